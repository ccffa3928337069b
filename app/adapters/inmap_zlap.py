"""ZLaP on InMaP's proxies: labels spread over a graph of unlabelled images, from proxies in place of the text.

Stojnić et al., "Label Propagation for Zero-Shot Classification with Vision-Language Models", CVPR 2024, which calls
them its InMaP variant. Proxies lie among the images, so that cosines with both are moved onto one scale. Both halves
assume that the pool holds about as many images of each class; what deviates is told in their own files.
"""

from typing import ClassVar

import numpy as np

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.inmap import learned_proxies
from app.adapters.zlap import expected, mass_logits, propagation
from app.types import ImageFeatures, Logits


class InMaPZLaP(ExampleAdapter):
    """Scores are the logarithms of each class's share of the mass that reaches an image from its proxy.

    Args:
        k: how many images (itself among them) and how many classes an image is linked to.
        gamma: power of the scaled cosines with proxies.
        alpha: share of the mass that goes on at each step, in [0, 1).
        keep: of how many classes each node's mass is kept; the paper's sparse variant is 1. 0 is for all, or for
            16 where all would be more than 2**28 numbers; ``diagnostics_`` says how many.
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
        """As many as an image is linked to."""
        return self.k

    def _learn(self, examples: Examples) -> None:
        images = np.asarray(examples.pool_features, np.float32)
        proxies, learned = learned_proxies(images, self.text_)
        self.propagation_ = propagation(
            images,
            proxies,
            expected(examples.pool_neighbours),
            k=self.k,
            gamma=self.gamma,
            alpha=self.alpha,
            keep=self.keep,
            scaled=True,
        )
        self.diagnostics_ = {**learned, **self.propagation_.diagnostics()}

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        return mass_logits(self.propagation_.of_queries(image_features, expected(neighbours)), zero_shot)

    def _pool_logits(self, pool_features: ImageFeatures, zero_shot: Logits) -> np.ndarray:  # noqa: ARG002
        return mass_logits(self.propagation_.of_pool(), zero_shot)
