"""Errors, paths, row types, text statistics, distributed helpers and the tracking interface.

Every package imports from here, and nothing here imports from them. A change here runs nearly all stages again.
Put a function here only if two packages need it.
"""
