"""Label sets in the database, with optimistic locking of changes."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from enum import Enum
from operator import attrgetter
from typing import Final, Literal, TypeAlias

from cachetools import LRUCache
from sqlalchemy import ColumnElement, Integer, and_, delete, func, literal, not_, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.errors import ConflictError, InvalidFieldError, PreconditionFailedError, TooLargeError, UnknownNameError
from app.names.class_names import indices_of
from app.names.hierarchy import forest_of, without_class
from app.names.namespaces import NAMESPACE_SEPARATOR, OPEN_NAMESPACE, Namespace, namespace_of, own_name
from app.store.database import reading, scrub, writing
from app.store.tables import AnswerRow, DraftRow, ExampleRow, LabelSetRow, LabelSetVersionRow, SelectionRow
from app.types import ClassEntry, LabelSet, MergeSynonyms

_LARGEST_VERSION = 2**31 - 1
_CACHED_CHARS = 64 * 2**20


class AnyVersion(Enum):
    """The type of ``ANY``."""

    ANY = "*"


ANY: Final = AnyVersion.ANY
"""The precondition that the label set exists; its version does not matter."""

IfMatch: TypeAlias = Collection[int] | Literal[AnyVersion.ANY] | None
"""The versions that a change may replace; None is no condition."""


@dataclass(frozen=True, slots=True)
class LabelSetSettings:
    """Everything in a version except its classes."""

    templates: str
    merge_synonyms: str = MergeSynonyms.MEAN
    multi_label: bool = False


@dataclass(frozen=True, slots=True)
class LabelSetSummary:
    """The current version of a label set without its classes."""

    name: str
    version: int
    class_count: int
    created_at: datetime
    multi_label: bool = False


class LabelSetRepository:
    """Label sets by qualified name; every write makes a new version, and a version never changes.

    The caller has cleaned names and classes (``app.names``).
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # A version never changes and its number is never used again, so only its existence must be checked.
        self._versions: LRUCache[tuple[str, int], LabelSet] = LRUCache(_CACHED_CHARS, getsizeof=_size)

    async def get(self, name: str, version: int | None = None) -> LabelSet:
        """Return one version, or the latest one.

        Raises:
            UnknownNameError: there is no such label set, or no such version of it.
        """
        async with reading(self._engine) as session:
            if not is_storable(name):
                raise await unknown_label_set(session, name)
            # No version has the number 0, so it replaces the numbers that do not fit into the column.
            wanted = literal(version if 0 < version <= _LARGEST_VERSION else 0) if version is not None else None
            statement = (
                select(LabelSetRow, LabelSetVersionRow.version)
                .outerjoin(
                    LabelSetVersionRow,
                    and_(
                        LabelSetVersionRow.name == LabelSetRow.name,
                        LabelSetVersionRow.version == (LabelSetRow.last_version if wanted is None else wanted),
                    ),
                )
                .where(LabelSetRow.name == name, LabelSetRow.deleted_at.is_(None))
            )
            found = (await session.execute(statement)).one_or_none()
            if found is None:
                raise await unknown_label_set(session, name)
            label_set, found_version = found
            if found_version is None:
                raise await _unknown_version(session, label_set, version)
            cached = self._versions.get((name, found_version))
            if cached is None:
                row = await session.get(LabelSetVersionRow, (name, found_version))
                if row is None:  # deleted between the two statements
                    raise await unknown_label_set(session, name)
                cached = _to_label_set(row)
                if _size(cached) <= self._versions.maxsize:
                    self._versions[name, found_version] = cached
            if cached.examples_revision == label_set.examples_revision:
                return cached
            revisions = label_set.examples_revision, label_set.deletions_revision
            if not any(revisions):
                return cached
            return replace(cached, examples_revision=revisions[0], deletions_revision=revisions[1])

    async def list(
        self, limit: int, after: str | None = None, namespace: Namespace | None = None
    ) -> Sequence[LabelSetSummary]:
        """Return at most ``limit`` summaries after the name ``after``, sorted by code point.

        ``namespace`` limits them to one namespace.
        """
        statement = (
            select(
                LabelSetVersionRow.name,
                LabelSetVersionRow.version,
                func.json_array_length(LabelSetVersionRow.classes, type_=Integer),
                LabelSetVersionRow.created_at,
                LabelSetVersionRow.multi_label,
            )
            .join(
                LabelSetRow,
                and_(
                    LabelSetRow.name == LabelSetVersionRow.name, LabelSetRow.last_version == LabelSetVersionRow.version
                ),
            )
            .where(LabelSetRow.deleted_at.is_(None))
            .order_by(LabelSetRow.name)
            .limit(limit)
        )
        if namespace is not None:
            statement = statement.where(belongs_to(LabelSetRow.name, namespace))
        if after is not None:
            if not is_storable(after):
                raise InvalidFieldError.of(
                    "after", f"{after!a} cannot be a name; give the last name of the page before"
                )
            statement = statement.where(LabelSetRow.name > after)
        async with reading(self._engine) as session:
            return [LabelSetSummary(*row) for row in await session.execute(statement)]

    async def put(
        self,
        name: str,
        classes: Sequence[ClassEntry],
        templates: str,
        *,
        merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN,
        multi_label: bool = False,
        if_match: IfMatch = None,
        if_none_match_any: bool = False,
        max_label_sets: int | None = None,
    ) -> tuple[LabelSet, bool]:
        """Write a new version; also return whether the label set is new.

        Raises:
            TooLargeError: its namespace has ``max_label_sets`` label sets already.
            PreconditionFailedError: the current version is not in ``if_match``, or there is one although
                ``if_none_match_any`` says that there must be none.
        """
        async with writing(self._engine) as session:
            row = await _lock_or_reserve(session, name)
            created = row.deleted_at is not None
            if created:
                if if_match is not None:
                    problem = f"If-Match is given, but there is no label set '{name}'"
                    raise PreconditionFailedError(f"{problem}; leave If-Match out to make it")
                if max_label_sets is not None:
                    await _require_room(session, namespace_of(name), max_label_sets)
                row.deleted_at = None
            else:
                if if_none_match_any:
                    problem = f"the label set '{name}' exists already, at version {row.last_version}"
                    raise PreconditionFailedError(f"{problem}; leave If-None-Match out to write the next version")
                _require_match(row, if_match)
            settings = LabelSetSettings(templates, merge_synonyms, multi_label)
            written = append_version(session, row, tuple(classes), settings)
            if not created:
                await _keep_selections(session, written)
            return written, created

    async def add_classes(
        self,
        name: str,
        classes: Sequence[ClassEntry],
        *,
        if_match: IfMatch = None,
        max_classes: int | None = None,
    ) -> LabelSet:
        """Write a new version with ``classes`` added after those of the current one.

        Raises:
            UnknownNameError: there is no such label set.
            PreconditionFailedError: the current version is not in ``if_match``.
            ConflictError: the label set has one of the classes already, ignoring letter case.
            TooLargeError: the label set would have more than ``max_classes`` classes.
            InvalidFieldError: some classes have a prior, and others have none, or the parents form no forest.
        """
        async with writing(self._engine) as session:
            row, current = await lock_current(session, name, if_match)
            present = {entry.name.lower(): entry.name for entry in current.classes}
            if taken := [present[entry.name.lower()] for entry in classes if entry.name.lower() in present]:
                listed = ", ".join(f"'{name}'" for name in taken)
                problem = f"the label set '{name}' has these classes already: {listed}"
                raise ConflictError(f"{problem}; leave them out, or replace the whole label set to change them")
            merged = (*current.classes, *classes)
            if len({entry.prior is None for entry in merged}) > 1:
                has = "has priors" if current.classes[0].prior is not None else "has no priors"
                problem = f"the label set '{own_name(name)}' {has}, and either all classes have one or none"
                raise InvalidFieldError.of("priors", f"{problem}; write the whole label set to change that")
            if max_classes is not None and len(merged) > max_classes:
                problem = f"the label set '{name}' would have {len(merged)} classes, at most {max_classes} are allowed"
                raise TooLargeError(f"{problem}; add fewer, or raise DEIXIS_MAX_CLASSES")
            forest_of(merged, known=len(current.classes))
            return append_version(session, row, merged, settings_of(current))

    async def remove_class(self, name: str, classname: str, *, if_match: IfMatch = None) -> LabelSet:
        """Write a new version without one class.

        Raises:
            UnknownNameError: there is no such label set, or no such class in it.
            PreconditionFailedError: the current version is not in ``if_match``.
            ConflictError: it is the only class, or the parents of the others form no forest without it.
        """
        async with writing(self._engine) as session:
            row, current = await lock_current(session, name, if_match)
            remaining = without_class(current.classes, classname)
            if len(remaining) == len(current.classes):
                raise UnknownNameError("class", escape_surrogates(classname), (entry.name for entry in current.classes))
            if not remaining:
                problem = f"'{classname}' is the only class of the label set '{name}', which must have one"
                raise ConflictError(f"{problem}; add another first, or delete the label set")
            try:
                forest_of(remaining)
            except InvalidFieldError as error:  # a name with the separator of paths was a class, and is a path now
                problem = f"without the class '{classname}', {error.problems[0].problem}"
                raise ConflictError(f"{problem}; change the parents first") from error
            return append_version(session, row, remaining, settings_of(current))

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, if_match: IfMatch = None
    ) -> LabelSet:
        """Write a new version with other thresholds of some classes; None removes one.

        Raises:
            UnknownNameError: there is no such label set, or no such class in it.
            InvalidFieldError: two names are those of one class.
            PreconditionFailedError: the current version is not in ``if_match``.
        """
        async with writing(self._engine) as session:
            row, current = await lock_current(session, name, if_match)
            classes = list(current.classes)
            changed = indices_of(list(thresholds), [entry.name for entry in classes])
            if repeated := [classes[index].name for index, number in Counter(changed).items() if number > 1]:
                problem = f"'{repeated[0]}' is given twice; remove one of them"
                raise InvalidFieldError.of(f"thresholds.{repeated[0]}", problem)
            for index, threshold in zip(changed, thresholds.values(), strict=True):
                classes[index] = replace(classes[index], threshold=threshold)
            written = append_version(session, row, tuple(classes), settings_of(current))
            await _keep_selections(session, written)
            return written

    async def delete(self, name: str, *, if_match: IfMatch = None) -> None:
        """Delete all versions, examples, drafts and selections permanently; version numbers are not used again.

        Raises:
            UnknownNameError: there is no such label set.
            PreconditionFailedError: the current version is not in ``if_match``.
        """
        async with writing(self._engine) as session:
            row = await _lock(session, name, if_match)
            for table in (LabelSetVersionRow, DraftRow, AnswerRow, SelectionRow):
                await session.execute(delete(table).where(table.name == name))
            with_examples = await delete_examples(session, ExampleRow.name == name) > 0
            if with_examples:
                row.examples_revision += 1
                row.deletions_revision = row.examples_revision
            row.deleted_at = datetime.now(UTC)
        if with_examples:
            await scrub(self._engine)


async def _require_room(session: AsyncSession, namespace: Namespace, most: int) -> None:
    there = await session.scalar(
        select(func.count())
        .select_from(LabelSetRow)
        .where(LabelSetRow.deleted_at.is_(None), belongs_to(LabelSetRow.name, namespace))
    )
    if there is not None and there >= most:
        raise TooLargeError(f"there are {there:,} label sets, the limit of a namespace is {most:,}; delete some first")


async def _lock_or_reserve(session: AsyncSession, name: str) -> LabelSetRow:
    """Return the locked row of a name; for a new name, a row that counts as deleted is inserted."""
    now = datetime.now(UTC)
    if session.get_bind().dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as insert_into  # noqa: PLC0415 - only this dialect
    else:
        from sqlalchemy.dialects.sqlite import insert as insert_into  # type: ignore[assignment]  # noqa: PLC0415
    reserved = insert_into(LabelSetRow).values(name=name, last_version=0, created_at=now, deleted_at=now)
    await session.execute(reserved.on_conflict_do_nothing())
    return await session.get_one(LabelSetRow, name, with_for_update=True)


async def _lock(session: AsyncSession, name: str, if_match: IfMatch) -> LabelSetRow:
    row = await session.get(LabelSetRow, name, with_for_update=True) if is_storable(name) else None
    if row is None or row.deleted_at is not None:
        raise await unknown_label_set(session, name)
    _require_match(row, if_match)
    return row


async def lock_current(session: AsyncSession, name: str, if_match: IfMatch) -> tuple[LabelSetRow, LabelSetVersionRow]:
    """Return the label set, locked until the transaction ends, and its current version.

    Raises:
        UnknownNameError: there is no such label set.
        PreconditionFailedError: the current version is not in ``if_match``.
    """
    row = await _lock(session, name, if_match)
    return row, await session.get_one(LabelSetVersionRow, (name, row.last_version))


async def delete_examples(session: AsyncSession, *chosen: ColumnElement[bool]) -> int:
    """Delete the examples that meet all conditions, and their features; return the number of examples.

    The caller locks the label set, raises the revision, and calls ``scrub`` afterwards.
    """
    connection = await session.connection()  # past the session, which would first ask which rows they are
    return (await connection.execute(delete(ExampleRow).where(*chosen))).rowcount


async def _keep_selections(session: AsyncSession, written: LabelSet) -> None:
    """Let the selections of the version before count for the one that was written, if they would be the same."""
    of_previous = SelectionRow.name == written.name, SelectionRow.version == written.version - 1
    if await session.scalar(select(SelectionRow.name).where(*of_previous).limit(1)) is None:
        return
    previous = await session.get_one(LabelSetVersionRow, (written.name, written.version - 1))
    if is_compared_alike(previous, written):
        await session.execute(update(SelectionRow).where(*of_previous).values(version=written.version))


_compared_fields = attrgetter(*(field.name for field in fields(ClassEntry) if field.name not in {"threshold", "prior"}))


def is_compared_alike(one: LabelSetVersionRow, other: LabelSetVersionRow | LabelSet) -> bool:
    """Return whether two versions have the same selections.

    Methods are compared, and scores calibrated, without thresholds and priors.
    """
    return (
        one.templates == other.templates
        and one.merge_synonyms == other.merge_synonyms
        and list(map(_compared_fields, one.classes)) == list(map(_compared_fields, other.classes))
    )


def settings_of(row: LabelSetVersionRow) -> LabelSetSettings:
    """Return the settings of a version, to write the next one with them."""
    return LabelSetSettings(row.templates, row.merge_synonyms, row.multi_label)


def append_version(
    session: AsyncSession, row: LabelSetRow, classes: tuple[ClassEntry, ...], settings: LabelSetSettings
) -> LabelSet:
    """Write the next version of a locked label set, and return it."""
    row.last_version += 1
    version = LabelSetVersionRow(
        name=row.name,
        version=row.last_version,
        classes=classes,
        templates=settings.templates,
        created_at=datetime.now(UTC),
        merge_synonyms=settings.merge_synonyms,
        multi_label=settings.multi_label,
    )
    session.add(version)
    return replace(
        _to_label_set(version), examples_revision=row.examples_revision, deletions_revision=row.deletions_revision
    )


def _size(label_set: LabelSet) -> int:
    """Return the approximate size: the characters, and a constant for each object."""
    return sum(
        100 + len(entry.name) + sum(60 + len(text) for text in (*entry.descriptions, *entry.features, *entry.synonyms))
        for entry in label_set.classes
    )


def _to_label_set(row: LabelSetVersionRow) -> LabelSet:
    return LabelSet(
        row.name,
        row.version,
        row.classes,
        row.templates,
        row.created_at,
        MergeSynonyms(row.merge_synonyms),
        multi_label=row.multi_label,
    )


def _require_match(row: LabelSetRow, if_match: IfMatch) -> None:
    if if_match is None or if_match is ANY or row.last_version in if_match:
        return
    named = ", ".join(str(version) for version in sorted(if_match)) or "none"
    problem = f"the label set '{row.name}' is at version {row.last_version}, but If-Match names {named}"
    raise PreconditionFailedError(f"{problem}; get the current version and make the change on that")


async def unknown_label_set(session: AsyncSession, name: str) -> UnknownNameError:
    """Return the error for an unknown label set, which lists the known ones of its namespace."""
    namespace = namespace_of(name)
    known = await session.scalars(
        select(LabelSetRow.name).where(LabelSetRow.deleted_at.is_(None), belongs_to(LabelSetRow.name, namespace))
    )
    return UnknownNameError("label set", escape_surrogates(own_name(name)), map(own_name, known))


def belongs_to(name: InstrumentedAttribute[str], namespace: Namespace) -> ColumnElement[bool]:
    """Return the condition that a qualified name belongs to a namespace."""
    if namespace == OPEN_NAMESPACE:
        return not_(name.contains(NAMESPACE_SEPARATOR))
    # All names with this prefix, as a range of code points that an index can use.
    first, behind = f"{namespace.name}{NAMESPACE_SEPARATOR}", f"{namespace.name}{chr(ord(NAMESPACE_SEPARATOR) + 1)}"
    return and_(name >= first, name < behind)


async def _unknown_version(session: AsyncSession, row: LabelSetRow, version: int | None) -> UnknownNameError:
    # Versions are only deleted all together, so the numbers have no gaps.
    first = await session.scalar(
        select(func.min(LabelSetVersionRow.version)).where(LabelSetVersionRow.name == row.name)
    )
    known = f"{first} to {row.last_version}" if first != row.last_version else f"{first}"
    return UnknownNameError("label set version", f"{row.name}@{version}", [known])


def is_storable(text: str) -> bool:
    """Return whether both databases can store the text: neither stores lone surrogates, and PostgreSQL no NUL."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def escape_surrogates(text: str) -> str:
    """Return a name as an error can show it, with lone surrogates escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
