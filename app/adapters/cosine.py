"""Cosine: the classifier of CLIP, the product of image and class, times the scale of the encoder.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1. The
rows of the classes are prototypes of prompts, or means, whose products with an image are means of cosines.
"""

from typing import ClassVar, Self

import numpy as np

from app.adapters._base import Declaration, Scores
from app.types import ImageFeatures


class Cosine:
    """``logit_scale * cosine + logit_bias``."""

    declaration: ClassVar[Declaration] = Declaration(
        "zero-shot", "Cosine similarity with the mean of the class's templates (Radford et al., ICML 2021)."
    )
    aligned: ClassVar[bool] = False
    transductive: ClassVar[bool] = False

    def fit(self, text: np.ndarray, *, logit_scale: float, logit_bias: float | None) -> Self:
        """Keep the rows (r, d), which are the weights of the classifier."""
        self.text_ = text
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        return self

    def predict(self, image_features: ImageFeatures) -> Scores:
        """Return the cosines, and as logits the cosines times the scale plus the bias."""
        # The length of unit rows is 1 to seven digits only, which can give a cosine of 1.0000001.
        similarities = (image_features @ self.text_.T).clip(-1, 1)
        return Scores(similarities, self.logit_scale_ * similarities + self.logit_bias_)
