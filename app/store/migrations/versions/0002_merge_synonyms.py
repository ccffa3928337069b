"""Keep with each version how its synonyms are merged."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; versions that are there have the default."""
    op.add_column("label_set_versions", sa.Column("merge_synonyms", sa.Text(), nullable=False, server_default="mean"))


def downgrade() -> None:
    """Drop the column; every version has the default again."""
    op.drop_column("label_set_versions", "merge_synonyms")
