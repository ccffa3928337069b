"""`deixis classify`: classify image files."""

import sys
from collections.abc import Callable, Sequence
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
from app.cli.csv_output import Cell, write_rows
from app.cli.options import ServerOption, takes_request
from app.cli.sorting import FileAction, Sorter
from app.errors import InvalidFieldError
from app.images.discovery import find_images, is_below
from app.integrations.fiftyone import labels_file
from app.runtime.file_names import file_text, printable

if TYPE_CHECKING:
    from deixis.answers import ImageResult, SharedName

_SHOWN_PROMPTS = 5
_BAR_WIDTH = 16


class Format(StrEnum):
    """The format of standard output; ``fiftyone`` is a labels.json that FiftyOne imports."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    FIFTYONE = "fiftyone"


@takes_request(
    *("labels", "label_set", "model", "method", "template", "database", "group", "option", "reject_below"),
    *("false_rejection_rate", "coverage", "top_k", "explain"),
)
def classify_command(
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched recursively) and globs.")],
    request: ClassifyRequest,
    output: Annotated[Format, typer.Option("--format", "-f", help="Format of standard output.")] = Format.TABLE,
    to_folder: Annotated[
        Path | None,
        typer.Option("--to-folder", help="Also copy each file into a subfolder of this folder named after its label."),
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="With --to-folder: move the files.")] = False,  # noqa: FBT002
    link: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--link", help="With --to-folder: create hard links to the files.")
    ] = False,
    dry_run: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--dry-run", help="With --to-folder: only print where the files would go.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Classify image files. Without labels, discover labels in a caption database.

    Files that cannot be read are reported on standard error and skipped. Exit status: 0 if every file was classified,
    1 if some were not, 2 if none was.
    """
    with report_errors():
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

    results, shared = with_backend(server, work, encoders=True)
    if output is Format.FIFTYONE:
        write_json(labels_file(files, results, classes=classes, top_k=request.top_k or 1))
    else:
        _write_predictions(files, results, output)
    if shared and output is Format.TABLE:
        rows = [(name.label, str(name.images)) for name in shared]
        out.print(make_table(("name", "images"), rows, right=("images",)))
    if request.explain and output is Format.TABLE:
        _write_explanations(files, results)
    report_warnings(results)
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


def _write_predictions(files: Sequence[Path], results: "Sequence[ImageResult]", output: Format) -> None:
    pairs = list(zip(files, results, strict=True))
    if output is Format.JSON:
        write_json([{"path": file_text(file), **result.model_dump(exclude_none=True)} for file, result in pairs])
        return
    # These columns appear only if they were requested, and so have a value in some result.
    optional: list[tuple[str, Callable[[ImageResult], str | None]]] = [
        (name, cell)
        for name, cell in (("rejected", _rejected_cell), ("prediction set", _prediction_set_cell))
        if any(cell(result) is not None for result in results)
    ]
    columns = ("path", "rank", "label", "score", "similarity", *(name for name, _ in optional))
    rows: list[tuple[Cell, ...]] = [
        (
            *(file, str(rank), prediction.label, f"{prediction.score:.4f}", f"{prediction.similarity:.4f}"),
            *(cell(result) or "" for _, cell in optional),
        )
        for file, result in pairs
        for rank, prediction in enumerate(result.predictions, start=1)
    ]
    if output is Format.CSV:
        write_rows(sys.stdout, [columns, *rows])
    elif rows:
        out.print(make_table(columns, [list(map(str, row)) for row in rows], right=("rank", "score", "similarity")))


def _rejected_cell(result: "ImageResult") -> str | None:
    return None if result.rejected is None else "none of these" if result.rejected else "no"


def _prediction_set_cell(result: "ImageResult") -> str | None:
    return None if result.prediction_set is None else ", ".join(result.prediction_set)


def _write_explanations(files: Sequence[Path], results: "Sequence[ImageResult]") -> None:
    """Print the prompts with the largest effect on each label, with a bar for the size of the effect."""
    for file, result in zip(files, results, strict=True):
        if result.explanation is None:
            continue
        out.print(f"\n[bold]{escape(printable(str(file)))}[/bold]", highlight=False)
        for caption in result.explanation.captions:
            suggested = f"   suggested {', '.join(caption.suggested)}" if caption.suggested else ""
            out.print(f"    {caption.similarity:6.3f}  {escape(caption.caption + suggested)}", highlight=False)
        for label in result.explanation.labels:
            rival = "" if label.rival is None else f"   against {label.rival} {label.rival_similarity:.3f}"
            out.print(f"  [bold]{escape(label.label)}[/bold] {label.similarity:.3f}{escape(rival)}", highlight=False)
            level = label.similarity if label.rival_similarity is None else label.rival_similarity
            prompts = [
                *(("+", "green", prompt) for prompt in label.supporting[:_SHOWN_PROMPTS]),
                *(("-", "red", prompt) for prompt in label.opposing[:_SHOWN_PROMPTS]),
            ]
            effects = [prompt.weight * abs(prompt.cosine - level) for _, _, prompt in prompts]
            largest = max(effects, default=0.0) or 1.0
            for (sign, colour, prompt), effect in zip(prompts, effects, strict=True):
                bar = "\u2588" * max(1, round(_BAR_WIDTH * effect / largest))
                coloured = f"[{colour}]{bar:<{_BAR_WIDTH}}[/{colour}]"
                out.print(f"    {sign} {coloured} {prompt.cosine:6.3f}  {escape(prompt.prompt)}", highlight=False)
