"""Foundations of all stages: errors, paths, row types, text statistics, tracking, distributed training."""
