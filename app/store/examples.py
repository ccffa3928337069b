"""Example images of label sets in the database: their features, their classes, and the method selections.

Every change to the examples of a label set raises its revision in the same transaction. Classifiers and selections are
stored with the revision, so outdated ones are recognised. Writers of one label set wait for each other.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from sqlalchemy import BindParameter, ColumnElement, and_, bindparam, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.errors import ConflictError, StoreError, TooLargeError, UnknownNameError
from app.store.database import reading, reading_one_moment, scrub, writing
from app.store.label_sets import (
    delete_examples,
    escape_surrogates,
    is_compared_alike,
    is_storable,
    lock_current,
    unknown_label_set,
)
from app.store.tables import (
    ExampleFeatureRow,
    ExampleFurtherClassRow,
    ExampleRow,
    LabelSetRow,
    LabelSetVersionRow,
    SelectionRow,
)

# Databases limit the number of parameters of a statement.
_PER_STATEMENT = 10_000

_FEATURES_PER_PAGE = 5_000
_LARGEST_ID = 2**63 - 1
_UNLABELLED, _LEFT_OUT = -1, -2

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class NewExample:
    """A new example image: the SHA-256 of its file, its classes if it has any, and its unit features (d,) by model.

    ``content`` is the file, if it should be stored.
    """

    digest: bytes
    classnames: tuple[str, ...]
    features: Mapping[str, Float[np.ndarray, " d"]]
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Added:
    """The result of adding images; ``ids`` are in the order of the images.

    ``duplicates`` are images that were stored already and did not change, or were repeated in the same call.
    """

    added: int
    relabelled: int
    duplicates: int
    revision: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Deleted:
    """The number of deleted examples, and the revision after the deletion."""

    deleted: int
    revision: int


@dataclass(frozen=True, slots=True)
class Example:
    """An example image; ``models`` are those with features of it, and ``kept`` says whether its file is stored.

    ``classnames`` is empty for an unlabelled image. Of several, the first given comes first; the others are sorted.
    """

    id: int
    digest: str
    classnames: tuple[str, ...]
    created_at: datetime
    models: tuple[str, ...]
    kept: bool


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """The number of examples of a label set by class, also of classes that its current version does not have.

    An example with several classes counts for each of them; ``labelled_images`` counts it once, and
    ``several_classes`` is the number of such examples.
    ``without_features`` is the number of examples without features of the requested model.
    """

    revision: int
    labelled: Mapping[str, int]
    labelled_images: int
    several_classes: int
    unlabelled: int
    without_features: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredFeatures:
    """The stored features of one model in the order of the ids; each label is the index of a class.

    Examples with several classes are not among them.
    """

    support_features: Float32[np.ndarray, "s d"]
    support_labels: Int64[np.ndarray, " s"]
    pool_features: Float32[np.ndarray, "u d"]
    revision: int


@dataclass(frozen=True, slots=True, eq=False)
class LabelledFeatures:
    """The stored features of one model of all examples with classes, and which of the classes each has."""

    features: Float32[np.ndarray, "n d"]
    is_label: Bool[np.ndarray, "n c"]
    revision: int


class ExampleRepository:
    """Example images by label set.

    Every method raises UnknownNameError if there is no such label set.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def add(self, name: str, items: Sequence[NewExample], *, max_examples: int | None = None) -> Added:
        """Store new images, and add the missing class, features and file of images that are stored already.

        A stored image takes the classes that are given with it instead of its own; if none are given, it keeps its own.
        If an image is given twice in one call, the first one counts.

        Raises:
            UnknownNameError: there is no such label set, or no such class in its current version.
            TooLargeError: there would be more than ``max_examples``.
            ConflictError: an image is given with neither features nor a file, because it was stored with them, and was
                deleted since.
        """
        firsts: dict[bytes, NewExample] = {}
        for item in items:
            firsts.setdefault(item.digest, item)
        features = await asyncio.to_thread(_stored_features, firsts.values())
        async with writing(self._engine) as session:
            row, current = await lock_current(session, name, None)
            _require_classes(items, [entry.name for entry in current.classes])
            connection = await session.connection()
            present = await _present(connection, name, list(firsts))
            new = [item for digest, item in firsts.items() if digest not in present]
            if deleted := sum(not item.features and item.content is None for item in new):
                raise ConflictError(
                    f"{deleted} of the {len(items)} images were deleted from '{name}' while they were uploaded, and"
                    " nothing was added; send them again"
                )
            await _require_room(connection, name, len(new), max_examples)
            ids = {digest: known.id for digest, known in present.items()} | await _insert(connection, name, new)
            relabelled = {
                known.id: firsts[digest].classnames
                for digest, known in present.items()
                if firsts[digest].classnames and set(firsts[digest].classnames) != set(known.classnames)
            }
            files = {
                known.id: firsts[digest].content
                for digest, known in present.items()
                if not known.kept and firsts[digest].content is not None
            }
            await _update(connection, "classname", {known: classnames[0] for known, classnames in relabelled.items()})
            await _set_further_classes(
                connection,
                {ids[item.digest]: item.classnames for item in new if len(item.classnames) > 1} | relabelled,
            )
            await _update(connection, "content", files)
            more = await _insert_features(
                connection, {(ids[digest], model): stored for (digest, model), stored in features.items()}
            )
            if new or relabelled or files or more:
                row.examples_revision += 1
            return Added(
                len(new),
                len(relabelled),
                len(items) - len(new) - len(relabelled),
                row.examples_revision,
                tuple(ids[item.digest] for item in items),
            )

    async def known(self, name: str, digests: Collection[bytes], models: Collection[str]) -> frozenset[bytes]:
        """Return the digests of the images that are stored with features of all ``models``."""
        featured = [_has_feature(model) for model in models]
        found: set[bytes] = set()
        async with reading(self._engine) as session:
            await _require(session, name)
            for some in _pieces(list(digests), _PER_STATEMENT):
                statement = select(ExampleRow.digest).where(
                    ExampleRow.name == name, ExampleRow.digest.in_(some), *featured
                )
                found.update(await session.scalars(statement))
        return frozenset(found)

    async def counts(self, name: str, model: str | None = None) -> ExampleCounts:
        """Return the numbers of examples, and of those without features of ``model`` (0 if it is None)."""
        counted = ExampleRow.id if model is None else ExampleFeatureRow.example_id
        statement = (
            select(ExampleRow.classname, func.count(ExampleRow.id), func.count(counted))
            .where(ExampleRow.name == name)
            .group_by(ExampleRow.classname)
        )
        if model is not None:
            statement = statement.outerjoin(ExampleFeatureRow, _features_of(model))
        further = (
            select(ExampleFurtherClassRow.classname, func.count())
            .join(ExampleRow, ExampleRow.id == ExampleFurtherClassRow.example_id)
            .where(ExampleRow.name == name)
            .group_by(ExampleFurtherClassRow.classname)
        )
        several = (
            select(func.count(ExampleFurtherClassRow.example_id.distinct()))
            .join(ExampleRow, ExampleRow.id == ExampleFurtherClassRow.example_id)
            .where(ExampleRow.name == name)
        )
        async with reading_one_moment(self._engine) as session:
            revision = await _require(session, name)
            rows = (await session.execute(statement)).all()
            labelled = Counter({classname: number for classname, number, _ in rows if classname is not None})
            labelled.update({classname: number for classname, number in await session.execute(further)})  # noqa: C416 - rows
            several_classes = await session.scalar(several) or 0
        return ExampleCounts(
            revision,
            dict(labelled),
            sum(number for classname, number, _ in rows if classname is not None),
            several_classes,
            sum(number for classname, number, _ in rows if classname is None),
            sum(number - featured for _, number, featured in rows),
        )

    async def revision(self, name: str) -> int:
        """Return the revision: the number of changes to the examples."""
        async with reading(self._engine) as session:
            return await _require(session, name)

    async def list(
        self, name: str, *, limit: int, after: int = 0, classname: str | None = None, unlabelled: bool = False
    ) -> Sequence[Example]:
        """Return at most ``limit`` examples with ids above ``after``, sorted by id.

        Args:
            name: of the label set.
            limit: the largest number of examples.
            after: 0 starts at the beginning.
            classname: return only examples that have this class.
            unlabelled: return only examples without a class.
        """
        conditions = [ExampleRow.id > min(after, _LARGEST_ID)]
        if unlabelled:
            conditions.append(ExampleRow.classname.is_(None))
        if classname is not None:
            conditions.append(_has_class(name, classname))
        async with reading_one_moment(self._engine) as session:
            await _require(session, name)
            if classname is not None and not is_storable(classname):
                return []
            return await _examples(session, name, limit, *conditions)

    async def get(self, name: str, example_id: int) -> Example:
        """Return one example.

        Raises:
            UnknownNameError: there is no such label set, or it has no such example.
        """
        async with reading_one_moment(self._engine) as session:
            await _require(session, name)
            for found in await _examples(session, name, 1, ExampleRow.id == _storable_id(example_id)):
                return found
            raise _unknown_example(name, example_id)

    async def content(self, name: str, example_id: int) -> bytes | None:
        """Return the file of an example; None if it is not stored.

        Raises:
            UnknownNameError: there is no such label set, or it has no such example.
        """
        statement = select(ExampleRow.content).where(ExampleRow.name == name, ExampleRow.id == _storable_id(example_id))
        async with reading(self._engine) as session:
            await _require(session, name)
            found = (await session.execute(statement)).one_or_none()
            if found is None:
                raise _unknown_example(name, example_id)
            return found[0]

    async def delete(
        self,
        name: str,
        *,
        ids: Collection[int] | None = None,
        classname: str | None = None,
        unlabelled: bool = False,
        everything: bool = False,
    ) -> Deleted:
        """Delete examples permanently, with their features and files; unknown ids are ignored.

        ``app.store.database.scrub`` describes what happens to their space on the disk.

        Args:
            name: of the label set.
            ids: those to delete.
            classname: or all that have this class.
            unlabelled: or all without a class.
            everything: or all.
        """
        assert [ids is not None, classname is not None, unlabelled, everything].count(True) == 1
        of_name = ExampleRow.name == name
        chosen: Sequence[tuple[ColumnElement[bool], ...]]
        if ids is not None:
            storable = sorted({_storable_id(example_id) for example_id in ids})
            chosen = [(of_name, ExampleRow.id.in_(some)) for some in _pieces(storable, _PER_STATEMENT)]
        elif classname is not None:
            chosen = [(of_name, _has_class(name, classname))] if is_storable(classname) else []
        else:
            chosen = [(of_name, ExampleRow.classname.is_(None))] if unlabelled else [(of_name,)]
        async with writing(self._engine) as session:
            row, _ = await lock_current(session, name, None)
            deleted = sum([await delete_examples(session, *conditions) for conditions in chosen])
            if deleted:
                row.examples_revision += 1
                row.deletions_revision = row.examples_revision
            left = Deleted(deleted, row.examples_revision)
        if deleted:
            await scrub(self._engine)
        return left

    async def features(
        self, name: str, model: str, classnames: Sequence[str], *, max_pool: int | None = None
    ) -> StoredFeatures:
        """Return the features of one model, in one consistent state.

        Examples without features of the model, those with several classes, and those of classes that are not in
        ``classnames``, are left out. If there are more than ``max_pool`` unlabelled examples, that many are taken,
        evenly spaced over the ids.
        """
        places: Mapping[str | None, int] = {None: _UNLABELLED} | {
            classname: place for place, classname in enumerate(classnames)
        }
        statement = (
            select(ExampleRow.id, ExampleRow.classname)
            .join(ExampleFeatureRow, _features_of(model))
            .where(ExampleRow.name == name)
        )
        several = (
            select(ExampleFurtherClassRow.example_id)
            .join(ExampleRow, ExampleRow.id == ExampleFurtherClassRow.example_id)
            .where(ExampleRow.name == name)
        )
        ids, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        async with reading_one_moment(self._engine) as session:
            revision = await _require(session, name)
            connection = await session.connection()
            async for rows in (await connection.stream(statement)).partitions(_FEATURES_PER_PAGE):
                some_ids, some_classnames = zip(*rows, strict=True)
                ids.append(np.array(some_ids, np.int64))
                labels.append(np.fromiter(map(places.get, some_classnames, repeat(_LEFT_OUT)), np.int64, len(rows)))
            left_out = np.array((await connection.scalars(several)).all(), np.int64)
            support, support_labels, pool = await asyncio.to_thread(
                _chosen, np.concatenate(ids), np.concatenate(labels), left_out, max_pool
            )
            support_features = await _load(connection, model, support)
            pool_features = await _load(connection, model, pool)
        width = max(support_features.shape[1], pool_features.shape[1])
        return StoredFeatures(
            support_features.reshape(len(support), width),
            support_labels,
            pool_features.reshape(len(pool), width),
            revision,
        )

    async def labelled_features(self, name: str, model: str, classnames: Sequence[str]) -> LabelledFeatures:
        """Return the features of one model of the examples with any of the classes, and the classes of each.

        Examples without features of the model are left out, and classes that are not in ``classnames``.
        """
        places = {classname: place for place, classname in enumerate(classnames)}
        first = (
            select(ExampleRow.id, ExampleRow.classname)
            .join(ExampleFeatureRow, _features_of(model))
            .where(ExampleRow.name == name, ExampleRow.classname.is_not(None))
        )
        further = (
            select(ExampleRow.id, ExampleFurtherClassRow.classname)
            .join(ExampleFurtherClassRow, ExampleFurtherClassRow.example_id == ExampleRow.id)
            .join(ExampleFeatureRow, _features_of(model))
            .where(ExampleRow.name == name)
        )
        async with reading_one_moment(self._engine) as session:
            revision = await _require(session, name)
            connection = await session.connection()
            rows = [*(await connection.execute(first)), *(await connection.execute(further))]
            pairs = [(example_id, places[classname]) for example_id, classname in rows if classname in places]
            ids, images = np.unique(np.array([pair[0] for pair in pairs], np.int64), return_inverse=True)
            is_label = np.zeros((len(ids), len(classnames)), bool)
            is_label[images, [pair[1] for pair in pairs]] = True
            features = await _load(connection, model, ids)
        return LabelledFeatures(features, is_label, revision)

    async def missing(self, name: str, model: str, limit: int, after: int = 0) -> Sequence[tuple[int, bytes]]:
        """Return ids and files of at most ``limit`` stored images without features of the model, sorted by id."""
        ids = (
            select(ExampleRow.id)
            .where(
                ExampleRow.name == name,
                ExampleRow.id > min(after, _LARGEST_ID),
                ExampleRow.content.is_not(None),
                ~_has_feature(model),
            )
            .order_by(ExampleRow.id)
            .limit(limit)
        )
        # The files are read in a second step; otherwise the database would sort rows that contain them.
        statement = select(ExampleRow.id, ExampleRow.content).where(ExampleRow.id.in_(ids)).order_by(ExampleRow.id)
        async with reading(self._engine) as session:
            await _require(session, name)
            return [
                (example_id, content) for example_id, content in await session.execute(statement) if content is not None
            ]

    async def add_features(self, name: str, model: str, rows: Mapping[int, Float[np.ndarray, " d"]]) -> int:
        """Add unit features (d,) by the ids of examples, and return the number of new ones.

        Deleted examples, and those that have features of the model, are ignored.
        """
        if not rows:
            return 0
        stored = dict(zip(rows, await asyncio.to_thread(_to_halves, list(rows.values())), strict=True))
        async with writing(self._engine) as session:
            row, _ = await lock_current(session, name, None)
            connection = await session.connection()
            there: dict[tuple[int, str], bytes] = {}
            for some in _pieces(list(stored), _PER_STATEMENT):
                statement = select(ExampleRow.id).where(ExampleRow.name == name, ExampleRow.id.in_(some))
                there |= {(example_id, model): stored[example_id] for example_id in await session.scalars(statement)}
            added = await _insert_features(connection, there)
            if added:
                row.examples_revision += 1
            return added


@dataclass(frozen=True, slots=True)
class SelectionState:
    """The version of a label set and the revision of its examples at a selection, and the current ones."""

    version: int
    revision: int
    last_version: int
    last_revision: int

    @property
    def is_current(self) -> bool:
        """Whether neither the label set nor its examples have changed since the selection."""
        return (self.version, self.revision) == (self.last_version, self.last_revision)


@dataclass(frozen=True, slots=True)
class StoredSelection(SelectionState):
    """The result of the comparison of methods for a label set and a model; up to a megabyte."""

    result: Mapping[str, Any]
    created_at: datetime


class SelectionRepository:
    """Method selections by label set and model."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def put(self, name: str, model: str, version: int, revision: int, result: Mapping[str, Any]) -> bool:
        """Store a selection; returns False if a newer one is stored, or the label set was deleted.

        Args:
            name: of the label set.
            model: the name of the model.
            version: of the label set. The newest one is stored if it has the same selections.
            revision: of its examples.
            result: any JSON object.
        """
        if not is_storable(name):
            return False
        async with writing(self._engine) as session:
            label_set = await session.get(LabelSetRow, name, with_for_update=True)
            if label_set is None or label_set.deleted_at is not None:
                return False
            # Versions with other thresholds or priors may have been written while the methods were compared.
            if version < label_set.last_version:
                newest = await session.get_one(LabelSetVersionRow, (name, label_set.last_version))
                compared = await session.get(LabelSetVersionRow, (name, version))
                if compared is not None and is_compared_alike(compared, newest):
                    version = newest.version
            row = await session.get(SelectionRow, (name, model))
            if row is None:
                row = SelectionRow(name=name, model=model)
                session.add(row)
            elif (row.version, row.examples_revision) > (version, revision):
                return False
            row.version, row.examples_revision = version, revision
            row.result, row.created_at = dict(result), datetime.now(UTC)
            return True

    async def get(self, name: str, model: str) -> StoredSelection | None:
        """Return the selection; None if there is none, or no such label set."""
        row = await self._read(name, model, SelectionRow.result, SelectionRow.created_at)
        return None if row is None else StoredSelection(*row)

    async def state(self, name: str, model: str) -> SelectionState | None:
        """Return the state of the selection without its result; None as in ``get``."""
        row = await self._read(name, model)
        return None if row is None else SelectionState(*row)

    async def _read(self, name: str, model: str, *columns: ColumnElement[Any] | InstrumentedAttribute[Any]) -> Any:
        if not is_storable(name):
            return None
        statement = (
            select(
                SelectionRow.version,
                SelectionRow.examples_revision,
                LabelSetRow.last_version,
                LabelSetRow.examples_revision,
                *columns,
            )
            .join(LabelSetRow, LabelSetRow.name == SelectionRow.name)
            .where(SelectionRow.name == name, SelectionRow.model == model)
        )
        async with reading(self._engine) as session:
            return (await session.execute(statement)).one_or_none()


@dataclass(frozen=True, slots=True)
class _Present:
    """The columns of a stored example that decide whether it changes."""

    id: int
    classnames: tuple[str, ...]
    kept: bool


async def _present(connection: AsyncConnection, name: str, digests: Sequence[bytes]) -> dict[bytes, _Present]:
    found: dict[bytes, _Present] = {}
    for some in _pieces(digests, _PER_STATEMENT):
        statement = select(
            ExampleRow.digest, ExampleRow.id, ExampleRow.classname, ExampleRow.content.is_not(None)
        ).where(ExampleRow.name == name, ExampleRow.digest.in_(some))
        rows = (await connection.execute(statement)).all()
        further = await _further_classes(connection, [row[1] for row in rows])
        found |= {
            digest: _Present(example_id, _classnames(classname, further[example_id]), kept)
            for digest, example_id, classname, kept in rows
        }
    return found


async def _insert(connection: AsyncConnection, name: str, items: Sequence[NewExample]) -> dict[bytes, int]:
    """Insert new images without their features, and return their ids by digest."""
    if not items:
        return {}
    now = datetime.now(UTC)
    values = [
        {
            "name": name,
            "digest": item.digest,
            "classname": item.classnames[0] if item.classnames else None,
            "created_at": now,
            "content": item.content,
        }
        for item in items
    ]
    await connection.execute(insert(ExampleRow), values)
    return {
        digest: made.id for digest, made in (await _present(connection, name, [item.digest for item in items])).items()
    }


async def _require_room(connection: AsyncConnection, name: str, new: int, max_examples: int | None) -> None:
    if not new or max_examples is None:
        return
    present = await connection.scalar(select(func.count(ExampleRow.id)).where(ExampleRow.name == name)) or 0
    if present + new > max_examples:
        problem = f"the label set '{name}' would have {present + new} example images, at most {max_examples} are"
        raise TooLargeError(f"{problem} allowed; add fewer, delete some, or raise DEIXIS_MAX_EXAMPLES")


def _require_classes(items: Sequence[NewExample], classnames: Sequence[str]) -> None:
    unknown = {classname for item in items for classname in item.classnames} - set(classnames)
    if unknown:
        raise UnknownNameError("class", escape_surrogates(min(unknown)), classnames)


async def _update(connection: AsyncConnection, column: str, by_id: Mapping[int, Any]) -> None:
    """Set one column of several examples to different values."""
    if by_id:
        statement = update(ExampleRow).where(ExampleRow.id == bindparam("of")).values({column: bindparam("to")})
        await connection.execute(statement, [{"of": example_id, "to": value} for example_id, value in by_id.items()])


async def _set_further_classes(connection: AsyncConnection, classnames: Mapping[int, tuple[str, ...]]) -> None:
    """Replace the classes after the first of several examples."""
    for some in _pieces(list(classnames), _PER_STATEMENT):
        await connection.execute(delete(ExampleFurtherClassRow).where(ExampleFurtherClassRow.example_id.in_(some)))
    values = [
        {"example_id": example_id, "classname": further}
        for example_id, given in classnames.items()
        for further in dict.fromkeys(given)
        if further != given[0]
    ]
    if values:
        await connection.execute(insert(ExampleFurtherClassRow), values)


async def _further_classes(connection: AsyncConnection, ids: Sequence[int]) -> Mapping[int, list[str]]:
    """Return the classes after the first, by the id of the example."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for some in _pieces(ids, _PER_STATEMENT):
        statement = select(ExampleFurtherClassRow.example_id, ExampleFurtherClassRow.classname).where(
            ExampleFurtherClassRow.example_id.in_(some)
        )
        for example_id, classname in await connection.execute(statement):
            found[example_id].append(classname)
    return found


def _classnames(first: str | None, further: Sequence[str]) -> tuple[str, ...]:
    return () if first is None else (first, *sorted(further))


async def _insert_features(connection: AsyncConnection, features: Mapping[tuple[int, str], bytes]) -> int:
    """Insert the features that are missing, by id and model, and return their number."""
    present = await _models(connection, list({example_id for example_id, _ in features}))
    values = [
        {"example_id": example_id, "model": model, "feature": feature}
        for (example_id, model), feature in features.items()
        if (example_id, model) not in present
    ]
    if values:
        await connection.execute(insert(ExampleFeatureRow), values)
    return len(values)


def _stored_features(items: Collection[NewExample]) -> dict[tuple[bytes, str], bytes]:
    """Return the stored form of the features by digest and model."""
    by_model: defaultdict[str, dict[bytes, np.ndarray]] = defaultdict(dict)
    for item in items:
        for model, feature in item.features.items():
            by_model[model][item.digest] = feature
    return {
        (digest, model): half
        for model, features in by_model.items()
        for digest, half in zip(features, _to_halves(list(features.values())), strict=True)
    }


def _to_halves(features: Sequence[Float[np.ndarray, " d"]]) -> Sequence[bytes]:
    return [row.tobytes() for row in np.stack(features).astype("<f2")]


def _from_halves(into: Float32[np.ndarray, "n d"], stored: Sequence[bytes], ids: Sequence[int]) -> None:
    """Convert stored features of the examples ``ids``.

    Raises:
        StoreError: some are damaged.
    """
    row_bytes = 2 * into.shape[1]
    damaged = [number for number, row in zip(ids, stored, strict=False) if _length(row) != row_bytes]
    if not damaged and len(stored) == len(ids):
        into[:] = np.frombuffer(b"".join(stored), "<f2").reshape(into.shape)
        damaged = [ids[index] for index in np.flatnonzero(~np.isfinite(into).all(axis=1)).tolist()]
        if not damaged:
            return
    shown = ", ".join(map(str, damaged[:10])) or "unknown"
    more = ", ..." if len(damaged) > 10 else ""
    raise StoreError(
        f"the stored features of example images are damaged (ids: {shown}{more}); delete each with"
        " DELETE /v1/label-sets/NAME/images/ID and add it again, or restore a backup"
    )


def _length(stored: object) -> int:
    return len(stored) if isinstance(stored, bytes) else -1


def _chosen(
    ids: Int64[np.ndarray, " n"],
    labels: Int64[np.ndarray, " n"],
    left_out: Int64[np.ndarray, " m"],
    max_pool: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids (s,) and labels (s,) of the support, and the ids (u,) of the pool, both ascending.

    The support has none of the ids ``left_out``.
    """
    labels = np.where(np.isin(ids, left_out), _LEFT_OUT, labels)
    order = np.argsort(ids)
    ids, labels = ids[order], labels[order]
    pool = ids[labels == _UNLABELLED]
    if max_pool is not None and len(pool) > max_pool:
        pool = pool[(np.arange(max_pool) * len(pool) + len(pool) // 2) // max_pool]
    return ids[labels >= 0], labels[labels >= 0], pool


async def _load(connection: AsyncConnection, model: str, ids: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n d"]:
    """Return the features of the examples that have some, sorted by id; shape (0, 0) if there are none."""
    features = np.zeros((0, 0), np.float32)
    for first in range(0, len(ids), _FEATURES_PER_PAGE):
        some = ids[first : first + _FEATURES_PER_PAGE].tolist()
        # Literals, because binding them as parameters takes the drivers longer than reading the features.
        listed: BindParameter[Sequence[int]] = bindparam("ids", some, expanding=True, literal_execute=True)
        statement = (
            select(ExampleFeatureRow.feature)
            .where(ExampleFeatureRow.model == model, ExampleFeatureRow.example_id.in_(listed))
            .order_by(ExampleFeatureRow.example_id)
        )
        stored = (await connection.scalars(statement)).all()
        if first == 0:
            # The most frequent length, because the first row may be the damaged one.
            lengths = Counter(map(_length, stored))
            features = np.empty((len(ids), max(0, lengths.most_common(1)[0][0] // 2) if stored else 0), np.float32)
        await asyncio.to_thread(_from_halves, features[first : first + len(some)], stored, some)
    return features


async def _examples(
    session: AsyncSession, name: str, limit: int, *conditions: ColumnElement[bool]
) -> Sequence[Example]:
    """Return at most ``limit`` examples of a label set that meet the conditions, sorted by id."""
    statement = (
        select(
            ExampleRow.id,
            ExampleRow.digest,
            ExampleRow.classname,
            ExampleRow.created_at,
            ExampleRow.content.is_not(None),
        )
        .where(ExampleRow.name == name, *conditions)
        .order_by(ExampleRow.id)
        .limit(limit)
    )
    rows = (await session.execute(statement)).all()
    models: defaultdict[int, set[str]] = defaultdict(set)
    ids = [row[0] for row in rows]
    for example_id, model in await _models(await session.connection(), ids):
        models[example_id].add(model)
    further = await _further_classes(await session.connection(), ids)
    return [
        Example(
            example_id,
            digest.hex(),
            _classnames(classname, further[example_id]),
            created_at,
            tuple(sorted(models[example_id])),
            kept,
        )
        for example_id, digest, classname, created_at, kept in rows
    ]


async def _models(connection: AsyncConnection, ids: Sequence[int]) -> set[tuple[int, str]]:
    """Return pairs of an example's id and a model with features of it."""
    found: set[tuple[int, str]] = set()
    for some in _pieces(ids, _PER_STATEMENT):
        statement = select(ExampleFeatureRow.example_id, ExampleFeatureRow.model).where(
            ExampleFeatureRow.example_id.in_(some)
        )
        found |= {(example_id, model) for example_id, model in await connection.execute(statement)}
    return found


async def _require(session: AsyncSession, name: str) -> int:
    """Return the revision of the examples of a label set; raises if there is none."""
    revision = None
    if is_storable(name):
        statement = select(LabelSetRow.examples_revision).where(
            LabelSetRow.name == name, LabelSetRow.deleted_at.is_(None)
        )
        revision = await session.scalar(statement)
    if revision is None:
        raise await unknown_label_set(session, name)
    return revision


def _has_class(name: str, classname: str) -> ColumnElement[bool]:
    further = (
        select(ExampleFurtherClassRow.example_id)
        .join(ExampleRow, ExampleRow.id == ExampleFurtherClassRow.example_id)
        .where(ExampleRow.name == name, ExampleFurtherClassRow.classname == classname)
    )
    first = select(ExampleRow.id).where(ExampleRow.name == name, ExampleRow.classname == classname)
    return ExampleRow.id.in_(first.union_all(further))


def _has_feature(model: str) -> ColumnElement[bool]:
    return exists().where(_features_of(model))


def _features_of(model: str) -> ColumnElement[bool]:
    return and_(ExampleFeatureRow.example_id == ExampleRow.id, ExampleFeatureRow.model == model)


def _pieces(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _storable_id(example_id: int) -> int:
    """Return an id that fits into the column; 0, which no example has, replaces one that does not."""
    return example_id if 0 < example_id <= _LARGEST_ID else 0


def _unknown_example(name: str, example_id: int) -> UnknownNameError:
    return UnknownNameError(
        "example image", str(example_id), way_out=f"the label set '{name}' has no example of that id"
    )
