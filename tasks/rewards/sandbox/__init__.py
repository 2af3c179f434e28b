"""Running programs of a policy against unit tests that they cannot see or influence (decision 10)."""
