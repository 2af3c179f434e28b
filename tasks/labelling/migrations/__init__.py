"""Migrations of the labelling database, run by Alembic in the order of their numbers."""
