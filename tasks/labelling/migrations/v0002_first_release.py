"""The tables of the first release, which `tasks.labelling.database.migrate` creates in an empty database."""

revision = "0002"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing comes before it."""
