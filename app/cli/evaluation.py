"""Measures accuracy on labelled images for `deixis evaluate`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from PIL import Image
from rich.markup import escape

from app.classification.method_names import DISCOVERY_METHOD
from app.classification.request import ClassifyRequest
from app.cli.backends import Backend
from app.cli.common import (
    SOME_FAILED,
    classify_files,
    clean_classname,
    make_table,
    out,
    progress_bar,
    read_subfolder_names,
    report_bad_files,
    report_bad_folders,
    report_errors,
    report_warnings,
    with_backend,
    with_service,
    write_file,
    write_json,
)
from app.cli.curve import measure_curve, print_curve, read_curve_files, read_shots
from app.cli.image_labels import find_images_of_file
from app.cli.pictures import check_picture
from app.errors import InvalidFieldError, UnknownNameError
from app.images.discovery import find_labelled_images
from app.scoring.measures import Difference, Evaluation, evaluate
from app.selection.multi_label import MultiLabelReport, report_labels
from deixis import ImageResult

if TYPE_CHECKING:
    from app.cli.backends.in_process import InProcessBackend
    from app.selection.comparison import Comparison

_MAX_CONFUSION_CLASSES = 20
ALL_METHODS = "all"


def run_evaluation(
    folder: Path,
    request: ClassifyRequest,
    *,
    names: Sequence[str],
    method: str | None,
    support: Path | None,
    pool: Path | None,
    shots: str,
    draws: int,
    picture: Path | None,
    image_labels: Path | None,
    json_file: Path | None,
    server: str | None,
) -> None:
    """Measure and print or write the report; the arguments are those of the command."""
    if image_labels is not None:
        others = (
            method in {ALL_METHODS, DISCOVERY_METHOD},
            support,
            pool,
            picture,
            names,
            request.database,
            request.group,
        )
        with report_errors():
            if any(others):
                problem = "measures one method, and excludes --name, --support, --pool and options of --method cased"
                raise InvalidFieldError.of("--image-labels", problem)
        evaluate_several_labels(folder, request, image_labels, method=method, json_file=json_file, server=server)
        return
    discovers = method == DISCOVERY_METHOD
    with report_errors():
        draws_curve = support is not None or pool is not None
        if draws_curve and method != ALL_METHODS:
            raise InvalidFieldError.of("--support", "needs --method all, and so does --pool")
        _check_outputs(json_file, picture, curve=draws_curve)
        _check_discovery(
            discovers=discovers,
            has_classes=(request.labels or request.label_set or server) is not None,
            is_requested=request.database is not None or request.group,
        )
        bad_folders: list[OSError] = []
        images = find_labelled_images(folder, bad_folders.append)
        class_of = read_subfolder_names(names, {subfolder for _, subfolder in images})
        true_names = [class_of[subfolder] for _, subfolder in images]
    files = [file for file, _ in images]

    async def with_classes(backend: Backend) -> tuple[list[str], ClassifyRequest]:
        way_out = "set the class of a subfolder with --name SUBFOLDER=CLASS"
        return await _with_classes(backend, request, list(dict.fromkeys(true_names)), way_out)

    async def compare(backend: Backend) -> _Report:
        _, compared = await with_classes(backend)
        with progress_bar("Encoding") as on_progress:
            comparison, results = await backend.compare(compared, files, true_names, on_progress)
        return _Report(results, comparison.to_json(), lambda _: _print_comparison(comparison))

    async def learning_curve(backend: Backend) -> _Report:
        classnames, fitted = await with_classes(backend)
        curve_files = read_curve_files(
            images, support, pool, class_of, classnames, bad_folders.append, shots=read_shots(shots), draws=draws
        )
        curve, results = await measure_curve(backend, fitted, curve_files, picture)
        others = [*curve_files.support_files, *curve_files.pool_files]
        return _Report(results, curve.to_json(), lambda _: print_curve(curve), others)

    async def measure(backend: Backend) -> _Report:
        classnames, measured = await with_classes(backend)
        measured = replace(measured, method=method, options=request.options)
        # Encodes the texts before the measurement, because they are encoded only once.
        await backend.classify([_grey_square()], measured)
        began = time.perf_counter()
        results = [result async for _, result in classify_files(backend, files, measured)]
        evaluation = _evaluate(classnames, true_names, results)
        rate = round(evaluation.images / (time.perf_counter() - began), 2)
        report = {**evaluation.to_json(), "images_per_s": rate}
        return _Report(results, report, lambda figures: _print_evaluation(evaluation, figures))

    async def discover(service: "InProcessBackend") -> _Report:
        from app.cli.names import evaluate_names, print_names_report  # noqa: PLC0415 - imports scipy

        named = replace(request, method=method, top_k=1)
        return _Report(*await evaluate_names(files, true_names, named, service), print_names_report)

    if discovers:
        report = with_service(discover)
    else:
        work = learning_curve if draws_curve else compare if method == ALL_METHODS else measure
        report = with_backend(server, work, encoders=True, search=method != ALL_METHODS)
    report_bad_folders(bad_folders)
    _write_report(report, files, json_file, bad_folders=len(bad_folders))


def evaluate_several_labels(
    folder: Path,
    request: ClassifyRequest,
    label_file: Path,
    *,
    method: str | None,
    json_file: Path | None,
    server: str | None,
) -> None:
    """Measure scores on images that may have several labels, and print or write the report."""
    bad_folders: list[OSError] = []
    with report_errors():
        _check_outputs(json_file, None, curve=False)
        images = find_images_of_file(folder, label_file, bad_folders.append)
    files = [file for file, _ in images]
    true_names = [names for _, names in images]

    async def measure(backend: Backend) -> _Report:
        distinct = list(dict.fromkeys(name for names in true_names for name in names))
        classnames, asked = await _with_classes(backend, request, distinct, "correct the file of --image-labels")
        asked = replace(asked, method=method, options=request.options, multi_label=True)
        results = [result async for _, result in classify_files(backend, files, asked)]
        read = [(names, result) for names, result in zip(true_names, results, strict=True) if result.error is None]
        if not read:
            raise InvalidFieldError.of("folder", "none of its images can be read")
        scores, default = _label_scores(classnames, [result for _, result in read])
        place = {name: index for index, name in enumerate(classnames)}
        is_label = np.zeros(scores.shape, bool)
        for row, (names, _) in zip(is_label, read, strict=True):
            row[[place[name] for name in names]] = True
        report = report_labels(classnames, scores, is_label, default)
        return _Report(results, report.to_json(), lambda figures: _print_label_report(report, figures))

    report = with_backend(server, measure, encoders=True)
    report_bad_folders(bad_folders)
    _write_report(report, files, json_file, bad_folders=len(bad_folders))


def _label_scores(classnames: Sequence[str], results: Sequence[ImageResult]) -> tuple[np.ndarray, list[float]]:
    """Return the scores of all classes (n, c), and the thresholds (c,) that are in use."""
    place = {name: index for index, name in enumerate(classnames)}
    scores = np.zeros((len(results), len(classnames)))
    thresholds = [inf] * len(classnames)
    for row, result in zip(scores, results, strict=True):
        for prediction in result.predictions:
            row[place[prediction.label]] = prediction.score
            thresholds[place[prediction.label]] = inf if prediction.threshold is None else prediction.threshold
    return scores, thresholds


async def _with_classes(
    backend: Backend, request: ClassifyRequest, true_names: Sequence[str], way_out: str
) -> tuple[list[str], ClassifyRequest]:
    """Return the classes, which are the true ones unless the request names them, and the request with them."""
    multi_label = None
    if request.label_set is not None:
        label_set = await backend.label_set(request.label_set)
        classnames = [entry.name for entry in label_set.classes]
        labels = request.labels
        if label_set.multi_label:
            multi_label = False  # each image has one true class
    else:
        labels = list(true_names) if request.labels is None else list(request.labels)
        classnames = [clean_classname(label) for label in labels]
    for unknown in sorted(set(true_names) - set(classnames)):
        raise UnknownNameError("class", unknown, classnames, way_out)
    return classnames, replace(request, labels=labels, options={}, top_k=len(classnames), multi_label=multi_label)


@dataclass(frozen=True, slots=True)
class _Report:
    """A report to write.

    Args:
        results: a result per file, also of ``other_files``.
        figures: the report as JSON.
        show: prints the report, with the number of skipped files.
        other_files: files that were read besides the test images.
    """

    results: Sequence[ImageResult]
    figures: Mapping[str, Any]
    show: Callable[[Mapping[str, Any]], None]
    other_files: Sequence[Path] = ()


def _write_report(report: _Report, files: Sequence[Path], json_file: Path | None, *, bad_folders: int) -> None:
    """Print or write the report, and exit with status 1 if files could not be read."""
    read = [*files, *report.other_files]
    report_warnings(read, report.results)
    bad = report_bad_files(read, report.results)
    figures = {**report.figures, "skipped": bad}
    if json_file == Path("-"):
        write_json(figures)
    else:
        report.show(figures)
        if json_file is not None:
            write_file(json_file, figures)
    if bad or bad_folders:
        raise typer.Exit(SOME_FAILED)


def _check_discovery(*, discovers: bool, has_classes: bool, is_requested: bool) -> None:
    if discovers and has_classes:
        raise InvalidFieldError.of("--method", "cased excludes --labels, --label-set and --server")
    if is_requested and not discovers:
        raise InvalidFieldError.of("--database", "needs --method cased, and so does --group")


def _check_outputs(json_file: Path | None, picture: Path | None, *, curve: bool) -> None:
    """Check before the measurement that the report can be written."""
    if picture is not None:
        if not curve:
            raise InvalidFieldError.of("--picture", "needs --support or --pool")
        check_picture(picture)
    if json_file is not None and json_file != Path("-") and not json_file.absolute().parent.is_dir():
        raise InvalidFieldError.of("--json", f"there is no folder {json_file.absolute().parent}")


def _grey_square() -> bytes:
    file = BytesIO()
    Image.new("L", (8, 8), 128).save(file, "PNG")
    return file.getvalue()


def _evaluate(classnames: Sequence[str], true_names: Sequence[str], results: Sequence[ImageResult]) -> Evaluation:
    """Measure the images that could be read."""
    index = {classname: number for number, classname in enumerate(classnames)}
    read = [(true, result) for true, result in zip(true_names, results, strict=True) if result.error is None]
    if not read:
        raise InvalidFieldError.of("folder", "none of its images can be read")
    return evaluate(
        classnames,
        np.array([index[true] for true, _ in read]),
        np.array([[index[prediction.label] for prediction in result.predictions] for _, result in read]),
    )


def _print_comparison(comparison: "Comparison") -> None:
    def cells(difference: Difference | None) -> tuple[str, str]:
        return ("", "") if difference is None else (f"{100 * difference.mean:+.1f}", f"{difference.p:.2g}")

    columns = (
        *("method", "prompts", "top-1", "95 % interval", "to zero-shot", "p", "to random", "p "),
        *("macro F1", "NLL", "ECE", "ms/image"),
    )
    rows = [
        (
            report.method,
            f"{report.prompts_per_class:g}",
            f"{report.evaluation.top1:.4f}",
            f"{report.interval[0]:.3f} to {report.interval[1]:.3f}",
            *cells(report.to_baseline),
            *cells(report.to_control),
            *(_share(value) for value in (report.evaluation.macro_f1, report.evaluation.nll, report.evaluation.ece)),
            f"{report.ms_per_image:.3f}",
        )
        for report in comparison.methods
    ]
    out.print(f"{comparison.images} images, model {escape(comparison.model)}", highlight=False)
    out.print(make_table(columns, rows, right=columns[1:]))
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
        make_table(
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
    if evaluation.class_count > len(evaluation.classes):
        out.print(f"and {evaluation.class_count - len(evaluation.classes)} further classes with fewer images")
    if evaluation.class_count <= _MAX_CONFUSION_CLASSES:
        names = [row.name for row in evaluation.classes]
        counts = {(cell.label, cell.predicted): str(cell.count) for cell in evaluation.confusion}
        out.print(
            make_table(
                ("true \\ predicted", *names),
                [(name, *(counts.get((name, predicted), "") for predicted in names)) for name in names],
                right=names,
            )
        )


def _print_label_report(report: MultiLabelReport, figures: Mapping[str, Any]) -> None:
    fitted = report.at_fitted
    out.print(
        f"[bold]mAP {fitted.mean_average_precision:.4f}[/bold]   micro AP {fitted.micro_average_precision:.4f}"
        f"   {report.images} images   {fitted.labels_per_image:.2f} labels per image   {figures['skipped']} skipped",
        highlight=False,
    )
    rows = [
        (name, f"{each.micro_f1:.3f}", f"{each.macro_f1:.3f}", f"{each.exact:.3f}")
        for name, each in (
            ("default", report.at_default),
            ("one for all labels, fitted", report.at_shared),
            ("one per label, fitted", fitted),
        )
    ]
    columns = ("thresholds", "micro F1", "macro F1", "exact")
    out.print(make_table(columns, rows, right=columns[1:]))
    shared = report.shared_threshold
    columns_of_labels = ("label", "images", "AP", "precision", "recall", "F1", "threshold")
    out.print(
        make_table(
            columns_of_labels,
            [
                (
                    row.name,
                    str(row.support),
                    *map(_share, (row.average_precision, row.precision, row.recall, row.f1)),
                    _share(report.thresholds.get(row.name, shared)),
                )
                for row in fitted.labels
            ],
            right=columns_of_labels[1:],
        )
    )
    if fitted.label_count > len(fitted.labels):
        out.print(f"and {fitted.label_count - len(fitted.labels)} further labels with fewer images")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
