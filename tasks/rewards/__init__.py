"""Reward functions and reward models.

`composition` makes one number per response of them, and checks it. Nothing here samples responses or knows PPO.
"""
