"""The `rlhf` command: `main`, `models` and `labels` hold its commands, `console` what they print."""
