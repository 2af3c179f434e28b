"""Running programs of a policy against unit tests that they cannot see or influence.

One process runs the program, another runs the tests and alone writes the result (decision 10).
"""
