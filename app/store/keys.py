"""API keys in the database, which stores only their SHA-256."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from app.errors import ConflictError, UnknownNameError
from app.names.namespaces import Namespace
from app.store.database import answer_within, reading, writing
from app.store.label_sets import escape_surrogates
from app.store.tables import ApiKeyRow
from app.types import Scope

# For the look-up of a key, which every request waits for. A key that was seen before is accepted after that.
_LOOKUP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Key:
    """The permissions and limits of a key; a limit of None is that of the settings.

    ``rate`` limits requests and ``image_rate`` images, as in ``60/minute``; ``concurrency`` limits concurrent requests
    in each process.
    """

    id: str
    scope: Scope
    namespace: Namespace
    note: str = ""
    rate: str | None = None
    image_rate: str | None = None
    concurrency: int | None = None
    created_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


class KeyRepository:
    """Keys by id."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def add(self, key: Key, digest: bytes) -> Key:
        """Store a key.

        Args:
            key: its dates are set here.
            digest: the SHA-256 of the secret, 32 bytes.

        Raises:
            ConflictError: the id is taken.
        """
        row = ApiKeyRow(
            id=key.id,
            digest=digest,
            scope=key.scope,
            namespace=key.namespace.name,
            note=key.note,
            rate=key.rate,
            image_rate=key.image_rate,
            concurrency=key.concurrency,
            created_at=datetime.now(UTC),
        )
        async with writing(self._engine) as session:
            if await session.get(ApiKeyRow, key.id) is not None:
                raise ConflictError(f"there is a key '{key.id}' already; make another")
            session.add(row)
        return _to_key(row)

    async def find(self, key_id: str) -> tuple[Key, bytes] | None:
        """Return a key with its digest, also a revoked one; None if there is no key with this id."""

        async def query() -> tuple[Key, bytes] | None:
            async with reading(self._engine) as session:
                row = await session.get(ApiKeyRow, key_id)
                return None if row is None else (_to_key(row), row.digest)

        return await answer_within(_LOOKUP_TIMEOUT_S, self._engine, query())

    async def list(self) -> Sequence[Key]:
        """Return all keys, the oldest first."""
        async with reading(self._engine) as session:
            rows = await session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return [_to_key(row) for row in rows]

    async def any(self) -> bool:
        """Return whether there is a key, revoked or not."""

        async def query() -> bool:
            async with reading(self._engine) as session:
                return bool(await session.scalar(select(func.count()).select_from(ApiKeyRow)))

        return await answer_within(_LOOKUP_TIMEOUT_S, self._engine, query())

    async def revoke(self, key_id: str) -> Key:
        """Revoke a key permanently; a revoked key is not changed.

        Raises:
            UnknownNameError: there is no key with this id.
        """
        async with writing(self._engine) as session:
            row = await session.get(ApiKeyRow, key_id) if key_id.isascii() and key_id.isprintable() else None
            if row is None:
                raise UnknownNameError("key", escape_surrogates(key_id), way_out="`deixis keys list` shows their ids")
            if row.revoked_at is None:
                row.revoked_at = datetime.now(UTC)
            return _to_key(row)

    async def used(self, key_id: str, at: datetime) -> None:
        """Store the time of the last use of a key."""
        async with writing(self._engine) as session:
            await session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(last_used_at=at))


def _to_key(row: ApiKeyRow) -> Key:
    return Key(
        row.id,
        Scope(row.scope),
        Namespace(row.namespace),
        row.note,
        row.rate,
        row.image_rate,
        row.concurrency,
        row.created_at,
        row.last_used_at,
        row.revoked_at,
    )
