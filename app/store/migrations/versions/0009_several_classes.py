"""Let an example image have several classes."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

ID_TYPE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the table of the classes after the first."""
    op.create_table(
        "example_further_classes",
        sa.Column("example_id", ID_TYPE, autoincrement=False, nullable=False),
        sa.Column("classname", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"],
            ["examples.id"],
            name="fk_example_further_classes_example_id_examples",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("example_id", "classname", name="pk_example_further_classes"),
    )
    op.create_index("ix_example_further_classes_classname", "example_further_classes", ["classname"])


def downgrade() -> None:
    """Drop the table; each image keeps its first class."""
    op.drop_index("ix_example_further_classes_classname", "example_further_classes")
    op.drop_table("example_further_classes")
