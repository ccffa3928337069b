"""Several labels per image: how well scores find them, at default thresholds and at those that images favour."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from app.scoring.multi_label_measures import MultiLabelEvaluation, evaluate_labels
from app.scoring.thresholds import fit_thresholds, folds_by_labels, held_out_thresholds

_FOLDS = 5


@dataclass(frozen=True, slots=True)
class MultiLabelReport:
    """How well scores find the labels of n images.

    ``at_default`` is at the thresholds that are in use. ``at_shared`` is at one threshold for all labels, and
    ``at_fitted`` at one for each: both have the highest F1 on the other images, fold by fold, so each image is held
    out. ``thresholds`` are those of ``at_fitted``, fitted to all images; ``shared_threshold`` is for labels that have
    none, and ``reasons`` say why.
    """

    images: int
    folds: int
    at_default: MultiLabelEvaluation
    at_shared: MultiLabelEvaluation
    at_fitted: MultiLabelEvaluation
    thresholds: Mapping[str, float]
    reasons: Mapping[str, str]
    shared_threshold: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers; the rows of labels only where thresholds differ by label."""
        content = asdict(self)
        del content["at_shared"]["labels"]
        return content


def report_labels(
    names: Sequence[str],
    scores: Float[np.ndarray, "n c"],
    is_label: Bool[np.ndarray, "n c"],
    default: float | Sequence[float],
) -> MultiLabelReport:
    """Compare scores of images that nothing was fitted to with their true labels.

    Args:
        names: of the c labels.
        scores: of n images.
        is_label: whether an image has a label.
        default: the thresholds that are in use.

    Raises:
        InvalidFieldError: no image has a label.
    """
    defaults = np.broadcast_to(np.asarray(default, np.float64), len(names))
    at_default = evaluate_labels(names, scores, is_label, defaults)
    folds = folds_by_labels(is_label, _FOLDS)
    fitted = fit_thresholds(scores, is_label)
    shared, own = (
        evaluate_labels(
            names, scores, is_label, held_out_thresholds(scores, is_label, folds, defaults, per_label=per_label)
        )
        for per_label in (False, True)
    )
    return MultiLabelReport(
        images=len(scores),
        folds=len(np.unique(folds)),
        at_default=at_default,
        at_shared=shared,
        at_fitted=own,
        thresholds={name: value for name, value in zip(names, fitted.by_label, strict=True) if value is not None},
        reasons={name: reason for name, reason in zip(names, fitted.reasons, strict=True) if reason is not None},
        shared_threshold=fitted.shared,
    )
