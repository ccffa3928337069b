import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters._class_means import ClassMeans
from app.fewshot.fitting import predict_held_out
from app.scoring.calibration import Rejection, rejection_threshold
from app.scoring.numerics import stratified_folds
from app.types import RejectBy
from tests.adapters.problems import PROBLEMS, problem, unit


def test_two_hundred_random_problems_equal_the_definition():
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        wanted = np.stack(
            [unit(drawn.rows[drawn.labels == label].astype(float).mean(axis=0)) for label in range(len(drawn.text))]
        )
        result = drawn.fit(ClassMeans(), drawn.support).predict(drawn.queries)
        np.testing.assert_allclose(result.logits, drawn.queries.astype(float) @ wanted.T, atol=1e-5)
        assert not result.warnings


def test_a_class_without_images_is_similar_to_none():
    drawn = problem(1, classes=4)
    kept = drawn.labels != 2
    without = Examples(support_features=drawn.rows[kept], support_labels=drawn.labels[kept])
    result = drawn.fit(ClassMeans(), without).predict(drawn.queries).logits
    assert not result[:, 2].any()
    assert result[:, [0, 1, 3]].all()


def test_confident_images_far_from_every_class_are_rejected():
    """A softmax over logits is sure of such images; the means are not."""
    rng = np.random.default_rng(0)
    dims, classes = 64, 5
    centres, foreign = unit(rng.standard_normal((classes, dims))), unit(rng.standard_normal(dims))
    text = unit(centres + 0.5 * unit(rng.standard_normal((classes, dims)))).astype(np.float32)
    labels = np.repeat(np.arange(classes), 12)

    def around(where):
        return unit(where + 0.6 * unit(rng.standard_normal((len(where), dims)))).astype(np.float32)

    rows, known, strange = around(centres[labels]), around(centres[labels]), around(np.tile(foreign, (60, 1)))
    adapter = ClassMeans().fit(
        text, logit_scale=100.0, logit_bias=None, examples=Examples(support_features=rows, support_labels=labels)
    )
    threshold = rejection_threshold(held_out(text, rows, labels).max(axis=1), 0.05)
    assert (adapter.predict(strange).logits.max(axis=1) < threshold).mean() > 0.95
    assert (adapter.predict(known).logits.max(axis=1) < threshold).mean() < 0.15


@pytest.mark.parametrize(("classes", "each"), [(2, 10), (3, 7), (8, 20)])
def test_held_out_means_reject_at_most_the_promised_share_of_new_images(classes, each):
    """Final means rest on more images than those of the folds, so new images are slightly nearer to them."""
    draws, rates = 200, (0.2, 0.1, 0.05)
    rejected = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        centres = unit(rng.standard_normal((classes, 24)))
        labels = np.repeat(np.arange(classes), each)

        def drawn(rng=rng, centres=centres, labels=labels):
            return unit(centres[labels] + 0.8 * unit(rng.standard_normal((len(labels), 24)))).astype(np.float32)

        text, rows, fresh = centres.astype(np.float32), drawn(), drawn()
        examples = Examples(support_features=rows, support_labels=labels)
        adapter = ClassMeans().fit(text, logit_scale=1.0, logit_bias=None, examples=examples)
        rejection = Rejection.of_held_out(RejectBy.CLASS_MEAN, held_out(text, rows, labels).max(axis=1))
        scores = adapter.predict(fresh).logits.max(axis=1)
        rejected.append([(scores < rejection.threshold(rate)).mean() for rate in rates])
    errors = np.std(rejected, axis=0) / np.sqrt(draws)
    assert (np.mean(rejected, axis=0) <= np.array(rates) + 3 * errors).all()


def held_out(text, rows, labels):
    class Scale:
        logit_scale, logit_bias = 1.0, None

    examples = Examples(support_features=rows, support_labels=labels)
    return predict_held_out(ClassMeans, text, examples, stratified_folds(labels, 5), Scale).logits
