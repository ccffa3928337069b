"""The plain classifier of CLIP: the product of image and class, times the encoder's own scale.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1. What
is known of the classes lies in their rows: prototypes of prompts, or means whose products are means of cosines.
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
        """Keep the rows (r, d), which are the classifier."""
        self.text_ = text
        self.logit_scale_ = logit_scale
        self.logit_bias_ = logit_bias or 0.0
        return self

    def predict(self, image_features: ImageFeatures) -> Scores:
        """Return cosines, and those times the scale plus the bias."""
        # Unit rows are so to seven digits, which is enough for a cosine of 1.0000001.
        similarities = (image_features @ self.text_.T).clip(-1, 1)
        return Scores(similarities, self.logit_scale_ * similarities + self.logit_bias_)
