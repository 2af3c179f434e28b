"""What a policy talks with: see `dialogue` for the interface, `kinds` for those that params.yaml can name."""
