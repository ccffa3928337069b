"""What adapters that learn from example images share: clean input, and zero-shot answers where they cannot learn."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Self, final

import numpy as np
from jaxtyping import Float, Float32, Int64

from app.adapters._base import NO_EXAMPLES, Examples, Neighbours, Scores
from app.scoring.numerics import unit_rows
from app.types import ClassEmbeddings, ImageFeatures, Logits

_SHORTEST = 1e-6


class Need(StrEnum):
    """Which example images an adapter learns from."""

    SUPPORT = "labelled images"
    POOL = "unlabelled images"


class DegenerateExamplesError(Exception):
    """These examples cannot teach this adapter; the message says why, as the end of a sentence."""


class ExampleAdapter(ABC):
    """A classifier that adds to the text what example images teach.

    It takes one row of text per class (c, d). Classes whose text is the same are one to adapters that know nothing but
    the text of them, and get the same scores; below, c counts those that differ. Where there is nothing to learn from,
    or what was learned gives no finite numbers, its answers are those of plain cosines, and ``warnings_`` and
    ``Scores.warnings`` say so; never silently. Subclasses are final, keep their hyperparameters in ``__init__``, and
    implement ``_learn`` and ``_logits``.
    """

    aligned: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    """Whether an answer may depend on the images that it was asked about before."""

    needs: ClassVar[frozenset[Need]]
    """Without any of these it answers as zero-shot does."""

    balanced: ClassVar[bool] = False
    """Whether it assumes that the pool holds about as many images of each class; it does not learn from other pools."""

    @property
    def neighbours(self) -> int:
        """How many pool images near each image it looks at; 0 for none."""
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
        """Learn from the rows of the classes (c, d), which are made unit, and the examples."""
        self.text_ = unit_rows(np.asarray(text, np.float32))
        self.class_rows_ = np.arange(len(self.text_))
        if Need.SUPPORT not in self.needs:
            self.text_, self.class_rows_ = distinct_rows(self.text_)
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        self.diagnostics_: Mapping[str, float] = {}
        self.warnings_: tuple[str, ...] = ()
        self.learned_ = False
        for name in [name for name in vars(self) if name.endswith("_") and name not in _OF_EVERY_FIT]:
            delattr(self, name)
        try:
            cleaned, dropped = _cleaned(examples)
            self._check(cleaned)
            with np.errstate(all="ignore"):
                self._learn(cleaned)
            self.learned_ = True
        except DegenerateExamplesError as error:
            self.warnings_ = (f"{error}, so that the answers are those of zero-shot",)
        except np.linalg.LinAlgError as error:
            self.warnings_ = (f"the examples' statistics cannot be used ({error}); the answers are those of zero-shot",)
        else:
            if dropped:
                self.warnings_ += (f"{dropped} examples are left out, whose features are zero or not finite",)
        return self

    @final
    def predict(self, image_features: ImageFeatures, neighbours: Neighbours | None = None) -> Scores:
        """Return scores (n, c); an image whose features are no direction gets the plain cosines, which are zero.

        Args:
            image_features: unit rows (n, d).
            neighbours: of each image among the pool that it was fitted on, where ``self.neighbours`` wants some.
        """
        rows = np.asarray(image_features, np.float32)
        good = _usable(rows)
        safe = rows if good.all() else np.where(good[:, None], rows, np.float32(0))
        similarities = (safe @ self.text_.T).clip(-1, 1)
        zero_shot: Logits = (self.logit_scale_ * similarities + self.logit_bias_).astype(np.float32)
        if not self.learned_:
            return self._told(similarities, zero_shot, self.warnings_)
        with np.errstate(all="ignore"):
            logits = np.asarray(self._logits(safe, zero_shot, neighbours), np.float32)
        return self._scores(similarities, zero_shot, logits, good)

    @final
    def pool_scores(self, pool_features: ImageFeatures) -> Scores:
        """Return the scores (u, c) of the very pool that it was fitted on: a transductive answer.

        Args:
            pool_features: the same usable unit rows (u, d) as in the examples.
        """
        similarities = (pool_features @ self.text_.T).clip(-1, 1)
        zero_shot: Logits = (self.logit_scale_ * similarities + self.logit_bias_).astype(np.float32)
        if not self.learned_:
            return self._told(similarities, zero_shot, self.warnings_)
        with np.errstate(all="ignore"):
            logits = np.asarray(self._pool_logits(pool_features, zero_shot), np.float32)
        return self._scores(similarities, zero_shot, logits, np.ones(len(logits), bool))

    def _scores(self, similarities: np.ndarray, zero_shot: Logits, logits: Logits, good: np.ndarray) -> Scores:
        finite = np.isfinite(logits).all(axis=1)
        warnings = self.warnings_
        if not good.all():
            warnings += ("an image's features are zero or not finite, so that nothing can be said of it",)
        if not finite[good].all():
            warnings += ("what was learned gives no finite score for an image, which is answered as by zero-shot",)
        kept = good & finite
        return self._told(similarities, logits if kept.all() else np.where(kept[:, None], logits, zero_shot), warnings)

    def _told(self, similarities: np.ndarray, logits: Logits, warnings: tuple[str, ...]) -> Scores:
        """Return the scores of all classes, those whose text is the same given the same."""
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
            if seen < LEAST_BALANCE * len(self.text_):
                raise DegenerateExamplesError(
                    f"by zero-shot the unlabelled images are spread over as few as {seen:.1f} of {len(self.text_)}"
                    " classes, and this method needs about as many of each"
                )

    @abstractmethod
    def _learn(self, examples: Examples) -> None:
        """Set attributes that end in ``_``, ``diagnostics_`` and ``warnings_`` among them.

        Called with finite unit rows, at least one of each kind that ``needs`` names; arithmetic warnings are off.

        Raises:
            DegenerateExamplesError: nothing can be learned from these.
        """

    @abstractmethod
    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        """Return logits (n, c) of images that may be all zero where they could not be used; see ``predict``."""

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:
        """Return logits (u, c) of the pool itself; by default as if each of its images were asked for alone."""
        return self._logits(pool_features, zero_shot, None)


_OF_EVERY_FIT = frozenset(
    {"text_", "class_rows_", "logit_scale_", "logit_bias_", "diagnostics_", "warnings_", "learned_"}
)


LEAST_BALANCE = 0.5
"""Of the classes, the share over which a pool must be spread for adapters that assume balance."""


def effective_classes(image_features: Float32[np.ndarray, "n d"], text: Float32[np.ndarray, "c d"]) -> float:
    """Return over how many classes the images are spread: the exponential of the entropy of their nearest classes.

    From 1, if all images are nearest to one class, to c, if each class is nearest to as many; images are looked at in
    pieces of some megabytes.
    """
    counts = np.zeros(len(text))
    step = max(1, 2**24 // len(text))
    for first in range(0, len(image_features), step):
        nearest = (image_features[first : first + step] @ text.T).argmax(axis=1)
        counts += np.bincount(nearest, minlength=len(text))
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _usable(rows: Float[np.ndarray, "n d"]) -> np.ndarray:
    """Tell which rows are finite and no zero vector."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
    usable: np.ndarray = np.isfinite(lengths) & (lengths > _SHORTEST)
    return usable


def _cleaned(examples: Examples) -> tuple[Examples, int]:
    """Return the examples with unit rows only, and how many were dropped."""
    support = _usable(examples.support_features)
    pool = _usable(examples.pool_features)
    dropped = int((~support).sum() + (~pool).sum())
    if not dropped:
        return examples, 0
    if not pool.all() and examples.pool_neighbours is not None:
        # Rows of the pool are named by their number, so that none can be taken away from under the neighbours.
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
    """Return the rows without repetition, in order of first appearance, and which of them each class has."""
    _, first, which = np.unique(text, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return text[first[order]], rank[which.ravel()]


def log_shares(masses: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Return logits whose softmax is each row of masses divided by its sum; a row of zeros gets equal logits."""
    least = 1e-12
    totals = masses.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, masses / np.where(totals > 0, totals, 1), 1 / masses.shape[1])
    logs: np.ndarray = np.log(np.maximum(shares, least))
    return logs
