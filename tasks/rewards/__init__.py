"""Reward functions and reward models.

`composition` makes one number per response of rules, reward models and environments. Scores are checked for finiteness
there. Nothing here samples responses or knows PPO.
"""
