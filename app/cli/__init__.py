"""The command line: `deixis serve`, and commands that run in this process or on a server (`--server`)."""

import io
import sys
from typing import Annotated

import typer

from app import __version__
from app.cli.backup import backup_command, database_cli, restore_command
from app.cli.bulk import bulk_command
from app.cli.captions import captions_cli
from app.cli.classify import classify_command
from app.cli.common import out
from app.cli.describe import describe_command, drafts_cli
from app.cli.evaluate import evaluate_command
from app.cli.examples import examples_cli
from app.cli.keys import keys_cli
from app.cli.label_sets import label_sets_cli
from app.cli.label_studio import label_studio_command
from app.cli.models import models_cli
from app.cli.serve import serve
from app.cli.watch import watch_command

cli = typer.Typer(
    name="deixis",
    help="Zero-shot image classification.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for name, command in (
    ("serve", serve),
    ("classify", classify_command),
    ("watch", watch_command),
    ("bulk", bulk_command),
    ("label-studio", label_studio_command),
    ("evaluate", evaluate_command),
    ("describe", describe_command),
    ("backup", backup_command),
    ("restore", restore_command),
):
    cli.command(name)(command)
cli.add_typer(label_sets_cli, name="label-sets")
cli.add_typer(examples_cli, name="examples")
cli.add_typer(captions_cli, name="captions")
cli.add_typer(drafts_cli, name="drafts")
cli.add_typer(keys_cli, name="keys")
cli.add_typer(database_cli, name="database")
cli.add_typer(models_cli, name="models")


def _version(requested: bool) -> None:  # noqa: FBT001 - the signature that typer calls
    if requested:
        out.print(f"deixis {__version__}", highlight=False)
        raise typer.Exit


@cli.callback()
def _main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare the options before a command; each of them acts in its own callback."""
    del version


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal does not have is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    cli()
