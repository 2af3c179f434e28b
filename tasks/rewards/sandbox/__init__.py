"""Sandbox for untrusted programs of a policy, run against tests that they never see."""
