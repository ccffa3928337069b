"""Backups of each database kind, restored into each kind."""

import json
import shutil
import sqlite3
import stat
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pytest
from sqlalchemy import select, text

from app.captions.backup import copy_databases, restore_databases
from app.captions.database import CaptionDatabase
from app.captions.generations import current_generation
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.names.namespaces import Namespace
from app.store import backup as backup_module
from app.store import copying
from app.store.backup import DATABASE, MANIFEST, read_backup, restore_backup, write_backup
from app.store.database import downgrade, migrate, open_engine, schema_revision
from app.store.drafts import DraftRepository
from app.store.examples import ExampleRepository, NewExample
from app.store.jobs import JobRepository
from app.store.keys import Key, KeyRepository
from app.store.label_sets import LabelSetRepository
from app.store.tables import Base
from app.types import ClassEntry, Scope
from tests.captions_made import made

pytestmark = pytest.mark.anyio

FEATURE = {"fake": np.array([0.6, 0.8], np.float16)}


@pytest.fixture
async def filled(engine):
    """Return a database with rows in every table, and with ids of deleted rows."""
    sets = LabelSetRepository(engine)
    await sets.put("pets", [ClassEntry("lynx", descriptions=("tufted ears", 'quotes " and \\ 猫'))], "photo")
    await sets.put("pets", [ClassEntry("lynx"), ClassEntry("puma"), ClassEntry("猫")], "{} im Zoo")
    await sets.put("acme#gone", [ClassEntry("dodo")], "photo")
    await sets.delete("acme#gone")
    examples = ExampleRepository(engine)
    items = [NewExample(bytes([n]) * 32, ("lynx", "puma")[: n % 3], FEATURE, bytes([n]) * 999) for n in range(9)]
    added = await examples.add("pets", items)
    await examples.delete("pets", ids=[added.ids[-1]])
    await JobRepository(engine).add("describe", "pets", {"question": "how?"}, total=3, attachment=bytes(range(256)))
    await KeyRepository(engine).add(Key("0123456789ab", Scope.WRITE, Namespace("acme"), rate="60/minute"), bytes(32))
    return engine


async def content_of(engine):
    """Return the rows of every table as Python values."""
    async with engine.connect() as connection:
        return {
            table.name: sorted(map(repr, await connection.execute(select(table))))
            for table in Base.metadata.sorted_tables
        }


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def other(request, opened, tmp_path):
    """Return another empty database, of each kind."""
    if request.param == "sqlite":
        return opened(f"sqlite:///{tmp_path / 'other' / 'deixis.sqlite3'}")
    return opened(request.getfixturevalue("other_postgres_url"))


@pytest.fixture
def other_postgres_url(postgres_server):
    import psycopg

    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE restored")
    yield postgres_server.replace("/postgres?", "/restored?")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("DROP DATABASE restored WITH (FORCE)")


@pytest.fixture
async def folder(filled, tmp_path):
    await write_backup(filled, tmp_path / "backup", version="1.2.3")
    return tmp_path / "backup"


async def test_a_restored_database_equals_the_original(filled, folder, other):
    manifest = await restore_backup(other, folder)
    assert await content_of(other) == await content_of(filled)
    assert manifest.rows["examples"] == 8
    found = await LabelSetRepository(other).get("pets", 1)
    assert found.classes[0].descriptions == ("tufted ears", 'quotes " and \\ 猫')


async def test_ids_of_deleted_rows_are_not_reused_after_a_restore(filled, folder, other):
    await restore_backup(other, folder)
    for engine in (filled, other):
        again, _ = await LabelSetRepository(engine).put("acme#gone", [ClassEntry("dodo")], "photo")
        assert again.version == 2
    new = [NewExample(bytes([99]) * 32, (), FEATURE)]
    ids = [(await ExampleRepository(engine).add("pets", new)).ids for engine in (filled, other)]
    assert ids[0] == ids[1]


async def test_an_empty_database_can_be_backed_up_and_restored(engine, other, tmp_path):
    await write_backup(engine, tmp_path / "backup", version="")
    await restore_backup(other, tmp_path / "backup")
    await LabelSetRepository(other).put("pets", [ClassEntry("lynx")], "photo")
    added = await ExampleRepository(other).add("pets", [NewExample(bytes(32), (), FEATURE)])
    assert added.ids == (1,)


async def test_tables_with_large_rows_are_copied_in_small_batches(filled, tmp_path, other, monkeypatch):
    monkeypatch.setattr(copying, "_BYTES_AT_ONCE", 2500)
    async with filled.connect() as connection:
        at_once = {table.name: await copying._rows_at_once(connection, table) for table in Base.metadata.sorted_tables}
    assert at_once["examples"] == 2
    assert at_once["label_sets"] == 1000
    await write_backup(filled, tmp_path / "backup", version="")
    await restore_backup(other, tmp_path / "backup")
    assert await content_of(other) == await content_of(filled)


async def test_the_manifest_lists_the_tables_and_the_revision(filled, folder):
    manifest = read_backup(folder)
    assert manifest.version == "1.2.3"
    assert manifest.revision == await schema_revision(filled)
    assert manifest.source == filled.dialect.name
    assert (datetime.now(UTC) - manifest.created_at).total_seconds() < 600
    assert set(manifest.files) == {DATABASE}
    assert manifest.rows == {name: len(rows) for name, rows in (await content_of(filled)).items()}


async def test_a_backup_is_readable_by_its_owner_only_and_has_no_write_ahead_log(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == [DATABASE, MANIFEST]
    with closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_an_existing_folder_is_not_overwritten(filled, folder, tmp_path):
    before = (folder / DATABASE).read_bytes()
    for taken in (folder, tmp_path):
        with pytest.raises(ConflictError, match="a backup never overwrites anything"):
            await write_backup(filled, taken, version="")
    assert (folder / DATABASE).read_bytes() == before


async def test_a_failed_backup_leaves_no_files(filled, tmp_path, monkeypatch):
    async def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_module, "copy_rows", fails)
    place = tmp_path / "new"
    with pytest.raises(StoreError, match="is full; free some space"):
        await write_backup(filled, place / "backup", version="")
    assert list(place.iterdir()) == []


async def test_what_killed_processes_left_is_removed_by_the_next_backup_and_restore(
    filled, tmp_path, other, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (".deixis-backup-killed", "deixis-restore-killed"):
        (tmp_path / name / "content").mkdir(parents=True)
        (tmp_path / name / "content" / DATABASE).write_bytes(bytes(100))
    await write_backup(filled, tmp_path / "backup", version="")
    await restore_backup(other, tmp_path / "backup")
    assert not [path for path in tmp_path.iterdir() if "killed" in path.name]


async def test_a_database_of_another_revision_is_not_backed_up(filled, tmp_path):
    await downgrade(filled, "0003")
    with pytest.raises(StoreError, match="revision '0003', and this release backs up"):
        await write_backup(filled, tmp_path / "backup", version="")


async def test_a_database_with_rows_is_replaced_only_if_requested(filled, folder, other):
    await migrate(other)
    await LabelSetRepository(other).put("mine", [ClassEntry("a")], "photo")
    before = await content_of(other)
    with pytest.raises(ConflictError, match="contains 1 label_sets, 1 label_set_versions; name an empty one"):
        await restore_backup(other, folder)
    assert await content_of(other) == before
    await restore_backup(other, folder, replace=True)
    assert await content_of(other) == await content_of(filled)


async def test_a_failed_restore_changes_nothing(filled, folder, other, monkeypatch):
    await migrate(other)
    await LabelSetRepository(other).put("mine", [ClassEntry("a")], "photo")
    before = await content_of(other)

    async def copies_and_fails(source, target):
        await copying.copy_rows(source, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_module, "copy_rows", copies_and_fails)
    with pytest.raises(OSError, match="No space"):
        await restore_backup(other, folder, replace=True)
    assert await content_of(other) == before


async def test_a_restore_names_an_unusable_folder_for_temporary_files(filled, folder, other, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(StoreError, match="cannot be written: No such file or directory"):
        await restore_backup(other, folder)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit": (lambda folder: flip(folder / DATABASE), "is damaged, its checksum"),
    "cut short": (lambda folder: (folder / DATABASE).write_bytes(bytes(100)), "is damaged, its checksum"),
    "no database": (lambda folder: (folder / DATABASE).unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "is not a backup"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"format": 1,'), "is damaged"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged"),
    "a newer format": (lambda folder: changed(folder, format=2), "the format 2 of a newer release"),
    "other rows": (lambda folder: changed(folder, rows={"label_sets": 77}), "does not contain the rows"),
    "a path": (lambda folder: changed(folder, files={"../x": {"bytes": 0, "sha256": ""}}), "is missing"),
    "NUL": (lambda folder: changed(folder, files={"a\0b": {"bytes": 0, "sha256": ""}}), "is missing"),
    "captions outside": (lambda folder: changed(folder, captions=["../../x"]), "is no name of a caption database"),
    "no files": (lambda folder: changed(folder, files={}), "does not list deixis.sqlite3"),
    "no folder": (shutil.rmtree, "is not a backup"),
}


def changed(folder, **more):
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | more))


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_backup_is_rejected_before_anything_changes(filled, folder, damage):
    (folder.parent / "x").touch()
    harm, message = DAMAGE[damage]
    harm(folder)
    before = await content_of(filled)
    with pytest.raises(StoreError, match=message):
        await restore_backup(filled, folder, replace=True)
    assert await content_of(filled) == before


async def test_a_backup_of_an_older_revision_is_migrated_in_the_target_only(filled, folder, other):
    old = open_engine(f"sqlite:///{folder / DATABASE}")
    await downgrade(old, "0004")
    await old.dispose()
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    files = backup_module._files_of(folder)
    changed(folder, files={DATABASE: files[DATABASE].model_dump()}, revision="0004", rows={"label_sets": 2})
    before = (folder / DATABASE).read_bytes()
    await restore_backup(other, folder)
    assert (folder / DATABASE).read_bytes() == before
    assert (await LabelSetRepository(other).get("pets")).version == 2
    assert await KeyRepository(other).list() == []


async def test_a_backup_of_a_newer_revision_is_rejected(filled, folder, other):
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        connection.execute("UPDATE deixis_schema SET version_num = '0999'")
    files = backup_module._files_of(folder)
    changed(folder, files={DATABASE: files[DATABASE].model_dump()})
    with pytest.raises(StoreError, match="revision '0999', but this release knows only"):
        await restore_backup(other, folder)


async def test_a_backup_is_a_consistent_snapshot(filled, tmp_path, other, monkeypatch):
    """Transactions during the copy are included completely or not at all."""

    async def copy_and_write(source, target):
        await source.execute(text("SELECT count(*) FROM label_sets"))  # the start of the snapshot
        await LabelSetRepository(filled).put("late", [ClassEntry("a")], "photo")
        return await copying.copy_rows(source, target)

    monkeypatch.setattr(backup_module, "copy_rows", copy_and_write)
    manifest = await write_backup(filled, tmp_path / "backup", version="")
    monkeypatch.undo()
    await restore_backup(other, tmp_path / "backup")
    assert manifest.rows["label_sets"] == 2
    assert {item.name for item in await LabelSetRepository(other).list(99)} == {"pets"}
    assert {item.name for item in await LabelSetRepository(filled).list(99)} == {"pets", "late"}


async def test_caption_databases_are_backed_up_and_restored_on_request(engine, tmp_path):
    captions = tmp_path / "captions"
    made(captions / "things")
    made(captions / "acme#toys")
    (captions / "things.building").mkdir()
    (captions / "stray").write_text("")
    manifest = await write_backup(
        engine, tmp_path / "backup", version="", copy_captions=partial(copy_databases, captions)
    )
    assert manifest.captions == ("acme#toys", "things")
    again = tmp_path / "again"
    await restore_backup(engine, tmp_path / "backup", restore_captions=partial(restore_databases, again))
    for name in manifest.captions:
        restored = CaptionDatabase.open(again / name, fingerprint=None, verify=True)
        assert list(restored.captions(range(len(restored)))) == list(
            CaptionDatabase.open(captions / name, fingerprint=None).captions(range(len(restored)))
        )
    generation = current_generation(again / "things")
    await restore_backup(
        engine, tmp_path / "backup", restore_captions=partial(restore_databases, again)
    )  # replaces existing databases
    assert current_generation(again / "things") == generation
    flip(next((tmp_path / "backup" / "captions").rglob("features.npy")))
    with pytest.raises(StoreError, match="damaged"):
        await restore_backup(engine, tmp_path / "backup", restore_captions=partial(restore_databases, again))


async def test_a_backup_without_caption_databases_restores_none(engine, tmp_path):
    await write_backup(
        engine, tmp_path / "backup", version="", copy_captions=partial(copy_databases, tmp_path / "nowhere")
    )
    with pytest.raises(InvalidFieldError, match="has no caption databases"):
        await restore_backup(
            engine, tmp_path / "backup", restore_captions=partial(restore_databases, tmp_path / "again")
        )


async def test_the_database_file_of_a_backup_can_be_served(filled, folder, opened, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    engine = opened(f"sqlite:///{tmp_path / 'data' / DATABASE}")
    await migrate(engine)
    assert (await LabelSetRepository(engine).get("pets")).version == 2
    assert await DraftRepository(engine).list("pets", limit=9) == []
