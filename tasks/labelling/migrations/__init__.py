"""Alembic revisions of the labelling database; `database.migrate` runs them."""
