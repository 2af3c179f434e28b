"""Sources of rows, and how rows are cleaned, split, de-duplicated and paired.

A reader gives rows of one type of `tasks.core.rows`. A malformed row is quarantined with its reason, never dropped.
The split of a text follows from its hash; a change of the hash moves texts between train and test.
"""
