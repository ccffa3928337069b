"""`deixis serve`: start the HTTP service."""

import inspect
from collections.abc import Iterator
from typing import Annotated

import typer

from app.cli import ConfigOption
from app.runtime.garbage import collections_paused
from app.settings import SETTING_GROUPS, Settings


def serve(config: str | None = None, **flags: str | None) -> None:
    """Start the HTTP service. Each option is also an environment variable: --data-dir is DEIXIS_DATA_DIR."""
    del config  # the callback of the option has acted
    with collections_paused():
        from app.cli.serving import run_service  # noqa: PLC0415 - the whole service, which `--help` does not need

    run_service(flags)


def _parameters() -> Iterator[inspect.Parameter]:
    """Yield an option per setting, in the panel of its group; the value None leaves the setting to other sources."""
    yield inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)
    panel = ""
    for name, field in Settings.model_fields.items():
        panel = SETTING_GROUPS.get(name, panel)
        option = typer.Option(
            f"--{name.replace('_', '-')}", help=field.description, show_default=False, rich_help_panel=panel
        )
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
        )


serve.__signature__ = inspect.Signature(list(_parameters()))  # type: ignore[attr-defined]
serve.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(serve).parameters.items()
} | {"return": None}
