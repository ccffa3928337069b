"""Call what a job is about its subject: a label set, or a caption database."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Rename the column."""
    # Not Alembic's own way, which in SQLite copies the table with all its attachments.
    op.execute("ALTER TABLE jobs RENAME COLUMN label_set TO subject")


def downgrade() -> None:
    """Rename the column back."""
    op.execute("ALTER TABLE jobs RENAME COLUMN subject TO label_set")
