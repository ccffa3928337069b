"""`deixis classify`: which word fits an image file."""

import csv
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from app.api.schemas.classification import ResultBody, SharedNameBody
from app.classification.resolve import ClassifyRequest
from app.cli.backends import Backend
from app.cli.common import (
    NOTHING_DONE,
    SOME_FAILED,
    CoverageOption,
    DatabaseOption,
    FalseRejectionRateOption,
    GroupOption,
    LabelSetOption,
    LabelsOption,
    MethodOption,
    ModelOption,
    OptionsOption,
    ServerOption,
    TemplateOption,
    class_name,
    classify_files,
    err,
    out,
    prepare_names,
    progress_bar,
    read_labels,
    read_options,
    report_bad_files,
    report_warnings,
    share_of,
    table_of,
    told_plainly,
    with_backend,
    write_json,
)
from app.cli.sorting import How, Sorter
from app.errors import InvalidFieldError
from app.images.discovery import find_images
from app.integrations.fiftyone import labels_file

_SHOWN_PROMPTS = 5
_BAR_WIDTH = 16


class Format(StrEnum):
    """How results are written to standard output; ``fiftyone`` is a labels.json that FiftyOne imports."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    FIFTYONE = "fiftyone"


def classify_command(
    paths: Annotated[list[Path], typer.Argument(help="Image files, folders (searched whole) and globs.")],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    model: ModelOption = None,
    method: MethodOption = None,
    template: TemplateOption = None,
    database: DatabaseOption = None,
    group: GroupOption = False,  # noqa: FBT002 - a flag
    option: OptionsOption = None,
    reject_below: Annotated[
        float | None,
        typer.Option(
            "--reject-below", min=0, max=1, help="Take images whose best score is lower for none of the labels."
        ),
    ] = None,
    false_rejection_rate: FalseRejectionRateOption = None,
    coverage: CoverageOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Predictions per image.")] = 1,
    explain: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option(
            "--explain",
            "-x",
            help="Also show which prompts spoke for each label, and which against; without labels, the captions near.",
        ),
    ] = False,
    output: Annotated[Format, typer.Option("--format", "-f", help="Of what goes to standard output.")] = Format.TABLE,
    to_folder: Annotated[
        Path | None,
        typer.Option(
            "--to-folder", help="Also copy each file into a folder of this one that is called like its label."
        ),
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="With --to-folder: move the files.")] = False,  # noqa: FBT002
    link: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--link", help="With --to-folder: make hard links to the files.")
    ] = False,
    dry_run: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--dry-run", help="With --to-folder: only tell where the files would go.")
    ] = False,
    server: ServerOption = None,
) -> None:
    """Classify image files; without labels, by names that are found for them in a caption database.

    Bad files are reported on standard error and skipped. Exit status: 0 if every file was classified, 1 if some were
    not, 2 if nothing could be done.
    """
    with told_plainly():
        sorter = _sorter(to_folder, move=move, link=link, dry_run=dry_run)
        question = ClassifyRequest(
            labels=read_labels(labels),
            label_set=label_set,
            method=method,
            model=model,
            template=template,
            top_k=top_k,
            explain=explain,
            options=read_options(option),
            reject_below=reject_below,
            false_rejection_rate=share_of(false_rejection_rate, "--false-rejection-rate"),
            coverage=share_of(coverage, "--coverage"),
            database=database,
            group=group,
        )
        files = find_images(paths)
        if sorter is not None:
            sorter.check()
            # What an earlier run has sorted is not sorted again.
            files = [file for file in files if not file.resolve().is_relative_to(sorter.target.resolve())]

    classes: list[str] | None = None

    async def work(backend: Backend) -> tuple[list[ResultBody], list[SharedNameBody]]:
        nonlocal classes
        await prepare_names(backend, question)
        if output is Format.FIFTYONE:
            classes = await _classes_of(backend, question)
        if not group:
            return [result async for _, result in classify_files(backend, files, question)], []
        with progress_bar() as bar:
            line = bar.add_task("Classifying", total=len(files))
            return await backend.name_together(files, question, lambda: bar.advance(line))

    results, names = with_backend(server, work, encoders=True)
    if output is Format.FIFTYONE:
        write_json(labels_file(files, results, classes=classes, top_k=top_k))
    else:
        _write_predictions(files, results, output)
    if names and output is Format.TABLE:
        rows = [(each.label, str(each.images)) for each in names]
        out.print(table_of(("name", "images"), rows, right=("images",)))
    if explain and output is Format.TABLE:
        _write_explanations(files, results)
    report_warnings(results)
    bad = report_bad_files(files, results)
    if sorter is not None:
        bad += _sort(sorter, files, results)
    if bad:
        raise typer.Exit(NOTHING_DONE if bad == len(files) else SOME_FAILED)


def _sorter(target: Path | None, *, move: bool, link: bool, dry_run: bool) -> Sorter | None:
    if target is None:
        if move or link or dry_run:
            raise InvalidFieldError.of("--to-folder", "is missing; --move, --link and --dry-run are about it")
        return None
    if move and link:
        raise InvalidFieldError.of("--link", "and --move are two ways; give one")
    return Sorter(target, How.MOVE if move else How.LINK if link else How.COPY, dry_run)


def _sort(sorter: Sorter, files: Sequence[Path], results: Sequence[ResultBody]) -> int:
    """Put every classified file where it belongs, and return how many could not be put there."""
    bad = 0
    for file, result in zip(files, results, strict=True):
        if result.error is not None:
            continue
        try:
            place = sorter.take(file, result)
        except OSError as error:
            bad += 1
            reason = error.strerror or type(error).__name__
            err.print(f"[yellow]left[/yellow] {escape(str(file))}: {escape(reason)}", highlight=False, soft_wrap=True)
            continue
        if sorter.dry_run:
            err.print(f"{escape(str(file))} -> {escape(str(place))}", highlight=False, soft_wrap=True)
    verb = {How.COPY: "copied", How.MOVE: "moved", How.LINK: "linked"}[sorter.how]
    would = "would be " if sorter.dry_run else ""
    err.print(f"{sorter.done} of {len(files)} {would}{verb} into {escape(str(sorter.target))}", highlight=False)
    return bad


async def _classes_of(backend: Backend, question: ClassifyRequest) -> list[str] | None:
    """Return what there is to choose from, spelled as answers spell it; None where names are found."""
    if question.label_set is not None and question.labels is None:
        return [each.name for each in (await backend.label_set(question.label_set)).classes]
    return None if question.labels is None else [class_name(each) for each in question.labels]


def _write_predictions(files: Sequence[Path], results: Sequence[ResultBody], output: Format) -> None:
    found = [(file, result) for file, result in zip(files, results, strict=True)]
    if output is Format.JSON:
        write_json([{"path": str(file), **result.model_dump(exclude_none=True)} for file, result in found])
        return
    rows: list[tuple[str, ...]] = [
        (str(file), str(rank), each.label, f"{each.score:.4f}", f"{each.similarity:.4f}")
        for file, result in found
        for rank, each in enumerate(result.predictions, start=1)
    ]
    columns: tuple[str, ...] = ("path", "rank", "label", "score", "similarity")
    for column, tell in (("rejected", _told_rejected), ("prediction set", _told_set)):
        if any(tell(result) is not None for _, result in found):
            told = [tell(result) or "" for _, result in found for _ in result.predictions]
            columns, rows = (*columns, column), [(*row, each) for row, each in zip(rows, told, strict=True)]
    if output is Format.CSV:
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
    elif rows:
        out.print(table_of(columns, rows, right=("rank", "score", "similarity")))


def _told_rejected(result: ResultBody) -> str | None:
    return None if result.rejected is None else "none of these" if result.rejected else "no"


def _told_set(result: ResultBody) -> str | None:
    return None if result.prediction_set is None else ", ".join(result.prediction_set)


def _write_explanations(files: Sequence[Path], results: Sequence[ResultBody]) -> None:
    """Show for each label its prompts with the most effect, a bar for how much."""
    for file, result in zip(files, results, strict=True):
        if result.explanation is None:
            continue
        out.print(f"\n[bold]{escape(str(file))}[/bold]", highlight=False)
        for caption in result.explanation.captions:
            suggested = f"   suggested {', '.join(caption.suggested)}" if caption.suggested else ""
            out.print(f"    {caption.similarity:6.3f}  {escape(caption.caption + suggested)}", highlight=False)
        for label in result.explanation.labels:
            rival = "" if label.rival is None else f"   against {label.rival} {label.rival_similarity:.3f}"
            out.print(f"  [bold]{escape(label.label)}[/bold] {label.similarity:.3f}{escape(rival)}", highlight=False)
            level = label.similarity if label.rival_similarity is None else label.rival_similarity
            shown = [
                *(("+", "green", each) for each in label.supporting[:_SHOWN_PROMPTS]),
                *(("-", "red", each) for each in label.opposing[:_SHOWN_PROMPTS]),
            ]
            effects = [each.weight * abs(each.cosine - level) for _, _, each in shown]
            largest = max(effects, default=0.0) or 1.0
            for (sign, colour, each), effect in zip(shown, effects, strict=True):
                bar = "\u2588" * max(1, round(_BAR_WIDTH * effect / largest))
                out.print(
                    f"    {sign} [{colour}]{bar:<{_BAR_WIDTH}}[/{colour}] {each.cosine:6.3f}  {escape(each.prompt)}",
                    highlight=False,
                )
