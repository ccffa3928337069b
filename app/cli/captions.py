"""`deixis captions ...`: the databases in which names are found, and captions near an image or a text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.api.schemas.classification import ResultBody
from app.api.schemas.databases import DatabaseBody, SearchFields, SearchResponse
from app.captions.plan import WORDNET, BuildPlan
from app.captions.search import MAX_CONTAINS_CHARS, MAX_LIMIT, MAX_OFFSET
from app.captions.sources import Source
from app.cli.backends import Backend, InProcess, read_image
from app.cli.common import (
    Engine,
    EngineOption,
    ModelOption,
    ServerOption,
    captions_bar,
    err,
    out,
    table_of,
    told_plainly,
    with_backend,
    with_service,
    write_json,
)
from app.errors import InvalidFieldError
from app.names.namespaces import clean_database_name
from app.runtime.cpu import usable_cores

captions_cli = typer.Typer(
    help="Caption databases: where names are found for images without labels.", no_args_is_help=True
)

NameArgument = Annotated[str, typer.Argument(help="Its name.")]


@captions_cli.command("build")
def build_database(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files of captions: text, CSV, TSV, JSON, JSON lines, Parquet, also .gz and .zst; - for standard"
            " input, a caption a line.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="What to call it.")] = None,
    wordnet: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--wordnet", help="Of the nouns of WordNet; called `wordnet` unless --name says otherwise.")
    ] = False,
    model: ModelOption = None,
    column: Annotated[
        str | None,
        typer.Option("--column", help="That holds the caption: its name, or in CSV and TSV its place from 0."),
    ] = None,
    min_chars: Annotated[int, typer.Option("--min-chars", min=1, help="Leave shorter captions out.")] = 3,
    max_chars: Annotated[int, typer.Option("--max-chars", min=1, help="Cut longer captions.")] = 500,
    latin_only: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--latin-only", help="Leave out captions whose letters are not mostly Latin.")
    ] = False,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            "--near-duplicates",
            min=0.5,
            max=1,
            help="Leave out captions whose cosine with one shortly before them is above this, as 0.97.",
        ),
    ] = None,
    recall: Annotated[
        float,
        typer.Option("--recall", min=0.01, max=1, help="Share of the nearest captions that a search is to find."),
    ] = 0.95,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="That make the index; as many as there are cores.", show_default=False),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Of the captions; kept with the database.")] = "",
    notes: Annotated[str, typer.Option("--notes", help="Where they are from; kept with the database.")] = "",
    engine: EngineOption = Engine.PROCESS,
) -> None:
    """Build a caption database, or build it again.

    What a build that was interrupted has encoded is kept, and not encoded again. The database takes the place of what
    has its name when it is finished; a running service with the same data folder goes on with the old one until then.
    """
    with told_plainly():
        if bool(sources) == wordnet:
            raise InvalidFieldError.of("sources", "give files of captions, or --wordnet")
        if name is None and not wordnet:
            raise InvalidFieldError.of("--name", "say what to call the database")
        chosen = clean_database_name(WORDNET if name is None else name, "--name")
    read: list[Source] = ["-" if each == "-" else Path(each) for each in sources or ()]

    async def work(service: InProcess) -> DatabaseBody:
        plan = BuildPlan(
            model=model or service.default_model,
            source=WORDNET if wordnet else None,
            files=tuple(sources or ()),
            column=column,
            min_chars=min_chars,
            max_chars=max_chars,
            latin_only=latin_only,
            near_duplicates=near_duplicates,
            recall=recall,
            threads=usable_cores() if threads is None else threads,
            source_notes=notes,
            licence=licence,
        )
        with captions_bar() as advance:
            await service.build_database(chosen, plan, read, advance)
        return await service.database(chosen)

    _print_database(with_service(work, engine))


@captions_cli.command("list")
def list_databases(server: ServerOption = None) -> None:
    """List the caption databases."""
    found = with_backend(server, lambda backend: backend.databases())
    rows = [
        (
            each.name + (" (default)" if each.default else ""),
            "" if each.captions is None else f"{each.captions:,}",
            each.model or "",
            f"{each.bytes / 2**20:,.1f}",
            (each.created_at or "")[:10],
        )
        for each in found
    ]
    out.print(table_of(("database", "captions", "model", "MiB", "built"), rows, right=("captions", "MiB")))
    for each in found:
        _warn(each)


@captions_cli.command("show")
def show_database(
    name: NameArgument,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Show what a database holds and how it was made."""
    told = with_backend(server, lambda backend: backend.database(name))
    if json_output:
        write_json(told.model_dump(mode="json"))
    else:
        _print_database(told)


def _print_database(told: DatabaseBody) -> None:
    lines = {
        "database": told.name + (" (default)" if told.default else ""),
        "captions": None if told.captions is None else f"{told.captions:,}",
        "model": told.model,
        "index": None if told.index is None else told.index.kind,
        "recall": ", ".join(f"{kind} {share:.3f}" for kind, share in (told.recall or {}).items()),
        "left out": ", ".join(
            f"{count:,} {kind.replace('_', ' ')}"
            for kind, count in (told.counts or {}).items()
            if count and kind not in {"read", "kept", "cut"}
        ),
        "MiB": f"{told.bytes / 2**20:,.1f}",
        "source": told.source_notes,
        "licence": told.licence,
        "generation": told.generation,
        "built": told.created_at,
    }
    for key, value in lines.items():
        if value:
            out.print(f"{key:<11} {escape(value)}", highlight=False, soft_wrap=True)
    _warn(told)


def _warn(told: DatabaseBody) -> None:
    if told.problem:
        err.print(f"[yellow]warning:[/yellow] {escape(told.problem)}", highlight=False, soft_wrap=True)


@captions_cli.command("search")
def search_captions(
    name: NameArgument,
    text: Annotated[str | None, typer.Option("--text", "-t", help="Captions near this text.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Or near this image.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-k", min=1, max=MAX_LIMIT, help="So many.")] = 10,
    offset: Annotated[int, typer.Option("--offset", min=0, max=MAX_OFFSET, help="Behind so many nearer ones.")] = 0,
    contains: Annotated[
        str | None, typer.Option("--contains", help="With this in them, whatever the case; of the 1,000 nearest.")
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", min=-1, max=1, help="With this cosine at least; of the 1,000 nearest."),
    ] = None,
    model: ModelOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Show the captions nearest to a text or an image."""
    with told_plainly():
        if (text is None) == (image is None):
            raise InvalidFieldError.of("--text", "give either --text or --image")
        if contains is not None and not 1 <= len(contains) <= MAX_CONTAINS_CHARS:
            raise InvalidFieldError.of("--contains", f"give 1 to {MAX_CONTAINS_CHARS} characters")
        content = None if image is None else read_image(image)
        if isinstance(content, ResultBody):
            assert content.error is not None
            raise InvalidFieldError.of(str(image), content.error.detail)
    fields = SearchFields(text=text, model=model, limit=limit, offset=offset, contains=contains, min_score=min_score)

    async def work(backend: Backend) -> SearchResponse:
        return await backend.search_captions(name, fields, content)

    told = with_backend(server, work, encoders=True)
    if json_output:
        write_json(told.model_dump(mode="json"))
    else:
        rows = [(f"{each.score:.4f}", each.caption) for each in told.results]
        out.print(table_of(("score", "caption"), rows, right=("score",)))


@captions_cli.command("delete")
def delete_database(name: NameArgument, server: ServerOption = None) -> None:
    """Delete a database for good."""
    with_backend(server, lambda backend: backend.delete_database(name))
    out.print(f"{escape(name)} deleted", highlight=False)
