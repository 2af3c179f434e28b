"""Running programs of a policy against unit tests that they cannot see or influence.

Two processes: one runs the program, the other runs the tests and alone writes the verdict (decision 10). A change here
must keep tests/unit/rewards/test_sandbox_attacks.py at zero successes.
"""
