"""`deixis captions ...`: build, show and search caption databases."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.captions.query import MAX_CONTAINS_CHARS, MAX_LIMIT, MAX_OFFSET, CaptionQuery
from app.cli.common import (
    Engine,
    captions_bar,
    make_table,
    out,
    report_errors,
    warn,
    with_backend,
    with_service,
    write_json,
)
from app.cli.options import EngineOption, ModelOption, ServerOption
from app.errors import InvalidFieldError
from app.images.reading import UnreadableFileError, read_image_file
from app.names.namespaces import clean_database_name
from app.runtime.cpu import usable_cores
from app.settings import load_settings

if TYPE_CHECKING:
    from app.captions.sources import Source
    from app.cli.backends.in_process import InProcessBackend
    from deixis.answers import Database

captions_cli = typer.Typer(no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the database.")]


@captions_cli.command("build")
def build_database(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files of captions: text, CSV, TSV, JSON, JSON Lines or Parquet, optionally .gz or .zst; - for"
            " standard input with one caption per line.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name of the database.")] = None,
    everyday: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option(
            "--everyday",
            help="Build the database from the names that come with Deixis; its default name is `everyday`.",
        ),
    ] = False,
    wordnet: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--wordnet", help="Build the database from the nouns of WordNet; its default name is `wordnet`."),
    ] = False,
    model: ModelOption = None,
    column: Annotated[
        str | None,
        typer.Option("--column", help="Column of the captions: its name, or for CSV and TSV its index from 0."),
    ] = None,
    min_chars: Annotated[int, typer.Option("--min-chars", min=1, help="Leave out shorter captions.")] = 3,
    max_chars: Annotated[int, typer.Option("--max-chars", min=1, help="Truncate longer captions.")] = 500,
    latin_only: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--latin-only", help="Leave out captions in which most letters are not Latin.")
    ] = False,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            "--near-duplicates",
            min=0.5,
            max=1,
            help="Leave out captions whose cosine similarity with a recent caption is higher, such as 0.97.",
        ),
    ] = None,
    recall: Annotated[
        float,
        typer.Option("--recall", min=0.01, max=1, help="Share of the nearest captions that a search should find."),
    ] = 0.95,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, help="Threads that build the index; by default the number of cores.", show_default=False
        ),
    ] = None,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the captions; stored with the database.")] = "",
    notes: Annotated[str, typer.Option("--notes", help="Source of the captions; stored with the database.")] = "",
    engine: EngineOption = Engine.PROCESS,
) -> None:
    """Build or rebuild a caption database.

    If a build is interrupted, run the same command again: it does not encode the same captions twice. A finished
    database replaces the one of the same name. Until then, a running service with the same data folder uses the old
    one.
    """
    from app.captions.build_plan import EVERYDAY, WORDNET, BuildPlan  # noqa: PLC0415 - imports numpy

    with report_errors():
        if bool(sources) + everyday + wordnet != 1:
            raise InvalidFieldError.of("sources", "pass files of captions or --everyday or --wordnet, and one of them")
        source = EVERYDAY if everyday else WORDNET if wordnet else None
        if name is None and source is None:
            raise InvalidFieldError.of("--name", "is missing; the database needs a name")
        database = clean_database_name(name or source or "", "--name")
    files: list[Source] = ["-" if source == "-" else Path(source) for source in sources or ()]

    async def work(service: "InProcessBackend") -> "Database":
        plan = BuildPlan(
            model=model or service.default_model,
            source=source,
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
        with captions_bar() as on_progress:
            await service.build_database(database, plan, files, on_progress)
        return await service.database(database)

    _print_database(with_service(work, engine))


@captions_cli.command("list")
def list_databases(server: ServerOption = None) -> None:
    """List the caption databases."""
    databases = with_backend(server, lambda backend: backend.databases())
    rows = [
        (
            database.name + (" (default)" if database.default else ""),
            "" if database.captions is None else f"{database.captions:,}",
            database.model or "",
            f"{database.bytes / 2**20:,.1f}",
            (database.created_at or "")[:10],
        )
        for database in databases
    ]
    out.print(make_table(("database", "captions", "model", "MiB", "built"), rows, right=("captions", "MiB")))
    for database in databases:
        _warn_of_problem(database)


@captions_cli.command("show")
def show_database(
    name: NameArgument,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Show the content of a database and how it was built."""
    database = with_backend(server, lambda backend: backend.database(name))
    if json_output:
        write_json(database.model_dump(mode="json"))
    else:
        _print_database(database)


def _print_database(database: "Database") -> None:
    lines = {
        "database": database.name + (" (default)" if database.default else ""),
        "captions": None if database.captions is None else f"{database.captions:,}",
        "model": database.model,
        "index": None if database.index is None else database.index.kind,
        "recall": ", ".join(f"{kind} {share:.3f}" for kind, share in (database.recall or {}).items()),
        "left out": ", ".join(
            f"{count:,} {kind.replace('_', ' ')}"
            for kind, count in (database.counts or {}).items()
            if count and kind not in {"read", "kept", "cut"}
        ),
        "MiB": f"{database.bytes / 2**20:,.1f}",
        "source": database.source_notes,
        "licence": database.licence,
        "generation": database.generation,
        "built": database.created_at,
    }
    for key, value in lines.items():
        if value:
            out.print(f"{key:<11} {escape(value)}", highlight=False, soft_wrap=True)
    _warn_of_problem(database)


def _warn_of_problem(database: "Database") -> None:
    if database.problem:
        warn("warning:", database.problem)


@captions_cli.command("search")
def search_captions(
    name: NameArgument,
    text: Annotated[str | None, typer.Option("--text", "-t", help="Search captions near this text.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Search captions near this image.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-k", min=1, max=MAX_LIMIT, help="Number of captions.")] = 10,
    offset: Annotated[
        int, typer.Option("--offset", min=0, max=MAX_OFFSET, help="Number of nearest captions to skip.")
    ] = 0,
    contains: Annotated[
        str | None,
        typer.Option(
            "--contains", help="Only captions that contain this text, ignoring case, among the 1,000 nearest."
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score",
            min=-1,
            max=1,
            help="Only captions with at least this cosine similarity, among the 1,000 nearest.",
        ),
    ] = None,
    model: ModelOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,  # noqa: FBT002 - a flag
    server: ServerOption = None,
) -> None:
    """Show the captions nearest to a text or an image."""
    with report_errors():
        if (text is None) == (image is None):
            raise InvalidFieldError.of("--text", "pass either --text or --image")
        if contains is not None and not 1 <= len(contains) <= MAX_CONTAINS_CHARS:
            raise InvalidFieldError.of(
                "--contains", f"must have 1 to {MAX_CONTAINS_CHARS} characters, and has {len(contains)}"
            )
        try:
            content = None if image is None else read_image_file(image, load_settings().max_image_bytes)
        except UnreadableFileError as error:
            raise InvalidFieldError.of(str(image), str(error)) from error
    query = CaptionQuery(name, text, content, model, limit, offset, contains, min_score)
    found = with_backend(server, lambda backend: backend.search_captions(query), encoders=True)
    if json_output:
        write_json(found.model_dump(mode="json"))
    else:
        rows = [(f"{result.score:.4f}", result.caption) for result in found.results]
        out.print(make_table(("score", "caption"), rows, right=("score",)))


@captions_cli.command("delete")
def delete_database(name: NameArgument, server: ServerOption = None) -> None:
    """Delete a caption database permanently."""
    with_backend(server, lambda backend: backend.delete_database(name))
    out.print(f"{escape(name)} deleted", highlight=False)
