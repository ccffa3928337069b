"""`deixis label-sets ...`: stored lists of classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from rich.markup import escape

from app.cli.backends import LabelSetInput
from app.cli.common import make_table, out, read_lines, report_errors, with_backend, write_file, write_json
from app.cli.label_set_files import classes_of_csv, classes_of_text, csv_of, indented_text_of
from app.cli.options import ServerOption, read_priors_file
from app.errors import InvalidFieldError
from app.label_sets.shipped import shipped_file, shipped_files
from app.names.field_values import Number, problem_of
from app.runtime.atomic_files import replace_content
from app.types import ClassEntry, MergeSynonyms

label_sets_cli = typer.Typer(no_args_is_help=True)


@label_sets_cli.command("list")
def list_label_sets(server: ServerOption = None) -> None:
    """List the label sets with their newest versions."""
    label_sets = with_backend(server, lambda backend: backend.label_sets())
    rows = [
        (found.name, str(found.version), str(found.classes), f"{found.created_at:%Y-%m-%d %H:%M:%S}")
        for found in label_sets
    ]
    out.print(make_table(("name", "version", "classes", "created (UTC)"), rows, right=("version", "classes")))


@label_sets_cli.command("show")
def show_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")], server: ServerOption = None
) -> None:
    """Show the classes of a label set."""
    label_set = with_backend(server, lambda backend: backend.label_set(name))
    several = "   several labels per image" if label_set.multi_label else ""
    out.print(
        f"[bold]{escape(label_set.name)}@{label_set.version}[/bold]   templates: {escape(label_set.templates)}{several}"
        f"   created {label_set.created_at:%Y-%m-%d %H:%M:%S} UTC",
        highlight=False,
    )
    has_parents = any(entry.parent is not None for entry in label_set.classes)
    has_thresholds = any(entry.threshold is not None for entry in label_set.classes)
    rows = [
        (
            entry.name,
            str(len(entry.descriptions) or ""),
            str(len(entry.features) or ""),
            ", ".join(entry.synonyms),
            entry.prompt or "",
            *([entry.parent or ""] if has_parents else []),
            *(["" if entry.threshold is None else f"{entry.threshold:g}"] if has_thresholds else []),
            *([f"{label_set.priors[entry.name]:g}"] if label_set.priors else []),
        )
        for entry in label_set.classes
    ]
    columns = (
        "class",
        "descriptions",
        "features",
        "synonyms",
        "prompt",
        *(["parent"] if has_parents else []),
        *(["threshold"] if has_thresholds else []),
        *(["prior"] if label_set.priors else []),
    )
    out.print(make_table(columns, rows, right=("descriptions", "features", "threshold", "prior")))


@label_sets_cli.command("import")
def import_label_set(
    name: Annotated[str, typer.Argument(help="Name of the label set; an existing one gets a new version.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A file of `export`, a JSON array, a CSV file with the columns name and parent, or a text file with"
            " one class name per line, indented below its parent. By default the label set of this name that is shipped"
            " with Deixis (`deixis label-sets shipped` lists them).",
            show_default=False,
        ),
    ] = None,
    templates: Annotated[str | None, typer.Option(help="A template set or one template; by default `photo`.")] = None,
    priors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="How often images show each class: a JSON file with a number for each."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set from a file."""
    with report_errors():
        content = _read_label_set(shipped_file(name, "or pass a file") if file is None else file)
        if priors is not None:
            content = replace(content, priors=read_priors_file(priors))
    if templates is not None:
        content = replace(content, templates=templates)
    written = with_backend(server, lambda backend: backend.put_label_set(name, content))
    out.print(f"wrote {escape(written.name)}@{written.version} with {len(written.classes)} classes", highlight=False)


@label_sets_cli.command("shipped")
def list_shipped_label_sets() -> None:
    """List the label sets with descriptions that are shipped with Deixis; `import NAME` imports one."""
    rows = []
    for shipped, file in shipped_files().items():
        classes = _read_label_set(file).classes
        texts = sum(len(entry.descriptions) + len(entry.features) for entry in classes)
        rows.append((shipped, str(len(classes)), str(texts), ", ".join(entry.name for entry in classes)))
    out.print(make_table(("name", "classes", "descriptions", "class names"), rows, right=("classes", "descriptions")))


@label_sets_cli.command("export")
def export_label_set(
    name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A file; by default standard output. The suffixes .csv and .txt write the names and parents alone.",
        ),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Write a label set as JSON, which `import` and the route PUT accept, or its hierarchy as CSV or indented text."""
    label_set = with_backend(server, lambda backend: backend.label_set(name))
    if output is not None and output.suffix.lower() in {".csv", ".txt"}:
        entries = [ClassEntry(entry.name, parent=entry.parent) for entry in label_set.classes]
        with report_errors():
            text = csv_of(entries) if output.suffix.lower() == ".csv" else indented_text_of(entries)
            replace_content(output, text)
        return
    exported = label_set.model_dump(
        mode="json", include={"classes", "templates", "merge_synonyms", "multi_label", "priors"}, exclude_defaults=True
    )
    if output is None:
        write_json(exported)
    else:
        write_file(output, exported)


class _ClassNumbers(BaseModel):
    threshold: Number | None = None
    prior: Number | None = None


def _class_fields(entry: object) -> object:
    if isinstance(entry, dict):
        _ClassNumbers.model_validate(entry)
    return {"name": entry} if isinstance(entry, str) else entry


class _LabelSetFile(BaseModel):
    """The JSON of a label set file, in which a class may be its name alone. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    classes: list[Annotated[ClassEntry, BeforeValidator(_class_fields)]]
    templates: str = "photo"
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    multi_label: bool = False
    priors: dict[str, Number] | None = None


def _read_label_set(file: Path) -> LabelSetInput:
    lines = read_lines(file)
    text = "\n".join(lines)
    if not lines:
        raise InvalidFieldError.of(str(file), "is empty; write one class name per line, or use a file of `export`")
    if not text.startswith(("{", "[")):
        content = file.read_text("utf-8-sig")
        is_csv = file.suffix.lower() == ".csv"
        return LabelSetInput(classes_of_csv(content, str(file)) if is_csv else classes_of_text(content, str(file)))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFieldError.of(str(file), f"is not JSON: {error}") from error
    fields = {"classes": content} if isinstance(content, list) else content
    try:
        parsed = _LabelSetFile.model_validate(fields)
    except ValidationError as error:
        raise InvalidFieldError.of(str(file), f"is not a label set: {problem_of(error, fields)}") from error
    if any(entry.prior is not None for entry in parsed.classes):
        raise InvalidFieldError.of(
            str(file), "has a class with 'prior'; give 'priors' of the label set, as `export` does"
        )
    return LabelSetInput(
        parsed.classes,
        parsed.templates,
        parsed.merge_synonyms,
        multi_label=parsed.multi_label,
        priors=parsed.priors,
    )
