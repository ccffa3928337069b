"""`deixis evaluate`: how often the answer is right."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich.markup import escape

from app.api.schemas.classification import ResultBody
from app.classification.methods import CASED
from app.classification.resolve import ClassifyRequest
from app.cli.backends import Backend
from app.cli.common import (
    SOME_FAILED,
    DatabaseOption,
    GroupOption,
    LabelSetOption,
    LabelsOption,
    ModelOption,
    OptionsOption,
    ServerOption,
    TemplateOption,
    class_name,
    classify_files,
    out,
    progress_bar,
    read_labels,
    read_options,
    read_subfolder_names,
    report_bad_files,
    report_warnings,
    table_of,
    told_plainly,
    with_backend,
    with_service,
    write_file,
    write_json,
)
from app.cli.curve import check_picture, curve_of, read_curve_input, read_shots
from app.cli.names import names_evaluated
from app.errors import InvalidFieldError, UnknownNameError
from app.images.discovery import find_labelled_images
from app.scoring.measures import Difference, Evaluation, evaluate
from app.selection.comparison import Comparison

_MAX_CONFUSION_CLASSES = 20
ALL_METHODS = "all"


def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="One subfolder per class, named after it.")],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", "-n", metavar="SUBFOLDER=CLASS", help="What a subfolder's class is called. Repeatable."),
    ] = None,
    model: ModelOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="The classifier, zero-shot by default; `all` compares every one, `cased` gets no classes."
        ),
    ] = None,
    option: OptionsOption = None,
    template: TemplateOption = None,
    database: DatabaseOption = None,
    group: GroupOption = False,  # noqa: FBT002 - a flag
    support: Annotated[
        Path | None,
        typer.Option(
            "--support",
            help="With `--method all`: labelled images to learn from, one subfolder per class; draws of them give"
            " accuracy against their number.",
        ),
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="With `--method all`: unlabelled images to learn from.")
    ] = None,
    shots: Annotated[
        str, typer.Option("--shots", help="Images of each class in a draw, comma separated.")
    ] = "1,2,4,8,16",
    draws: Annotated[int, typer.Option("--draws", min=1, max=1000, help="Draws of each number.")] = 5,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Also draw the curve: .svg, .png or .pdf; needs matplotlib."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write every figure as JSON; - for standard output."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Measure accuracy on a folder with one subfolder per class.

    The classes to choose from are the subfolders' names (underscores read as spaces, `--name` gives better ones) unless
    `--labels` or `--label-set` say otherwise; then every subfolder must be called like one of those.

    With `--method all`, every method is run on the same images, and it is said whether descriptions help: each is
    compared with zero-shot and with random words of the same number. With `--support` or `--pool` too, methods learn
    from those images, and accuracy is told for each number of labelled images per class.

    With `--method cased`, names are found without the classes, and compared with them.
    """
    with told_plainly():
        options = read_options(option)
        curve = support is not None or pool is not None
        if curve and method != ALL_METHODS:
            raise InvalidFieldError.of("--support", "goes with --method all, as does --pool")
        _check_outputs(json_file, picture, curve=curve)
        finds_names = method == CASED.name
        _check_names(
            finds_names=finds_names,
            given=(labels or label_set or server) is not None,
            asked=database is not None or group,
        )
        images = find_labelled_images(folder)
        renamed = read_subfolder_names(name or [], {subfolder for _, subfolder in images})
        true_names = [renamed[subfolder] for _, subfolder in images]
        given = read_labels(labels)
        if given is None and label_set is None:
            given = list(dict.fromkeys(true_names))
    files = [file for file, _ in images]

    async def read_question(backend: Backend) -> tuple[list[str], ClassifyRequest]:
        classnames = (
            [class_name(each) for each in given]
            if label_set is None and given is not None
            else [each.name for each in (await backend.label_set(label_set or "")).classes]
        )
        for true_name in set(true_names) - set(classnames):
            raise UnknownNameError("class", true_name, classnames, "--name SUBFOLDER=CLASS tells what a subfolder is")
        question = ClassifyRequest(
            labels=given, label_set=label_set, model=model, template=template, top_k=len(classnames)
        )
        return classnames, question

    async def compared(backend: Backend) -> _Measured:
        _, question = await read_question(backend)
        with progress_bar() as bar:
            line = bar.add_task("Encoding", total=len(files))
            comparison, results = await backend.compare(question, files, true_names, lambda: bar.advance(line))
        return _Measured(results, comparison.to_json(), lambda _: _print_comparison(comparison))

    async def drawn(backend: Backend) -> _Measured:
        classnames, question = await read_question(backend)
        given_images = read_curve_input(
            images, support, pool, renamed, classnames, shots=read_shots(shots), draws=draws
        )
        return _Measured(*await curve_of(backend, question, given_images, picture))

    async def evaluated(backend: Backend) -> _Measured:
        classnames, question = await read_question(backend)
        question = replace(question, method=method, options=options)
        # The texts are encoded once and for all: no part of the rate at which images are classified.
        await backend.classify([_grey_square()], question)
        began = time.perf_counter()
        results = [result async for _, result in classify_files(backend, files, question)]
        evaluation = _evaluated(classnames, true_names, results)
        rate = round(evaluation.images / (time.perf_counter() - began), 2)
        report = {**evaluation.to_json(), "images_per_s": rate}
        return _Measured(results, report, partial(_print_evaluation, evaluation))

    if finds_names:
        question = ClassifyRequest(
            method=method, model=model, template=template, options=options, database=database, group=group, top_k=1
        )
        _tell(_Measured(*with_service(partial(names_evaluated, files, true_names, question))), files, json_file)
        return
    work = drawn if curve else compared if method == ALL_METHODS else evaluated
    _tell(with_backend(server, work, encoders=True), files, json_file)


class _Measured(NamedTuple):
    """What came of a folder: each file's result, the report, what prints it, and which other files were read."""

    results: Sequence[ResultBody]
    report: Mapping[str, Any]
    show: Callable[[Mapping[str, Any]], None]
    more_files: Sequence[Path] = ()


def _tell(measured: _Measured, files: Sequence[Path], json_file: Path | None) -> None:
    """Print the figures or write them, and end the command where files could not be read."""
    report_warnings(measured.results)
    bad = report_bad_files([*files, *measured.more_files], measured.results)
    report = {**measured.report, "skipped": bad}
    if json_file == Path("-"):
        write_json(report)
    else:
        measured.show(report)
        if json_file is not None:
            write_file(json_file, report)
    if bad:
        raise typer.Exit(SOME_FAILED)


def _check_names(*, finds_names: bool, given: bool, asked: bool) -> None:
    if finds_names and given:
        raise InvalidFieldError.of("--method", "cased gets no classes and no server: leave out what names one")
    if asked and not finds_names:
        raise InvalidFieldError.of("--database", "goes with --method cased, as does --group")


def _check_outputs(json_file: Path | None, picture: Path | None, *, curve: bool) -> None:
    """Find out before anything is measured whether the figures can be written."""
    if picture is not None:
        check_picture(picture, wanted=curve)
    if json_file is not None and json_file != Path("-") and not json_file.absolute().parent.is_dir():
        raise InvalidFieldError.of("--json", f"there is no folder {json_file.absolute().parent}")


def _grey_square() -> bytes:
    file = BytesIO()
    Image.new("L", (8, 8), 128).save(file, "PNG")
    return file.getvalue()


def _evaluated(classnames: Sequence[str], true_names: Sequence[str], results: Sequence[ResultBody]) -> Evaluation:
    """Score the images that could be read."""
    index = {classname: number for number, classname in enumerate(classnames)}
    read = [(true, result) for true, result in zip(true_names, results, strict=True) if result.error is None]
    if not read:
        raise InvalidFieldError.of("folder", "not one of its images could be read")
    return evaluate(
        classnames,
        np.array([index[true] for true, _ in read]),
        np.array([[index[each.label] for each in result.predictions] for _, result in read]),
    )


def _print_comparison(comparison: Comparison) -> None:
    def told(difference: Difference | None) -> tuple[str, str]:
        return ("", "") if difference is None else (f"{100 * difference.mean:+.1f}", f"{difference.p:.2g}")

    columns = (
        *("method", "prompts", "top-1", "95 % interval", "to zero-shot", "p", "to random", "p "),
        *("macro F1", "NLL", "ECE", "ms/image"),
    )
    rows = [
        (
            each.method,
            f"{each.prompts_per_class:g}",
            f"{each.evaluation.top1:.4f}",
            f"{each.interval[0]:.3f} to {each.interval[1]:.3f}",
            *told(each.to_baseline),
            *told(each.to_control),
            *(_share(value) for value in (each.evaluation.macro_f1, each.evaluation.nll, each.evaluation.ece)),
            f"{each.ms_per_image:.3f}",
        )
        for each in comparison.methods
    ]
    out.print(f"{comparison.images} images, model {escape(comparison.model)}", highlight=False)
    out.print(table_of(columns, rows, right=columns[1:]))
    for method in comparison.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)
    for sentence in comparison.verdict:
        out.print(escape(sentence), highlight=False, soft_wrap=True)


def _print_evaluation(evaluation: Evaluation, report: Mapping[str, Any]) -> None:
    low, high = evaluation.top1_interval
    out.print(
        f"[bold]top-1 {evaluation.top1:.4f}[/bold] (95 % interval {low:.3f} to {high:.3f})"
        f"   top-5 {evaluation.top5:.4f}   mean recall {evaluation.mean_recall:.4f}   {evaluation.images} images"
        f"   {report['images_per_s']} images/s   {report['skipped']} skipped",
        highlight=False,
    )
    out.print(
        table_of(
            ("class", "images", "recall", "precision", "F1", "most confused with"),
            [
                (
                    row.name,
                    str(row.support),
                    _share(row.recall),
                    _share(row.precision),
                    _share(row.f1),
                    row.confused_with or "",
                )
                for row in evaluation.classes
            ],
            right=("images", "recall", "precision", "F1"),
        )
    )
    if len(evaluation.classes) <= _MAX_CONFUSION_CLASSES:
        names = [row.name for row in evaluation.classes]
        out.print(
            table_of(
                ("true \\ predicted", *names),
                [
                    (name, *(str(count or "") for count in row))
                    for name, row in zip(names, evaluation.confusion, strict=True)
                ],
                right=names,
            )
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
