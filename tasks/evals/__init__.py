"""Comparison of the policies with SFT, judges, the gate, and the report.

Judges here are never seen by training. Every figure has an interval, and the seed fixes it.
A new column of the table goes to `compare` and `report_text`.
"""
