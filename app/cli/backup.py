"""`deixis backup`, `deixis restore` and `deixis database`: what the service keeps, as a whole."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.captions.backup import copy_databases, restore_databases
from app.cli.common import out, run, told_plainly
from app.errors import InvalidFieldError
from app.settings import Settings, load_settings
from app.store.backup import BackupManifest, restore_backup, write_backup
from app.store.database import downgrade, location, newest_revision, open_engine, schema_revision

database_cli = typer.Typer(
    name="database",
    help="The schema of the database: which revision it has, and the way back to an older release.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Result = TypeVar("_Result")


def backup_command(
    folder: Annotated[Path, typer.Argument(help="Is made; must not exist.")],
    *,
    captions: Annotated[
        bool, typer.Option("--captions", help="With the caption databases, which may be large.")
    ] = False,
) -> None:
    """Back up everything the service keeps, while it runs.

    Label sets with all versions, example images, drafts, jobs and API keys; not weights, nor caches. It works for
    SQLite and PostgreSQL, and restores into either.
    """

    async def work(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        copy = partial(copy_databases, settings.effective_captions_dir) if captions else None
        return await write_backup(engine, folder, version=__version__, copy_captions=copy)

    _tell(_with_engine(work), f"backed up to {folder}")


def restore_command(
    folder: Annotated[Path, typer.Argument(help="As `deixis backup` made it.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what the database holds, and what captions have the same name.")
    ] = False,
    captions: Annotated[bool, typer.Option("--captions", help="With its caption databases.")] = False,
) -> None:
    """Bring back a backup into the database of the settings. Stop the service before.

    Everything is brought back, or nothing is changed.
    """

    async def work(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        restore = partial(restore_databases, settings.effective_captions_dir) if captions else None
        return await restore_backup(engine, folder, replace=replace, restore_captions=restore)

    _tell(_with_engine(work), f"restored from {folder}")


@database_cli.command("show")
def show() -> None:
    """Show where the database is, and the revision of its schema."""

    async def work(engine: AsyncEngine, _: Settings) -> tuple[str, str | None]:
        return location(engine.url), await schema_revision(engine)

    where, revision = _with_engine(work)
    out.print(f"database  {escape(where)}", highlight=False, soft_wrap=True)
    out.print(f"revision  {revision or 'none yet'}", highlight=False)
    out.print(f"newest    {newest_revision()}", highlight=False)


@database_cli.command("downgrade")
def downgrade_command(
    revision: Annotated[str, typer.Argument(help="Of the older release, as its `deixis database show` tells.")],
    *,
    yes: Annotated[
        bool, typer.Option("--yes", help="Drop what only later revisions have; there is no way to get it back.")
    ] = False,
) -> None:
    """Take the schema back, to go back to an older release. Stop the service and back up before."""
    with told_plainly():
        if not yes:
            raise InvalidFieldError.of("--yes", "is needed: tables and columns of later revisions are dropped")

    async def work(engine: AsyncEngine, _: Settings) -> None:
        await downgrade(engine, revision)

    _with_engine(work)
    out.print(f"the schema has revision {revision}; start the release that it belongs to", highlight=False)


def _with_engine(work: Callable[[AsyncEngine, Settings], Awaitable[_Result]]) -> _Result:
    async def opened() -> _Result:
        settings = load_settings()
        engine = open_engine(settings.effective_database_url)
        try:
            return await work(engine, settings)
        finally:
            await engine.dispose()

    return run(opened())


def _tell(manifest: BackupManifest, done: str) -> None:
    size = sum(each.bytes for each in manifest.files.values())
    rows = ", ".join(f"{count:,} {table}" for table, count in manifest.rows.items() if count) or "nothing"
    out.print(f"{escape(done)}: {rows}; {size / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    if manifest.captions:
        out.print(f"caption databases: {escape(', '.join(manifest.captions))}", highlight=False, soft_wrap=True)
