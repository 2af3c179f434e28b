"""Evaluation of policies: win rates, judges, reward-hacking findings and the report."""
