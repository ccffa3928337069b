"""The base class of adapters that learn from example images: clean input, and zero-shot results if it cannot learn."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Self, final

import numpy as np
from jaxtyping import Float, Float32, Int64

from app.adapters._base import NO_EXAMPLES, Examples, Neighbours, Scores
from app.scoring.numerics import unit_rows
from app.types import ClassEmbeddings, ImageFeatures, Logits

_MIN_LENGTH = 1e-6


class Need(StrEnum):
    """The kinds of example images that adapters learn from."""

    SUPPORT = "labelled images"
    POOL = "unlabelled images"


class DegenerateExamplesError(Exception):
    """The adapter cannot learn from these examples. The message says why, without a full stop."""


class ExampleAdapter(ABC):
    """A classifier that learns from text and example images.

    It takes one row of text for each class (c, d). If it does not learn from labelled images, it merges classes with
    the same text, which get the same scores; in the methods that subclasses implement, c counts different classes. If
    it cannot learn, or if its logits are not finite, it returns the results of zero-shot, with a warning in
    ``warnings_`` and ``Scores.warnings``. Subclasses are final, keep their hyperparameters in ``__init__``, and
    implement ``_learn`` and ``_logits``.
    """

    aligned: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    """Whether a result may depend on the images of earlier requests."""

    needs: ClassVar[frozenset[Need]]
    """The kinds of images that it needs; without all of them it returns the results of zero-shot."""

    balanced: ClassVar[bool] = False
    """Whether it assumes a pool with about the same number of images of each class; it does not learn from others."""

    @property
    def neighbours(self) -> int:
        """The number of nearest pool images that it needs for each image; 0 for none."""
        return 0

    @final
    def fit(
        self,
        text: ClassEmbeddings,
        *,
        logit_scale: float,
        logit_bias: float | None,
        examples: Examples = NO_EXAMPLES,
    ) -> Self:
        """Learn from the rows of the classes (c, d), which are normalised, and from the examples."""
        self.text_ = unit_rows(np.asarray(text, np.float32))
        self.class_rows_ = np.arange(len(self.text_))
        if Need.SUPPORT not in self.needs:
            self.text_, self.class_rows_ = distinct_rows(self.text_)
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        self.diagnostics_: Mapping[str, float] = {}
        self.warnings_: tuple[str, ...] = ()
        self.learned_ = False
        for name in [name for name in vars(self) if name.endswith("_") and name not in _BASE_ATTRIBUTES]:
            delattr(self, name)
        try:
            cleaned, dropped = _cleaned(examples)
            self._check(cleaned)
            with np.errstate(all="ignore"):
                self._learn(cleaned)
            self.learned_ = True
        except DegenerateExamplesError as error:
            self.warnings_ = (f"{error}; the results are those of zero-shot",)
        except np.linalg.LinAlgError as error:
            self.warnings_ = (
                f"the statistics of the examples cannot be used ({error}); the results are those of zero-shot",
            )
        else:
            if dropped:
                self.warnings_ += (f"{dropped} examples are not used, because their features are zero or not finite",)
        return self

    @final
    def predict(self, image_features: ImageFeatures, neighbours: Neighbours | None = None) -> Scores:
        """Return scores (n, c). An image whose features are zero or not finite gets cosines of zero.

        Args:
            image_features: unit rows (n, d).
            neighbours: the nearest pool images of each image; required if ``self.neighbours`` is above 0.
        """
        rows = np.asarray(image_features, np.float32)
        good = _usable(rows)
        safe = rows if good.all() else np.where(good[:, None], rows, np.float32(0))
        similarities = (safe @ self.text_.T).clip(-1, 1)
        zero_shot: Logits = (self.logit_scale_ * similarities + self.logit_bias_).astype(np.float32)
        if not self.learned_:
            return self._for_all_classes(similarities, zero_shot, self.warnings_)
        with np.errstate(all="ignore"):
            logits = np.asarray(self._logits(safe, zero_shot, neighbours), np.float32)
        return self._scores(similarities, zero_shot, logits, good)

    @final
    def pool_scores(self, pool_features: ImageFeatures) -> Scores:
        """Return the scores (u, c) of the pool that it was fitted on: a transductive result.

        Args:
            pool_features: the same unit rows (u, d) as in the examples, all usable.
        """
        similarities = (pool_features @ self.text_.T).clip(-1, 1)
        zero_shot: Logits = (self.logit_scale_ * similarities + self.logit_bias_).astype(np.float32)
        if not self.learned_:
            return self._for_all_classes(similarities, zero_shot, self.warnings_)
        with np.errstate(all="ignore"):
            logits = np.asarray(self._pool_logits(pool_features, zero_shot), np.float32)
        return self._scores(similarities, zero_shot, logits, np.ones(len(logits), bool))

    def _scores(self, similarities: np.ndarray, zero_shot: Logits, logits: Logits, good: np.ndarray) -> Scores:
        finite = np.isfinite(logits).all(axis=1)
        warnings = self.warnings_
        if not good.all():
            warnings += ("the features of an image are zero or not finite, so it cannot be classified",)
        if not finite[good].all():
            warnings += ("an image has no finite score; its results are those of zero-shot",)
        kept = good & finite
        return self._for_all_classes(
            similarities, logits if kept.all() else np.where(kept[:, None], logits, zero_shot), warnings
        )

    def _for_all_classes(self, similarities: np.ndarray, logits: Logits, warnings: tuple[str, ...]) -> Scores:
        """Return the scores of all classes from those of the classes with different text."""
        if len(self.class_rows_) != len(self.text_):
            similarities, logits = similarities[:, self.class_rows_], logits[:, self.class_rows_]
        return Scores(similarities, logits, warnings=warnings)

    def _check(self, examples: Examples) -> None:
        missing = [
            need
            for need, features in ((Need.SUPPORT, examples.support_features), (Need.POOL, examples.pool_features))
            if need in self.needs and not len(features)
        ]
        if missing:
            raise DegenerateExamplesError(f"there are no {' and no '.join(missing)} to learn from")
        if self.balanced:
            seen = effective_classes(examples.pool_features, self.text_)
            if seen < MIN_BALANCE * len(self.text_):
                raise DegenerateExamplesError(
                    f"zero-shot predicts only {seen:.1f} of {len(self.text_)} classes for the unlabelled images, and"
                    " this method needs about the same number of images of each class"
                )

    @abstractmethod
    def _learn(self, examples: Examples) -> None:
        """Set attributes that end in ``_``, including ``diagnostics_`` and ``warnings_``.

        It is called with finite unit rows, at least one of each kind in ``needs``, and without arithmetic warnings.

        Raises:
            DegenerateExamplesError: the adapter cannot learn from these examples.
        """

    @abstractmethod
    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        """Return logits (n, c). Images that cannot be used are rows of zeros; see ``predict`` for the arguments."""

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:
        """Return logits (u, c) of the pool; by default as if each of its images were classified alone."""
        return self._logits(pool_features, zero_shot, None)


_BASE_ATTRIBUTES = frozenset(
    {"text_", "class_rows_", "logit_scale_", "logit_bias_", "diagnostics_", "warnings_", "learned_"}
)


MIN_BALANCE = 0.8
"""The share of the classes that a pool must show for adapters that assume balance; see ``effective_classes``.

Pools of half of the classes showed 0.54 to 0.83 of ten classes, balanced ones 0.89 to 0.98: the errors of zero-shot
spread the images over other classes. On the former InMaP lost up to 13 points of accuracy, and GDA-EM 11. Of a hundred
classes that zero-shot often confuses, balanced pools show half, and are refused too.
"""


def effective_classes(image_features: Float32[np.ndarray, "n d"], text: Float32[np.ndarray, "c d"]) -> float:
    """Return the effective number of classes of the images: the exponential of the entropy of their nearest classes.

    It is 1 if all images are nearest to one class, and c if every class is nearest to the same number of images. The
    images are processed in pieces of some megabytes.
    """
    counts = np.zeros(len(text))
    step = max(1, 2**24 // len(text))
    for first in range(0, len(image_features), step):
        nearest = (image_features[first : first + step] @ text.T).argmax(axis=1)
        counts += np.bincount(nearest, minlength=len(text))
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _usable(rows: Float[np.ndarray, "n d"]) -> np.ndarray:
    """Return which rows are finite and not zero."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
    usable: np.ndarray = np.isfinite(lengths) & (lengths > _MIN_LENGTH)
    return usable


def _cleaned(examples: Examples) -> tuple[Examples, int]:
    """Return the examples without unusable rows, and the number of those."""
    support = _usable(examples.support_features)
    pool = _usable(examples.pool_features)
    dropped = int((~support).sum() + (~pool).sum())
    if not dropped:
        return examples, 0
    if not pool.all() and examples.pool_neighbours is not None:
        # Neighbours refer to rows of the pool by their number, so no row can be removed.
        raise DegenerateExamplesError(
            f"{int((~pool).sum())} unlabelled images have features that are zero or not finite"
        )
    return (
        Examples(
            examples.support_features[support],
            examples.support_labels[support],
            examples.pool_features[pool],
            examples.pool_neighbours,
        ),
        dropped,
    )


def distinct_rows(text: Float32[np.ndarray, "c d"]) -> tuple[Float32[np.ndarray, "r d"], Int64[np.ndarray, " c"]]:
    """Return the different rows, in the order of their first appearance, and the index of each class's row in them."""
    _, first, which = np.unique(text, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return text[first[order]], rank[which.ravel()]


def log_shares(masses: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Return logits whose softmax is each row of masses divided by its sum; a row of zeros gets equal logits."""
    smallest = 1e-12
    totals = masses.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, masses / np.where(totals > 0, totals, 1), 1 / masses.shape[1])
    logs: np.ndarray = np.log(np.maximum(shares, smallest))
    return logs
