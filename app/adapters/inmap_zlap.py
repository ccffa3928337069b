"""ZLaP with InMaP: label propagation over a graph of unlabelled images, from proxies instead of the text.

Stojnić et al., "Label Propagation for Zero-Shot Classification with Vision-Language Models", CVPR 2024, their InMaP
variant. Proxies lie among the images, so the cosines with both are scaled together. Both methods assume about the same
number of images of each class. The deviations are those of ``inmap.py`` and ``zlap.py``.
"""

from typing import ClassVar

import numpy as np

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.inmap import learned_proxies
from app.adapters.zlap import mass_logits, propagation, required
from app.types import ImageFeatures, Logits


class InMaPZLaP(ExampleAdapter):
    """Logits are the logarithms of the shares of the classes in the mass that reaches an image from its proxy.

    Args:
        k: the number of images (including itself) and of classes that an image is linked to.
        gamma: power of the scaled cosines with proxies.
        alpha: share of the mass that moves along the links at each step, in [0, 1).
        keep: the number of classes whose mass is kept for each node; 1 is the sparse variant of the paper. 0 keeps all,
            or 16 if all would be more than 2**28 numbers; ``diagnostics_`` contains the number.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "inmap+zlap", "ZLaP from the class embeddings that InMaP learns (Stojnić et al., CVPR 2024)."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.POOL})
    balanced: ClassVar[bool] = True

    def __init__(self, *, k: int = 10, gamma: float = 3.0, alpha: float = 0.3, keep: int = 0) -> None:
        self.k = k
        self.gamma = gamma
        self.alpha = alpha
        self.keep = keep

    @property
    def neighbours(self) -> int:
        """The number of images that an image is linked to."""
        return self.k

    def _learn(self, examples: Examples) -> None:
        images = np.asarray(examples.pool_features, np.float32)
        proxies, learned = learned_proxies(images, self.text_)
        self.propagation_ = propagation(
            images,
            proxies,
            required(examples.pool_neighbours),
            k=self.k,
            gamma=self.gamma,
            alpha=self.alpha,
            keep=self.keep,
            scaled=True,
        )
        self.diagnostics_ = {**learned, **self.propagation_.diagnostics()}

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        return mass_logits(self.propagation_.query_masses(image_features, required(neighbours)), zero_shot)

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return mass_logits(self.propagation_.pool_masses(), zero_shot)
