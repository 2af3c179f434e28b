"""Reward functions and reward models; `composition` makes one number per response of them."""
