"""Random classification problems: images and texts around class centres, on cones of any width."""

from dataclasses import dataclass

import numpy as np

from app.adapters._base import Examples

PROBLEMS = 200


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Problem:
    """Labelled images ``rows`` (s, d) with ``labels`` (s,), ``text`` (c, d), and ``queries`` (n, d)."""

    rows: np.ndarray
    labels: np.ndarray
    text: np.ndarray
    queries: np.ndarray
    logit_scale: float
    logit_bias: float | None

    @property
    def support(self):
        return Examples(support_features=self.rows, support_labels=self.labels)

    @property
    def pool(self):
        return Examples(pool_features=self.rows)

    def fit(self, adapter, examples):
        return adapter.fit(self.text, logit_scale=self.logit_scale, logit_bias=self.logit_bias, examples=examples)

    def zero_shot(self, rows=None):
        rows = self.queries if rows is None else rows
        return self.logit_scale * rows.astype(float) @ unit(self.text.astype(float)).T + (self.logit_bias or 0)


def problem(seed, *, classes=None, dims=None, images=None, sigmoid=None):
    """Return a random problem; if ``sigmoid`` (by default every third), with a bias and texts opposite to the images.

    ``images`` is the number of images per class, by default two to eight.
    """
    rng = np.random.default_rng(seed)
    sigmoid = seed % 3 == 0 if sigmoid is None else sigmoid
    classes = classes or int(rng.integers(2, 8))
    dims = dims or int(rng.integers(4, 48))
    counts = rng.integers(2, 9, classes) if images is None else np.full(classes, images)
    labels = rng.permutation(np.repeat(np.arange(classes), counts))
    cone = rng.choice([0.0, 1.0, 2.0]) * unit(rng.standard_normal(dims))
    centres = unit(rng.standard_normal((classes, dims)))
    spread = rng.choice([0.5, 1.0, 2.0]) / np.sqrt(dims)

    def around(which):
        return unit(cone + centres[which] + spread * rng.standard_normal((len(which), dims))).astype(np.float32)

    near = centres + (-1.0 if sigmoid else 0.5) * cone
    return Problem(
        rows=around(labels),
        labels=labels,
        text=unit(near + 0.5 / np.sqrt(dims) * rng.standard_normal((classes, dims))).astype(np.float32),
        queries=around(rng.integers(0, classes, 9)),
        logit_scale=float(rng.choice([10.0, 50.0, 100.0])),
        logit_bias=-7.0 if sigmoid else None,
    )


def difference(got, wanted):
    """Return the largest difference, relative to the largest expected number or to one."""
    return np.abs(np.asarray(got, float) - wanted).max() / max(1.0, np.abs(wanted).max())


def same_in_float64(drawn, adapter, examples):
    """Assert that features in double precision have the same results as those in single precision."""
    wide = Examples(
        examples.support_features.astype(float), examples.support_labels, examples.pool_features.astype(float)
    )
    first = drawn.fit(adapter(), examples).predict(drawn.queries)
    second = drawn.fit(adapter(), wide).predict(drawn.queries.astype(float))
    assert first.logits.dtype == second.logits.dtype == np.float32
    np.testing.assert_allclose(second.logits, first.logits, rtol=1e-4, atol=1e-3)
