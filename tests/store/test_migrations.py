import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import UniqueConstraint, inspect, text

from app.errors import StoreError
from app.names.namespaces import OPEN_NAMESPACE
from app.store import database
from app.store.database import downgrade, migrate, schema_revision
from app.store.examples import ExampleCounts, ExampleRepository, NewExample
from app.store.jobs import JobRepository
from app.store.keys import Key, KeyRepository
from app.store.label_sets import LabelSetRepository
from app.store.tables import SCHEMA_VERSION_TABLE, Base
from app.types import ClassEntry, Scope

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]

STARTING = """
import asyncio, sys
from app.store.database import migrate, open_engine, ping

async def start(url):
    engine = open_engine(url)
    print("ready", flush=True)
    sys.stdin.readline()
    await migrate(engine)
    await ping(engine)
    await engine.dispose()

asyncio.run(start(sys.argv[1]))
"""


def differences(connection):
    options = {"version_table": SCHEMA_VERSION_TABLE, "compare_type": True, "compare_server_default": True}
    return compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)


async def table_names(engine):
    async with engine.connect() as connection:
        return set(await connection.run_sync(lambda connection: inspect(connection).get_table_names()))


async def revision_of(engine):
    async with engine.connect() as connection:
        return await connection.scalar(text(f"SELECT version_num FROM {SCHEMA_VERSION_TABLE}"))


async def test_migrations_produce_the_tables_of_the_code(engine):
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_difference_between_migrations_and_code_is_detected(engine):
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE label_set_versions ADD COLUMN stray TEXT"))
    async with engine.connect() as connection:
        assert len(await connection.run_sync(differences)) == 1


def counts_on(table):
    """Return whether SQLite never reuses ids of the table; SQLAlchemy cannot name the primary key of such a table."""
    return table.dialect_options["sqlite"]["autoincrement"]


async def test_constraints_have_the_names_of_the_code(engine):
    tables = Base.metadata.sorted_tables
    unnamed = [table for table in tables if engine.dialect.name == "sqlite" and counts_on(table)]

    def names(connection):
        inspector = inspect(connection)
        return (
            [inspector.get_pk_constraint(table.name)["name"] for table in tables],
            [key["name"] for table in tables for key in inspector.get_foreign_keys(table.name)],
            [unique["name"] for table in tables for unique in inspector.get_unique_constraints(table.name)],
        )

    async with engine.connect() as connection:
        assert await connection.run_sync(names) == (
            [None if table in unnamed else table.primary_key.name for table in tables],
            [key.name for table in tables for key in table.foreign_key_constraints],
            [
                constraint.name
                for table in tables
                for constraint in table.constraints
                if isinstance(constraint, UniqueConstraint)
            ],
        )


async def test_sqlite_never_reuses_ids_of_autoincrement_tables(sqlite_url, opened):
    engine = opened(sqlite_url)
    await migrate(engine)
    async with engine.connect() as connection:
        made = await connection.execute(text("SELECT name FROM sqlite_master WHERE sql LIKE '% AUTOINCREMENT%'"))
    assert set(made.scalars()) == {table.name for table in Base.metadata.sorted_tables if counts_on(table)}


def upgrade_to(connection, revision):
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


async def test_label_sets_older_than_examples_have_none_at_revision_0(url, opened):
    engine = opened(url)
    now = "2025-01-01 00:00:00"
    async with engine.begin() as connection:
        await connection.run_sync(upgrade_to, "0003")
        await connection.execute(text(f"INSERT INTO label_sets VALUES ('pets', 1, NULL, '{now}')"))
        classes = '[{"name":"lynx"}]'
        version = f"INSERT INTO label_set_versions VALUES ('pets', 1, '{classes}', 'photo', '{now}', 'mean')"
        await connection.execute(text(version))
    await migrate(engine)
    assert (await LabelSetRepository(engine).get("pets")).classnames == ("lynx",)
    assert await ExampleRepository(engine).counts("pets") == ExampleCounts(0, {}, 0, 0, 0, 0)


async def test_a_second_migration_changes_nothing(engine, repository):
    put, _ = await repository.put("pets", [ClassEntry("lynx")], "photo")
    await migrate(engine)
    assert await repository.get("pets") == put


async def test_a_newer_schema_is_rejected_with_its_revision_and_not_changed(engine, repository):
    put, _ = await repository.put("pets", [ClassEntry("lynx")], "photo")
    async with engine.begin() as connection:
        await connection.execute(text(f"UPDATE {SCHEMA_VERSION_TABLE} SET version_num = '0999'"))
    with pytest.raises(StoreError, match=r"revision '0999', but this release knows only up to '\d{4}'; install the"):
        await migrate(engine)
    assert await revision_of(engine) == "0999"
    assert await repository.get("pets") == put


async def test_a_failed_migration_is_rolled_back(url, opened):
    engine = opened(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE label_set_versions (somebody_elses TEXT)"))
    with pytest.raises(StoreError, match="already exists; name a database that is empty or was made by Deixis"):
        await migrate(engine)
    assert await table_names(engine) == {"label_set_versions"}


async def test_a_migration_waits_for_that_of_another_engine(url, opened):
    engines = [opened(url) for _ in range(5)]
    async with asyncio.timeout(30):
        await asyncio.gather(*(migrate(engine) for engine in engines))
    assert await revision_of(engines[0]) is not None


def start_at_once(url, processes):
    """Return the standard error and the exit status of each process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-W", "error", "-c", STARTING, url]
    started = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(processes)]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [(process.communicate(timeout=60)[1], process.returncode) for process in started]


async def test_concurrent_starts_migrate_once(url, opened):
    assert start_at_once(url, processes=3) == [("", 0)] * 3
    assert (await LabelSetRepository(opened(url)).put("pets", [ClassEntry("lynx")], "photo"))[1]


async def test_migrations_are_found_in_an_installed_package(sqlite_url, opened, tmp_path, monkeypatch):
    elsewhere = tmp_path / "100% new: folder, with 'signs'"
    shutil.copytree(database.MIGRATIONS, elsewhere)
    monkeypatch.setattr(database, "MIGRATIONS", elsewhere)
    engine = opened(sqlite_url)
    await migrate(engine)
    assert {*Base.metadata.tables, SCHEMA_VERSION_TABLE} == await table_names(engine)


async def schema_of(engine):
    """Return the schema that the database reports, independent of the order of columns."""

    def reflect(connection):
        inspector = inspect(connection)
        return {
            name: (
                {
                    get_column["name"]: (str(get_column["type"]), get_column["nullable"])
                    for get_column in inspector.get_columns(name)
                },
                inspector.get_pk_constraint(name)["constrained_columns"],
                sorted(
                    (get_index["name"] or "", *get_index["column_names"]) for get_index in inspector.get_indexes(name)
                ),
                sorted(
                    (get_foreign_key["name"] or "", get_foreign_key["referred_table"])
                    for get_foreign_key in inspector.get_foreign_keys(name)
                ),
            )
            for name in inspector.get_table_names()
        }

    async with engine.connect() as connection:
        return await connection.run_sync(reflect)


REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009")


def test_the_names_of_files_are_the_revisions_of_alembic_in_order():
    newest_first = [script.revision for script in ScriptDirectory(str(database.MIGRATIONS)).walk_revisions()]
    assert database.revisions() == newest_first[::-1] == list(REVISIONS)


def test_a_start_without_a_pending_migration_does_not_import_alembic(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "deixis.sqlite3")
    program = (
        "import asyncio, sys; from app.store.database import migrate, open_engine;"
        "asyncio.run(migrate(open_engine(sys.argv[1]))); print('alembic' in sys.modules)"
    )
    url = f"sqlite:///{tmp_path / 'deixis.sqlite3'}"
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("revision", REVISIONS[:-1])
async def test_a_downgrade_to_each_revision_and_an_upgrade_restore_the_schema(engine, repository, revision):
    put, _ = await repository.put("pets", [ClassEntry("lynx")], "photo")
    await engine_filled(engine)
    arrived = await schema_of(engine)
    await downgrade(engine, revision)
    assert await revision_of(engine) == revision
    taken_back = await schema_of(engine)
    await migrate(engine)
    assert await schema_of(engine) == arrived
    assert (await repository.get("pets")).classes == put.classes
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await downgrade(engine, revision)
    assert await schema_of(engine) == taken_back


async def engine_filled(engine):
    """Insert a row into every table of later revisions."""
    await KeyRepository(engine).add(Key("0123456789ab", Scope.ADMIN, OPEN_NAMESPACE), bytes(32))
    await JobRepository(engine).add("describe", "pets", {}, total=3)
    await ExampleRepository(engine).add("pets", [NewExample(bytes(32), ("lynx",), {"fake": np.ones(2, np.float16)})])


async def test_a_downgrade_deletes_newer_tables_and_keeps_the_others(engine, repository):
    await repository.put("pets", [ClassEntry("lynx")], "photo")
    await engine_filled(engine)
    await downgrade(engine, "0004")
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT label_set FROM jobs")) == "pets"
        assert await connection.scalar(text("SELECT count(*) FROM example_features")) == 1
    await downgrade(engine, "0001")
    assert await table_names(engine) == {"label_sets", "label_set_versions", SCHEMA_VERSION_TABLE}
    await migrate(engine)
    assert (await repository.get("pets")).classnames == ("lynx",)
    assert await KeyRepository(engine).list() == []
    assert await ExampleRepository(engine).counts("pets") == ExampleCounts(0, {}, 0, 0, 0, 0)


@pytest.mark.parametrize("revision", [REVISIONS[-1], "0999", "", "base", "-1", "head"])
async def test_a_downgrade_requires_an_older_revision(engine, revision):
    with pytest.raises(StoreError, match="no older one is called"):
        await downgrade(engine, revision)
    assert await revision_of(engine) == REVISIONS[-1]


async def test_an_empty_database_has_no_revision_and_cannot_be_downgraded(url, opened):
    engine = opened(url)
    assert await schema_revision(engine) is None
    with pytest.raises(StoreError, match="revision 'none'"):
        await downgrade(engine, "0001")


async def test_stored_results_of_evaluations_are_converted_to_the_cells_that_are_not_zero(url, opened):
    engine = opened(url)
    now = "2025-01-01 00:00:00"
    rows = [
        {"name": name, "support": support, "predicted": predicted, "correct": 1}
        for name, support, predicted in (("lynx", 1, 2), ("puma", 2, 1), ("ocelot", 0, 0))
    ]
    result = {
        "methods": [{"method": "gda", "evaluation": {"classes": rows, "confusion": [[1, 0, 0], [1, 1, 0], [0] * 3]}}]
    }
    columns = "id, kind, subject, status, request, done, total, result, created_at"
    async with engine.begin() as connection:
        await connection.run_sync(upgrade_to, "0006")
        for job_id, subject, status, stored in (
            ("old", "acme#pets", "succeeded", json.dumps(result)),
            ("failed", "pets", "failed", None),
        ):
            await connection.execute(
                text(f"INSERT INTO jobs ({columns}) VALUES (:id, 'evaluate', :s, :t, '{{}}', 1, 1, :r, '{now}')"),
                {"id": job_id, "s": subject, "t": status, "r": stored},
            )
    await migrate(engine)
    jobs = JobRepository(engine)
    (method,) = (await jobs.get("old")).result["methods"]
    assert method["evaluation"] == {
        "classes": rows[:2],
        "class_count": 2,
        "confusion": [
            {"label": "lynx", "predicted": "lynx", "count": 1},
            {"label": "puma", "predicted": "lynx", "count": 1},
            {"label": "puma", "predicted": "puma", "count": 1},
        ],
        "confusion_count": 3,
    }
    async with engine.connect() as connection:
        found = dict((await connection.execute(text("SELECT id, namespace FROM jobs"))).all())
    assert found == {"old": "acme", "failed": ""}
    await downgrade(engine, "0006")
    await migrate(engine)
    assert (await jobs.get("old")).result["methods"] == [method]
