"""How a learning curve is shown: a table, a picture made of letters, and a file."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from app.api.schemas.classification import ResultBody
from app.classification.methods import AUTO, DEFAULT_METHOD, METHODS
from app.classification.resolve import ClassifyRequest
from app.cli.backends import Backend, CurveInput
from app.cli.common import class_name, out, progress_bar, table_of
from app.errors import InvalidFieldError, UnknownNameError
from app.images.discovery import find_images, find_labelled_images
from app.selection.learning_curve import CurvePoint, LearningCurve

_SUFFIXES = (".svg", ".png", ".pdf")
_HEIGHT = 16
_COLUMN_WIDTH = 8


def read_shots(text: str) -> list[int]:
    """Return the numbers of images of `--shots`, ascending."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise InvalidFieldError.of("--shots", f"'{text}' is no list of numbers such as 1,2,4,8,16") from error
    if counts[0] < 1:
        raise InvalidFieldError.of("--shots", f"'{text}' has a number below 1")
    return counts


def read_curve_input(
    images: Sequence[tuple[Path, str]],
    support: Path | None,
    pool: Path | None,
    renamed: Mapping[str, str],
    classnames: Sequence[str],
    *,
    shots: Sequence[int],
    draws: int,
) -> CurveInput:
    """Return the files of a curve.

    Args:
        images: to ask about, each with its subfolder.
        support: folder with one subfolder per class.
        pool: folder of unlabelled images, searched whole.
        renamed: the class of each subfolder of the images.
        classnames: to choose from.
        shots: images of each class in a draw.
        draws: of each number.

    Raises:
        UnknownNameError: a subfolder of the support is called like no class.
    """
    labelled = find_labelled_images(support) if support is not None else []
    names = [renamed.get(subfolder) or class_name(subfolder.replace("_", " ")) for _, subfolder in labelled]
    for strange in sorted(set(names) - set(classnames)):
        raise UnknownNameError("class", strange, classnames, "subfolders of --support must be called like the classes")
    return CurveInput(
        [file for file, _ in images],
        [renamed[subfolder] for _, subfolder in images],
        [file for file, _ in labelled],
        names,
        find_images([pool]) if pool is not None else [],
        shots,
        draws,
    )


async def curve_of(
    backend: Backend, question: ClassifyRequest, given: CurveInput, picture: Path | None
) -> tuple[list[ResultBody], Mapping[str, Any], Callable[[object], None], list[Path]]:
    """Measure, draw the picture, and return each file's result, the report, what prints it, and the other files."""
    with progress_bar() as bar:
        line = bar.add_task("Encoding and learning", total=None)

        async def advance(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total)

        curve, results = await backend.learning_curve(question, given, advance)
    if picture is not None:
        draw_curve(curve, picture)
    return results, curve.to_json(), lambda _: print_curve(curve), [*given.support_files, *given.pool_files]


def check_picture(file: Path, *, wanted: bool) -> None:
    """Find out before anything is measured whether the picture can be drawn.

    Raises:
        InvalidFieldError: nothing to draw, a kind of file that cannot be written, no folder, or no matplotlib.
    """
    if not wanted:
        raise InvalidFieldError.of("--picture", "goes with --support or --pool")
    if file.suffix not in _SUFFIXES:
        raise InvalidFieldError.of("--picture", f"'{file.name}' must end in one of {', '.join(_SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise InvalidFieldError.of("--picture", f"there is no folder {file.absolute().parent}")
    try:
        import matplotlib  # noqa: F401, PLC0415 - only where a picture is wanted
    except ImportError as error:
        raise InvalidFieldError.of("--picture", "needs matplotlib; run: pip install 'deixis[bench]'") from error


def print_curve(curve: LearningCurve) -> None:
    """Print every method's accuracy for each number of images, and a picture of it."""
    low, high = curve.interval
    out.print(
        f"{curve.images} images, model {escape(curve.model)}; learned from draws of {curve.labelled} labelled and from"
        f" {curve.unlabelled} unlabelled images; zero-shot's 95 % interval {low:.3f} to {high:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    shots = sorted({point.shots for point in curve.points if point.shots is not None})
    methods = list(dict.fromkeys(point.method for point in curve.points))
    columns = ("method", "without labels", *map(_shots, shots))
    rows = [(name, *(_told(_at(curve, name, count)) for count in (None, *shots))) for name in methods]
    out.print(table_of(columns, rows, right=columns[1:]))
    for point in curve.points:
        if point.method == AUTO:
            taken = ", ".join(f"{name} {point.chosen.count(name)}" for name in dict.fromkeys(point.chosen))
            number = "without labels" if point.shots is None else _shots(point.shots)
            worse = f"; below zero-shot beyond chance in {point.worse}" if point.worse else ""
            out.print(f"auto, {number}: {escape(taken)}{worse}", highlight=False)
    if len(shots) > 1:
        out.print(_drawn(curve, shots, methods), highlight=False, markup=False)
    for method in curve.not_run:
        out.print(f"[yellow]not run:[/yellow] {escape(method)}", highlight=False, soft_wrap=True)


def _shots(count: int) -> str:
    return "1 shot" if count == 1 else f"{count} shots"


def _at(curve: LearningCurve, method: str, shots: int | None) -> CurvePoint | None:
    return next((point for point in curve.points if (point.method, point.shots) == (method, shots)), None)


def _told(point: CurvePoint | None) -> str:
    if point is None:
        return ""
    return f"{point.mean:.3f}" if len(point.accuracies) == 1 else f"{point.mean:.3f} ± {point.deviation:.3f}"


def _drawn(curve: LearningCurve, shots: Sequence[int], methods: Sequence[str]) -> str:
    """Return accuracy against shots, a letter for each method that grows with them, and dashes for zero-shot."""
    growing = [name for name in methods if any(_at(curve, name, count) for count in shots)]
    base = _at(curve, DEFAULT_METHOD, None)
    means = [point.mean for name in growing for count in shots if (point := _at(curve, name, count)) is not None]
    level = base.mean if base is not None else means[0]
    low, high = min(level, *means), max(level, *means)
    step = max((high - low) / (_HEIGHT - 1), 1e-9)
    grid = [[" "] * (_COLUMN_WIDTH * len(shots)) for _ in range(_HEIGHT)]
    grid[round((high - level) / step)] = list("-" * (_COLUMN_WIDTH * len(shots)))
    letters = {name: chr(ord("A") + number) for number, name in enumerate(growing)}
    for name in growing:
        for place, count in enumerate(shots):
            point = _at(curve, name, count)
            if point is not None:
                row, column = round((high - point.mean) / step), place * _COLUMN_WIDTH + 2
                while grid[row][column] not in " -":
                    column += 1  # beside the letter of a method that is as good
                grid[row][column] = letters[name]
    lines = [f"{high - row * step:7.3f} |{''.join(cells)}".rstrip() for row, cells in enumerate(grid)]
    axis = "".join(f"{count:^5}".ljust(_COLUMN_WIDTH) for count in shots)
    key = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    return "\n".join(
        [*lines, f"        +{'-' * (_COLUMN_WIDTH * len(shots))}", f"         {axis} shots", f"{key}, --- zero-shot"]
    )


def draw_curve(curve: LearningCurve, file: Path) -> None:
    """Write accuracy against shots, with bars of one standard deviation.

    Raises:
        InvalidFieldError: the file cannot be written.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only where a picture is wanted

    shots = sorted({point.shots for point in curve.points if point.shots is not None})
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(point.method for point in curve.points):
        points = [point for count in shots if (point := _at(curve, name, count)) is not None]
        flat = _at(curve, name, None)
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
            style = {"color": "black", "linestyle": "--"} if name == DEFAULT_METHOD else {"linestyle": ":"}
            axes.axhline(100 * flat.mean, label=name, **style)
    if shots:
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{curve.images} images, model {curve.model}")
    axes.legend(fontsize="small")
    try:
        figure.savefig(file)
    except OSError as error:
        raise InvalidFieldError.of("--picture", f"{file} cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)
