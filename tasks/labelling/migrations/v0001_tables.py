"""Create the tables, and triggers by which the database itself refuses to change or delete an event."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SQLITE_TRIGGER = """
CREATE TRIGGER events_no_{name} BEFORE {name} ON events
BEGIN SELECT RAISE(ABORT, 'events are only ever added'); END
"""

POSTGRESQL_FUNCTION = """
CREATE FUNCTION events_only_added() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'events are only ever added'; END $$
"""

POSTGRESQL_TRIGGER = """
CREATE TRIGGER events_only_added BEFORE UPDATE OR DELETE OR TRUNCATE ON events
FOR EACH STATEMENT EXECUTE FUNCTION events_only_added()
"""


def upgrade() -> None:
    """Create everything in an empty database."""
    op.create_table(
        "questions",
        sa.Column("id", sa.String(64), primary_key=True),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("prompt", "response_a", "response_b")),
        sa.Column("policy_a", sa.String(64), nullable=False),
        sa.Column("policy_b", sa.String(64), nullable=False),
        sa.Column("gold", sa.String(8)),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("priority", sa.Float(), nullable=False),
        sa.Column("labels_wanted", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "labellers",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("password_hash", sa.String(256)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("event_id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("token", sa.String(36), nullable=False, unique=True),
        sa.Column("question_id", sa.String(64), sa.ForeignKey("questions.id"), nullable=False, index=True),
        sa.Column("labeller", sa.String(64), sa.ForeignKey("labellers.name"), nullable=False, index=True),
        sa.Column("previous_event", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("choice", sa.String(8)),
        *(sa.Column(name, sa.Integer()) for name in ("strength", "rating_a", "rating_b")),
        sa.Column("comment", sa.Text()),
        sa.Column("swapped", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("question_id", "labeller", "previous_event"),
        sa.CheckConstraint("kind in ('label', 'undo')"),
        sa.CheckConstraint("(kind = 'label') = (choice is not null)"),
    )
    if op.get_bind().dialect.name == "sqlite":
        for name in ("update", "delete"):
            op.execute(SQLITE_TRIGGER.format(name=name))
    else:
        op.execute(POSTGRESQL_FUNCTION)
        op.execute(POSTGRESQL_TRIGGER)
