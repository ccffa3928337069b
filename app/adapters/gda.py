"""GDA: a Gaussian classifier whose classes share one covariance, added to the zero-shot logits.

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024: discriminant analysis with
equal priors, f_c(x) = x P mu_c - mu_c P mu_c / 2, where P is the empirical-Bayes ridge estimate of the inverse
covariance of Kubokawa and Srivastava.

Deviations:

- P is divided by d / (n - 1), so that alpha = 1 is the Gaussian likelihood. The grid of the paper is not portable
between
  label sets: the best values are spread over all of it.
- Alpha is selected by cross-validation on the labelled images, by their likelihood at the best temperature, not by the
  accuracy on other images. The logits are divided by this temperature, so that scores for different alphas, and of
  different fits, can be compared.
- The mean over the classes is subtracted from the contributions, so that they do not change the level of the scores of
a
  sigmoid encoder. A softmax does not depend on it.
- A class without images gets the mean that the paper gives new classes, but the covariance of all other classes. The
  paper's covariance for new classes is made to separate these from each other only. Beside classes with images, it made
  their scores far too small.
- With fewer than two images per class, the covariance within the classes is zero or has too few directions. The paper
  adds augmented images; here, the covariance is that of all images about their mean, and alpha is fixed. The same holds
  where too few images are labelled to select alpha.
"""

from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float, Int

from app.adapters._base import Declaration, Examples, Neighbours, Range
from app.adapters._cross_validation import compared_images, first_best, held_out_folds
from app.adapters._examples import DegenerateExamplesError, ExampleAdapter, Need
from app.runtime.turns import give_way
from app.scoring.calibration import tempered_loss
from app.types import ImageFeatures, Logits

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""The candidates of cross-validation."""

CAUTIOUS_ALPHA = 0.3
"""The weight if too few images are labelled to select one."""

# The part of the variance between classes, and of the length of an image, that is due to rounding.
_NO_VARIANCE = 1e-6
_NEW_CLASS_NEIGHBOURS = 64
_TEXT_COPIES = 16


class GDA(ExampleAdapter):
    """Logits are (zero-shot + alpha (x W + b)) / temperature.

    ``W_`` (d, c) and ``b_`` (c,) have a mean of zero over the classes. ``alpha_`` and ``temperature_`` are the values
    that are used; the temperature is 1 if alpha is not selected.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "gda", "Gaussian discriminant analysis of labelled images, added to zero-shot (Wang et al., ICLR 2024)."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUPPORT})

    def __init__(
        self,
        alpha: Annotated[
            float,
            Range(0, 1e4, "Weight of the labelled images relative to the text; 0 selects it by cross-validation."),
        ] = 0.0,
    ) -> None:
        self.alpha = alpha

    def _learn(self, examples: Examples) -> None:
        rows, labels = examples.support_features, examples.support_labels
        classes = len(self.text_)
        chosen = None if self.alpha else self._chosen(rows, labels)
        why = "" if self.alpha or chosen else "too few images are labelled to select their weight; a fixed one is used"
        alpha, temperature = chosen or (self.alpha or CAUTIOUS_ALPHA, 1.0)
        weights, biases, pooled = gaussian(rows, labels, self.text_, pooled=bool(why))
        missing = classes - len(np.unique(labels))
        self.W_ = (weights - weights.mean(axis=1, keepdims=True)).astype(np.float32)
        self.b_ = (biases - biases.mean()).astype(np.float32)
        self.alpha_, self.temperature_ = alpha, temperature
        self.warnings_ = tuple(
            warning
            for warning, applies in (
                ("too few images are labelled for a covariance within classes; that of all images is used", pooled),
                (why, bool(why)),
                (
                    f"classes without a labelled image: {missing}; they use the mean of similar images and their text",
                    missing > 0,
                ),
            )
            if applies
        )
        self.diagnostics_ = {
            "alpha": alpha,
            "temperature": temperature,
            "alpha_was_chosen": float(not self.alpha and not why),
            "covariance_of_all_images": float(pooled),
            "images": len(rows),
            "classes_without_images": missing,
        }

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del neighbours
        logits: np.ndarray = zero_shot + np.float32(self.alpha_) * (image_features @ self.W_ + self.b_)
        return logits / np.float32(self.temperature_)

    def _chosen(self, rows: Float[np.ndarray, "s d"], labels: Int[np.ndarray, " s"]) -> tuple[float, float] | None:
        """Return the alpha and the temperature with the best likelihood of held-out images; None if too few."""
        folds = held_out_folds(labels, len(self.text_))
        if folds is None or len(self.text_) == 1:
            return None
        compared = compared_images(folds)
        queries, truth = rows[compared].astype(np.float64), labels[compared]
        zero_shot = self.logit_scale_ * queries @ self.text_.T
        contributions = np.empty_like(zero_shot)
        for fold in range(int(folds.max()) + 1):
            give_way()
            rest, here = folds != fold, folds[compared] == fold
            weights, biases, pooled = gaussian(rows[rest], labels[rest], self.text_)
            if pooled:
                # Alphas of the two covariances cannot be compared.
                return None
            contributions[here] = queries[here] @ weights + biases
        losses, temperatures = zip(
            *(tempered_loss(zero_shot + alpha * contributions, truth) for alpha in ALPHAS), strict=True
        )
        best = first_best(losses)
        return ALPHAS[best], temperatures[best]


def gaussian(
    rows: Float[np.ndarray, "s d"],
    labels: Int[np.ndarray, " s"],
    text: Float[np.ndarray, "c d"],
    *,
    pooled: bool = False,
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"], bool]:
    """Return W and b in float64, and whether the covariance is that of all images instead of within the classes.

    With ``pooled`` it is; without, if there are too few images for a covariance within the classes.

    Raises:
        DegenerateExamplesError: the images are all the same.
    """
    counts = np.bincount(labels, minlength=len(text))
    means = class_means(rows, labels, len(text))
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows - means[labels]
    within = float(np.vdot(centred, centred))
    between = float(counts @ ((means - mean) ** 2).sum(axis=1))
    if within + between <= len(rows) * _NO_VARIANCE**2:
        raise DegenerateExamplesError("the labelled images are all the same, so they do not separate the classes")
    empty = counts == 0
    pooled = pooled or len(rows) < 2 * (~empty).sum() or within <= _NO_VARIANCE * between
    if pooled:
        centred = rows - mean
    if empty.any():
        means[empty] = new_class_means(rows, text[empty])
    weights = times_precision(means, centred)
    biases = -np.log(len(text)) - (weights * means).sum(axis=1) / 2
    return weights.T, biases, bool(pooled)


def times_precision(vectors: Float[np.ndarray, "m d"], centred: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "m d"]:
    """Return ``vectors @ P``, where ``P = (s - 1) inv((s - 1) cov + trace(cov) I)``.

    This is the estimate of Kubokawa and Srivastava, times (s - 1) / d. With fewer images than dimensions, an s by s
    system is solved (Woodbury identity), else a d by d one. The condition number of either is at most s.
    """
    from scipy.linalg import cho_factor, cho_solve  # noqa: PLC0415 - imported by the first fit, not at every start

    images, dims = centred.shape
    degrees = max(images - 1, 1)
    trace = float(np.vdot(centred, centred)) / degrees
    if images < dims:
        system = centred @ centred.T
        system[np.diag_indices(images)] += trace
        explained = centred.T @ cho_solve(cho_factor(system, lower=True), centred @ vectors.T)
        small: np.ndarray = degrees / trace * (vectors - explained.T)
        return small
    system = centred.T @ centred
    system[np.diag_indices(dims)] += trace
    solved: np.ndarray = degrees * cho_solve(cho_factor(system, lower=True), vectors.T).T
    return solved


def class_means(
    rows: Float[np.ndarray, "s d"], labels: Int[np.ndarray, " s"], classes: int
) -> Float[np.ndarray, "c d"]:
    """Return the mean of the images of each class, in float64; zeros for a class without images."""
    order = np.argsort(labels, kind="stable")
    present, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    means = np.zeros((classes, rows.shape[1]))
    means[present] = np.add.reduceat(rows[order], first, axis=0, dtype=np.float64) / counts[:, None]
    return means


def new_class_means(rows: Float[np.ndarray, "s d"], text: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    """Return for each text the mean of 16 copies of it and of the 64 labelled images nearest to it.

    This is the rule of the paper for classes without labelled images. Of equally near images the earlier comes first.
    """
    wide = text.astype(np.float64)
    count = min(_NEW_CLASS_NEIGHBOURS, len(rows))
    nearest = np.argsort(-(wide @ rows.T), axis=1, kind="stable")[:, :count]
    sums = np.stack([rows[near].sum(axis=0, dtype=np.float64) for near in nearest])
    means: np.ndarray = (sums + _TEXT_COPIES * wide) / (count + _TEXT_COPIES)
    return means
