"""The array types with their named axes.

Axes: n images, c classes, r names of classes (r >= c: a class may have synonyms), k prompts, d embedding dimensions,
h and w pixels.
"""

from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]
"""One RGB image, resized and cropped for its encoder."""

ImageFeatures: TypeAlias = Float32[np.ndarray, "n d"]
"""Image features with unit rows."""

TextFeatures: TypeAlias = Float32[np.ndarray, "k d"]
"""Prompt features with unit rows."""

ClassEmbeddings: TypeAlias = Float32[np.ndarray, "r d"]
"""One row per class name, of unit length or shorter, depending on how the method pools its prompts."""

PromptEmbeddings: TypeAlias = Float32[np.ndarray, "r k d"]
"""Unit rows for methods that weigh prompts; the k-th prompt of every name has the same template."""

Similarities: TypeAlias = Float32[np.ndarray, "n c"]
"""Cosines, or weighted means of cosines, in [-1, 1]."""

Logits: TypeAlias = Float32[np.ndarray, "n c"]
"""The input of the probability function."""

Probabilities: TypeAlias = Float32[np.ndarray, "n c"]
"""Scores in [0, 1]; rows sum to 1 for softmax models only."""
