import numpy as np
import pytest

from app.scoring.multi_label_measures import average_precision
from app.scoring.thresholds import fit_thresholds
from app.selection.threshold_curves import MAX_POINTS, Curve
from tests.oracles import thresholds as oracle


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


@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.5, 1.0])
def test_a_sample_of_many_scores_has_both_ends_and_small_steps_of_the_recall(share):
    random = np.random.default_rng(1)
    is_label = random.random(5000) < share
    scores = random.random(5000) + is_label
    curve = Curve.of(scores, is_label, [0.3, 0.6, 0.9])
    assert len(curve.thresholds) <= MAX_POINTS
    assert (curve.thresholds[0], curve.thresholds[-1]) == (scores.min(), scores.max())
    assert (np.diff(curve.thresholds) > 0).all()
    assert -np.diff(curve.correct).min() <= max(2, 0.011 * is_label.sum())
    for threshold, predicted, correct in zip(curve.thresholds, curve.predicted, curve.correct, strict=True):
        assert predicted == (scores >= threshold).sum()
        assert correct == (is_label & (scores >= threshold)).sum()


def test_a_sample_is_exact_at_the_thresholds_that_matter():
    random = np.random.default_rng(1)
    is_label = random.random(5000) < 0.01
    scores = (random.random(5000) + is_label) / 2
    for threshold in (0.0, 0.123, 0.4567, 0.95, float(scores.max()), 1.1, float(scores[7])):
        above = scores >= threshold
        curve = Curve.of(scores, is_label, [threshold])
        assert selected_at(curve, threshold) == (above.sum(), (above & is_label).sum())
        # Also at the nearest thresholds that select other images.
        below = scores[~above].max(initial=-1)
        assert selected_at(curve, below) == ((scores >= below).sum(), (is_label & (scores >= below)).sum())


def test_without_images_there_is_no_point():
    curve = Curve.of(np.zeros(0), np.zeros(0, bool))
    assert [len(part) for part in (curve.thresholds, curve.predicted, curve.correct)] == [0, 0, 0]


def problems(count=200):
    """Yield scores with ties, and labels; some labels have no image or all."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        shape = int(random.integers(1, 40)), int(random.integers(1, 4))
        scores = random.integers(0, random.choice([2, 8, 1000]), shape).astype(np.float32) / 1000
        yield scores.astype(np.float64), random.random(shape) < random.choice([0, 0.1, 0.5, 0.9, 1], shape[1])


def test_counts_and_suggestions_are_those_of_trying_every_threshold():
    for scores, is_label in problems():
        every = scores.reshape(-1).tolist(), is_label.reshape(-1).tolist()
        columns = [(column.tolist(), truth.tolist()) for column, truth in zip(scores.T, is_label.T, strict=True)]
        curves = [Curve.of(column, truth) for column, truth in zip(scores.T, is_label.T, strict=True)]
        fitted = {share: fit_thresholds(scores, is_label, precision=share).by_label for share in (0.3, 0.7, 0.9)}
        reached = {share: fit_thresholds(scores, is_label, recall=share).by_label for share in (0.1, 0.5, 0.8, 0.9)}
        averages, best = average_precision(scores, is_label), fit_thresholds(scores, is_label).by_label
        for label, ((column, truth), curve) in enumerate(zip(columns, curves, strict=True)):
            for threshold in {0.0, 0.0005, 1.0, *column}:
                assert selected_at(curve, threshold) == oracle.counts(column, truth, threshold)
            assert (averages[label] if any(truth) else None) == pytest.approx(oracle.average_precision(column, truth))
            for expected_at, by_share in ((oracle.at_precision, fitted), (oracle.at_recall, reached)):
                for share, by_label in by_share.items():
                    found = by_label[label]
                    shown = None if found is None else oracle.counts(column, truth, found)
                    assert shown == expected_at(column, truth, share)
            highest = oracle.best_f1(column, truth, *every)
            assert (best[label] is None) == (highest is None)
            if highest is not None:
                assert oracle.f1_with_shared(column, truth, *every, best[label]) == pytest.approx(highest, abs=1e-12)
