"""Count the attempts of jobs, take namespaces in turn, and store confusion matrices without their zeros."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

NAME_TYPE = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
JOBS = sa.table(
    "jobs",
    sa.column("id", sa.Text()),
    sa.column("kind", sa.Text()),
    sa.column("subject", sa.Text()),
    sa.column("namespace", sa.Text()),
    sa.column("status", sa.Text()),
    sa.column("result", sa.JSON()),
)
MAX_CLASS_ROWS = 1000
MAX_CONFUSIONS = 500


def upgrade() -> None:
    """Add the columns, and convert the stored results of evaluations, which took megabytes."""
    op.add_column("jobs", sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("namespace", NAME_TYPE, nullable=False, server_default=sa.text("''")))
    op.add_column("jobs", sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_kind_namespace_started_at", "jobs", ["kind", "namespace", "started_at"])
    connection = op.get_bind()
    owned = sa.select(JOBS.c.subject).where(JOBS.c.subject.contains("#")).distinct()
    for subject in connection.scalars(owned).all():
        namespace = subject.partition("#")[0]
        connection.execute(sa.update(JOBS).where(JOBS.c.subject == subject).values(namespace=namespace))
    evaluations = sa.select(JOBS.c.id).where(JOBS.c.kind == "evaluate", JOBS.c.status == "succeeded")
    for job_id in connection.scalars(evaluations).all():  # one result at a time, because it may take 100 MB
        result: Any = connection.scalar(sa.select(JOBS.c.result).where(JOBS.c.id == job_id))
        for method in result["methods"]:
            method["evaluation"] |= _bounded(method["evaluation"])
        connection.execute(sa.update(JOBS).where(JOBS.c.id == job_id).values(result=result))


def downgrade() -> None:
    """Drop the columns; the results of evaluations stay as they are."""
    op.drop_index("ix_jobs_kind_namespace_started_at", "jobs")
    op.drop_column("jobs", "started_at")
    op.drop_column("jobs", "namespace")
    op.drop_column("jobs", "attempts")


def _bounded(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an evaluation about its classes, as this revision stores them."""
    if "confusion_count" in evaluation:  # converted before a downgrade
        return {}
    rows = evaluation["classes"]
    cells = [
        {"label": rows[true]["name"], "predicted": rows[predicted]["name"], "count": count}
        for true, counts in enumerate(evaluation["confusion"])
        for predicted, count in enumerate(counts)
        if count
    ]
    cells.sort(key=lambda cell: -cell["count"])
    occurring = [row for row in rows if row["support"] + row["predicted"]]
    largest = sorted(occurring, key=lambda row: (-row["support"], -row["predicted"]))[:MAX_CLASS_ROWS]
    names = {row["name"] for row in largest}
    return {
        "classes": [row for row in occurring if row["name"] in names],
        "class_count": len(occurring),
        "confusion": cells[:MAX_CONFUSIONS],
        "confusion_count": len(cells),
    }
