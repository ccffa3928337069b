"""The tables, and the column types with which both databases return the stored values unchanged.

A label set is one row in ``label_sets`` and one row per version in ``label_set_versions``. Version rows are never
updated. Deleting a label set deletes its versions and keeps the first row, so that a version number is never used
twice, and ``pets@3`` never changes its meaning.

The unchanged answer of a language model to a question is one row in ``answers``; each draft from it is one row in
``drafts``. Both are deleted with the label set. A job is one row in ``jobs``; the process that runs it holds a lease.

An example image is one row in ``examples``, one per model in ``example_features``, and one per class after the first
in ``example_further_classes``. ``label_sets`` counts the changes
to a label set's examples, and continues to count when the label set is deleted and created again, so that a classifier
is never used for other examples than those it was fitted on. The method selection of a label set and a model is one row
in ``selections``.

All tables store qualified names, such as ``acme#pets`` (``Namespace``).
"""

from datetime import UTC, datetime
from typing import Any, TypeAlias

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from app.types import ClassEntry

SCHEMA_VERSION_TABLE = "deixis_schema"
"""Alembic's table of the revision. Its default name could clash in a shared PostgreSQL database."""

NAME_TYPE = Text().with_variant(Text(collation="C"), "postgresql")
"""Names are sorted by code point on both databases, independently of the server's locale."""

COUNTED_TYPE = BigInteger().with_variant(Integer, "sqlite")
"""Ids that the database assigns. SQLite assigns them only in an INTEGER column, which has 64 bits there."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, also on SQLite, which does not store time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - SQLAlchemy's
        """Convert to UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - SQLAlchemy's
        """Add the time zone UTC, or convert from the time zone of the PostgreSQL session."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


_Json: TypeAlias = list[dict[str, Any]]


class ClassEntriesJson(TypeDecorator[tuple[ClassEntry, ...]]):
    """Class entries as a JSON array of objects, without empty fields."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[ClassEntry, ...] | None, dialect: Dialect) -> _Json | None:  # noqa: ARG002 - SQLAlchemy's
        """Convert to JSON."""
        return None if value is None else [_entry_to_json(entry) for entry in value]

    def process_result_value(self, value: _Json | None, dialect: Dialect) -> tuple[ClassEntry, ...] | None:  # noqa: ARG002 - SQLAlchemy's
        """Convert from JSON."""
        return None if value is None else tuple(_entry_from_json(entry) for entry in value)


def _entry_to_json(entry: ClassEntry) -> dict[str, Any]:
    others = {
        "descriptions": list(entry.descriptions),
        "synonyms": list(entry.synonyms),
        "features": list(entry.features),
        "prompt": entry.prompt,
        "prior": entry.prior,
        "parent": entry.parent,
    }
    threshold = {} if entry.threshold is None else {"threshold": entry.threshold}
    return {"name": entry.name} | {key: value for key, value in others.items() if value} | threshold


def _entry_from_json(entry: dict[str, Any]) -> ClassEntry:
    descriptions, synonyms, features = (tuple(entry.get(key, ())) for key in ("descriptions", "synonyms", "features"))
    return ClassEntry(
        entry["name"],
        descriptions,
        synonyms,
        features,
        entry.get("prompt"),
        entry.get("threshold"),
        entry.get("prior"),
        entry.get("parent"),
    )


class Base(DeclarativeBase):
    """The base class of the tables; the migrations must produce its metadata."""

    # Named constraints can be dropped by a later migration on either database.
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class LabelSetRow(Base):
    """A name that is or was in use, and its last version number."""

    __tablename__ = "label_sets"

    name: Mapped[str] = mapped_column(NAME_TYPE, primary_key=True)
    last_version: Mapped[int] = mapped_column(Integer)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    examples_revision: Mapped[int] = mapped_column(Integer, server_default="0")
    deletions_revision: Mapped[int] = mapped_column(Integer, server_default="0")


class LabelSetVersionRow(Base):
    """One version of a label set; never updated."""

    __tablename__ = "label_set_versions"

    name: Mapped[str] = mapped_column(NAME_TYPE, ForeignKey(LabelSetRow.name), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    classes: Mapped[tuple[ClassEntry, ...]] = mapped_column(ClassEntriesJson)
    templates: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    merge_synonyms: Mapped[str] = mapped_column(Text, server_default="mean")
    multi_label: Mapped[bool] = mapped_column(Boolean, server_default=false())


class AnswerRow(Base):
    """A language model's answer to one question about one class; never updated."""

    __tablename__ = "answers"

    name: Mapped[str] = mapped_column(NAME_TYPE, ForeignKey(LabelSetRow.name), primary_key=True)
    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    question: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    texts: Mapped[list[str]] = mapped_column(JSON)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    asked_at: Mapped[datetime] = mapped_column(UtcDateTime)


class DraftRow(Base):
    """A description or a feature from an answer, and the decision about it."""

    __tablename__ = "drafts"
    __table_args__ = (ForeignKeyConstraint(["name", "digest"], [AnswerRow.name, AnswerRow.digest]),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(NAME_TYPE, index=True)
    digest: Mapped[str] = mapped_column(Text)
    classname: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    decided_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class JobRow(Base):
    """Work that outlives its request; ``subject`` is the qualified name of a label set or a caption database.

    Until ``lease_until``, ``owner`` counts as alive; then another process may take over the job. ``attempts`` counts
    the processes that began it and did not hand it back. ``namespace`` is that of the subject.
    """

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_kind_namespace_started_at", "kind", "namespace", "started_at"),)

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    subject: Mapped[str] = mapped_column(NAME_TYPE)
    status: Mapped[str] = mapped_column(Text)
    request: Mapped[dict[str, Any]] = mapped_column(JSON, deferred=True)
    attachment: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)
    done: Mapped[int] = mapped_column(Integer)
    total: Mapped[int] = mapped_column(Integer)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), deferred=True)
    error: Mapped[str | None] = mapped_column(Text)
    owner: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    namespace: Mapped[str] = mapped_column(NAME_TYPE, server_default=text("''"))
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ExampleRow(Base):
    """An example image of a label set; without a class it belongs to the unlabelled pool.

    ``classname`` is its class, or the first of its classes.

    ``digest`` is the SHA-256 of the file. ``content`` is the file, if it is stored.
    """

    __tablename__ = "examples"
    __table_args__ = (
        UniqueConstraint("name", "digest"),
        Index("ix_examples_name_classname_id", "name", "classname", "id"),
        Index("ix_examples_name_id", "name", "id"),
        {"sqlite_autoincrement": True},  # the id of a deleted image is never used again
    )

    id: Mapped[int] = mapped_column(COUNTED_TYPE, primary_key=True)
    name: Mapped[str] = mapped_column(NAME_TYPE, ForeignKey(LabelSetRow.name))
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    classname: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    content: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)


class ExampleFurtherClassRow(Base):
    """A class of an example image that has several; the first one is in ``examples``.

    So an image of one class takes no row here, and lists by class find both with an index.
    """

    __tablename__ = "example_further_classes"
    __table_args__ = (Index("ix_example_further_classes_classname", "classname"),)

    example_id: Mapped[int] = mapped_column(
        COUNTED_TYPE, ForeignKey(ExampleRow.id, ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    classname: Mapped[str] = mapped_column(Text, primary_key=True)


class ExampleFeatureRow(Base):
    """The features of an example by one image tower: float16, little endian, 2 * d bytes.

    ``model`` is the fingerprint of the tower, so features of two towers are never mixed.
    """

    __tablename__ = "example_features"

    example_id: Mapped[int] = mapped_column(
        COUNTED_TYPE, ForeignKey(ExampleRow.id, ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    model: Mapped[str] = mapped_column(Text, primary_key=True)
    feature: Mapped[bytes] = mapped_column(LargeBinary)


class ApiKeyRow(Base):
    """An API key, of which only the SHA-256 is stored; it has access to its ``namespace``."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    scope: Mapped[str] = mapped_column(Text)
    namespace: Mapped[str] = mapped_column(NAME_TYPE)
    note: Mapped[str] = mapped_column(Text)
    rate: Mapped[str | None] = mapped_column(Text)
    image_rate: Mapped[str | None] = mapped_column(Text)
    concurrency: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class SelectionRow(Base):
    """The method selection of a label set and a model, with the version and the revision it is based on."""

    __tablename__ = "selections"

    name: Mapped[str] = mapped_column(NAME_TYPE, ForeignKey(LabelSetRow.name), primary_key=True)
    model: Mapped[str] = mapped_column(Text, primary_key=True)
    version: Mapped[int] = mapped_column(Integer)
    examples_revision: Mapped[int] = mapped_column(Integer)
    result: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
