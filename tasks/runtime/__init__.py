"""Runs stages under DVC and records them in MLflow.

No stage imports this package before it runs itself: a change here makes no stage run again.
"""
