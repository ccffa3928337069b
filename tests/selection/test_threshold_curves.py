import numpy as np
import pytest

from app.selection.threshold_curves import MAX_POINTS, Curve


def selected_at(curve, threshold):
    """Return the images that a threshold selects, and those of them with the label, as documented."""
    place = np.searchsorted(curve.thresholds, threshold)
    return (0, 0) if place == len(curve.thresholds) else (int(curve.predicted[place]), int(curve.correct[place]))


def test_every_threshold_selects_the_images_at_or_above_it():
    random = np.random.default_rng(0)
    scores = random.integers(0, 40, 150) / 40  # with equal ones
    is_label = random.random(150) < scores
    curve = Curve.of(scores, is_label)
    for threshold in np.linspace(-0.1, 1.1, 241):
        above = scores >= threshold
        assert selected_at(curve, threshold) == (above.sum(), (above & is_label).sum())


def test_a_curve_of_many_scores_is_an_even_sample_with_both_ends():
    scores = np.random.default_rng(1).random(5000)
    is_label = scores > 0.5
    curve = Curve.of(scores, is_label)
    assert len(curve.thresholds) == MAX_POINTS
    assert (curve.thresholds[0], curve.thresholds[-1]) == pytest.approx((scores.min(), scores.max()))
    assert (np.diff(curve.thresholds) > 0).all()
    for threshold, predicted, correct in zip(curve.thresholds, curve.predicted, curve.correct, strict=True):
        assert predicted == (scores >= threshold).sum()
        assert correct == (is_label & (scores >= threshold)).sum()


def test_without_images_there_is_no_point():
    curve = Curve.of(np.zeros(0), np.zeros(0, bool))
    assert [len(part) for part in (curve.thresholds, curve.predicted, curve.correct)] == [0, 0, 0]
