"""TDA: two caches of the images of requests, one that votes for classes and one that votes against them.

Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024. An image is put into the
positive cache of its zero-shot class if its entropy is below that of a cached image. If its entropy is moderate, it is
also put into the negative cache, with the classes that it may belong to. The positive cache votes for its classes, the
negative cache against the classes that its images may belong to.

The constants are the published defaults, which differ between data sets. Entropies are in nats, but their bounds are
shares of log2(c), in bits: the published code does the same, and the constants were chosen with it. Deviation: the
scale of the encoder replaces 100.
"""

import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float32

from app.adapters._base import Declaration, Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.scoring.numerics import softmax
from app.types import ImageFeatures, Logits

_MIN_LENGTH = 1e-6


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The number of images per class in a cache, the weight of their votes, and how fast it falls with distance."""

    size: int
    weight: float
    sharpness: float


POSITIVE = CacheOptions(3, 2.0, 5.0)
NEGATIVE = CacheOptions(2, 0.117, 1.0)
MIN_ENTROPY, MAX_ENTROPY = 0.2, 0.5
"""The bounds of the entropy of images in the negative cache, as shares of log2(c), in nats."""

MIN_SHARE, MAX_SHARE = 0.03, 1.0
"""The bounds of the probabilities of the classes that an image of the negative cache may belong to."""


class Cache:
    """The images with the lowest entropy for each class, at most ``options.size`` of them.

    A slot holds the feature (d,) of an image, and the classes that it votes on. The memory grows to c * size features,
    and the same number of lists of at most 1 / ``MIN_SHARE`` classes.
    """

    def __init__(self, options: CacheOptions, dims: int) -> None:
        self.options = options
        self.features: np.ndarray = np.zeros((0, dims), np.float32)
        self.entropies: list[float] = []
        self.targets: list[np.ndarray] = []
        self.slots: dict[int, list[int]] = {}
        """The slots of each class, sorted by entropy."""

    def put(self, label: int, feature: Float32[np.ndarray, " d"], entropy: float, targets: np.ndarray) -> None:
        """Add an image, unless the cache of its class is full of images with at most its entropy."""
        slots = self.slots.setdefault(label, [])
        if len(slots) < self.options.size:
            slots.append(len(self.targets))
            self.entropies.append(entropy)
            self.targets.append(targets)
            if len(self.targets) > len(self.features):
                self.features = np.concatenate([self.features, np.zeros_like(self.features), feature[None]])
        elif entropy >= self.entropies[slots[-1]]:
            return
        last = slots[-1]
        self.features[last], self.entropies[last], self.targets[last] = feature, entropy, targets
        slots.sort(key=self.entropies.__getitem__)

    def votes(self, feature: Float32[np.ndarray, " d"], classes: int) -> Float[np.ndarray, " c"]:
        """Return for each class the sum of weight * exp(-sharpness (1 - cosine)) over the images that vote on it."""
        if not self.targets:
            return np.zeros(classes)
        cosines = (self.features[: len(self.targets)] @ feature).astype(np.float64)
        affinities = self.options.weight * np.exp(-self.options.sharpness * (1 - cosines))
        counts = [len(targets) for targets in self.targets]
        return np.bincount(np.concatenate(self.targets), np.repeat(affinities, counts), minlength=classes)


class TDA(ExampleAdapter):
    """Logits are zero-shot + the votes of the positive cache - those of the negative cache at that time.

    Images are processed one by one in their order, and concurrent calls wait for each other. An image is added to the
    caches before it is classified. ``fit`` empties the caches.
    """

    declaration: ClassVar[Declaration] = Declaration(
        "tda",
        "Similarity to earlier images of requests, those with confident zero-shot predictions"
        " (Karmanov et al., CVPR 2024).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset()
    transductive: ClassVar[bool] = True
    stateful: ClassVar[bool] = True

    def _learn(self, examples: Examples) -> None:
        del examples
        self.lock_ = threading.Lock()
        self.positive_ = Cache(POSITIVE, self.text_.shape[1])
        self.negative_ = Cache(NEGATIVE, self.text_.shape[1])

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del neighbours
        shares = softmax(zero_shot.astype(np.float64))
        entropies = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)
        doubtful = is_doubtful(entropies, zero_shot.shape[1])
        # Unusable images are rows of zeros, which must not be cached.
        usable = np.linalg.norm(image_features, axis=1) > _MIN_LENGTH
        logits = zero_shot.astype(np.float64)
        with self.lock_:
            for index in np.flatnonzero(usable):
                feature, label = image_features[index], int(zero_shot[index].argmax())
                entropy = float(entropies[index])
                self.positive_.put(label, feature, entropy, np.array([label]))
                if doubtful[index]:
                    possible = (shares[index] > MIN_SHARE) & (shares[index] < MAX_SHARE)
                    self.negative_.put(label, feature, entropy, np.flatnonzero(possible))
                logits[index] += self.positive_.votes(feature, logits.shape[1])
                logits[index] -= self.negative_.votes(feature, logits.shape[1])
        return logits


def is_doubtful(entropies: Float[np.ndarray, " n"], classes: int) -> Bool[np.ndarray, " n"]:
    """Return which entropies, in nats, are between the bounds; none if there is one class."""
    if classes == 1:
        return np.zeros(len(entropies), bool)
    portions = entropies / np.log2(classes)
    doubtful: np.ndarray = (portions > MIN_ENTROPY) & (portions < MAX_ENTROPY)
    return doubtful
