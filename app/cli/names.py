"""`deixis evaluate --method cased`: measure labels that are discovered without the classes."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.captions.metrics import cluster_accuracy, semantic_iou, semantic_similarity
from app.classification.request import ClassifyRequest
from app.cli.backends.in_process import InProcessBackend
from app.cli.common import classify_files, make_table, out, prepare_database, progress_bar
from app.errors import InvalidFieldError
from deixis import ImageResult

_SHOWN_NAMES = 3


async def evaluate_names(
    files: Sequence[Path], true_names: Sequence[str], request: ClassifyRequest, service: InProcessBackend
) -> tuple[list[ImageResult], Mapping[str, Any]]:
    """Return a result per file, and the report.

    Raises:
        InvalidFieldError: none of the files can be read.
    """
    await prepare_database(service, request)
    began = time.perf_counter()
    if request.group:
        with progress_bar("Classifying") as on_progress:
            results, _ = await service.classify_together(files, request, on_progress)
    else:
        results = [result async for _, result in classify_files(service, files, request)]
    seconds = time.perf_counter() - began
    pairs = [
        (result.predictions[0].label, true_name)
        for result, true_name in zip(results, true_names, strict=True)
        if result.error is None
    ]
    if not pairs:
        raise InvalidFieldError.of("folder", "none of its images can be read")
    names, truth = [name for name, _ in pairs], [true_name for _, true_name in pairs]
    texts = list(dict.fromkeys([*names, *truth]))
    features = await service.text_features(request.model, texts)
    row_of = {text: row for row, text in enumerate(texts)}
    similarity = semantic_similarity(
        features[[row_of[name] for name in names]], features[[row_of[name] for name in truth]]
    )
    report = {
        "images": len(pairs),
        "names": len(set(names)),
        "cluster_accuracy": round(cluster_accuracy(names, truth), 4),
        "semantic_similarity": round(similarity, 4),
        "semantic_iou": round(semantic_iou(names, truth), 4),
        "images_per_s": round(len(pairs) / seconds, 2),
        "classes": {
            true_name: dict(Counter(name for name, true in pairs if true == true_name).most_common())
            for true_name in sorted(set(truth))
        },
    }
    return results, report


def print_names_report(report: Mapping[str, Any]) -> None:
    """Print the measures, and the names that each class was given most often."""
    figures = [(key.replace("_", " "), f"{report[key]:g}") for key in report if key not in {"classes", "skipped"}]
    out.print(make_table(("figure", ""), figures, right=("",)))
    rows: list[tuple[str, str, str]] = [
        (
            true_name,
            str(sum(names.values())),
            ", ".join(f"{name} {count}" for name, count in list(names.items())[:_SHOWN_NAMES]),
        )
        for true_name, names in report["classes"].items()
    ]
    out.print(make_table(("class", "images", "most frequent names"), rows, right=("images",)))
