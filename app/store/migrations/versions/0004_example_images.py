"""Make the tables for example images, their features, and what was chosen by trying it on them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NAME_TYPE = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
COUNTED_TYPE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables; label sets that are there have no examples, at revision 0."""
    op.add_column("label_sets", sa.Column("examples_revision", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("label_sets", sa.Column("deletions_revision", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "examples",
        sa.Column("id", COUNTED_TYPE, nullable=False),
        sa.Column("name", NAME_TYPE, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("classname", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["name"], ["label_sets.name"], name="fk_examples_name_label_sets"),
        sa.PrimaryKeyConstraint("id", name="pk_examples"),
        sa.UniqueConstraint("name", "digest", name="uq_examples_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_examples_name_classname_id", "examples", ["name", "classname", "id"])
    op.create_index("ix_examples_name_id", "examples", ["name", "id"])
    op.create_table(
        "example_features",
        sa.Column("example_id", COUNTED_TYPE, nullable=False, autoincrement=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("feature", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["examples.id"], name="fk_example_features_example_id_examples", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("example_id", "model", name="pk_example_features"),
    )
    op.create_table(
        "selections",
        sa.Column("name", NAME_TYPE, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("examples_revision", sa.Integer(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["label_sets.name"], name="fk_selections_name_label_sets"),
        sa.PrimaryKeyConstraint("name", "model", name="pk_selections"),
    )


def downgrade() -> None:
    """Drop example images, and what was made of them."""
    op.drop_table("selections")
    op.drop_table("example_features")
    op.drop_table("examples")
    op.drop_column("label_sets", "deletions_revision")
    op.drop_column("label_sets", "examples_revision")
