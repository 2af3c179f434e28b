"""Environments of multi-turn rollouts; `base` defines the interface and the text format of conversations."""
