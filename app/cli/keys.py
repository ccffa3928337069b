"""`deixis keys`: create, list and revoke the API keys of a server with this database."""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from app.cli.common import err, out
from app.types import Scope

if TYPE_CHECKING:
    from app.store.keys import Key

keys_cli = typer.Typer(no_args_is_help=True)


@keys_cli.command("create")
def create(
    scope: Annotated[
        Scope,
        typer.Option(
            help="`classify` allows classification and reads, `write` also changes, `admin` everything in all"
            " namespaces, `metrics` only the metrics for Prometheus."
        ),
    ] = Scope.CLASSIFY,
    namespace: Annotated[
        str, typer.Option(help="Namespace of its label sets and caption databases; by default the one without a name.")
    ] = "",
    rate: Annotated[
        str | None, typer.Option(help="Limit of requests, such as `60/min` or `10/second; 5000/day`.")
    ] = None,
    image_rate: Annotated[str | None, typer.Option(help="Limit of images, in the same form.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Limit of simultaneous requests per process.")] = None,
    note: Annotated[str, typer.Option(help="A note, such as the name of the user; `list` shows it.")] = "",
) -> None:
    """Create a key and print it. It cannot be printed again. A running server accepts it within a second."""
    from app.cli.stored_data import create_key  # noqa: PLC0415 - the database

    shown, key = create_key(
        scope,
        namespace,
        note=" ".join(note.split())[:200],
        rate=rate,
        image_rate=image_rate,
        concurrency=concurrency,
    )
    err.print(
        f"The key '{key.id}' of scope {key.scope}; only its hash is stored, so save the key now:", highlight=False
    )
    # The only line on standard output, so that a script can capture it.
    print(shown)  # noqa: T201


@keys_cli.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """List the keys by id. The keys themselves are not stored."""
    from app.cli.stored_data import list_keys as stored_keys  # noqa: PLC0415 - the database

    keys = stored_keys()
    if as_json:
        print(json.dumps([_json_key(key) for key in keys], indent=2))  # noqa: T201
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
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as `list` shows it.")]) -> None:
    """Revoke a key permanently. A running server refuses it within a second."""
    from app.cli.stored_data import revoke_key  # noqa: PLC0415 - the database

    key = revoke_key(key_id)
    out.print(f"The key '{key.id}' is revoked.", highlight=False)


def _minute(at: datetime | None) -> str:
    return "never" if at is None else f"{at:%Y-%m-%d %H:%M}Z"


def _json_key(key: "Key") -> dict[str, Any]:
    fields = {name: getattr(key, name) for name in key.__dataclass_fields__}
    fields["namespace"] = key.namespace.name
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()}
