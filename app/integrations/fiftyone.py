"""FiftyOne: the samples of a dataset labelled by a service, and labels as a file that FiftyOne imports.

The file is of the type ``FiftyOneImageClassificationDataset``, whose form the user guide of FiftyOne describes under
"Loading datasets from disk".
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deixis import Client, ImageResult

# A score of 0 has no logarithm.
_LEAST_SCORE = 1e-12


class Predicted(Protocol):
    """A label and its score."""

    @property
    def label(self) -> str:
        """The label."""

    @property
    def score(self) -> float:
        """Probability."""


class Result(Protocol):
    """What came of a file."""

    @property
    def predictions(self) -> Sequence[Predicted]:
        """The best first."""

    @property
    def rejected(self) -> bool | None:
        """Whether it is none of the labels; None where that was not asked."""

    @property
    def error(self) -> object | None:
        """Why it could not be read."""


@dataclass(slots=True)
class Labelled:
    """What became of the samples.

    Args:
        model: that answered.
        label_set: ``name@version``; None for labels of the call.
        labels: in the order of the logits; empty where they are found in captions.
        labelled: samples that have a label now.
        rejected: samples that are none of the labels, whose field is None now.
        skipped: the path of each sample that could not be read, and why; its field is as it was.
    """

    model: str
    label_set: str | None
    labels: tuple[str, ...]
    labelled: int = 0
    rejected: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def classify_samples(
    samples: Iterable[Any],
    client: Client,
    *,
    label_field: str = "deixis",
    labels: Sequence[str] | None = None,
    label_set: str | None = None,
    top_k: int = 1,
    store_logits: bool = False,
    batch_size: int = 8,
    concurrency: int = 4,
    progress: bool = False,
    **question: Any,
) -> Labelled:
    """Label samples: a ``Classification`` each, or ``Classifications`` where ``top_k`` is more than 1.

    Its tags are the model and the version of the label set, its confidence is the score.

    Args:
        samples: a dataset or a view, whose samples are saved; or any samples with a ``filepath``, which are not.
        client: of the service.
        label_field: the field of the samples that is set.
        labels: words to choose from.
        label_set: or the name of a stored label set. Without either, names are found in a caption database.
        top_k: labels of a sample.
        store_logits: also keep the logarithm of every label's score, in the order of ``Labelled.labels``.
        batch_size: images of a request.
        concurrency: requests at a time.
        progress: show a bar.
        question: what else ``Client.stream`` takes, such as ``method`` and ``reject_below``.

    Raises:
        ImportError: FiftyOne is not installed.
        ValueError: ``top_k`` is below 1, logits without labels, or of a label that the service spells otherwise.
        deixis.ClientError: the service refused, or is not there; what was labelled before that is kept.
    """
    try:
        import fiftyone  # noqa: PLC0415 - may not be there, and takes seconds
    except ImportError as error:
        raise ImportError("FiftyOne is not installed; run: pip install fiftyone") from error
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    told, asked = _asked(client, labels, label_set, question)
    if store_logits and not told.labels:
        raise ValueError("store_logits needs labels or label_set; names that are found have no logits")
    asked["top_k"] = max(top_k, len(told.labels)) if store_logits else top_k
    tags = [each for each in (told.model, told.label_set) if each is not None]

    def label_of(result: ImageResult) -> Any:
        own = fiftyone.Classification
        more = {"logits": _logits(result, told.labels)} if store_logits else {}
        found = [own(label=each.label, confidence=each.score, tags=list(tags)) for each in result.predictions[:top_k]]
        if top_k > 1:
            return fiftyone.Classifications(classifications=found, **more)
        for name, value in more.items():
            found[0][name] = value
        return found[0]

    waiting: deque[Any] = deque()

    def paths() -> Iterator[str]:
        for sample in samples:
            waiting.append(sample)
            yield sample.filepath

    # Samples of a dataset are written many at a time.
    saving: AbstractContextManager[Any] = samples.save_context() if hasattr(samples, "save_context") else nullcontext()
    with saving as context:
        for each in client.stream(paths(), batch_size=batch_size, concurrency=concurrency, progress=progress, **asked):
            sample = waiting.popleft()
            if each.result.error is not None:
                told.skipped.append((sample.filepath, each.result.error.detail))
                continue
            has_none = bool(each.result.rejected) or not each.result.predictions
            told.labelled += not has_none
            told.rejected += has_none
            sample[label_field] = None if has_none else label_of(each.result)
            if context is not None:
                context.save(sample)
    return told


def _asked(
    client: Client, labels: Sequence[str] | None, label_set: str | None, question: dict[str, Any]
) -> tuple[Labelled, dict[str, Any]]:
    """Return what is known before the first answer, and a question that is the same for every request."""
    if isinstance(labels, str):
        raise TypeError("labels must be a list of words; a text alone would be read letter by letter")
    model = question.get("model") or client.models()[0].name
    asked = {**question, "model": model, "labels": labels}
    if label_set is None:
        return Labelled(model, None, tuple(labels or ())), asked
    found = client.label_sets.get(label_set)
    # From now on that version, whatever the set becomes.
    pinned = f"{found.name}@{found.version}"
    return Labelled(model, pinned, tuple(each.name for each in found.classes)), {**asked, "label_set": pinned}


def _logits(result: ImageResult, labels: Sequence[str]) -> list[float]:
    scores = {each.label: each.score for each in result.predictions}
    for label in labels:
        if label not in scores:
            raise ValueError(f"there is no score of '{label}'; the service spells labels in NFC and with single spaces")
    return [math.log(max(scores[label], _LEAST_SCORE)) for label in labels]


def labels_file(
    files: Sequence[Path], results: Sequence[Result], *, classes: Sequence[str] | None, top_k: int
) -> dict[str, Any]:
    """Return what a ``labels.json`` of a FiftyOneImageClassificationDataset holds, with absolute paths.

    A file that could not be read is left out; one that is none of the labels is there, without a label.

    Args:
        files: images.
        results: what came of each.
        classes: the labels; None where they were found.
        top_k: labels of a file; a list where there may be several.
    """

    def label_of(result: Result) -> Any:
        if result.rejected or not result.predictions:
            return None
        found = [{"label": each.label, "confidence": each.score} for each in result.predictions[:top_k]]
        return found if top_k > 1 else found[0]

    return {
        "classes": None if classes is None else list(classes),
        "labels": {
            str(file.absolute()): label_of(result)
            for file, result in zip(files, results, strict=True)
            if result.error is None
        },
    }
