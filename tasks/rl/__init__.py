"""PPO and GRPO for language models: tensor functions, sampling and the trainer.

docs/ppo.md has the conventions, and the source of each detail. The mathematics (masking, kl, advantages, losses,
hacking) imports torch alone and is covered by `make mutants`; `trainer` has the loop.
"""
