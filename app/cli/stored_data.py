"""What `deixis keys`, `backup`, `restore` and `database` do in the database of the settings, without a service."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.api.auth import keys
from app.api.auth.policy import parse_rate
from app.captions.backup import copy_databases, restore_databases
from app.cli.common import run
from app.names.namespaces import clean_namespace
from app.observability.logs import configure_logs
from app.settings import Settings, load_settings
from app.store import database
from app.store.backup import BackupManifest, restore_backup, write_backup
from app.store.keys import Key, KeyRepository
from app.types import Scope

_Result = TypeVar("_Result")


def create_key(
    scope: Scope, namespace: str, *, note: str, rate: str | None, image_rate: str | None, concurrency: int | None
) -> tuple[str, Key]:
    """Create a key; return its text, which cannot be shown again, and its record."""

    async def create(repository: KeyRepository) -> tuple[str, Key]:
        key = Key(
            "",
            scope,
            clean_namespace(namespace, "--namespace"),
            note=note,
            rate=parse_rate(rate, "--rate"),
            image_rate=parse_rate(image_rate, "--image-rate"),
            concurrency=concurrency,
        )
        return await keys.create_key(repository, key)

    return _with_keys(create)


def list_keys() -> Sequence[Key]:
    """Return all keys by id."""
    return _with_keys(lambda repository: repository.list())


def revoke_key(key_id: str) -> Key:
    """Revoke a key."""
    return _with_keys(lambda repository: repository.revoke(key_id))


def back_up(folder: Path, *, captions: bool) -> BackupManifest:
    """Write a backup into a new folder."""

    async def write(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        copy = partial(copy_databases, settings.effective_captions_dir) if captions else None
        return await write_backup(engine, folder, version=__version__, copy_captions=copy)

    return _with_engine(write)


def restore(folder: Path, *, replace: bool, captions: bool) -> BackupManifest:
    """Restore a backup."""

    async def read(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        restore_captions = partial(restore_databases, settings.effective_captions_dir) if captions else None
        return await restore_backup(engine, folder, replace=replace, restore_captions=restore_captions)

    return _with_engine(read)


def schema() -> tuple[str, str | None, str]:
    """Return the location of the database, the revision of its schema, and the newest revision."""

    async def show(engine: AsyncEngine, _: Settings) -> tuple[str, str | None, str]:
        return database.location(engine.url), await database.schema_revision(engine), database.newest_revision()

    return _with_engine(show)


def downgrade(revision: str) -> None:
    """Downgrade the schema to the revision of an older release."""
    _with_engine(lambda engine, _: database.downgrade(engine, revision))


def _with_keys(work: Callable[[KeyRepository], Awaitable[_Result]]) -> _Result:
    async def migrated(engine: AsyncEngine, _: Settings) -> _Result:
        await database.migrate(engine)
        return await work(KeyRepository(engine))

    return _with_engine(migrated)


def _with_engine(work: Callable[[AsyncEngine, Settings], Awaitable[_Result]]) -> _Result:
    configure_logs("console", "warning")

    async def opened() -> _Result:
        settings = load_settings()
        engine = database.open_engine(settings.effective_database_url)
        try:
            return await work(engine, settings)
        finally:
            await engine.dispose()

    return run(opened())
