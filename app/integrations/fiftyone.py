"""FiftyOne: label the samples of a dataset by a service, and write predictions as a file that FiftyOne imports.

The file is a ``labels.json`` of the type ``FiftyOneImageClassificationDataset``; the user guide of FiftyOne describes
the format under "Loading datasets from disk".
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.runtime.file_names import file_text

if TYPE_CHECKING:
    from deixis import Client, ImageResult
    from deixis.answers import Prediction

# Replaces a score of 0, which has no logarithm.
_MIN_SCORE = 1e-12


@dataclass(slots=True)
class LabellingSummary:
    """The summary of a call of ``classify_samples``.

    Args:
        model: the model that was used.
        label_set: ``name@version``; None without a label set.
        labels: in the order of the logits; empty if labels were discovered.
        labelled: number of samples that were labelled.
        rejected: number of samples without a label, whose field was set to None.
        skipped: path and error of each sample that could not be read; its field was not changed.
    """

    model: str
    label_set: str | None
    labels: tuple[str, ...]
    labelled: int = 0
    rejected: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def classify_samples(
    samples: Iterable[Any],
    client: "Client",
    *,
    label_field: str = "deixis",
    labels: Sequence[str] | None = None,
    label_set: str | None = None,
    top_k: int = 1,
    store_logits: bool = False,
    batch_size: int = 8,
    concurrency: int = 4,
    progress: bool = False,
    **options: Any,
) -> LabellingSummary:
    """Set a ``Classification`` on each sample, or ``Classifications`` if ``top_k`` is more than 1.

    Their confidence is the score; their tags are the model and the version of the label set. If classes have parents,
    the attribute ``label_path`` has the labels from a root of the hierarchy to where the answer stops.

    Args:
        samples: a dataset or a view, whose samples are saved; or other objects with a ``filepath``, which are not.
        client: a client of the service.
        label_field: the field of the samples to set.
        labels: the labels.
        label_set: a stored label set. Without ``labels`` and ``label_set``, labels are discovered.
        top_k: maximum number of labels per sample; with ``multi_label``, a sample has all labels that reach their
            threshold.
        store_logits: also store the logarithm of every label's score, in the order of ``LabellingSummary.labels``.
        batch_size: images per request.
        concurrency: maximum number of simultaneous requests.
        progress: show a progress bar.
        options: other arguments of ``Client.stream``, such as ``method`` and ``reject_below``.

    Raises:
        ImportError: FiftyOne is not installed.
        ValueError: ``top_k`` is below 1; or logits are requested without labels, or for a label that the service
            normalised to another spelling.
        deixis.ClientError: the service refused a request or does not respond. Samples labelled before are kept.
    """
    try:
        import fiftyone  # noqa: PLC0415 - an optional dependency, whose import takes seconds
    except ImportError as error:
        raise ImportError("FiftyOne is not installed; run: pip install fiftyone") from error
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    summary, request = _pinned_request(client, labels, label_set, options)
    if store_logits and not summary.labels:
        raise ValueError("store_logits needs labels or label_set; discovered labels have no logits")
    request["top_k"] = max(top_k, len(summary.labels)) if store_logits else top_k
    tags = [tag for tag in (summary.model, summary.label_set) if tag is not None]

    def label_of(result: "ImageResult") -> Any:
        more: dict[str, Any] = {"logits": _logits(result, summary.labels)} if store_logits else {}
        if result.path is not None:
            more["label_path"] = [step.label for step in result.path]
        classifications = [
            fiftyone.Classification(label=prediction.label, confidence=prediction.score, tags=list(tags))
            for prediction in _shown(result, top_k)
        ]
        if top_k > 1 or result.labels is not None:
            return fiftyone.Classifications(classifications=classifications, **more)
        for name, value in more.items():
            classifications[0][name] = value
        return classifications[0]

    pending: deque[Any] = deque()

    def paths() -> Iterator[str]:
        for sample in samples:
            pending.append(sample)
            yield sample.filepath

    # Writes the samples of a dataset in batches.
    saving: AbstractContextManager[Any] = samples.save_context() if hasattr(samples, "save_context") else nullcontext()
    with saving as context:
        for row in client.stream(paths(), batch_size=batch_size, concurrency=concurrency, progress=progress, **request):
            sample, result = pending.popleft(), row.result
            if result.error is not None:
                summary.skipped.append((sample.filepath, result.error.detail))
                continue
            has_label = result.label is not None
            summary.labelled += has_label
            summary.rejected += not has_label
            sample[label_field] = label_of(result) if has_label else None
            if context is not None:
                context.save(sample)
    return summary


def _pinned_request(
    client: "Client", labels: Sequence[str] | None, label_set: str | None, options: dict[str, Any]
) -> tuple[LabellingSummary, dict[str, Any]]:
    """Return an empty summary, and the request with the model and the version of the label set fixed."""
    if isinstance(labels, str):
        raise TypeError("labels must be a list of strings, not one string")
    model = options.get("model") or client.models()[0].name
    request = {**options, "model": model, "labels": labels}
    if label_set is None:
        return LabellingSummary(model, None, tuple(labels or ())), request
    found = client.label_sets.get(label_set)
    reference = f"{found.name}@{found.version}"
    classnames = tuple(entry.name for entry in found.classes)
    return LabellingSummary(model, reference, classnames), {**request, "label_set": reference}


def _shown(result: "ImageResult", top_k: int) -> "Sequence[Prediction]":
    """Return the best predictions, or where images may have several labels, those that reach their threshold."""
    if result.labels is None:
        return result.predictions[:top_k]
    return [prediction for prediction in result.predictions if prediction.above]


def _logits(result: "ImageResult", labels: Sequence[str]) -> list[float]:
    scores = {prediction.label: prediction.score for prediction in result.predictions}
    for label in labels:
        if label not in scores:
            raise ValueError(
                f"the service returned no score for '{label}'; write labels in Unicode NFC and with single spaces"
            )
    return [math.log(max(scores[label], _MIN_SCORE)) for label in labels]


def labels_file(
    files: Sequence[Path], results: "Sequence[ImageResult]", *, classes: Sequence[str] | None, top_k: int
) -> dict[str, Any]:
    """Return the content of a ``labels.json``, with absolute paths.

    Files that could not be read are left out. Rejected files are included without a label.

    Args:
        files: paths of the images.
        results: the result of each file.
        classes: the labels; None if they were discovered.
        top_k: maximum number of labels per file; above 1, each file has a list of labels.
    """

    def label_of(result: "ImageResult") -> Any:
        if result.label is None:
            return None
        labels = [{"label": prediction.label, "confidence": prediction.score} for prediction in _shown(result, top_k)]
        if top_k > 1 or result.labels is not None:
            return labels
        path = {} if result.path is None else {"attributes": {"label_path": [step.label for step in result.path]}}
        return {**labels[0], **path}

    return {
        "classes": None if classes is None else list(classes),
        "labels": {
            file_text(file.absolute()): label_of(result)
            for file, result in zip(files, results, strict=True)
            if result.error is None
        },
    }
