"""Writes the predictions of `deixis classify`: a table for people, and rows or objects for programs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

from app.cli.backends import failed_result
from app.cli.common import make_table, out, write_json
from app.cli.csv_output import Cell, write_rows
from app.runtime.file_names import file_text, printable

if TYPE_CHECKING:
    from deixis.answers import ImageResult, Prediction

NONE_OF_THESE = "none of these"
NOT_SURE = "not sure"
_SHOWN_PROMPTS = 5
_BAR_WIDTH = 16
_MIN_PATH_WIDTH = 16
# Between two columns of a table.
_GAP = 2


def print_table(files: Sequence[Path], results: "Sequence[ImageResult]", console: Console = out) -> None:
    """Print a row per image with its best label and the next ones; files with an error are left out.

    On a terminal, long paths are shortened at their start, where the paths of a folder are equal.
    """
    pairs = [(file, result) for file, result in zip(files, results, strict=True) if result.error is None]
    rows: list[tuple[str, ...]] = [(printable(str(file)), *_label_cells(result)) for file, result in pairs]
    columns = ["image", "label", "score", "runner-up"]
    if not any(row[3] for row in rows):
        columns, rows = columns[:3], [row[:3] for row in rows]
    if any(result.prediction_set is not None for _, result in pairs):
        columns.append("prediction set")
        rows = [(*row, _prediction_set_cell(result) or "") for row, (_, result) in zip(rows, pairs, strict=True)]
    if console.is_terminal:
        others = zip(*([columns, *rows]), strict=True)
        width = console.width - sum(max(map(cell_len, cells)) + _GAP for cells in list(others)[1:])
        rows = [(_shortened(path, max(width, _MIN_PATH_WIDTH)), *others) for path, *others in rows]
    if rows:
        console.print(make_table(columns, rows, right=("score",)))


def _label_cells(result: "ImageResult") -> tuple[str, str, str]:
    """Return the label, its score, and the next labels with their scores; a rejected image has none of the labels.

    If the path of a hierarchy ends elsewhere than at the best class, its end is the label, and all classes follow.
    """
    if result.labels is not None:
        marked = ", ".join(f"✓ {label}" for label in result.labels)
        above = [prediction.score for prediction in result.predictions if prediction.above]
        below = [prediction for prediction in result.predictions if not prediction.above]
        return marked or NONE_OF_THESE, ", ".join(f"{score:.4f}" for score in above), _scored(below[:1])
    best, others = result.predictions[:1], result.predictions[1:]
    if result.rejected:
        return NONE_OF_THESE, "", _scored(result.predictions)
    if result.path is not None and (not result.path or result.path[-1].label != best[0].label):
        if not result.path:
            return NOT_SURE, "", _scored(result.predictions)
        return result.path[-1].label, f"{result.path[-1].score:.4f}", _scored(result.predictions)
    # Discovering labels may find none.
    return (best[0].label, f"{best[0].score:.4f}", _scored(others)) if best else ("", "", "")


def _scored(predictions: "Sequence[Prediction]") -> str:
    return ", ".join(f"{prediction.label} {prediction.score:.4f}" for prediction in predictions)


def _shortened(path: str, width: int) -> str:
    if cell_len(path) <= width:
        return path
    while cell_len(path) >= width:
        path = path[1:]
    return f"…{path}"


def with_bad_folders(
    files: Sequence[Path], results: "Sequence[ImageResult]", errors: Sequence[OSError]
) -> "tuple[list[Path], list[ImageResult]]":
    """Return the files and folders that have rows, and a result for each; that of a folder is its error."""
    failed = [failed_result(f"the folder cannot be read: {error.strerror}") for error in errors]
    return [*files, *(Path(error.filename) for error in errors)], [*results, *failed]


def write_csv(files: Sequence[Path], results: "Sequence[ImageResult]") -> None:
    """Write a row per prediction to standard output, and a row for each file without one, with its error if any."""
    pairs = list(zip(files, results, strict=True))
    # These columns appear only if they were requested, and so have a value in some result.
    optional: list[tuple[str, Callable[[ImageResult], str | None]]] = [
        (name, cell)
        for name, cell in (
            ("rejected", _rejected_cell),
            ("prediction set", _prediction_set_cell),
            ("label path", _path_cell),
        )
        if any(cell(result) is not None for result in results)
    ]
    several = ("threshold", "above") if any(result.labels is not None for result in results) else ()
    rows: list[tuple[Cell, ...]] = [
        ("path", "rank", "label", "score", "similarity", *several, *(name for name, _ in optional), "error")
    ]
    for file, result in pairs:
        end = (*(cell(result) or "" for _, cell in optional), "" if result.error is None else result.error.detail)
        predictions = [
            (
                str(rank),
                each.label,
                f"{each.score:.4f}",
                f"{each.similarity:.4f}",
                *(_above_cells(each) if several else ()),
            )
            for rank, each in enumerate(result.predictions, start=1)
        ]
        rows += [(file, *cells, *end) for cells in predictions or [("",) * (4 + len(several))]]
    write_rows(sys.stdout, rows)


def write_json_results(files: Sequence[Path], results: "Sequence[ImageResult]") -> None:
    """Write an object per file to standard output, with its predictions or its error.

    ``path`` is that of the file, and ``label_path`` the one of a hierarchy.
    """
    objects = []
    for file, result in zip(files, results, strict=True):
        fields = result.model_dump(exclude_none=True)
        labels = {"label_path": fields.pop("path")} if "path" in fields else {}
        objects.append({"path": file_text(file), **fields, **labels})
    write_json(objects)


def _above_cells(prediction: "Prediction") -> tuple[str, str]:
    threshold = "" if prediction.threshold is None else f"{prediction.threshold:g}"
    return threshold, "" if prediction.above is None else "yes" if prediction.above else "no"


def _rejected_cell(result: "ImageResult") -> str | None:
    return None if result.rejected is None else NONE_OF_THESE if result.rejected else "no"


def _prediction_set_cell(result: "ImageResult") -> str | None:
    return None if result.prediction_set is None else ", ".join(result.prediction_set)


def _path_cell(result: "ImageResult") -> str | None:
    return None if result.path is None else "|".join(step.label for step in result.path)


def print_explanations(files: Sequence[Path], results: "Sequence[ImageResult]") -> None:
    """Print the prompts with the largest effect on each label, and the words that are nearer than every label."""
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
        scores = result.out_of_vocabulary
        if scores is not None and scores.nearest:
            words = ", ".join(f"{near.word} {near.similarity:.3f}" for near in scores.nearest)
            out.print(f"  [bold]nearer than every label[/bold] {escape(words)}", highlight=False)
