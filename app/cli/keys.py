"""`deixis keys`: make, list and revoke the API keys of a server that has this database."""

import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from app.api.auth.keys import create_key
from app.api.auth.quotas import parse_rate
from app.cli.common import err, out, run
from app.names.namespaces import clean_namespace
from app.settings import load_settings
from app.store.database import migrate, open_engine
from app.store.keys import Key, KeyRepository, Scope

keys_cli = typer.Typer(
    name="keys",
    help="API keys: who may use a server, for what, and how much. They are kept in the database of the settings.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_Result = TypeVar("_Result")


@keys_cli.command("create")
def create(
    scope: Annotated[
        Scope,
        typer.Option(
            help="`classify` also reads, `write` also changes, `admin` may do everything in every namespace,"
            " `metrics` is for Prometheus alone."
        ),
    ] = Scope.CLASSIFY,
    namespace: Annotated[
        str, typer.Option(help="Whose label sets and caption databases it sees; by default those that have no owner.")
    ] = "",
    rate: Annotated[str | None, typer.Option(help="Requests, as `60/min` or `10/second; 5000/day`.")] = None,
    image_rate: Annotated[str | None, typer.Option(help="Images, in the same form.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time, in each process.")] = None,
    note: Annotated[str, typer.Option(help="For whom it is; shown by `list`.")] = "",
) -> None:
    """Make a key and print it, which nobody can do again. A running server knows it within a second."""

    async def make(repository: KeyRepository) -> tuple[str, Key]:
        asked = Key(
            "",
            scope,
            clean_namespace(namespace, "--namespace"),
            note=" ".join(note.split())[:200],
            rate=parse_rate(rate, "--rate"),
            image_rate=parse_rate(image_rate, "--image-rate"),
            concurrency=concurrency,
        )
        return await create_key(repository, asked)

    shown, key = _with_keys(make)
    err.print(f"The key '{key.id}' of scope {key.scope}; only its hash is kept, so note it now:", highlight=False)
    # Alone on standard output, so that a script can keep it.
    print(shown)  # noqa: T201


@keys_cli.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """List the keys; what they are is not kept."""
    keys = _with_keys(lambda repository: repository.list())
    if as_json:
        print(json.dumps([_told(key) for key in keys], indent=2))  # noqa: T201
        return
    table = Table("id", "scope", "namespace", "rate", "images", "at a time", "created", "last used", "state", "note")
    for key in keys:
        table.add_row(
            key.id,
            key.scope,
            key.namespace.name or "-",
            key.rate or "-",
            key.image_rate or "-",
            str(key.concurrency or "-"),
            _minute(key.created_at),
            _minute(key.last_used_at),
            "valid" if key.revoked_at is None else f"revoked {_minute(key.revoked_at)}",
            escape(key.note),
        )
    out.print(table)


@keys_cli.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]) -> None:
    """Make a key useless for good. A running server refuses it within a second."""
    key = _with_keys(lambda repository: repository.revoke(key_id))
    out.print(f"The key '{key.id}' is revoked.", highlight=False)


def _with_keys(work: Callable[[KeyRepository], Awaitable[_Result]]) -> _Result:
    async def opened() -> _Result:
        engine = open_engine(load_settings().effective_database_url)
        try:
            await migrate(engine)
            return await work(KeyRepository(engine))
        finally:
            await engine.dispose()

    return run(opened())


def _minute(at: datetime | None) -> str:
    return "never" if at is None else f"{at:%Y-%m-%d %H:%M}Z"


def _told(key: Key) -> dict[str, Any]:
    told = {name: getattr(key, name) for name in Key.__dataclass_fields__}
    told["namespace"] = key.namespace.name
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in told.items()}
