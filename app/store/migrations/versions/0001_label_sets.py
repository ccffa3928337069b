"""Make the tables for label sets and their versions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME_TYPE = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables for label sets and their versions."""
    op.create_table(
        "label_sets",
        sa.Column("name", NAME_TYPE, nullable=False),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_label_sets"),
    )
    op.create_table(
        "label_set_versions",
        sa.Column("name", NAME_TYPE, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("classes", sa.JSON(), nullable=False),
        sa.Column("templates", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["label_sets.name"], name="fk_label_set_versions_name_label_sets"),
        sa.PrimaryKeyConstraint("name", "version", name="pk_label_set_versions"),
    )


def downgrade() -> None:
    """Drop everything."""
    op.drop_table("label_set_versions")
    op.drop_table("label_sets")
