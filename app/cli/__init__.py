"""The command line: `deixis serve`, and commands that run in this process or on a server (`--server`)."""

import io
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from app import __version__
from app.errors import did_you_mean
from app.runtime.garbage import collections_paused


class _Entry(NamedTuple):
    """Where a command, or a ``Typer`` of commands, is declared, and the first paragraph of its help."""

    module: str
    name: str
    summary: str


_ENTRIES: Mapping[str, _Entry] = MappingProxyType(
    {
        "serve": _Entry(
            "serve",
            "serve",
            "Start the HTTP service. Each option is also an environment variable: --data-dir is DEIXIS_DATA_DIR.",
        ),
        "classify": _Entry(
            "classify",
            "classify_command",
            "Classify image files. Without labels, discover labels in a caption database.",
        ),
        "watch": _Entry(
            "watch",
            "watch_command",
            "Classify the images of a folder as they appear, and write the labels beside them. Stop with Ctrl-C or"
            " SIGTERM.",
        ),
        "bulk": _Entry(
            "bulk",
            "bulk_command",
            "Classify images in folders, tar files and Parquet files, and write the labels to Parquet.",
        ),
        "label-studio": _Entry(
            "label_studio",
            "label_studio_command",
            "Run a machine learning backend of Label Studio for projects with choices about an image.",
        ),
        "evaluate": _Entry(
            "evaluate", "evaluate_command", "Measure accuracy on a folder with one subfolder per class."
        ),
        "describe": _Entry("describe", "describe_command", "Describe the classes of a label set by a language model."),
        "backup": _Entry("backup", "backup_command", "Back up the data of the service, also while it runs."),
        "restore": _Entry(
            "backup",
            "restore_command",
            "Restore a backup into the database of the settings. Stop the service first.",
        ),
        "label-sets": _Entry("label_sets", "label_sets_cli", "Stored lists of classes."),
        "examples": _Entry("examples", "examples_cli", "Example images of label sets, labelled or unlabelled."),
        "thresholds": _Entry(
            "thresholds",
            "thresholds_command",
            "Show the precision and recall of each label against its threshold, and store thresholds.",
        ),
        "captions": _Entry(
            "captions",
            "captions_cli",
            "Caption databases, in which labels are discovered for images without a label list.",
        ),
        "drafts": _Entry("describe", "drafts_cli", "Review the class descriptions that a language model wrote."),
        "keys": _Entry(
            "keys",
            "keys_cli",
            "API keys, with their scopes and rate limits. They are stored in the database of the settings.",
        ),
        "database": _Entry(
            "backup",
            "database_cli",
            "The schema of the database: show its revision, and downgrade it for an older release.",
        ),
        "models": _Entry("models", "models_cli", "Recommended models and their weights."),
    }
)
"""The commands, in the order of the help."""

_STYLE: Mapping[str, Any] = MappingProxyType(
    {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}
)


def _use_local(context: typer.Context, local: bool) -> None:  # noqa: FBT001 - the signature that typer calls
    if local:
        context.meta["deixis.local"] = True
        os.environ["DEIXIS_SERVER"] = "local"


def _add_local_option(command: Any) -> None:
    """Add ``--local`` to each command that has ``--server``."""
    for nested in getattr(command, "commands", {}).values():
        _add_local_option(nested)
    if any(parameter.name == "server" for parameter in command.params):

        def local(
            *,
            local: Annotated[
                bool,
                typer.Option(
                    "--local",
                    is_eager=True,  # the callback of --server reads what this one sets
                    callback=_use_local,
                    expose_value=False,
                    help="Run in this process, also if DEIXIS_SERVER is set or a server answers on this machine.",
                    rich_help_panel="Where the command runs",
                ),
            ] = False,
        ) -> None:
            del local

        alone = typer.Typer(**_STYLE)
        alone.command()(local)
        command.params += get_command(alone).params


class _LazyCommand(TyperCommand):
    """A command in a list of commands, which has only its summary; the command itself is imported when it is used."""

    def load(self) -> Any:
        """Import the command."""
        assert self.name is not None
        entry = _ENTRIES[self.name]
        with collections_paused():
            declared = getattr(import_module(f"app.cli.{entry.module}"), entry.name)
        group = typer.Typer(**_STYLE)
        if isinstance(declared, typer.Typer):
            group.add_typer(declared, name=self.name, help=entry.summary)
        else:
            group.command(self.name)(declared)
        command = get_group(group).commands[self.name]
        _add_local_option(command)
        return command

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the arguments of the command itself."""
        return self.load().make_context(*arguments, **options)


class _LazyGroup(TyperGroup):
    """The commands of ``_ENTRIES``; completes the errors for values of their options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: _LazyCommand(name, help=entry.summary) for name, entry in _ENTRIES.items()}

    def invoke(self, ctx: Any) -> Any:
        """Run a command; its options are parsed here."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            value, is_choice, choices = error.message.removeprefix("Value error, ").partition(" is not one of ")
            if is_choice:
                known = re.findall("'([^']+)'", choices)
                error.message = f"{value}{is_choice}{choices.rstrip('.')}{did_you_mean(value.strip(chr(39)), known)}"
            elif (errors := getattr(error.__cause__, "errors", None)) is not None:  # of pydantic, without the value
                from app.names.field_values import with_value  # noqa: PLC0415 - pydantic

                error.message = with_value(error.message, errors()[0]["input"])
            raise


cli = typer.Typer(
    name="deixis",
    cls=_LazyGroup,
    help="Zero-shot image classification.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(requested: bool) -> None:  # noqa: FBT001 - the signature that typer calls
    if requested:
        typer.echo(f"deixis {__version__}")
        raise typer.Exit


def _use_config(file: str | None) -> None:
    if file is not None:
        # As a variable, it also applies to processes that this one starts.
        os.environ["DEIXIS_CONFIG"] = os.path.abspath(os.path.expanduser(file)) if file else ""  # noqa: PTH100, PTH111 - no import of pathlib


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_use_config,
        help="A TOML file with settings, instead of that of DEIXIS_CONFIG or deixis.toml in your folder of settings;"
        " '' for none.",
    ),
]


@cli.callback()
def _main(
    *,
    config: ConfigOption = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare the options before a command; each of them acts in its own callback."""
    del config, version


def command_tree() -> TyperGroup:
    """Return the group of all commands, with each command imported."""
    group = get_group(cli)
    group.commands = {name: _LazyCommand(name).load() for name in _ENTRIES}
    return group


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal does not have is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    cli()
