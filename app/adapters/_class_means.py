"""The mean of each class's labelled images: not a method, but what images of unknown classes are recognised by."""

from typing import ClassVar

import numpy as np

from app.adapters._base import Examples, Neighbours
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.gda import class_means
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures, Logits


class ClassMeans(ExampleAdapter):
    """Logits are the cosines with the mean of each class's labelled images; 0 for a class without any.

    Attributes:
        means_: unit rows (c, d).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUPPORT})

    def _learn(self, examples: Examples) -> None:
        means = class_means(examples.support_features, examples.support_labels, len(self.text_))
        self.means_ = unit_rows(means).astype(np.float32)

    def _logits(self, image_features: ImageFeatures, zero_shot: Logits, neighbours: Neighbours | None) -> np.ndarray:
        del zero_shot, neighbours
        cosines: np.ndarray = image_features @ self.means_.T
        return cosines.clip(-1, 1)
