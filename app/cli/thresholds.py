"""`deixis thresholds`: precision and recall against the threshold of each label, and storing thresholds."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.backends import Backend
from app.cli.common import make_table, out, progress_bar, report_errors, warn, with_backend, write_json
from app.cli.options import ModelOption, ServerOption
from app.cli.pictures import check_picture, write_picture
from app.errors import InvalidFieldError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deixis.answers import LabelThreshold, Thresholds

_AUTOMATIC = "auto"
_MAX_CHARTS = 8
# Of a picture, which takes a tenth of a second for each.
_MAX_DRAWN = 100
_MAX_COLUMNS = 41
_BLOCKS = " ▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"


def thresholds_command(
    label_set: Annotated[str, typer.Argument(help="Name of the label set.")],
    precision: Annotated[
        float | None,
        typer.Option("--precision", help="Suggest the lowest thresholds with this precision, between 0 and 1."),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option("--recall", help="Suggest the highest thresholds with this recall, between 0 and 1."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="Show, and with `--store` change, this label only. Repeatable."),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="LABEL=THRESHOLD", help="Store a threshold, or `auto` for none. Repeatable."),
    ] = None,
    store: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--store", help="Store the suggested thresholds, as a new version of the label set.")
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Also write charts: .svg, .png or .pdf; needs matplotlib."),
    ] = None,
    json_output: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--json", help="Print all fields as JSON.")
    ] = False,
    model: ModelOption = None,
    server: ServerOption = None,
) -> None:
    """Show the precision and recall of each label against its threshold, and store thresholds.

    They are measured on the example images of the label set. Thresholds apply to requests with several labels per
    image. A label without a threshold of its own has one that is fitted to the example images, or 0.5 without images.
    Suggestions have the highest F1, or the precision or recall of the options. They are chosen on the same images, so
    the values on new images are slightly lower; `deixis evaluate` with `--image-labels` measures other images.
    """
    with report_errors():
        _check_goals(precision, recall)
        stated = dict(map(_threshold_of, given or ()))
        if picture is not None:
            check_picture(picture)

    async def work(backend: Backend) -> "tuple[Thresholds, str | None]":
        async def measure() -> "Thresholds":
            found = await backend.thresholds(label_set, model, precision=precision, recall=recall)
            return found.model_copy(update={"labels": _chosen(found, labels)})

        found = await measure()
        if found.images and not found.calibrated:  # in this process, no job has done it
            with progress_bar("Comparing the methods") as on_progress:
                await backend.select_methods(label_set, None, on_progress)
            found = await measure()
        suggested = {each.label: each.suggested for each in found.labels if each.suggested is not None}
        if store and not suggested:
            raise InvalidFieldError.of(
                "--store", "no label has a suggestion; run the command without --store to see why"
            )
        changes = {**(suggested if store else {}), **stated}
        if not changes:
            return found, None
        written = await backend.set_thresholds(label_set, changes, version=found.version)
        return await measure(), f"{written.name}@{written.version}"

    found, stored = with_backend(server, work, encoders=True)
    if picture is not None:
        with report_errors():
            write_picture(_figure(found.labels), picture)
    if json_output:
        write_json(found.to_dict())
        return
    goal = f"precision {precision:g}" if precision else f"recall {recall:g}" if recall else "highest F1"
    _print(found, goal, chosen=labels is not None, with_suggestions=stored is None)
    if stored is not None:
        out.print(f"stored in {escape(stored)}", highlight=False)


def _check_goals(precision: float | None, recall: float | None) -> None:
    for option, target in (("--precision", precision), ("--recall", recall)):
        if target is not None and not 0 < target < 1:
            raise InvalidFieldError.of(option, f"{target:g} is not above 0 and below 1")
    if precision is not None and recall is not None:
        raise InvalidFieldError.of("--recall", "excludes --precision; leave one of them out")


def _threshold_of(text: str) -> tuple[str, float | None]:
    label, _, number = text.rpartition("=")
    if label and number.strip().lower() == _AUTOMATIC:
        return label, None
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if not label or not 0 <= threshold <= 1:
        raise InvalidFieldError.of(
            "--set", f"'{text}' is not LABEL=THRESHOLD with a number between 0 and 1, or with {_AUTOMATIC}"
        )
    return label, threshold


def _chosen(found: "Thresholds", labels: Sequence[str] | None) -> "list[LabelThreshold]":
    by_name = {each.label: each for each in found.labels}
    for label in labels or ():
        if label not in by_name:
            raise UnknownNameError("label", label, by_name)
    return [by_name[label] for label in labels] if labels else found.labels


def _print(found: "Thresholds", goal: str, *, chosen: bool, with_suggestions: bool) -> None:
    out.print(
        f"[bold]{escape(found.label_set)}[/bold]   {found.images} labelled example images"
        f"   model {escape(found.model)}",
        highlight=False,
    )
    if found.images and not found.calibrated:
        problem = "the service is still comparing the methods. When it has finished, scores and thresholds change"
        warn("not calibrated:", problem)
    if not found.multi_label:
        warn("note:", "requests with this label set give each image one label. Thresholds apply only with multi_label")
    measures = ("precision", "recall", "F1")
    columns = ("label", "images", "AP", "threshold", "", *measures)
    rows = [
        (
            each.label,
            str(each.images),
            _share(each.average_precision),
            f"{each.threshold:.3f}",
            _AUTOMATIC if each.own is None else "own",
            *map(_share, _measures(each, each.threshold)),
        )
        for each in found.labels
    ]
    out.print(make_table(columns, rows, right=("images", "AP", "threshold", *measures)))
    if with_suggestions:
        _print_suggestions(found.labels, goal)
    with_images = [each for each in found.labels if each.images]
    if chosen or len(with_images) <= _MAX_CHARTS:
        for each in with_images:
            out.print(f"\n{_text_chart(each)}", highlight=False, markup=False)
    else:
        out.print("--label LABEL shows the curve of a label, --picture FILE those of all", highlight=False)


def _print_suggestions(labels: "Sequence[LabelThreshold]", goal: str) -> None:
    suggested = [(each, each.suggested) for each in labels if each.suggested is not None]
    if suggested:
        columns = (f"suggested: {goal}", "threshold", "precision", "recall", "F1")
        rows = [
            (each.label, f"{threshold:.3f}", *map(_share, _measures(each, threshold))) for each, threshold in suggested
        ]
        out.print()
        out.print(make_table(columns, rows, right=columns[1:]))
        out.print("--store stores them as a new version, --set LABEL=THRESHOLD another one", highlight=False)
    reasons: dict[str, list[str]] = {}
    for each in labels:
        if each.reason is not None:
            reasons.setdefault(each.reason, []).append(each.label)
    for reason, names in reasons.items():
        warn("no suggestion:", f"{', '.join(names)}: {reason}")


def _measures(label: "LabelThreshold", threshold: float) -> tuple[float | None, float | None, float | None]:
    """Return precision, recall and F1; None where they are not defined."""
    predicted, correct = label.selected_at(threshold)
    return (
        correct / predicted if predicted else None,
        correct / label.images if label.images else None,
        2 * correct / (predicted + label.images) if predicted + label.images else None,
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _text_chart(label: "LabelThreshold") -> str:
    """Return precision and recall against the threshold as two lines of bars, with a mark below the one in use."""
    columns = max(16, min(_MAX_COLUMNS, out.width - 14))
    levels = _BLOCKS if (out.encoding or "").lower().startswith("utf") else _DIGITS

    def bar(value: float | None) -> str:
        return " " if value is None else levels[min(len(levels) - 1, ceil(value * (len(levels) - 1)))]

    steps = [column / (columns - 1) for column in range(columns)]
    measured = [_measures(label, threshold) for threshold in steps]
    place, number = round(label.threshold * (columns - 1)), f"{label.threshold:.3f}"
    mark = f"{' ' * place}^ {number}" if place + 8 < columns else f"{number} ^".rjust(place + 1)
    return "\n".join(
        [
            label.label,
            f"  precision |{''.join(bar(values[0]) for values in measured)}|",
            f"  recall    |{''.join(bar(values[1]) for values in measured)}|",
            f"            0{mark}".ljust(columns + 13) + "1",
        ]
    )


def _figure(labels: "Sequence[LabelThreshold]") -> "Figure":
    """Return a chart of precision and recall against the threshold for each label with images."""
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an optional dependency

    shown = [each for each in labels if each.images]
    if not shown:
        raise InvalidFieldError.of("--picture", "no label has labelled example images, so there is no curve")
    if len(shown) > _MAX_DRAWN:
        warn("not drawn:", f"{len(shown) - _MAX_DRAWN} of {len(shown)} labels; choose labels with --label")
        shown = shown[:_MAX_DRAWN]
    columns = min(4, len(shown))
    rows = ceil(len(shown) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    for axes, each in zip(grid.flat, shown, strict=False):
        steps = sorted({0.0, 1.0, *each.curve.thresholds, *(min(1, level + 1e-9) for level in each.curve.thresholds)})
        measured = [_measures(each, threshold) for threshold in steps]
        axes.plot(steps, [values[0] for values in measured], label="precision")
        axes.plot(steps, [values[1] for values in measured], linestyle="--", label="recall")
        axes.axvline(each.threshold, color="black", linewidth=1)
        axes.set_title(f"{each.label} ({each.images})", parse_math=False)
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    grid.flat[0].legend(fontsize="small")
    figure.supxlabel("threshold")
    return figure
