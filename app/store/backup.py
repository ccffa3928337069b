"""Backups: a folder with everything that the service stores, which can also serve as its data folder.

``deixis.sqlite3`` contains the rows of the database, SQLite or PostgreSQL; ``captions/`` optionally contains the
caption databases; ``manifest.json`` lists the contents with checksums. The folder is written under a temporary name and
renamed at the end, so a backup is complete or does not exist.
"""

import asyncio
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.errors import ConflictError, InvalidFieldError, StoreError
from app.names.namespaces import is_qualified_database_name
from app.runtime.atomic_files import publish, sync
from app.runtime.temporary_folders import temporary_folder
from app.store.copying import copy_rows, delete_rows, row_counts
from app.store.database import (
    location,
    migrate,
    newest_revision,
    open_engine,
    reading_one_moment,
    schema_revision,
    writing,
)

DATABASE = "deixis.sqlite3"
CAPTIONS = "captions"
MANIFEST = "manifest.json"

_BUILDING = ".deixis-backup-"
_RESTORING = "deixis-restore-"

CopyCaptions = Callable[[Path], Sequence[str]]
"""Copies the caption databases into a folder, and returns their names."""

RestoreCaptions = Callable[[Path, Sequence[str]], None]
"""Restores the caption databases of these names from a folder."""


class BackupFile(BaseModel):
    """A file of a backup."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class BackupManifest(BaseModel):
    """The contents of a backup.

    Args:
        format: the format of the folder.
        version: the version of Deixis.
        revision: the schema revision of the database.
        created_at: the start of the backup; it contains everything that was acknowledged before.
        source: the kind of database.
        rows: the number of rows by table.
        captions: the names of the caption databases.
        files: the files by their path in the folder.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    version: str
    revision: str
    created_at: datetime
    source: str
    rows: Mapping[str, int]
    captions: tuple[str, ...] = ()
    files: Mapping[str, BackupFile]


async def write_backup(
    engine: AsyncEngine, folder: Path, *, version: str, copy_captions: CopyCaptions | None = None
) -> BackupManifest:
    """Write a consistent backup of the database while the service reads and writes it.

    Args:
        engine: of the database.
        folder: the new folder; its parents are created, and only this user may read it.
        version: the version of Deixis.
        copy_captions: adds the caption databases to the backup; None leaves them out.

    Raises:
        ConflictError: the folder exists.
        StoreError: the database cannot be read or has another schema revision, or the disk is full.
    """
    created_at = datetime.now(UTC)
    revision = await schema_revision(engine)
    if revision != newest_revision():
        problem = f"the database at {location(engine.url)} has schema revision '{revision}'"
        raise StoreError(
            f"{problem}, and this release backs up '{newest_revision()}'; start it once, or use the other release"
        )
    with _temporary_folder(folder) as building:
        rows = await _write_rows(engine, building / DATABASE)
        captions = () if copy_captions is None else await asyncio.to_thread(copy_captions, building / CAPTIONS)
        manifest = BackupManifest(
            version=version,
            revision=revision,
            created_at=created_at,
            source=engine.dialect.name,
            rows=rows,
            captions=tuple(captions),
            files=await asyncio.to_thread(_files_of, building),
        )
        (building / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
    return manifest


async def _write_rows(engine: AsyncEngine, file: Path) -> dict[str, int]:
    copy = open_engine(f"sqlite:///{file}")
    try:
        await migrate(copy)
        async with reading_one_moment(engine) as source, writing(copy) as target:
            rows = await copy_rows(await source.connection(), await target.connection())
    finally:
        await copy.dispose()
    # Merges the write-ahead log into the file and removes it.
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    return rows


def read_backup(folder: Path) -> BackupManifest:
    """Compare every file of a backup with its checksum, and return the manifest.

    Raises:
        StoreError: the folder is not a backup, is damaged, or was written by a newer release.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict) and content.get("format") not in {None, 1}:
            problem = f"'{folder}' has the format {content['format']} of a newer release"
            raise StoreError(f"{problem}; restore it with that release")
        manifest = BackupManifest.model_validate(content)
    except FileNotFoundError as error:
        raise StoreError(
            f"'{folder}' is not a backup: it has no {MANIFEST}; name a folder that `deixis backup` wrote"
        ) from error
    except OSError as error:
        raise StoreError(f"'{file}' cannot be read: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise StoreError(f"'{file}' is damaged; use another backup") from error
    for name, expected in manifest.files.items():
        path = Path(os.path.realpath(folder / name.replace("\0", "?")))
        if not path.is_relative_to(os.path.realpath(folder)) or not path.is_file():
            raise StoreError(f"'{folder / name}' is missing; use another backup")
        if path.stat().st_size != expected.bytes or _sha256_of(path) != expected.sha256:
            raise StoreError(f"'{folder / name}' is damaged, its checksum is wrong; use another backup")
    for name in manifest.captions:
        if not is_qualified_database_name(name):
            raise StoreError(f"'{file}' is damaged: '{name[:80]}' is no name of a caption database; use another backup")
    if DATABASE not in manifest.files:
        raise StoreError(f"'{file}' does not list {DATABASE}; use another backup")
    return manifest


async def restore_backup(
    engine: AsyncEngine, folder: Path, *, replace: bool = False, restore_captions: RestoreCaptions | None = None
) -> BackupManifest:
    """Restore a backup. The rows are restored in one transaction: all of them or none.

    No server may use the database meanwhile, because it would continue to answer from its caches.

    Args:
        engine: of the database, which is migrated to this release.
        folder: of the backup, which an older release may have written.
        replace: delete the rows that the database has.
        restore_captions: restores the caption databases; None leaves them out.

    Raises:
        StoreError: as ``read_backup``, or the database cannot be written.
        ConflictError: the database has rows, or a caption database is being built.
        InvalidFieldError: ``restore_captions`` is given, and the backup has no caption databases.
    """
    manifest = await asyncio.to_thread(read_backup, folder)
    if restore_captions is not None and not manifest.captions:
        raise InvalidFieldError.of("--captions", f"'{folder}' has no caption databases; omit this option")
    async with _opened(folder / DATABASE) as backup:
        await migrate(engine)
        async with reading_one_moment(backup) as source, writing(engine) as target:
            connection = await target.connection()
            present = {table: count for table, count in (await row_counts(connection)).items() if count}
            if present and not replace:
                listed = ", ".join(f"{count:,} {table}" for table, count in present.items())
                problem = f"the database at {location(engine.url)} contains {listed}"
                raise ConflictError(f"{problem}; name an empty one in DEIXIS_DATABASE_URL, or give --replace")
            await delete_rows(connection)
            rows = await copy_rows(await source.connection(), connection)
            if any(rows.get(table) != count for table, count in manifest.rows.items() if count):
                raise StoreError(f"'{folder}' does not contain the rows that its {MANIFEST} lists; use another backup")
    if restore_captions is not None:
        await asyncio.to_thread(restore_captions, folder / CAPTIONS, manifest.captions)
    return manifest


@asynccontextmanager
async def _opened(file: Path) -> AsyncIterator[AsyncEngine]:
    """Open a migrated copy of a backup's database, so that the backup itself does not change."""
    with ExitStack() as opened:
        with _disk_errors(Path("the folder for temporary files")):
            copy = opened.enter_context(temporary_folder(Path(tempfile.gettempdir()), _RESTORING)) / DATABASE
            await asyncio.to_thread(shutil.copyfile, file, copy)
        engine = open_engine(f"sqlite:///{copy}")
        try:
            await migrate(engine)
            yield engine
        finally:
            await engine.dispose()


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that only this user may read; when the block ends it is synced and renamed."""
    if folder.exists():
        raise ConflictError(f"'{folder}' exists, and a backup never overwrites anything; name a new folder")
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent, _BUILDING) as temporary:
            yield temporary
            for path in temporary.rglob("*"):
                sync(path)
            publish(temporary, folder)


def _files_of(folder: Path) -> dict[str, BackupFile]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): BackupFile(bytes=path.stat().st_size, sha256=_sha256_of(path))
        for path in files
    }


def _sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StoreError(f"the disk of '{folder}' is full; free some space") from error
        raise StoreError(f"'{error.filename or folder}' cannot be written: {error.strerror}") from error
