"""Opens the database: its URL, options and schema, and the translation of driver errors.

SQLite and PostgreSQL are distinguished only here, and in the copying of rows and the one INSERT that names its dialect.
"""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, String, column, event, func, inspect, select, table, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from app.errors import StatementRefusedError, StoreError
from app.store.tables import SCHEMA_VERSION_TABLE, LabelSetRow
from deixis.extras import needs_extra

_Result = TypeVar("_Result")

LOCK_TIMEOUT_S = 10.0
SCRUB_TIMEOUT_S = 0.5
# For a connection of the pool. With a database that does not respond, other requests then fail before their deadline.
POOL_TIMEOUT_S = 10
VACUUMED_BYTES = 64 * 2**20  # half a second of writing, for which other writers wait
# A connection to a machine that is gone fails within a minute; by default, Linux waits for hours.
_CONNECTION_OPTIONS: Mapping[str, int] = MappingProxyType(
    {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    }
)
MIGRATIONS = Path(__file__).parent / "migrations"

# Advisory locks share one space of numbers per PostgreSQL database, so the number should be unlikely elsewhere.
_MIGRATION_LOCK = int.from_bytes(b"deixis", "big")

_WRITES = "deixis_writes"
_WRITE_TURN = "deixis_write_turn"
_EXAMPLES = "'sqlite:////var/lib/deixis/deixis.sqlite3' or 'postgresql://user:password@host/deixis'"
_DAMAGED = "the file is damaged, or the disk fails: stop the service, keep a copy of the file, and restore a backup"
_WAYS_OUT = {
    "not a database": "move that file away, or name another one in DEIXIS_DATABASE_URL",
    "unable to open": "make the file and its folder writable for the service, or name another in DEIXIS_DATABASE_URL",
    "readonly": "make the file and its folder writable for the service, or name another in DEIXIS_DATABASE_URL",
    "is locked": "another program holds the file locked; end it, or use PostgreSQL",
    "is full": "make room on the disk",
    "malformed": _DAMAGED,
    "disk i/o error": _DAMAGED,
    "permission denied": "grant the user of DEIXIS_DATABASE_URL the right to create and use tables in its schema",
    "already exists": "name a database that is empty or was made by Deixis in DEIXIS_DATABASE_URL",
    "no such table": "start the service once, which makes the tables",
    'relation "': "start the service once, which makes the tables",
    "authentication failed": "correct the user and password in DEIXIS_DATABASE_URL",
}
_LIMIT_EXCEEDED = "54"  # the class of SQLSTATE, such as a value that is too large for its index
_OTHERWISE = "check that DEIXIS_DATABASE_URL names the right database and that it is running"


def open_engine(url: str) -> AsyncEngine:
    """Return an engine for SQLite or PostgreSQL; create an SQLite file and its folders, but connect to no server.

    Args:
        url: ``sqlite:///file``, ``sqlite+aiosqlite:///file``, ``postgres://``, ``postgresql://`` or
            ``postgresql+psycopg://``.

    Raises:
        StoreError: the URL is invalid, the file cannot be created, or its extra is not installed.
    """
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        # The cause is dropped, because its message may contain a part of the password.
        problem = f"DEIXIS_DATABASE_URL is not an address: '{_redacted(url)}'; write {_EXAMPLES}"
        raise StoreError(problem) from None
    match address.drivername:
        case "sqlite" | "sqlite+aiosqlite":
            return _open_sqlite(address)
        case "postgres" | "postgresql" | "postgresql+psycopg":
            return _open_postgresql(address.set(drivername="postgresql+psycopg"))
        case other:
            raise StoreError(f"DEIXIS_DATABASE_URL names the unknown database kind '{other}'; write {_EXAMPLES}")


def _open_sqlite(address: URL) -> AsyncEngine:
    if not address.database or address.database == ":memory:":
        raise StoreError(f"DEIXIS_DATABASE_URL names no file, so nothing would be kept; write {_EXAMPLES}")
    if address.query or address.host or address.database.startswith("file:"):
        problem = f"DEIXIS_DATABASE_URL is '{_redacted(str(address))}', but SQLite takes a plain path without options"
        raise StoreError(f"{problem}; write {_EXAMPLES}")
    file = Path(address.database).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make the folder '{file.parent}' for the database: {error.strerror}"
        raise StoreError(f"{problem}; make it, or name another file in DEIXIS_DATABASE_URL") from error
    address = URL.create("sqlite+aiosqlite", database=str(file))
    try:
        # If the file cannot be opened, aiosqlite's thread outlives the event loop and prints its own traceback.
        sqlite3.connect(file).close()
    except sqlite3.Error as error:
        raise _failure(address, error) from error
    engine = create_async_engine(
        address,
        # With isolation_level None, sqlite3 does not begin transactions by itself; _begin does.
        connect_args={"isolation_level": None, "timeout": LOCK_TIMEOUT_S, "factory": _SqliteConnection},
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,
        json_serializer=_to_json,
        execution_options={_WRITE_TURN: asyncio.Lock()},
    )
    event.listen(engine.sync_engine, "connect", _set_pragmas)
    event.listen(engine.sync_engine, "begin", _SqliteFiles(file).begin)
    return engine


def _open_postgresql(address: URL) -> AsyncEngine:
    # Prepared statements do not work with a pooler such as PgBouncer, and these statements gain little from them.
    connect_args: dict[str, Any] = {"prepare_threshold": None}
    connect_args |= {name: value for name, value in _CONNECTION_OPTIONS.items() if name not in address.query}
    try:
        return create_async_engine(
            address,
            connect_args=connect_args,
            pool_pre_ping=True,
            pool_timeout=POOL_TIMEOUT_S,
            # The row locks of the repositories need this level; the default of the server may differ.
            isolation_level="READ COMMITTED",
            hide_parameters=True,
            json_serializer=_to_json,
        )
    except ImportError as error:
        raise StoreError(needs_extra(f"the database at {location(address)}", "postgres")) from error


_to_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


class _SqliteConnection(sqlite3.Connection):
    """A connection whose locks end when it is closed.

    SQLite keeps a closed connection and its transaction alive until its last statement is freed. After a cancelled
    request this can take long, because the traceback of the cancellation holds the statement.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.rollback()
        super().close()


def _set_pragmas(connection: Any, _record: object) -> None:
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged write outlives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten with zeros
        cursor.close()
    except BaseException:
        connection.close()  # the pool does not know of it yet and would leak its thread
        raise


class _SqliteFiles:
    """Begins transactions, unless the files of the database were deleted or replaced while it was open.

    SQLite would acknowledge what it writes to the deleted files, and new connections would create an empty database.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._log = file.with_name(f"{file.name}-wal")
        self._identity: tuple[int, int] | None = None
        self._has_log = False

    def begin(self, connection: Connection) -> None:
        # A transaction that reads before it writes must take the write lock first: SQLite refuses, without waiting, to
        # upgrade a read whose snapshot is out of date.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
        try:
            status = self._file.stat()
            identity = status.st_dev, status.st_ino
            has_log = self._log.exists()
        except OSError:
            identity, has_log = (-1, -1), False
        self._identity = self._identity or identity
        # In WAL mode, the write lock has opened the log; a read opens it later.
        if identity != self._identity:
            problem = f"the file '{self._file}' was deleted or replaced while the service used it"
            raise StoreError(f"{problem}; stop the service, restore the file, and start it")
        if writes and self._has_log and not has_log:
            problem = f"the file '{self._log}' was deleted while the service used it"
            raise StoreError(f"{problem}; restart the service, which saves what the file contained")
        self._has_log = self._has_log or has_log


def location(address: URL) -> str:
    """Return the URL without password and options, for messages and logs."""
    return address.set(query={}).render_as_string(hide_password=True)


def _redacted(url: str) -> str:
    return re.sub(r"(?i)(password\s*=\s*)[^&\s]+", r"\1***", re.sub(r"://.*@", "://***@", url, flags=re.DOTALL))


def _failure(address: URL, cause: BaseException | None) -> StoreError:
    reason = _reason(cause)
    return StoreError(f"the database at {location(address)} failed: {reason}; {_way_out(reason) or _OTHERWISE}")


def _reason(cause: BaseException | None) -> str:
    return " ".join(str(cause).split())


def _way_out(reason: str) -> str | None:
    return next((way_out for sign, way_out in _WAYS_OUT.items() if sign in reason.lower()), None)


def _is_refused(error: DBAPIError) -> bool:
    """Return whether the database works, and would refuse the same values or the same statement again."""
    if error.connection_invalidated:
        return False
    if isinstance(error, (DataError, IntegrityError)):
        return True
    if _way_out(_reason(error.orig)) is not None:  # its tables or rights are not those of the service
        return False
    if isinstance(error, OperationalError):
        sqlstate, sqlite_code = getattr(error.orig, "sqlstate", None), getattr(error.orig, "sqlite_errorcode", None)
        return (sqlstate or "").startswith(_LIMIT_EXCEEDED) or sqlite_code == sqlite3.SQLITE_ERROR
    return isinstance(error, (ProgrammingError, NotSupportedError))


@contextmanager
def _store_errors(engine: AsyncEngine) -> Iterator[None]:
    """Raise the errors of the driver and the pool as ``StoreError`` or ``StatementRefusedError``."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        if not isinstance(error, DBAPIError):
            raise _failure(engine.url, error) from error
        if not _is_refused(error):
            raise _failure(engine.url, error.orig) from error
        # The further lines of PostgreSQL quote rows, which may belong to another namespace.
        reason = str(error.orig).partition("\n")[0]
        problem = f"the database at {location(engine.url)} refused a value or a statement of the service: {reason}"
        raise StatementRefusedError(
            f"{problem}; the same attempt will fail again: change the data, or report it"
        ) from error
    except PoolTimeoutError as error:
        problem = f"every connection to the database at {location(engine.url)} is busy"
        raise StoreError(f"{problem}; try again, or see what keeps the database from answering") from error


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """Yield a session whose transaction is rolled back at the end."""
    with _store_errors(engine):
        async with AsyncSession(engine) as session:
            yield session


@asynccontextmanager
async def reading_one_moment(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """Yield a session as ``reading`` does; all its statements see the state of the first one."""
    # On SQLite every transaction has this isolation.
    options = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    async with reading(engine.execution_options(**options)) as session:
        yield session


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """Yield a session that is committed at the end, or rolled back when the body raises.

    On SQLite its first statement takes the write lock; on PostgreSQL the body locks the rows that it will change.
    """
    with _store_errors(engine):
        async with (
            _turn_to_write(engine),
            AsyncSession(engine.execution_options(**{_WRITES: True}), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session


@asynccontextmanager
async def _turn_to_write(engine: AsyncEngine) -> AsyncIterator[None]:
    """Wait until the earlier writers of this process are done, if the database is SQLite.

    SQLite lets any of the waiting writers be the next, so that one of many would wait longer than ``LOCK_TIMEOUT_S``.
    """
    lock: asyncio.Lock | None = engine.get_execution_options().get(_WRITE_TURN)
    if lock is None:
        yield
        return
    try:
        async with asyncio.timeout(LOCK_TIMEOUT_S):
            await lock.acquire()
    except TimeoutError:
        problem = f"other writes to the database at {location(engine.url)} took more than {LOCK_TIMEOUT_S:g} s"
        raise StoreError(f"{problem}; try again later, or use PostgreSQL") from None
    try:
        yield
    finally:
        lock.release()


async def scrub(engine: AsyncEngine) -> None:
    """Remove the copies of deleted rows from an SQLite file; called after the deletion is committed.

    SQLite overwrites deleted rows, but not the copies that it leaves when it moves rows between pages, nor those in its
    write-ahead log. So a file of at most ``VACUUMED_BYTES`` is vacuumed, and the log is emptied. The log cannot be
    emptied during a write, or while a reader uses it. Each of the two steps waits for others at most
    ``SCRUB_TIMEOUT_S``, and never fails; the next call does what could not be done. On PostgreSQL this does nothing:
    the next vacuum removes deleted rows.
    """
    if engine.dialect.name == "sqlite":
        await asyncio.to_thread(_write_anew, engine.url.database or "")


def _write_anew(file: str) -> None:
    # A connection of the pool would wait for LOCK_TIMEOUT_S, and its users with it.
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(file, timeout=SCRUB_TIMEOUT_S, isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA secure_delete=ON").fetchall()
        held = "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count"
        if connection.execute(f"{held}, pragma_page_size").fetchone()[0] <= VACUUMED_BYTES:
            with suppress(sqlite3.Error):
                connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


async def ping(engine: AsyncEngine, timeout_s: float = 2.0) -> None:
    """Check that the database answers within ``timeout_s`` and has tables.

    Raises:
        StoreError: the database does not answer, or has no tables.
    """

    async def query() -> None:
        async with reading(engine) as session:
            await session.execute(select(LabelSetRow.name).limit(1))

    await answer_within(timeout_s, engine, query())


async def answer_within(timeout_s: float, engine: AsyncEngine, query: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of a query; after ``timeout_s`` it is cancelled, but not waited for.

    A driver may wait for a server that does not respond until it has cancelled a statement.

    Raises:
        StoreError: the database did not answer in time.
    """
    task = asyncio.create_task(query)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody else asks for it
    if task.done():
        return task.result()
    problem = f"the database at {location(engine.url)} did not answer within {timeout_s:g} s"
    raise StoreError(f"{problem}; {_OTHERWISE}")


async def migrate(engine: AsyncEngine) -> None:
    """Migrate the schema to the newest revision; processes that start together do it once.

    Alembic keeps its state in module globals, so one process must not migrate two databases at the same time.

    Raises:
        StoreError: the database cannot be used, or its schema is newer than this release.
    """
    with _store_errors(engine):
        if engine.dialect.name == "sqlite":
            await _enter_wal_mode(engine)
        async with engine.execution_options(**{_WRITES: True}).begin() as connection:
            if engine.dialect.name == "postgresql":
                # Held until the transaction ends; SQLite's BEGIN IMMEDIATE does the same.
                await connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                encoding = await connection.scalar(text("SHOW server_encoding"))
                if encoding != "UTF8":
                    problem = f"the database at {location(engine.url)} has encoding {encoding}, which cannot hold every"
                    raise StoreError(
                        f"{problem} name; make one with: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
                    )
            if await connection.run_sync(_is_outdated):
                await asyncio.to_thread(import_module, "alembic.command")  # takes a part of a second
                await connection.run_sync(_alembic, "upgrade", "head")


async def _enter_wal_mode(engine: AsyncEngine) -> None:
    """Switch SQLite to WAL mode, in which readers do not block the writer; the file stores the mode.

    SQLite does not apply its lock timeout to this switch, so it is retried here.
    """
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + LOCK_TIMEOUT_S
    async with engine.connect() as connection:
        # Without SQLAlchemy, because the mode cannot be switched in the transaction that it would begin.
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        while True:
            try:
                async with driver_connection.execute("PRAGMA journal_mode=WAL"):
                    return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or loop.time() > give_up_at:
                    raise
            await asyncio.sleep(0.01)


def revisions() -> list[str]:
    """Return the schema revisions that this release knows, the oldest first; they are in the names of their files."""
    return sorted(file.name.partition("_")[0] for file in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def newest_revision() -> str:
    """Return the schema revision of this release."""
    return revisions()[-1]


async def schema_revision(engine: AsyncEngine) -> str | None:
    """Return the schema revision of the database, None if it has no schema; raises ``StoreError``."""
    with _store_errors(engine):
        async with engine.connect() as connection:
            present = await connection.run_sync(_present)
    return next(iter(present), None)


async def downgrade(engine: AsyncEngine, revision: str) -> None:
    """Downgrade the schema to an older revision; the tables and columns of later revisions are dropped.

    No other process may use the database meanwhile.

    Args:
        engine: of the database.
        revision: an older revision than that of the database.

    Raises:
        StoreError: the database cannot be used, or there is no such older revision.
    """
    with _store_errors(engine):
        async with engine.execution_options(**{_WRITES: True}).begin() as connection:
            if engine.dialect.name == "postgresql":
                await connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            await connection.run_sync(_check_is_older, revision)
            await asyncio.to_thread(import_module, "alembic.command")
            await connection.run_sync(_alembic, "downgrade", revision)


def _present(connection: Connection) -> set[str]:
    """Return the schema revision of the database; nothing if it has no schema."""
    if not inspect(connection).has_table(SCHEMA_VERSION_TABLE):
        return set()
    return set(connection.scalars(select(column("version_num", String)).select_from(table(SCHEMA_VERSION_TABLE))))


def _check_is_older(connection: Connection, revision: str) -> None:
    present = max(_present(connection), default="")
    older = [known for known in revisions() if known < present]
    if revision not in older:
        problem = f"the database at {location(connection.engine.url)} has schema revision '{present or 'none'}'"
        raise StoreError(f"{problem}, and no older one is called '{revision}'; known: {', '.join(older) or 'none'}")


def _is_outdated(connection: Connection) -> bool:
    known, present = revisions(), _present(connection)
    if newer := present - set(known):
        problem = f"the database at {location(connection.engine.url)} has schema revision '{min(newer)}'"
        raise StoreError(
            f"{problem}, but this release knows only up to '{known[-1]}'; install the release of Deixis that wrote it"
            " or a later one, or name another database in DEIXIS_DATABASE_URL"
        )
    return present != {known[-1]}


def _alembic(connection: Connection, direction: Literal["upgrade", "downgrade"], revision: str) -> None:
    # Imports every kind of database of SQLAlchemy, and few starts migrate.
    from alembic import command, config  # noqa: PLC0415

    options = config.Config()
    options.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))  # configparser reads % as a variable
    options.attributes["connection"] = connection
    getattr(command, direction)(options, revision)
