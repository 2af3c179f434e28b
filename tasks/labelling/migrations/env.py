"""What alembic runs: the migrations, on the connection and in the transaction that database.py gives."""

from __future__ import annotations

from alembic import context

from tasks.labelling.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
context.run_migrations()
