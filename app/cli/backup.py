"""`deixis backup`, `deixis restore` and `deixis database`: the data of the service as a whole."""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.captions.backup import copy_databases, restore_databases
from app.cli.common import out, report_errors, run
from app.errors import InvalidFieldError
from app.settings import Settings, load_settings
from app.store.backup import BackupManifest, restore_backup, write_backup
from app.store.database import downgrade, location, newest_revision, open_engine, schema_revision

database_cli = typer.Typer(
    name="database",
    help="The schema of the database: show its revision, and downgrade it for an older release.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Result = TypeVar("_Result")


def backup_command(
    folder: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
    *,
    captions: Annotated[
        bool, typer.Option("--captions", help="Include the caption databases, which may be large.")
    ] = False,
) -> None:
    """Back up the data of the service, also while it runs.

    A backup has the label sets with all versions, example images, drafts, jobs and API keys, but no weights and no
    caches. A backup of SQLite or PostgreSQL can be restored into either of them.
    """

    async def work(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        copy = partial(copy_databases, settings.effective_captions_dir) if captions else None
        return await write_backup(engine, folder, version=__version__, copy_captions=copy)

    _print_summary(_with_engine(work), f"backed up to {folder}")


def restore_command(
    folder: Annotated[Path, typer.Argument(help="A folder of `deixis backup`.")],
    *,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Delete the content of the database, and caption databases of the same names."),
    ] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Include the caption databases of the backup.")] = False,
) -> None:
    """Restore a backup into the database of the settings. Stop the service first.

    If the restore fails, nothing is changed.
    """

    async def work(engine: AsyncEngine, settings: Settings) -> BackupManifest:
        restore = partial(restore_databases, settings.effective_captions_dir) if captions else None
        return await restore_backup(engine, folder, replace=replace, restore_captions=restore)

    _print_summary(_with_engine(work), f"restored from {folder}")


@database_cli.command("show")
def show() -> None:
    """Show the location of the database and the revision of its schema."""

    async def work(engine: AsyncEngine, _: Settings) -> tuple[str, str | None]:
        return location(engine.url), await schema_revision(engine)

    where, revision = _with_engine(work)
    out.print(f"database  {escape(where)}", highlight=False, soft_wrap=True)
    out.print(f"revision  {revision or 'none'}", highlight=False)
    out.print(f"newest    {newest_revision()}", highlight=False)


@database_cli.command("downgrade")
def downgrade_command(
    revision: Annotated[
        str, typer.Argument(help="Revision of the older release, as its `deixis database show` prints it.")
    ],
    *,
    yes: Annotated[
        bool,
        typer.Option("--yes", help="Confirm that the tables and columns of later revisions are dropped permanently."),
    ] = False,
) -> None:
    """Downgrade the schema for an older release. Stop the service and back it up first."""
    with report_errors():
        if not yes:
            raise InvalidFieldError.of(
                "--yes", "is missing; it confirms that tables and columns of later revisions are dropped"
            )

    async def work(engine: AsyncEngine, _: Settings) -> None:
        await downgrade(engine, revision)

    _with_engine(work)
    out.print(f"the schema has revision {revision}; start the release of this revision", highlight=False)


def _with_engine(work: Callable[[AsyncEngine, Settings], Awaitable[_Result]]) -> _Result:
    async def opened() -> _Result:
        settings = load_settings()
        engine = open_engine(settings.effective_database_url)
        try:
            return await work(engine, settings)
        finally:
            await engine.dispose()

    return run(opened())


def _print_summary(manifest: BackupManifest, done: str) -> None:
    size = sum(file.bytes for file in manifest.files.values())
    rows = ", ".join(f"{count:,} {table}" for table, count in manifest.rows.items() if count) or "nothing"
    out.print(f"{escape(done)}: {rows}; {size / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    if manifest.captions:
        out.print(f"caption databases: {escape(', '.join(manifest.captions))}", highlight=False, soft_wrap=True)
