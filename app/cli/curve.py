"""Learning curves on the command line: their input, and their output as a table, a text chart and an image file."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from app.classification.method_names import AUTO, DEFAULT_METHOD
from app.classification.request import ClassifyRequest
from app.cli.backends import Backend, CurveFiles
from app.cli.common import clean_classname, make_table, out, progress_bar
from app.cli.pictures import write_picture
from app.errors import InvalidFieldError, UnknownNameError
from app.images.discovery import OnUnreadable, find_images, find_labelled_images
from deixis import ImageResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from app.selection.learning_curve import CurvePoint, LearningCurve

_HEIGHT = 16
_COLUMN_WIDTH = 8


def read_shots(text: str) -> list[int]:
    """Return the numbers of ``--shots`` in ascending order."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise InvalidFieldError.of("--shots", f"'{text}' is not a list of numbers such as 1,2,4,8,16") from error
    if counts[0] < 1:
        raise InvalidFieldError.of("--shots", f"'{text}' has a number below 1")
    return counts


def read_curve_files(
    images: Sequence[tuple[Path, str]],
    support: Path | None,
    pool: Path | None,
    class_of: Mapping[str, str],
    classnames: Sequence[str],
    unreadable: OnUnreadable,
    *,
    shots: Sequence[int],
    draws: int,
) -> CurveFiles:
    """Return the images of a learning curve.

    Args:
        images: the test images, each with its subfolder.
        support: folder of labelled images, one subfolder per class.
        pool: folder of unlabelled images, searched recursively.
        class_of: the class of each subfolder of the test images.
        classnames: the classes.
        unreadable: called with the error of each folder that cannot be searched.
        shots: the numbers of labelled images per class.
        draws: random draws of labelled images for each number.

    Raises:
        UnknownNameError: a subfolder of ``support`` is not a class.
    """
    labelled = find_labelled_images(support, unreadable) if support is not None else []
    names = [class_of.get(subfolder) or clean_classname(subfolder.replace("_", " ")) for _, subfolder in labelled]
    for unknown in sorted(set(names) - set(classnames)):
        raise UnknownNameError("class", unknown, classnames, "name the subfolders of --support after the classes")
    return CurveFiles(
        files=[file for file, _ in images],
        classes=[class_of[subfolder] for _, subfolder in images],
        support_files=[file for file, _ in labelled],
        support_classes=names,
        pool_files=find_images([pool], unreadable) if pool is not None else [],
        shots=shots,
        draws=draws,
    )


async def measure_curve(
    backend: Backend, request: ClassifyRequest, images: CurveFiles, picture: Path | None
) -> "tuple[LearningCurve, list[ImageResult]]":
    """Measure the curve and write the picture, and return the curve with a result per file."""
    with progress_bar("Encoding and fitting") as on_progress:
        curve, results = await backend.learning_curve(request, images, on_progress)
    if picture is not None:
        # In a thread: it takes half a second, and the service is in this process.
        await asyncio.to_thread(lambda: write_picture(_figure(curve), picture))
    return curve, results


def print_curve(curve: "LearningCurve") -> None:
    """Print the accuracy of each method for each number of images, as a table and as a text chart."""
    low, high = curve.interval
    out.print(
        f"{curve.images} images, model {escape(curve.model)}; fitted on draws of {curve.labelled} labelled images and"
        f" on {curve.unlabelled} unlabelled images; 95 % interval of zero-shot {low:.3f} to {high:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    shots = sorted({point.shots for point in curve.points if point.shots is not None})
    methods = list(dict.fromkeys(point.method for point in curve.points))
    columns = ("method", "without labels", *map(_shots, shots))
    rows = [(name, *(_accuracy(_point(curve, name, count)) for count in (None, *shots))) for name in methods]
    out.print(make_table(columns, rows, right=columns[1:]))
    for point in curve.points:
        if point.method == AUTO:
            chosen = ", ".join(f"{name} {point.chosen.count(name)}" for name in dict.fromkeys(point.chosen))
            number = "without labels" if point.shots is None else _shots(point.shots)
            worse = f"; significantly below zero-shot in {point.worse}" if point.worse else ""
            out.print(f"auto, {number}: {escape(chosen)}{worse}", highlight=False)
    if len(shots) > 1:
        out.print(_text_chart(curve, shots, methods), highlight=False, markup=False)
    for method in curve.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)


def _shots(count: int) -> str:
    return "1 shot" if count == 1 else f"{count} shots"


def _point(curve: "LearningCurve", method: str, shots: int | None) -> "CurvePoint | None":
    return next((point for point in curve.points if (point.method, point.shots) == (method, shots)), None)


def _accuracy(point: "CurvePoint | None") -> str:
    if point is None:
        return ""
    return f"{point.mean:.3f}" if len(point.accuracies) == 1 else f"{point.mean:.3f} ± {point.deviation:.3f}"


def _text_chart(curve: "LearningCurve", shots: Sequence[int], methods: Sequence[str]) -> str:
    """Return a chart of accuracy against shots: a letter per few-shot method, and dashes for zero-shot."""
    growing = [name for name in methods if any(_point(curve, name, count) for count in shots)]
    base = _point(curve, DEFAULT_METHOD, None)
    means = [point.mean for name in growing for count in shots if (point := _point(curve, name, count)) is not None]
    level = base.mean if base is not None else means[0]
    low, high = min(level, *means), max(level, *means)
    step = max((high - low) / (_HEIGHT - 1), 1e-9)
    grid = [[" "] * (_COLUMN_WIDTH * len(shots)) for _ in range(_HEIGHT)]
    grid[round((high - level) / step)] = list("-" * (_COLUMN_WIDTH * len(shots)))
    letters = {name: chr(ord("A") + number) for number, name in enumerate(growing)}
    for name in growing:
        for place, count in enumerate(shots):
            point = _point(curve, name, count)
            if point is not None:
                row, column = round((high - point.mean) / step), place * _COLUMN_WIDTH + 2
                while grid[row][column] not in " -":
                    column += 1  # beside the letter of a method with the same accuracy
                grid[row][column] = letters[name]
    lines = [f"{high - row * step:7.3f} |{''.join(cells)}".rstrip() for row, cells in enumerate(grid)]
    axis = "".join(f"{count:^5}".ljust(_COLUMN_WIDTH) for count in shots)
    key = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    return "\n".join(
        [*lines, f"        +{'-' * (_COLUMN_WIDTH * len(shots))}", f"         {axis} shots", f"{key}, --- zero-shot"]
    )


def _figure(curve: "LearningCurve") -> "Figure":
    """Return a chart of accuracy against shots, with error bars of one standard deviation."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an optional dependency

    from app.classification.methods import METHODS  # noqa: PLC0415 - imported for the curve already

    shots = sorted({point.shots for point in curve.points if point.shots is not None})
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(point.method for point in curve.points):
        points = [point for count in shots if (point := _point(curve, name, count)) is not None]
        flat = _point(curve, name, None)
        if points:
            axes.errorbar(
                shots,
                [100 * point.mean for point in points],
                yerr=[100 * point.deviation for point in points],
                marker="o",
                capsize=3,
                label=name,
            )
        elif flat is not None and (name in {AUTO, DEFAULT_METHOD} or METHODS[name].learns):
            style: dict[str, Any] = (
                {"color": "black", "linestyle": "--"} if name == DEFAULT_METHOD else {"linestyle": ":"}
            )
            axes.axhline(100 * flat.mean, label=name, **style)
    if shots:
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{curve.images} images, model {curve.model}")
    axes.legend(fontsize="small")
    return figure
