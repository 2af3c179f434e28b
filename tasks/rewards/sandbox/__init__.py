"""Running programs that a policy wrote, which may do anything to look right, against tests that they never see."""
