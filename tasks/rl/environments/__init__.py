"""Environments of multi-turn rollouts: `base` defines the interface, `ENVIRONMENTS` lists the kinds."""
