"""What the pipeline knows about a method, and how logits become scores."""

from typing import ClassVar, Protocol, Self

import numpy as np

from app.task import ClassEmbeddings, ImageFeatures, Logits, Probabilities


class Adapter(Protocol):
    """A training-free classifier over frozen features.

    Hyperparameters are arguments of ``__init__``, which does nothing else; what ``fit`` learns ends in ``_``. ``fit``
    forgets what an earlier call left, and neither call changes its inputs.
    """

    name: ClassVar[str]
    """The method's name, as callers write it."""

    summary: ClassVar[str]
    """One sentence for ``GET /v1/methods``, with the source."""

    transductive: ClassVar[bool]
    """Whether one image's answer may depend on the others of its request."""

    def fit(self, class_embeddings: ClassEmbeddings, *, logit_scale: float, logit_bias: float | None) -> Self:
        """Take the label set, as unit rows (c, d), and the encoder's own scale and bias."""

    def predict_logits(self, image_features: ImageFeatures) -> Logits:
        """Return logits (n, c) for unit rows (n, d)."""


def probabilities(logits: Logits, *, sigmoid: bool) -> Probabilities:
    """Return scores in [0, 1]: a softmax over the classes, or for sigmoid models each class by itself.

    A sigmoid model was trained to answer "does this text fit this image?" per pair (Zhai et al., "Sigmoid Loss for
    Language Image Pre-Training", ICCV 2023, eq. 1), so that its rows need not sum to 1 and may be small throughout.
    """
    wide = logits.astype(np.float64)
    if sigmoid:
        # exp of a negative number only: no overflow for logits of any size.
        small = np.exp(-np.abs(wide))
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
    shares: Probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares
