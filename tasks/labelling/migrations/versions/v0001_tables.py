"""Items, labellers and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    _items()
    _labellers()
    _events()


def _items() -> None:
    op.create_table(
        "items",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("response_a", sa.Text(), nullable=False),
        sa.Column("response_b", sa.Text(), nullable=False),
        sa.Column("policy_a", sa.String(64), nullable=False),
        sa.Column("policy_b", sa.String(64), nullable=False),
        sa.Column("gold", sa.String(8)),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("priority", sa.Float(), nullable=False),
        sa.Column("labels_wanted", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )


def _labellers() -> None:
    op.create_table(
        "labellers",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("password_hash", sa.String(256)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("token", sa.String(36), nullable=False, unique=True),
        sa.Column("item_id", sa.String(64), sa.ForeignKey("items.id"), nullable=False),
        sa.Column("labeller", sa.String(64), sa.ForeignKey("labellers.name"), nullable=False),
        sa.Column("after", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("choice", sa.String(8)),
        sa.Column("strength", sa.Integer()),
        sa.Column("rating_a", sa.Integer()),
        sa.Column("rating_b", sa.Integer()),
        sa.Column("comment", sa.Text()),
        sa.Column("swapped", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("item_id", "labeller", "after"),
        sa.CheckConstraint("kind in ('label', 'undo')"),
        sa.CheckConstraint("(kind = 'label') = (choice is not null)"),
    )
    op.create_index("ix_events_item_id", "events", ["item_id"])
    op.create_index("ix_events_labeller", "events", ["labeller"])
