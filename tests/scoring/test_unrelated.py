import numpy as np
import pytest

from app.scoring.unrelated import UnrelatedSimilarity

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("labels", [1, 2, 10, 100])
def test_the_typical_best_is_the_median_of_the_best_of_as_many_draws_but_of_ten_at_least(labels):
    reference = UnrelatedSimilarity(RNG.normal(0.2, 0.05, (10, 5000)))
    # The largest two percent are left out: draws from the rest of the normal distribution.
    draws = np.sort(RNG.normal(0.2, 0.05, 50_000))[:49_000]
    best = RNG.choice(draws, (2000, max(labels, 10))).max(axis=1)
    assert reference.typical_best(labels) == pytest.approx(np.median(best), abs=0.005)


def test_words_that_name_the_photograph_do_not_count_as_unrelated():
    cosines = np.full((4, 100), 0.1)
    cosines[:, :2] = 0.9
    assert UnrelatedSimilarity(cosines).typical_best(1_000_000) == 0.1
