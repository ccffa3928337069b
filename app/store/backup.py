"""A backup: a folder with everything that the service keeps, which it could be started on as it is.

``deixis.sqlite3`` has the rows of the database, whatever kind that is, ``captions/`` the caption databases if they are
wanted, and ``manifest.json`` what there is, with checksums. The folder is written aside and renamed, so that it is
there whole or not at all.
"""

import asyncio
import errno
import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.captions.build import install
from app.captions.database import CURRENT, current_generation, is_database
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.names.namespaces import is_qualified_database_name
from app.runtime.atomic_files import publish, sync
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


class BackupFile(BaseModel):
    """A file of a backup."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class BackupManifest(BaseModel):
    """What a backup holds.

    Args:
        format: of the folder.
        version: of Deixis.
        revision: of the database's schema.
        created_at: when it was begun; all that was acknowledged before is in it.
        source: the kind of database.
        rows: by table.
        captions: names of the caption databases.
        files: by their path in the folder.
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
    engine: AsyncEngine, folder: Path, *, version: str, captions_dir: Path | None = None
) -> BackupManifest:
    """Write a backup of one moment, while others read and write.

    Args:
        engine: of the database.
        folder: is made, with its parents, for this user alone.
        version: of Deixis.
        captions_dir: whose databases are to be in it; None for none.

    Raises:
        ConflictError: the folder exists.
        StoreError: the database cannot be read or is of another release, or the disk is full.
    """
    created_at = datetime.now(UTC)
    revision = await schema_revision(engine)
    if revision != newest_revision():
        problem = f"the database at {location(engine.url)} has schema revision '{revision}'"
        raise StoreError(
            f"{problem}, and this release backs up '{newest_revision()}'; start it once, or use the other release"
        )
    with _aside(folder) as place:
        rows = await _write_rows(engine, place / DATABASE)
        names = await asyncio.to_thread(_copy_captions, captions_dir, place / CAPTIONS) if captions_dir else ()
        manifest = BackupManifest(
            version=version,
            revision=revision,
            created_at=created_at,
            source=engine.dialect.name,
            rows=rows,
            captions=names,
            files=await asyncio.to_thread(_files_of, place),
        )
        (place / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
    return manifest


async def _write_rows(engine: AsyncEngine, file: Path) -> dict[str, int]:
    made = open_engine(f"sqlite:///{file}")
    try:
        await migrate(made)
        async with reading_one_moment(engine) as source, writing(made) as target:
            rows = await copy_rows(await source.connection(), await target.connection())
    finally:
        await made.dispose()
    # One file, without a log beside it.
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    return rows


def _copy_captions(captions_dir: Path, place: Path) -> tuple[str, ...]:
    if not captions_dir.is_dir():
        return ()
    names = sorted(
        each.name for each in captions_dir.iterdir() if is_qualified_database_name(each.name) and is_database(each)
    )
    for name in names:
        generation = current_generation(captions_dir / name)
        shutil.copytree(captions_dir / name / generation, place / name / generation)
        (place / name / CURRENT).write_text(f"{generation}\n", "ascii")
    return tuple(names)


def read_backup(folder: Path) -> BackupManifest:
    """Return what a backup holds, after every file was compared with its checksum.

    Raises:
        StoreError: it is none, is damaged, or of a newer release.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict) and content.get("format") not in {None, 1}:
            raise StoreError(f"'{folder}' has the format {content['format']} of a newer release; restore it with that")
        manifest = BackupManifest.model_validate(content)
    except FileNotFoundError as error:
        raise StoreError(f"'{folder}' holds no backup: there is no {MANIFEST} in it") from error
    except OSError as error:
        raise StoreError(f"'{file}' cannot be read: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise StoreError(f"'{file}' is damaged; use another backup") from error
    for name, told in manifest.files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise StoreError(f"'{folder / name}' is missing; use another backup")
        if path.stat().st_size != told.bytes or _sha256_of(path) != told.sha256:
            raise StoreError(f"'{folder / name}' is damaged, its checksum is another one; use another backup")
    if DATABASE not in manifest.files:
        raise StoreError(f"'{file}' names no {DATABASE}; use another backup")
    return manifest


async def restore_backup(
    engine: AsyncEngine, folder: Path, *, replace: bool = False, captions_dir: Path | None = None
) -> BackupManifest:
    """Bring back what a backup holds; in one transaction, so that it is all there or nothing has changed.

    No server may use the database meanwhile: it would go on answering from what it has in memory.

    Args:
        engine: of the database, which is brought up to date.
        folder: of the backup, which may be of an older release.
        replace: delete what the database holds.
        captions_dir: where its caption databases go, over those of the same name; None leaves them out.

    Raises:
        StoreError: as ``read_backup``, or the database cannot be written.
        ConflictError: the database holds something, or a caption database is being built.
        InvalidFieldError: the backup has no caption databases, and they are asked for.
    """
    manifest = await asyncio.to_thread(read_backup, folder)
    if captions_dir is not None and not manifest.captions:
        raise InvalidFieldError.of("--captions", f"'{folder}' has no caption databases; leave it out")
    async with _opened(folder / DATABASE) as backup:
        await migrate(engine)
        async with reading_one_moment(backup) as source, writing(engine) as target:
            connection = await target.connection()
            present = {table: count for table, count in (await row_counts(connection)).items() if count}
            if present and not replace:
                told = ", ".join(f"{count:,} {table}" for table, count in present.items())
                problem = f"the database at {location(engine.url)} holds {told}"
                raise ConflictError(f"{problem}; name an empty one in DEIXIS_DATABASE_URL, or give --replace")
            await delete_rows(connection)
            rows = await copy_rows(await source.connection(), connection)
            if any(rows.get(table) != count for table, count in manifest.rows.items() if count):
                raise StoreError(f"'{folder}' does not hold the rows that its {MANIFEST} tells; use another backup")
    if captions_dir is not None:
        for name in manifest.captions:
            place = folder / CAPTIONS / name
            await asyncio.to_thread(install, place / current_generation(place), captions_dir / name)
    return manifest


@asynccontextmanager
async def _opened(file: Path) -> AsyncIterator[AsyncEngine]:
    """Open a copy of the database of a backup, brought up to date, so that the backup stays as it is."""
    with tempfile.TemporaryDirectory(prefix="deixis-restore-") as place:
        copy = Path(place) / DATABASE
        with _disk_errors(copy.parent):
            await asyncio.to_thread(shutil.copyfile, file, copy)
        engine = open_engine(f"sqlite:///{copy}")
        try:
            await migrate(engine)
            yield engine
        finally:
            await engine.dispose()


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Yield a folder beside, which takes the name when everything in it is on the disk."""
    if folder.exists():
        raise ConflictError(f"'{folder}' exists, and no backup is written over; name a new folder")
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # for this user alone
        try:
            yield place
            for each in place.rglob("*"):
                sync(each)
            publish(place, folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _files_of(place: Path) -> dict[str, BackupFile]:
    files = sorted(each for each in place.rglob("*") if each.is_file())
    return {
        each.relative_to(place).as_posix(): BackupFile(bytes=each.stat().st_size, sha256=_sha256_of(each))
        for each in files
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
            raise StoreError(f"there is no room left on the disk of '{folder}'; make room") from error
        raise StoreError(f"'{error.filename or folder}' cannot be written: {error.strerror}") from error
