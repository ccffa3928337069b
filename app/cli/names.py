"""`deixis evaluate --method cased`: how good names are that were found without the classes."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.api.schemas.classification import ResultBody
from app.captions.metrics import cluster_accuracy, semantic_iou, semantic_similarity
from app.classification.resolve import ClassifyRequest
from app.cli.backends import InProcess
from app.cli.common import classify_files, out, prepare_names, progress_bar, table_of
from app.errors import InvalidFieldError

_SHOWN_NAMES = 3


async def names_evaluated(
    files: Sequence[Path], true_names: Sequence[str], question: ClassifyRequest, service: InProcess
) -> tuple[list[ResultBody], Mapping[str, Any], Callable[[Mapping[str, Any]], None]]:
    """Return each file's result, the figures, and what prints them.

    Raises:
        InvalidFieldError: not one file could be read.
    """
    await prepare_names(service, question)
    began = time.perf_counter()
    if question.group:
        with progress_bar() as bar:
            line = bar.add_task("Classifying", total=len(files))
            results, _ = await service.name_together(files, question, lambda: bar.advance(line))
    else:
        results = [result async for _, result in classify_files(service, files, question)]
    seconds = time.perf_counter() - began
    pairs = [
        (result.predictions[0].label, true_name)
        for result, true_name in zip(results, true_names, strict=True)
        if result.error is None
    ]
    if not pairs:
        raise InvalidFieldError.of("folder", "not one of its images could be read")
    found, truth = [name for name, _ in pairs], [true_name for _, true_name in pairs]
    texts = list(dict.fromkeys([*found, *truth]))
    features = await service.text_features(question.model, texts)
    row_of = {text: row for row, text in enumerate(texts)}
    report = {
        "images": len(pairs),
        "names": len(set(found)),
        "cluster_accuracy": round(cluster_accuracy(found, truth), 4),
        "semantic_similarity": round(
            semantic_similarity(features[[row_of[each] for each in found]], features[[row_of[each] for each in truth]]),
            4,
        ),
        "semantic_iou": round(semantic_iou(found, truth), 4),
        "images_per_s": round(len(pairs) / seconds, 2),
        "classes": {
            true_name: dict(Counter(name for name, true in pairs if true == true_name).most_common())
            for true_name in sorted(set(truth))
        },
    }
    return results, report, _print_names


def _print_names(report: Mapping[str, Any]) -> None:
    figures = [(key.replace("_", " "), f"{report[key]:g}") for key in report if key not in {"classes", "skipped"}]
    out.print(table_of(("figure", ""), figures, right=("",)))
    rows: list[tuple[str, str, str]] = [
        (
            true_name,
            str(sum(names.values())),
            ", ".join(f"{name} {count}" for name, count in list(names.items())[:_SHOWN_NAMES]),
        )
        for true_name, names in report["classes"].items()
    ]
    out.print(table_of(("class", "images", "found most often"), rows, right=("images",)))
