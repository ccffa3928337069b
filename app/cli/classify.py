"""`deixis classify`: classify image files."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.classification.request import ClassifyRequest
from app.cli.backends import Backend
from app.cli.common import (
    classify_files,
    clean_classname,
    err,
    exit_status,
    make_table,
    out,
    prepare_database,
    progress_bar,
    report_bad_files,
    report_bad_folders,
    report_errors,
    report_warnings,
    warn,
    with_backend,
    write_json,
)
from app.cli.options import ServerOption, takes_request
from app.cli.predictions import print_explanations, print_table, with_bad_folders, write_csv, write_json_results
from app.cli.sorting import FileAction, Sorter
from app.errors import InvalidFieldError
from app.images.discovery import find_images, is_below
from app.integrations.fiftyone import labels_file
from app.runtime.file_names import printable

if TYPE_CHECKING:
    from deixis.answers import ImageResult, SharedName

# Of a table: the best label and the next one.
_TABLE_TOP_K = 2
_SORTING = "Sorting into folders"


class Format(StrEnum):
    """The format of standard output; ``fiftyone`` is a labels.json that FiftyOne imports."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    FIFTYONE = "fiftyone"


@takes_request(
    *("labels", "label_set", "model", "method", "template", "database", "group", "option", "priors", "reject_below"),
    *("false_rejection_rate", "reject", "coverage", "multi_label", "min_score", "top_k", "explain"),
)
def classify_command(
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched recursively) and globs.")],
    request: ClassifyRequest,
    output: Annotated[
        Format, typer.Option("--format", "-f", help="Format of standard output.", rich_help_panel="Results")
    ] = Format.TABLE,
    to_folder: Annotated[
        Path | None,
        typer.Option(
            "--to-folder",
            help="Also copy each file into a subfolder of this folder named after its label.",
            rich_help_panel=_SORTING,
        ),
    ] = None,
    move: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--move", help="With --to-folder: move the files.", rich_help_panel=_SORTING)
    ] = False,
    link: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--link", help="With --to-folder: create hard links to the files.", rich_help_panel=_SORTING)
    ] = False,
    dry_run: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option(
            "--dry-run", help="With --to-folder: only print where the files would go.", rich_help_panel=_SORTING
        ),
    ] = False,
    server: ServerOption = None,
) -> None:
    """Classify image files. Without labels, discover labels in a caption database.

    Files that cannot be read are reported on standard error; in CSV and JSON, they have rows with an error. Exit
    status: 0 if every file was classified, 1 if some were not, 2 if none was.
    """
    if request.top_k is None:
        request = replace(request, top_k=_TABLE_TOP_K if output is Format.TABLE else 1)
    with report_errors():
        if request.explain and output not in {Format.TABLE, Format.JSON}:
            problem = f"has no place in the format '{output}'; leave it out, or choose --format table or json"
            raise InvalidFieldError.of("--explain", problem)
        sorter = _sorter(to_folder, move=move, link=link, dry_run=dry_run)
        bad_folders: list[OSError] = []
        files = find_images(paths, bad_folders.append)
        if sorter is not None:
            sorter.validate()
            # The files that an earlier run sorted are not sorted again.
            files = [file for file in files if not is_below(file, sorter.target)]

    classes: list[str] | None = None

    async def work(backend: Backend) -> "tuple[list[ImageResult], list[SharedName]]":
        nonlocal classes
        await prepare_database(backend, request)
        if output is Format.FIFTYONE:
            classes = await _class_names(backend, request)
        if not request.group:
            return [result async for _, result in classify_files(backend, files, request)], []
        with progress_bar("Classifying") as on_progress:
            return await backend.classify_together(files, request, on_progress)

    # The number of images that a server classifies together is limited.
    results, shared = with_backend(server, work, encoders=True, search=not request.group)
    match output:
        case Format.FIFTYONE:
            write_json(labels_file(files, results, classes=classes, top_k=request.top_k or 1))
        case Format.TABLE:
            print_table(files, results)
        case Format.CSV:
            write_csv(*with_bad_folders(files, results, bad_folders))
        case Format.JSON:
            write_json_results(*with_bad_folders(files, results, bad_folders))
    if shared and output is Format.TABLE:
        rows = [(name.label, str(name.images)) for name in shared]
        out.print(make_table(("name", "images"), rows, right=("images",)))
    if request.explain and output is Format.TABLE:
        print_explanations(files, results)
    report_warnings(files, results)
    report_bad_folders(bad_folders)
    bad = report_bad_files(files, results)
    if sorter is not None:
        bad += _sort(sorter, files, results)
    raise typer.Exit(exit_status(bad, len(files), folders=len(bad_folders)))


def _sorter(target: Path | None, *, move: bool, link: bool, dry_run: bool) -> Sorter | None:
    if target is None:
        if move or link or dry_run:
            raise InvalidFieldError.of("--to-folder", "is missing; --move, --link and --dry-run need it")
        return None
    if move and link:
        raise InvalidFieldError.of("--link", "excludes --move; pass one of them")
    return Sorter(target, FileAction.MOVE if move else FileAction.LINK if link else FileAction.COPY, dry_run)


def _sort(sorter: Sorter, files: Sequence[Path], results: "Sequence[ImageResult]") -> int:
    """Sort the classified files, and return the number of those that could not be sorted."""
    bad = 0
    for file, result in zip(files, results, strict=True):
        if result.error is not None:
            continue
        try:
            destination = sorter.sort(file, result)
        except OSError as error:
            bad += 1
            warn("not sorted", f"{file}: {error.strerror or type(error).__name__}")
            continue
        if sorter.dry_run:
            err.print(escape(printable(f"{file} -> {destination}")), highlight=False, soft_wrap=True)
    verb = {FileAction.COPY: "copied", FileAction.MOVE: "moved", FileAction.LINK: "linked"}[sorter.action]
    would = "would be " if sorter.dry_run else ""
    err.print(
        f"{sorter.done} of {len(files)} {would}{verb} into {escape(printable(str(sorter.target)))}", highlight=False
    )
    return bad


async def _class_names(backend: Backend, request: ClassifyRequest) -> list[str] | None:
    """Return the classes in the spelling of results; None if labels are discovered."""
    if request.label_set is not None and request.labels is None:
        return [entry.name for entry in (await backend.label_set(request.label_set)).classes]
    return None if request.labels is None else [clean_classname(label) for label in request.labels]
