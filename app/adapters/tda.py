"""TDA: two caches of the images that come by, one of what their classes look like and one of what they do not.

Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024. Each image goes into the
positive cache of the class that zero-shot gives it, if it is surer than one that is there; if it is neither sure nor
unsure, into the negative cache too, with the classes that it may be. Then the positive cache votes for its classes, and
the negative one against those that its images may be.

The constants are published defaults, which differ between data sets. The entropies are in nats while their bounds are
shares of log2(c), which is in bits: so does the published code, with which the constants were chosen. Deviation: the
encoder's own scale stands for 100.
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

_LEAST_LENGTH = 1e-6


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How many images a cache keeps of each class, how much they count, and how fast that falls with distance."""

    size: int
    weight: float
    sharpness: float


POSITIVE = CacheOptions(3, 2.0, 5.0)
NEGATIVE = CacheOptions(2, 0.117, 1.0)
LEAST_ENTROPY, MOST_ENTROPY = 0.2, 0.5
"""Between these shares of log2(c), in nats, an image goes into the negative cache."""

LEAST_SHARE, MOST_SHARE = 0.03, 1.0
"""Between these probabilities a class is one that an image of the negative cache may be."""


class Cache:
    """Of each class the images of least entropy, at most ``options.size`` of them.

    Slots are taken in the order in which images come, and hold for each a feature (d,) and the classes that it speaks
    of. Memory grows to c * size features, and as many lists of at most 1 / ``LEAST_SHARE`` classes.
    """

    def __init__(self, options: CacheOptions, dims: int) -> None:
        self.options = options
        self.features: np.ndarray = np.zeros((0, dims), np.float32)
        self.entropies: list[float] = []
        self.targets: list[np.ndarray] = []
        self.slots: dict[int, list[int]] = {}
        """The slots of each class, by entropy."""

    def put(self, label: int, feature: Float32[np.ndarray, " d"], entropy: float, targets: np.ndarray) -> None:
        """Keep an image, or forget it where the class has enough that are at least as sure."""
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
        """Return for each class the sum of weight * exp(-sharpness (1 - cosine)) over the images that speak of it."""
        if not self.targets:
            return np.zeros(classes)
        cosines = (self.features[: len(self.targets)] @ feature).astype(np.float64)
        affinities = self.options.weight * np.exp(-self.options.sharpness * (1 - cosines))
        counts = [len(targets) for targets in self.targets]
        return np.bincount(np.concatenate(self.targets), np.repeat(affinities, counts), minlength=classes)


class TDA(ExampleAdapter):
    """Logits are zero-shot + the votes of the positive cache - those of the negative one, as they are at that moment.

    Images are looked at one after the other, in their order and across calls, which wait for one another; an image is
    itself in the caches when it is answered. ``fit`` empties them.
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
        # Images that could not be used come as zeros, and must not be remembered.
        usable = np.linalg.norm(image_features, axis=1) > _LEAST_LENGTH
        logits = zero_shot.astype(np.float64)
        with self.lock_:
            for index in np.flatnonzero(usable):
                feature, label = image_features[index], int(zero_shot[index].argmax())
                entropy = float(entropies[index])
                self.positive_.put(label, feature, entropy, np.array([label]))
                if doubtful[index]:
                    possible = (shares[index] > LEAST_SHARE) & (shares[index] < MOST_SHARE)
                    self.negative_.put(label, feature, entropy, np.flatnonzero(possible))
                logits[index] += self.positive_.votes(feature, logits.shape[1])
                logits[index] -= self.negative_.votes(feature, logits.shape[1])
        return logits


def is_doubtful(entropies: Float[np.ndarray, " n"], classes: int) -> Bool[np.ndarray, " n"]:
    """Tell which entropies, in nats, are between the bounds; with one class there is no doubt."""
    if classes == 1:
        return np.zeros(len(entropies), bool)
    portions = entropies / np.log2(classes)
    doubtful: np.ndarray = (portions > LEAST_ENTROPY) & (portions < MOST_ENTROPY)
    return doubtful
