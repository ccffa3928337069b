import asyncio
import os
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app.errors import StatementRefusedError, StoreError
from app.store import database
from app.store.database import migrate, open_engine, ping, reading, writing
from app.store.label_sets import LabelSetRepository
from app.types import ClassEntry

pytestmark = pytest.mark.anyio


async def refusal_of(opened, url):
    with pytest.raises(StoreError) as caught:
        await migrate(opened(url))
    return caught.value.message


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite"])
async def test_an_sqlite_file_is_created_with_its_folders(tmp_path, opened, scheme):
    file = tmp_path / "new" / "50% of # folder" / "deixis.sqlite3"
    engine = opened(f"{scheme}:///{file}")
    await migrate(engine)
    await ping(engine)
    assert file.exists()


@pytest.mark.postgres
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
async def test_every_scheme_of_a_postgresql_url_is_accepted(postgres_url, opened, scheme):
    engine = opened(postgres_url.replace("postgresql", scheme, 1))
    await migrate(engine)
    await ping(engine)


async def test_an_sqlite_path_may_start_with_the_home_folder(tmp_path, monkeypatch, opened):
    monkeypatch.setenv("HOME", str(tmp_path))
    await migrate(opened("sqlite:///~/deixis.sqlite3"))
    assert (tmp_path / "deixis.sqlite3").exists()


async def test_sqlite_is_configured_for_durability_and_lock_timeouts(sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    async with engine.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        values = [(await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar_one() for pragma in pragmas]
    assert values == ["wal", 2, 1, 10_000]


async def test_a_version_requires_its_label_set(engine):
    orphan = "INSERT INTO label_set_versions VALUES ('pets', 1, '[]', '', '2025-01-01 00:00:00', 'max', false)"
    async with engine.connect() as connection:
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            await connection.execute(text(orphan))


async def test_reads_are_not_blocked_by_a_write(engine, repository):
    await repository.put("pets", [ClassEntry("lynx")], "photo")
    async with writing(engine) as session:
        await session.execute(text("UPDATE label_sets SET last_version = 7"))
        assert (await repository.get("pets")).version == 1
        await session.rollback()


async def test_the_writers_of_a_process_take_turns_in_order(engine, repository):
    written = []

    async def write(number):
        await repository.put(f"set {number}", [ClassEntry("lynx")], "photo")
        written.append(number)

    await asyncio.gather(*(write(number) for number in range(40)))
    if engine.dialect.name == "sqlite":
        assert written == sorted(written)
    assert sorted(written) == list(range(40))


async def test_a_writer_that_waits_too_long_for_its_turn_fails(sqlite_url, opened, monkeypatch):
    engine = opened(sqlite_url)
    await migrate(engine)
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.05)
    async with writing(engine):
        with pytest.raises(StoreError, match=r"took more than 0\.05 s; try again later"):
            await LabelSetRepository(engine).put("pets", [ClassEntry("lynx")], "photo")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is not an address: ''"),
        ("/var/lib/deixis.sqlite3", "is not an address: '/var/lib/deixis.sqlite3'; write 'sqlite:///"),
        ("host=db user=deixis password=hunter2", "is not an address: 'host=db user=deixis password=***'"),
        ("postgresql://deixis:hunter2@db:port/deixis", "is not an address: 'postgresql://***@db:port/deixis'"),
        (
            "postgresql://deixis:hun@ter2@db:x/d?password=hunter2",
            "is not an address: 'postgresql://***@db:x/d?password=***'",
        ),
        ("mysql://deixis:hunter2@db/deixis", "unknown database kind 'mysql'"),
        ("postgresql+asyncpg://deixis:hunter2@db/deixis", "unknown database kind 'postgresql+asyncpg'"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///deixis.sqlite3?mode=ro", "without options"),
        ("sqlite:///file:deixis.sqlite3", "without options"),
        ("sqlite://relative/deixis.sqlite3", "without options"),
    ],
)
async def test_the_error_for_an_invalid_url_does_not_contain_its_password(url, message):
    with pytest.raises(StoreError) as caught:
        open_engine(url)
    assert message in caught.value.message
    assert "hunter2" not in caught.value.message
    assert "'postgresql://user:password@host/deixis'" in caught.value.message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_the_error_for_a_missing_postgresql_driver_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match="needs the extra 'postgres'") as caught:
        open_engine("postgresql://deixis:hunter2@db/deixis")
    assert "hunter2" not in caught.value.message


async def test_the_error_for_an_unreachable_server_does_not_contain_the_password(opened):
    message = await refusal_of(opened, "postgresql://deixis:hunter2@127.0.0.1:1/deixis?sslpassword=hunter2")
    assert "postgresql+psycopg://deixis:***@127.0.0.1:1/deixis failed:" in message
    assert "check that DEIXIS_DATABASE_URL names the right database and that it is running" in message
    assert "hunter2" not in message
    assert "\n" not in message


@pytest.mark.postgres
async def test_the_error_for_a_missing_database_names_it(postgres_url, opened):
    message = await refusal_of(opened, postgres_url.replace("/test_", "/missing_"))
    assert 'database "missing_' in message
    assert "does not exist" in message


async def write(engine, *statements, **values):
    async with writing(engine) as session:
        for statement in statements:
            await session.execute(text(statement), values)


REFUSED = {
    "a missing value": "INSERT INTO label_sets (name) VALUES (NULL)",
    "a taken name": "INSERT INTO label_sets (name, last_version) VALUES ('a', 1), ('a', 1)",
    "no such function": "SELECT no_such_function()",
    "no SQL": "SELEKT",
}


@pytest.mark.parametrize("statement", REFUSED.values(), ids=REFUSED)
async def test_a_refused_statement_is_another_error_than_an_unavailable_database(engine, statement):
    with pytest.raises(StatementRefusedError, match="refused a value or a statement") as caught:
        await write(engine, statement)
    assert "(a)" not in caught.value.message  # a row, of any namespace
    await ping(engine)


REFUSED_BY_POSTGRESQL = {
    "a number that is too large": ("SELECT CAST(:value AS integer)", "99999999999"),
    "a NUL": ("SELECT CAST(:value AS text)", "a\0b"),
    "a NUL in JSON": ("SELECT CAST(:value AS jsonb)", '"\\u0000"'),
    "a key that is too large for its index": ("INSERT INTO label_sets (name, last_version) VALUES (:value, 1)", None),
}


@pytest.mark.postgres
@pytest.mark.parametrize(("statement", "value"), REFUSED_BY_POSTGRESQL.values(), ids=REFUSED_BY_POSTGRESQL)
async def test_a_value_that_postgresql_refuses_is_another_error_than_an_unavailable_one(
    postgres_url, opened, statement, value
):
    engine = opened(postgres_url)
    await migrate(engine)
    incompressible = "".join(map(chr, np.random.default_rng(1).integers(0x4E00, 0x9FFF, 20_000)))
    with pytest.raises(StatementRefusedError, match="refused a value or a statement"):
        await write(engine, statement, value=value or incompressible)


UNAVAILABLE = {
    "a closed connection": "SELECT pg_terminate_backend(pg_backend_pid())",
    "a statement timeout": "SET LOCAL statement_timeout = 1; SELECT pg_sleep(60)",
    "a standby": "SET TRANSACTION READ ONLY; DELETE FROM label_sets",
    "no right": "SET LOCAL ROLE pg_monitor; DELETE FROM label_sets",
    "no tables": "SET LOCAL search_path = 'nowhere'; DELETE FROM label_sets",
}


@pytest.mark.postgres
@pytest.mark.parametrize("statements", UNAVAILABLE.values(), ids=UNAVAILABLE)
async def test_a_database_that_cannot_be_used_at_the_moment_is_unavailable(postgres_url, opened, statements):
    engine = opened(postgres_url)
    await migrate(engine)
    with pytest.raises(StoreError):
        await write(engine, *statements.split(";"))


@pytest.mark.postgres
async def test_a_postgresql_database_that_is_not_utf8_is_rejected(postgres_url, opened):
    name = postgres_url.partition("?")[0].rpartition("/")[2]
    async with opened(postgres_url).connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(f"CREATE DATABASE {name}_latin ENCODING 'LATIN1' TEMPLATE template0"))
    message = await refusal_of(opened, postgres_url.replace(name, f"{name}_latin"))
    assert "has encoding LATIN1" in message
    assert "CREATE DATABASE" in message


@pytest.mark.postgres
async def test_a_connection_closed_by_the_server_is_replaced(postgres_url, opened):
    engine = opened(postgres_url)
    await migrate(engine)
    async with opened(postgres_url).connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = "
        await connection.execute(text(f"{others} current_database()"))
    await ping(engine)


async def test_the_error_for_a_folder_that_cannot_be_created_has_the_reason(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot make the folder '.*/file/sub' .*: Not a directory; make it, or name"):
        open_engine(f"sqlite:///{tmp_path / 'file' / 'sub' / 'deixis.sqlite3'}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can make files")
async def test_the_error_for_a_folder_without_write_permission_names_it(opened):
    message = await refusal_of(opened, "sqlite:////proc/self/deixis.sqlite3")
    assert "unable to open database file; make the file and its folder writable" in message


@pytest.fixture
def without_right_to_write():
    """Return a function that removes the write permission of the owner until the end of the test."""
    taken = []

    def take(path):
        taken.append((path, path.stat().st_mode))
        path.chmod(path.stat().st_mode & 0o555)
        if os.access(path, os.W_OK):
            pytest.skip("this user may write everywhere")

    yield take
    for path, mode in taken:
        path.chmod(mode)


async def test_a_read_only_folder_is_an_error(tmp_path, sqlite_url, opened, without_right_to_write):
    without_right_to_write(tmp_path)
    assert "unable to open database file; make the file and its folder writable" in await refusal_of(opened, sqlite_url)


async def test_writing_to_a_read_only_file_is_an_error(tmp_path, sqlite_url, opened, without_right_to_write):
    await migrate(opened(sqlite_url))
    without_right_to_write(tmp_path / "deixis.sqlite3")
    with pytest.raises(StoreError, match="readonly database; make the file and its folder writable"):
        await LabelSetRepository(opened(sqlite_url)).put("pets", [ClassEntry("lynx")], "photo")


async def test_a_folder_at_the_path_of_the_file_is_an_error(tmp_path, opened):
    assert "unable to open" in await refusal_of(opened, f"sqlite:///{tmp_path}")


async def test_a_file_that_is_not_a_database_is_an_error_and_not_changed(tmp_path, opened):
    file = tmp_path / "notes.txt"
    file.write_text("not a database at all, but long enough to have a header\n" * 100)
    before = file.read_bytes()
    message = await refusal_of(opened, f"sqlite:///{file}")
    assert "file is not a database; move that file away, or name another one" in message
    assert file.read_bytes() == before


@pytest.mark.parametrize("deleted", ["deixis.sqlite3", "deixis.sqlite3-wal"])
async def test_nothing_is_written_after_a_file_of_the_database_was_deleted(tmp_path, sqlite_url, opened, deleted):
    engine = opened(sqlite_url)
    await migrate(engine)
    repository = LabelSetRepository(engine)
    await repository.put("pets", [ClassEntry("lynx")], "photo")
    moved = (tmp_path / deleted).rename(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"{deleted}' was deleted .*while the service used it"):
            await repository.put("pets", [ClassEntry("owl")], "photo")
    moved.rename(tmp_path / deleted)
    await repository.put("pets", [ClassEntry("owl")], "photo")
    assert (await repository.get("pets")).version == 2


async def test_a_restart_saves_what_a_deleted_log_contained(tmp_path, sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    await LabelSetRepository(engine).put("pets", [ClassEntry("lynx")], "photo")
    (tmp_path / "deixis.sqlite3-wal").unlink()
    await engine.dispose()
    assert (await LabelSetRepository(opened(sqlite_url)).get("pets")).version == 1


async def test_another_file_in_the_place_of_the_database_is_not_used(tmp_path, sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    (tmp_path / "deixis.sqlite3").unlink()
    await migrate(opened(sqlite_url))
    with pytest.raises(StoreError, match="was deleted or replaced"):
        await ping(engine)


async def test_a_log_that_sqlite_itself_removes_is_no_error(sqlite_url, opened, repository, engine):
    if engine.dialect.name == "sqlite":
        await repository.put("pets", [ClassEntry("lynx")], "photo")
        await engine.dispose()  # the last connection removes the log
    await ping(engine)
    await repository.put("owls", [ClassEntry("owl")], "photo")


async def test_a_damaged_file_is_an_error_that_recommends_a_backup(tmp_path, sqlite_url, opened):
    await migrate(opened(sqlite_url))
    with sqlite3.connect(tmp_path / "deixis.sqlite3") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "deixis.sqlite3").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(20 * 4096))
    assert "malformed; the file is damaged" in await refusal_of(opened, sqlite_url)


async def test_a_file_locked_by_another_program_is_an_error_after_a_timeout(sqlite_url, opened, monkeypatch):
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.05)
    engine = opened(sqlite_url)
    await migrate(engine)
    async with writing(engine) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(StoreError, match="database is locked; another program holds"):
            await LabelSetRepository(opened(sqlite_url)).put("pets", [ClassEntry("lynx")], "photo")


async def test_closing_a_connection_releases_its_lock_despite_an_unfinished_statement(sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    async with writing(engine) as session:
        connection = await (await session.connection()).get_raw_connection()
        unfinished = await connection.driver_connection.execute("SELECT 1 UNION ALL SELECT 2")
        await unfinished.fetchone()
        await connection.driver_connection.close()
        async with asyncio.timeout(5):
            await LabelSetRepository(opened(sqlite_url)).put("pets", [ClassEntry("lynx")], "photo")
        await session.invalidate()
    assert unfinished is not None


async def test_a_database_without_tables_is_not_ready(url, opened):
    engine = opened(url)
    with pytest.raises(StoreError, match=r"label_sets.*start the service once, which makes the tables"):
        await ping(engine)


async def test_a_server_that_does_not_respond_is_not_ready(opened):
    silent = asyncio.Event()

    async def say_nothing(_reader, writer):
        await silent.wait()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        engine = opened(f"postgresql://deixis:hunter2@127.0.0.1:{port}/deixis")
        with pytest.raises(StoreError, match=r"did not answer within 0.2 s") as caught:
            await ping(engine, timeout_s=0.2)
        silent.set()
    assert "hunter2" not in caught.value.message


async def test_an_exhausted_connection_pool_is_an_error(sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    engine.sync_engine.pool._timeout = 0.05
    async with asyncio.timeout(10):
        async with asyncio.TaskGroup() as group:
            done = asyncio.Event()
            barrier = asyncio.Barrier(16)

            async def keep_busy():
                async with reading(engine) as session:
                    await session.execute(text("SELECT 1"))
                    await barrier.wait()
                    await done.wait()

            for _ in range(15):
                group.create_task(keep_busy())
            await barrier.wait()
            with pytest.raises(StoreError, match=r"every connection to the database at .* is busy"):
                await ping(engine)
            done.set()
