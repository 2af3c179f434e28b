"""The database itself refuses to change or delete an event."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SQLITE = """
CREATE TRIGGER events_no_{name} BEFORE {name} ON events
BEGIN SELECT RAISE(ABORT, 'events are only ever added'); END
"""

POSTGRESQL_FUNCTION = """
CREATE FUNCTION events_only_added() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'events are only ever added'; END $$
"""

POSTGRESQL = """
CREATE TRIGGER events_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON events
FOR EACH STATEMENT EXECUTE FUNCTION events_only_added()
"""


def upgrade() -> None:
    """Make the triggers."""
    if op.get_bind().dialect.name == "sqlite":
        for name in ("update", "delete"):
            op.execute(SQLITE.format(name=name))
    else:
        op.execute(POSTGRESQL_FUNCTION)
        op.execute(POSTGRESQL)
