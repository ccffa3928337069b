"""Two hundred random problems per method, from classes to similarities, compared with simple reference code."""

import hashlib
import random

import numpy as np
import pytest

from app.adapters.cosine import Cosine
from app.classification.methods import METHODS
from app.prompting.class_embeddings import pool
from app.types import ClassEntry
from tests.oracles.text_prototypes import cupl_prototypes, dclip_scores, unit

DIMS = 32
WORDS = ("stripes", "a long neck", "tufted ears", "has spots", "used in fields", "antennae", "an orange beak", "scales")


def direction(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return unit(np.random.default_rng(seed).standard_normal(DIMS)).astype(np.float32)


def problem(seed):
    """Return classes with different numbers of descriptions, templates, and unit images (n, d)."""
    draw = random.Random(seed)
    classes = [
        ClassEntry(
            f"thing {number}",
            descriptions=tuple(f"Thing {number} is {index} wide." for index in range(draw.randint(1, 7))),
            features=tuple(draw.sample(WORDS, draw.randint(1, len(WORDS)))),
        )
        for number in range(draw.randint(1, 6))
    ]
    templates = tuple(f"{index} times a {{}}." for index in range(draw.randint(1, 9)))
    images = unit(np.random.default_rng(seed).standard_normal((draw.randint(1, 4), DIMS)))
    return classes, templates, images.astype(np.float32)


@pytest.mark.parametrize(
    ("method", "renormalised"),
    [("zero-shot", True), ("cupl", True), ("cupl-ensemble", True), ("dclip", False), ("waffle", False)],
)
def test_two_hundred_random_problems_equal_the_reference(method, renormalised):
    worst = 0.0
    for seed in range(200):
        classes, templates, images = problem(seed)
        recipe = METHODS[method].recipe(classes, templates, dict(METHODS[method].read_options({})))
        features = [np.stack([direction(text) for text in row.texts]) for row in recipe.rows]
        rows = np.stack([pool(row, recipe.pooling, item) for row, item in zip(recipe.rows, features, strict=True)])
        found = Cosine().fit(rows, logit_scale=20.0, logit_bias=None).predict(images).similarities

        exact = [feature.astype(np.float64) for feature in features]
        wide = images.astype(np.float64)
        wanted = wide @ cupl_prototypes(exact).T if renormalised else dclip_scores(wide, exact)
        worst = max(worst, np.abs(found - wanted).max())
    assert worst <= 1e-6
