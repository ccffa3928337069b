"""The answers of language models, and the drafts made from them, which a person accepts or rejects."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import and_, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.errors import ConflictError, TooLargeError, UnknownNameError
from app.store.database import reading, writing
from app.store.label_sets import (
    IfMatch,
    append_version,
    is_storable,
    lock_current,
    settings_of,
    unknown_label_set,
)
from app.store.tables import AnswerRow, DraftRow, LabelSetRow
from app.types import ClassEntry, DraftStatus, LabelSet

# Databases bound the parameters of one statement.
_IDS_PER_STATEMENT = 10_000


class DraftKind(StrEnum):
    """The kind of a text: a description or a feature."""

    DESCRIPTION = "description"
    FEATURE = "feature"


@dataclass(frozen=True, slots=True)
class Answer:
    """A language model's answers to a question; ``digest`` identifies the question, the model and the options."""

    digest: str
    question: str
    model: str
    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A text about a class, its origin, and the decision about it."""

    id: int
    classname: str
    kind: DraftKind
    text: str
    status: DraftStatus
    model: str
    question: str
    asked_at: datetime
    decided_at: datetime | None


class DraftRepository:
    """Stores answers and drafts by label set; an answer is stored together with its drafts."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def answered(self, name: str) -> frozenset[str]:
        """Return the digests of the answered questions of a label set."""
        async with reading(self._engine) as session:
            return frozenset(await session.scalars(select(AnswerRow.digest).where(AnswerRow.name == name)))

    async def add(
        self,
        name: str,
        answer: Answer,
        classname: str,
        kind: DraftKind,
        texts: Sequence[str],
        comparison_key: Callable[[str], str],
    ) -> int:
        """Store an answer and its drafts, and return the number of new drafts.

        A text with the same ``comparison_key`` as a draft or a text of the class is left out. An answer that is stored
        already is not changed.

        Raises:
            UnknownNameError: the label set was deleted.
        """
        async with writing(self._engine) as session:
            _, current = await lock_current(session, name, None)
            if await session.get(AnswerRow, (name, answer.digest)) is not None:
                return 0
            now = datetime.now(UTC)
            session.add(
                AnswerRow(
                    name=name,
                    digest=answer.digest,
                    question=answer.question,
                    model=answer.model,
                    texts=list(answer.texts),
                    prompt_tokens=answer.prompt_tokens,
                    completion_tokens=answer.completion_tokens,
                    asked_at=now,
                )
            )
            await session.flush()
            of_class = and_(DraftRow.name == name, DraftRow.classname == classname, DraftRow.kind == kind)
            present = {comparison_key(text) for text in await session.scalars(select(DraftRow.text).where(of_class))}
            present |= {
                comparison_key(text)
                for entry in current.classes
                if entry.name == classname
                for text in _texts_of(entry, kind)
            }
            added = 0
            for text in texts:
                if comparison_key(text) in present:
                    continue
                present.add(comparison_key(text))
                session.add(
                    DraftRow(
                        name=name,
                        digest=answer.digest,
                        classname=classname,
                        kind=kind,
                        text=text,
                        status=DraftStatus.DRAFT,
                    )
                )
                added += 1
            return added

    async def list(
        self,
        name: str,
        *,
        limit: int,
        after: int = 0,
        status: DraftStatus | None = None,
        classname: str | None = None,
    ) -> Sequence[Draft]:
        """Return at most ``limit`` drafts with an id above ``after``, the oldest first.

        Raises:
            UnknownNameError: there is no such label set.
        """
        statement = (
            select(DraftRow, AnswerRow.model, AnswerRow.question, AnswerRow.asked_at)
            .join(AnswerRow, and_(AnswerRow.name == DraftRow.name, AnswerRow.digest == DraftRow.digest))
            .where(DraftRow.name == name, DraftRow.id > after)
            .order_by(DraftRow.id)
            .limit(limit)
        )
        if status is not None:
            statement = statement.where(DraftRow.status == status)
        if classname is not None:
            statement = statement.where(DraftRow.classname == classname)
        async with reading(self._engine) as session:
            await _require(session, name)
            return [_to_draft(*row) for row in await session.execute(statement)]

    async def accept(
        self,
        name: str,
        ids: Collection[int] | None,
        *,
        max_texts: int,
        if_match: IfMatch = None,
    ) -> tuple[LabelSet, int]:
        """Add drafts to a new version of the label set; also return the number of accepted drafts.

        Drafts of a class that the current version does not have are not changed.

        Args:
            name: of the label set.
            ids: of the drafts; None means all undecided drafts.
            max_texts: the largest number of descriptions, and of features, of a class.
            if_match: the versions that may be replaced.

        Raises:
            UnknownNameError: there is no such label set, or no such draft.
            ConflictError: there is nothing to accept.
            TooLargeError: a class would have more than ``max_texts``.
            PreconditionFailedError: the current version is not in ``if_match``.
        """
        async with writing(self._engine) as session:
            row, current = await lock_current(session, name, if_match)
            by_class: dict[tuple[str, str], list[_Undecided]] = defaultdict(list)
            for draft in await _undecided(session, name, ids):
                by_class[draft.classname, draft.kind].append(draft)
            classes, accepted = [], []
            for entry in current.classes:
                descriptions, features = (by_class.get((entry.name, kind), []) for kind in DraftKind)
                classes.append(_with(entry, descriptions, features, max_texts))
                accepted += [draft.id for draft in (*descriptions, *features)]
            if not accepted:
                raise ConflictError(
                    f"the label set '{name}' has no draft to accept; `deixis describe` and"
                    f" POST /v1/label-sets/{name}/descriptions:generate create drafts"
                )
            await _decide(session, accepted, DraftStatus.ACCEPTED)
            version = append_version(session, row, tuple(classes), settings_of(current))
            return version, len(accepted)

    async def reject(self, name: str, ids: Collection[int] | None) -> int:
        """Reject drafts, which are then never drafted again, and return their number.

        Args:
            name: of the label set.
            ids: of the drafts; None means all undecided drafts.

        Raises:
            UnknownNameError: there is no such label set, or no such draft.
        """
        async with writing(self._engine) as session:
            await lock_current(session, name, None)
            drafts = await _undecided(session, name, ids)
            await _decide(session, [draft.id for draft in drafts], DraftStatus.REJECTED)
            return len(drafts)

    async def count(self, name: str, status: DraftStatus) -> int:
        """Return the number of drafts of a label set with that status."""
        statement = select(func.count()).where(DraftRow.name == name, DraftRow.status == status)
        async with reading(self._engine) as session:
            return await session.scalar(statement) or 0


class _Undecided(NamedTuple):
    """The columns that a decision needs; reading all columns of a large label set takes seconds."""

    id: int
    classname: str
    kind: str
    text: str


async def _undecided(session: AsyncSession, name: str, ids: Collection[int] | None) -> Sequence[_Undecided]:
    statement = (
        select(DraftRow.id, DraftRow.classname, DraftRow.kind, DraftRow.text)
        .where(DraftRow.name == name, DraftRow.status == DraftStatus.DRAFT)
        .order_by(DraftRow.id)
    )
    undecided = [_Undecided(*row) for row in await session.execute(statement)]
    if ids is None:
        return undecided
    wanted = set(ids)
    found = [draft for draft in undecided if draft.id in wanted]
    if missing := sorted(wanted - {draft.id for draft in found}):
        raise UnknownNameError(
            "draft", str(missing[0]), way_out=f"the label set '{name}' has no undecided draft with this id"
        )
    return found


async def _decide(session: AsyncSession, ids: Sequence[int], status: DraftStatus) -> None:
    now = datetime.now(UTC)
    for first in range(0, len(ids), _IDS_PER_STATEMENT):
        block = DraftRow.id.in_(ids[first : first + _IDS_PER_STATEMENT])
        await session.execute(update(DraftRow).where(block).values(status=status, decided_at=now))


def _with(
    entry: ClassEntry, descriptions: Sequence[_Undecided], features: Sequence[_Undecided], max_texts: int
) -> ClassEntry:
    """Return the class with the texts of the drafts added after its own."""
    more = replace(
        entry,
        descriptions=tuple(dict.fromkeys([*entry.descriptions, *(draft.text for draft in descriptions)])),
        features=tuple(dict.fromkeys([*entry.features, *(draft.text for draft in features)])),
    )
    for kind, texts in (("descriptions", more.descriptions), ("features", more.features)):
        if len(texts) > max_texts:
            raise TooLargeError(
                f"the class '{entry.name}' would have {len(texts)} {kind}, at most {max_texts} are allowed; accept"
                " fewer of its drafts"
            )
    return more


def _texts_of(entry: ClassEntry, kind: DraftKind) -> tuple[str, ...]:
    return entry.descriptions if kind is DraftKind.DESCRIPTION else entry.features


async def _require(session: AsyncSession, name: str) -> None:
    row = await session.get(LabelSetRow, name) if is_storable(name) else None
    if row is None or row.deleted_at is not None:
        raise await unknown_label_set(session, name)


def _to_draft(draft: DraftRow, model: str, question: str, asked_at: datetime) -> Draft:
    return Draft(
        draft.id,
        draft.classname,
        DraftKind(draft.kind),
        draft.text,
        DraftStatus(draft.status),
        model,
        question,
        asked_at,
        draft.decided_at,
    )
