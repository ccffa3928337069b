"""The request to classify images, before any name in it is looked up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.names.namespaces import OPEN_NAMESPACE, Namespace
from app.types import Reject


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """What a caller wants to know about some images, in the caller's words; None stands for the default.

    Without ``labels`` and ``label_set``, labels are discovered in the caption database ``database``; with ``group``,
    for all images together. With ``keep_features``, later requests can name the images by id. If ``multi_label`` is
    None, the label set says whether an image may have several labels. ``priors`` are a number for each class,
    ``estimate`` or ``uniform``. With parents of classes, paths stop before labels with a lower score than
    ``min_score``. Names are looked up in ``namespace``.
    """

    labels: Sequence[str] | None = None
    label_set: str | None = None
    method: str | None = None
    model: str | None = None
    template: str | None = None
    top_k: int | None = None
    explain: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    reject_below: float | None = None
    false_rejection_rate: float | None = None
    coverage: float | None = None
    database: str | None = None
    group: bool = False
    keep_features: bool = False
    multi_label: bool | None = None
    priors: Mapping[str, float] | str | None = None
    min_score: float | None = None
    namespace: Namespace = OPEN_NAMESPACE
    reject: Reject | None = None
