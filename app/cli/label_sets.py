"""`deixis label-sets ...`: lists of class names that are kept under a name."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.api.schemas.label_sets import LabelSetBody
from app.cli.common import (
    ServerOption,
    out,
    read_lines,
    table_of,
    told_plainly,
    with_backend,
    write_file,
    write_json,
)
from app.errors import InvalidFieldError, UnknownNameError
from app.runtime.data_files import resources

label_sets_cli = typer.Typer(help="Lists of class names that are kept under a name.", no_args_is_help=True)


@label_sets_cli.command("list")
def list_label_sets(server: ServerOption = None) -> None:
    """List every label set with its latest version."""
    found = with_backend(server, lambda backend: backend.label_sets())
    rows = [(each.name, str(each.version), str(each.classes), f"{each.created_at:%Y-%m-%d %H:%M:%S}") for each in found]
    out.print(table_of(("name", "version", "classes", "created (UTC)"), rows, right=("version", "classes")))


@label_sets_cli.command("show")
def show_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")], server: ServerOption = None
) -> None:
    """Show a label set's classes."""
    label_set = with_backend(server, lambda backend: backend.label_set(name))
    out.print(
        f"[bold]{escape(label_set.name)}@{label_set.version}[/bold]   templates: {escape(label_set.templates)}"
        f"   created {label_set.created_at:%Y-%m-%d %H:%M:%S} UTC",
        highlight=False,
    )
    rows = [
        (
            each.name,
            str(len(each.descriptions) or ""),
            str(len(each.features) or ""),
            ", ".join(each.synonyms),
            each.prompt or "",
        )
        for each in label_set.classes
    ]
    columns = ("class", "descriptions", "features", "synonyms", "prompt")
    out.print(table_of(columns, rows, right=("descriptions", "features")))


@label_sets_cli.command("import")
def import_label_set(
    name: Annotated[str, typer.Argument(help="To write; a name that exists gets a new version.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="What `export` writes, a JSON array, or text with a class name a line; without it, the label set of"
            " that name that comes with Deixis, described: `deixis label-sets shipped` lists them.",
            show_default=False,
        ),
    ] = None,
    templates: Annotated[str | None, typer.Option(help="A template set or one template; `photo` by default.")] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set from a file."""
    with told_plainly():
        body = _read_label_set(_shipped(name) if file is None else file)
    if templates is not None:
        body = body.model_copy(update={"templates": templates})
    written = with_backend(server, lambda backend: backend.put_label_set(name, body))
    out.print(f"wrote {escape(written.name)}@{written.version} with {len(written.classes)} classes", highlight=False)


@label_sets_cli.command("shipped")
def list_shipped_label_sets() -> None:
    """List the label sets that come with Deixis, their classes described; `import NAME` takes one over."""
    rows = []
    for file in sorted((resources("prompts") / "descriptions").glob("*.json")):
        classes = _read_label_set(file).entries()
        texts = sum(len(entry.descriptions) + len(entry.features) for entry in classes)
        rows.append((file.stem, str(len(classes)), str(texts), ", ".join(entry.name for entry in classes)))
    out.print(table_of(("name", "classes", "descriptions", "of"), rows, right=("classes", "descriptions")))


def _shipped(name: str) -> Path:
    files = {file.stem: file for file in (resources("prompts") / "descriptions").glob("*.json")}
    if name not in files:
        raise UnknownNameError("shipped label set", name, files, "or name a file to read")
    return files[name]


@label_sets_cli.command("export")
def export_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; standard output by default.")] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set as JSON that `import` reads, and PUT takes as its body."""
    label_set = with_backend(server, lambda backend: backend.label_set(name))
    exported = label_set.model_dump(
        mode="json", include={"classes", "templates", "merge_synonyms"}, exclude_defaults=True
    )
    if output is None:
        write_json(exported)
    else:
        write_file(output, exported)


def _read_label_set(file: Path) -> LabelSetBody:
    lines = read_lines(file)
    text = "\n".join(lines)
    if not lines:
        raise InvalidFieldError.of(str(file), "is empty; write a class name a line, or what `export` writes")
    if not text.startswith(("{", "[")):
        return LabelSetBody(classes=list(lines))
    try:
        found = json.loads(text)
        return LabelSetBody.model_validate({"classes": found} if isinstance(found, list) else found)
    except ValueError as error:
        raise InvalidFieldError.of(str(file), f"is no label set: {error}") from error
