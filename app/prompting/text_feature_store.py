"""Text features on disk, so that a restart does not encode the same texts again."""

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import structlog

from app.types import TextFeatures

log = structlog.get_logger()

# The format of the rows, stored in user_version of the file.
_FORMAT = 2
_CHECKSUM_BYTES = 8
_LOCK_TIMEOUT_S = 5.0
_TRIES = 50
_BETWEEN_TRIES_S = 0.1
_PRIMARY_CODE = 0xFF
# Variables in one statement; SQLite allows 32,766.
_AT_ONCE = 10_000
# The share of the rows that is dropped when the file is full, so that not every write has to drop rows.
_FREED = 0.1
_TORN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# Another name than in format 1, whose readers would take the checksum for features.
_SCHEMA = "CREATE TABLE IF NOT EXISTS checked_features (key BLOB PRIMARY KEY, row BLOB NOT NULL, used INTEGER NOT NULL)"


class TextFeatureStore:
    """A cache of unit rows by encoder and text, in one SQLite file, that drops the least recently used first.

    Several processes may share the file. If it cannot be read or written (a full disk, a damaged file), or a row does
    not match its checksum, this is logged and the texts are encoded again. Rows are float32, so results are
    bit-identical after a restart. The work is done in one thread of the store.

    Args:
        file: created if it is missing, and replaced if it is not such a database.
        max_bytes: limit of the file, which one write may exceed.
    """

    def __init__(self, file: Path, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        # One thread: SQLite has one writer, and a connection is used by one at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text-features")
        self._connection: sqlite3.Connection | None = None
        self._failing = False

    async def read(self, fingerprint: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the stored rows (d,), by text."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._attempt, self._read, fingerprint, list(dict.fromkeys(texts))
        )

    async def write(self, fingerprint: str, rows: Mapping[str, np.ndarray]) -> None:
        """Store the rows. When this returns, they are in the file, or the failure is logged."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, self._write, fingerprint, rows)

    def close(self) -> None:
        """Finish the work that has begun, and close the file; may be called twice."""
        self._thread.shutdown(wait=True)
        self._disconnect()

    def _attempt(
        self,
        work: Callable[[sqlite3.Connection, str, object], dict[str, np.ndarray]],
        fingerprint: str,
        what: object,
    ) -> dict[str, np.ndarray]:
        try:
            result = work(self._connect(), fingerprint, what)
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            if not self._failing:
                log.warning("text_features_not_kept", file=str(self._file), reason=str(error))
            self._failing = True
            # Errors of Python's module itself have no code.
            if getattr(error, "sqlite_errorcode", None) in _TORN:
                self._discard()
            return {}
        self._failing = False
        return result

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._file, timeout=_LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection = connection
            connection.text_factory = bytes  # a damaged row may be text, which need not be UTF-8
            _use_wal(connection)
            # A power cut may lose the last rows, which are then encoded again, but does not damage the file.
            connection.execute("PRAGMA synchronous=NORMAL")
            if connection.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
                connection.execute("DROP TABLE IF EXISTS features")
                connection.execute("DROP TABLE IF EXISTS checked_features")
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version={_FORMAT}")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _discard(self) -> None:
        """Remove a damaged file; the next attempt creates it again."""
        for suffix in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)

    def _read(self, connection: sqlite3.Connection, fingerprint: str, texts: object) -> dict[str, np.ndarray]:
        assert isinstance(texts, list)
        text_of = {_key(fingerprint, text): text for text in texts}
        keys = list(text_of)
        rows: dict[str, np.ndarray] = {}
        damaged = 0
        for start in range(0, len(keys), _AT_ONCE):
            chunk = keys[start : start + _AT_ONCE]
            wanted = ",".join("?" * len(chunk))
            statement = f"SELECT key, row FROM checked_features WHERE key IN ({wanted})"  # noqa: S608 - question marks
            with closing(connection.execute(statement, chunk)) as found:
                for key, stored in found:
                    row = _unpacked(key, stored)
                    if row is None:
                        damaged += 1
                    else:
                        rows[text_of[key]] = row
        if damaged:
            log.warning("text_features_damaged", file=str(self._file), rows=damaged)
        if rows:
            now = int(time.time())
            used = [_key(fingerprint, text) for text in rows]
            for start in range(0, len(used), _AT_ONCE):
                chunk = used[start : start + _AT_ONCE]
                wanted = ",".join("?" * len(chunk))
                # To the day, so that reading seldom writes.
                connection.execute(
                    f"UPDATE checked_features SET used = ? WHERE used < ? AND key IN ({wanted})",  # noqa: S608 - question marks
                    [now, now - 86_400, *chunk],
                )
        return rows

    def _write(self, connection: sqlite3.Connection, fingerprint: str, rows: object) -> dict[str, np.ndarray]:
        assert isinstance(rows, Mapping)
        now = int(time.time())
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany(
                "INSERT OR REPLACE INTO checked_features VALUES (?, ?, ?)",
                [
                    (key, _packed(key, row), now)
                    for key, row in ((_key(fingerprint, text), row) for text, row in rows.items())
                ],
            )
            self._make_room(connection)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        return {}

    def _make_room(self, connection: sqlite3.Connection) -> None:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > self._max_bytes:
            count = connection.execute("SELECT count(*) FROM checked_features").fetchone()[0]
            connection.execute(
                "DELETE FROM checked_features WHERE key IN (SELECT key FROM checked_features ORDER BY used LIMIT ?)",
                [max(1, int(_FREED * count))],
            )


class StoredTextEncoder:
    """A text encoder that reads from the store, and encodes and stores the texts that it lacks.

    Args:
        encode: encodes texts.
        fingerprint: returns the fingerprint of the text tower.
        store: None encodes every text.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Awaitable[TextFeatures]],
        fingerprint: Callable[[], Awaitable[str]],
        store: TextFeatureStore | None,
    ) -> None:
        self._encode = encode
        self._store = store
        self._fingerprint = fingerprint

    async def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d)."""
        if self._store is None:
            return await self._encode(prompts)
        fingerprint = await self._fingerprint()
        rows = await self._store.read(fingerprint, prompts)
        missing = [text for text in dict.fromkeys(prompts) if text not in rows]
        if missing:
            encoded = dict(zip(missing, await self._encode(missing), strict=True))
            rows |= encoded
            await self._store.write(fingerprint, encoded)
        features: TextFeatures = np.stack([rows[text] for text in prompts])
        return features


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log, again and again while another process does so, because SQLite does not wait then."""
    for attempt in range(_TRIES):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & _PRIMARY_CODE != sqlite3.SQLITE_BUSY or attempt + 1 == _TRIES:
                raise
            time.sleep(_BETWEEN_TRIES_S)
        else:
            return


def _packed(key: bytes, row: np.ndarray) -> bytes:
    content = np.ascontiguousarray(row, np.float32).tobytes()
    return content + _checksum(key, content)


def _unpacked(key: bytes, stored: object) -> np.ndarray | None:
    """Return a stored row (d,); None if it is damaged."""
    if not isinstance(stored, bytes):
        return None
    content, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
    return np.frombuffer(content, np.float32) if checksum == _checksum(key, content) else None


def _checksum(key: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES, key=key).digest()


def _key(fingerprint: str, text: str) -> bytes:
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=16, key=fingerprint.encode()[:64]
    ).digest()
