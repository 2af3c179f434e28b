"""Prefect flows over the stages of dvc.yaml, and the `rlhf` command.

This package decides order, time, retries and processes, and prints to the terminal. It has no tensors and no loops over
batches. `flows/cli/` parses arguments and calls one function each; stages stay in `tasks/`.
"""
