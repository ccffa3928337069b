"""`deixis backup`, `deixis restore` and `deixis database`: the data of the service as a whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.common import out, report_errors
from app.errors import InvalidFieldError

if TYPE_CHECKING:
    from app.store.backup import BackupManifest

database_cli = typer.Typer(no_args_is_help=True)


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
    from app.cli.stored_data import back_up  # noqa: PLC0415 - the database

    _print_summary(back_up(folder, captions=captions), f"backed up to {folder}")


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
    from app.cli.stored_data import restore  # noqa: PLC0415 - the database

    _print_summary(restore(folder, replace=replace, captions=captions), f"restored from {folder}")


@database_cli.command("show")
def show() -> None:
    """Show the location of the database and the revision of its schema."""
    from app.cli.stored_data import schema  # noqa: PLC0415 - the database

    where, revision, newest = schema()
    out.print(f"database  {escape(where)}", highlight=False, soft_wrap=True)
    out.print(f"revision  {revision or 'none'}", highlight=False)
    out.print(f"newest    {newest}", highlight=False)


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
    from app.cli.stored_data import downgrade  # noqa: PLC0415 - the database

    downgrade(revision)
    out.print(f"the schema has revision {revision}; start the release of this revision", highlight=False)


def _print_summary(manifest: "BackupManifest", done: str) -> None:
    size = sum(file.bytes for file in manifest.files.values())
    rows = ", ".join(f"{count:,} {table}" for table, count in manifest.rows.items() if count) or "nothing"
    out.print(f"{escape(done)}: {rows}; {size / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    if manifest.captions:
        out.print(f"caption databases: {escape(', '.join(manifest.captions))}", highlight=False, soft_wrap=True)
