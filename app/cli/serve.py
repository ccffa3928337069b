"""`deixis serve`: start the HTTP service."""

import inspect
from typing import Annotated

import typer

from app.runtime.garbage import collections_paused
from app.settings import Settings


def serve(**flags: str | None) -> None:
    """Start the HTTP service. Each option is also an environment variable: --data-dir is DEIXIS_DATA_DIR."""
    with collections_paused():
        from app.cli.serving import run_service  # noqa: PLC0415 - the whole service, which `--help` does not need

    run_service(flags)


def _flags_of_settings() -> inspect.Signature:
    """Return an option per setting; the value None leaves the setting to the environment."""
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    str | None,
                    typer.Option(f"--{name.replace('_', '-')}", help=field.description, show_default=False),
                ],
            )
            for name, field in Settings.model_fields.items()
        ]
    )


serve.__signature__ = _flags_of_settings()  # type: ignore[attr-defined]
serve.__annotations__ = {
    name: parameter.annotation for name, parameter in inspect.signature(serve).parameters.items()
} | {"return": None}
