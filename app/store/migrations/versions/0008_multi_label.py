"""Keep with each version whether an image may have several of its labels."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; in versions that are there, an image has one label."""
    op.add_column(
        "label_set_versions", sa.Column("multi_label", sa.Boolean(), nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    """Drop the column; in every version, an image has one label again."""
    op.drop_column("label_set_versions", "multi_label")
