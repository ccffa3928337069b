import numpy as np
import pytest

from app.adapters._base import Examples
from app.adapters.gda import ALPHAS, CAUTIOUS_ALPHA, GDA, class_means, gaussian, new_class_means, times_precision
from app.scoring.numerics import softmax
from tests.adapters.problems import PROBLEMS, difference, problem, same_in_float64
from tests.oracles import gda as oracle


def oracle_classifier(drawn):
    """Return W (d, c) and b (c,) of the reference, with its precision divided by d / (n - 1)."""
    classes, (images, dims) = len(drawn.text), drawn.rows.shape
    weights, biases = oracle.fit(drawn.rows.astype(float), drawn.labels, classes)
    part = (images - 1) / dims
    return part * weights, part * (biases + np.log(classes)) - np.log(classes)


def centred(values):
    return values - values.mean(axis=1, keepdims=True)


def contributions(adapter, rows):
    return rows @ adapter.W_ + adapter.b_


def without_class(drawn, label):
    kept = drawn.labels != label
    return Examples(support_features=drawn.rows[kept], support_labels=drawn.labels[kept])


def of_each_class(drawn, count):
    """Return the first images of each class."""
    kept = np.concatenate([np.flatnonzero(drawn.labels == label)[:count] for label in range(len(drawn.text))])
    return Examples(support_features=drawn.rows[kept], support_labels=drawn.labels[kept])


def test_two_hundred_random_problems_equal_the_reference():
    """Some have more dimensions than images, or an encoder with a bias and negative cosines."""
    worst = 0.0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        weights, biases, pooled = gaussian(drawn.rows, drawn.labels, drawn.text)
        wanted_weights, wanted_biases = oracle_classifier(drawn)
        assert not pooled
        worst = max(worst, difference(weights, wanted_weights), difference(biases, wanted_biases))
    assert worst <= 1e-12


@pytest.mark.parametrize("alpha", [0.01, 1.0, 10.0])
def test_the_adapter_equals_the_reference_up_to_a_constant_per_image(alpha):
    worst = 0.0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        result = drawn.fit(GDA(alpha), drawn.support).predict(drawn.queries)
        weights, biases = oracle_classifier(drawn)
        wanted = drawn.zero_shot() + alpha * centred(drawn.queries.astype(float) @ weights + biases)
        worst = max(worst, difference(result.logits, wanted))
        assert result.warnings == ()
    assert worst <= 2e-6


def test_the_means_of_classes_without_images_equal_the_reference():
    """Compares weights of the reference, which are these means times the mean of its precisions."""
    worst = 0.0
    for seed in range(PROBLEMS):
        drawn = problem(seed)
        rows, text = drawn.rows.astype(float), drawn.text[:3].astype(float)
        wanted, _ = oracle.fit_new_classes(rows, text)
        nearest = [rows[np.argsort(-(rows @ row), kind="stable")[:64]] for row in text]
        precision = np.mean([oracle.precision(near, row) for near, row in zip(nearest, text, strict=True)], axis=0)
        worst = max(worst, difference((new_class_means(rows, text) @ precision).T, wanted))
    assert worst <= 1e-12


@pytest.mark.parametrize(("images", "dims"), [(2, 9), (8, 9), (9, 9), (40, 9), (1, 5)])
def test_the_precision_is_the_same_in_both_computations(images, dims):
    rng = np.random.default_rng(images)
    rows, vectors = rng.standard_normal((images, dims)), rng.standard_normal((3, dims))
    degrees = max(images - 1, 1)
    covariance = rows.T @ rows / degrees
    wanted = degrees * vectors @ np.linalg.inv(degrees * covariance + np.trace(covariance) * np.eye(dims))
    np.testing.assert_allclose(times_precision(vectors, rows), wanted, rtol=1e-9)


def test_alpha_does_not_depend_on_the_number_of_images():
    """With the precision of the paper, ten times the images would need a tenth of alpha."""
    drawn = problem(1, images=8, dims=16)
    once, often = drawn.support, Examples(np.tile(drawn.rows, (10, 1)), np.tile(drawn.labels, 10))
    first = contributions(drawn.fit(GDA(1.0), once), drawn.queries)
    second = contributions(drawn.fit(GDA(1.0), often), drawn.queries)
    assert 1 / 3 < first.std() / second.std() < 3


def test_one_image_per_class_contributes_with_a_warning():
    """The covariance within the classes is zero, and its pseudo-inverse would contribute nothing."""
    drawn = problem(2, classes=5, dims=32)
    examples = of_each_class(drawn, 1)
    adapter = drawn.fit(GDA(), examples)
    assert adapter.learned_
    assert adapter.alpha_ == CAUTIOUS_ALPHA
    assert adapter.diagnostics_["covariance_of_all_images"] == 1
    assert any("covariance within classes" in warning for warning in adapter.warnings_)
    assert any("a fixed one is used" in warning for warning in adapter.warnings_)
    assert contributions(adapter, examples.support_features).argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_one_image_per_class_uses_the_covariance_of_all_images():
    drawn = problem(2, classes=5, dims=32)
    examples = of_each_class(drawn, 1)
    rows = examples.support_features.astype(float)
    weights, _, pooled = gaussian(examples.support_features, examples.support_labels, drawn.text)
    assert pooled
    precision = oracle.precision(rows) * 4 / 32
    np.testing.assert_allclose(weights, (rows @ precision).T, rtol=1e-9)


def test_two_images_of_one_class_do_not_determine_the_covariance():
    drawn = problem(2, classes=6, dims=32)
    examples = of_each_class(drawn, 1)
    second = np.flatnonzero(drawn.labels == 0)[1]
    examples = Examples(
        np.append(examples.support_features, drawn.rows[[second]], axis=0), np.append(examples.support_labels, 0)
    )
    assert drawn.fit(GDA(), examples).diagnostics_["covariance_of_all_images"] == 1


def test_two_images_per_class_have_a_covariance_but_no_folds_with_one():
    """Without a weight that is selected, the covariance of all images does less harm."""
    drawn = problem(2, classes=5, dims=32)
    adapter = drawn.fit(GDA(), of_each_class(drawn, 2))
    assert adapter.diagnostics_["covariance_of_all_images"] == 1
    assert adapter.alpha_ == CAUTIOUS_ALPHA
    given = drawn.fit(GDA(alpha=1.0), of_each_class(drawn, 2))
    assert given.diagnostics_["covariance_of_all_images"] == 0
    assert not given.warnings_


def test_many_images_of_one_class_do_not_select_alpha_for_classes_with_one_image():
    drawn = problem(3, classes=5, dims=16, images=20)
    single = of_each_class(drawn, 1)
    more = np.flatnonzero(drawn.labels == 0)[1:]
    examples = Examples(
        np.append(single.support_features, drawn.rows[more], axis=0),
        np.append(single.support_labels, np.zeros(19, int)),
    )
    adapter = drawn.fit(GDA(), examples)
    assert adapter.alpha_ == CAUTIOUS_ALPHA
    assert "a fixed one is used" in adapter.warnings_[1]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_class_without_images_is_finite_and_predicted_by_its_text(count):
    """Its mean would be NaN, and with it every logit."""
    for seed in range(20):
        drawn = problem(seed, classes=5, dims=24, images=6, sigmoid=False)
        few = of_each_class(drawn, count)
        kept = few.support_labels != 3
        examples = Examples(few.support_features[kept], few.support_labels[kept])
        adapter = drawn.fit(GDA(1.0), examples)
        result = adapter.predict(np.concatenate([drawn.queries, drawn.text[[3]]]))
        assert adapter.diagnostics_["classes_without_images"] == 1
        assert any("classes without a labelled image: 1;" in warning for warning in adapter.warnings_)
        assert np.isfinite(result.logits).all()
        assert result.logits[-1].argmax() == 3


def test_classes_without_images_use_the_covariance_of_the_others():
    drawn = problem(4, classes=4, dims=12)
    examples = without_class(drawn, 2)
    rows, labels = examples.support_features, examples.support_labels
    weights, biases, _ = gaussian(rows, labels, drawn.text)
    means = class_means(rows, labels, 4)
    means[2] = new_class_means(rows, drawn.text[[2]])[0]
    part = (len(rows) - 1) / 12
    precision = part * oracle.precision(rows - means[labels])
    np.testing.assert_allclose(weights, (means @ precision).T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(biases, -np.log(4) - np.einsum("cd,dc->c", means, weights) / 2, rtol=1e-9)


def test_more_classes_than_images_are_finite():
    drawn = problem(5, classes=7, dims=16)
    adapter = drawn.fit(GDA(), Examples(drawn.rows[:3], drawn.labels[:3]))
    assert adapter.learned_
    assert np.isfinite(adapter.predict(drawn.queries).logits).all()


def test_identical_images_give_the_results_of_zero_shot():
    drawn = problem(6, classes=3)
    for labels in ([0], [0, 0, 1, 1, 2, 2]):
        examples = Examples(np.repeat(drawn.rows[:1], len(labels), axis=0), np.array(labels))
        result = drawn.fit(GDA(), examples).predict(drawn.queries)
        np.testing.assert_allclose(result.logits, drawn.zero_shot(), atol=1e-4)
        assert "all the same" in result.warnings[0]


def test_copies_of_one_image_per_class_have_no_covariance_within_the_classes():
    drawn = problem(7, classes=4, dims=16)
    single = of_each_class(drawn, 1)
    copies = Examples(np.repeat(single.support_features, 5, axis=0), np.repeat(single.support_labels, 5))
    adapter = drawn.fit(GDA(), copies)
    assert adapter.diagnostics_["covariance_of_all_images"] == 1
    assert np.isfinite(adapter.predict(drawn.queries).logits).all()


def test_contributions_have_mean_zero_over_the_classes():
    """This keeps the level of the scores of a sigmoid encoder."""
    drawn = problem(9, sigmoid=True)
    adapter = drawn.fit(GDA(1.0), drawn.support)
    result = adapter.predict(drawn.queries).logits
    assert (drawn.queries @ drawn.text.T).min() < 0
    np.testing.assert_allclose(result.mean(axis=1), drawn.zero_shot().mean(axis=1), atol=1e-3)


def test_a_single_class_has_the_results_of_zero_shot():
    drawn = problem(10, classes=1)
    for alpha in (0.0, 1.0):
        result = drawn.fit(GDA(alpha), drawn.support).predict(drawn.queries)
        np.testing.assert_allclose(result.logits, drawn.zero_shot(), atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_double_precision_gives_the_same_logits(alpha):
    drawn = problem(11)
    same_in_float64(drawn, lambda: GDA(alpha), drawn.support)


def test_the_selected_alpha_equals_that_of_a_simple_search():
    """Recomputes folds, means, covariances, and the loss at the best of many temperatures; ties: the smaller alpha."""
    for seed in range(20):
        drawn = problem(seed, images=6, classes=4, dims=20)
        rows, labels = drawn.rows.astype(float), drawn.labels
        seen = dict.fromkeys(range(4), 0)
        folds = np.empty(len(labels), int)
        for index, label in enumerate(labels):
            folds[index] = seen[label] % 5
            seen[label] += 1
        added = np.empty((len(rows), 4))
        for fold in range(5):
            rest = folds != fold
            weights, biases = oracle.fit(rows[rest], labels[rest], 4)
            added[~rest] = (rest.sum() - 1) / 20 * (rows[~rest] @ weights + biases)
        zero_shot = drawn.zero_shot(drawn.rows)
        losses = []
        for alpha in ALPHAS:
            scaled = (zero_shot + alpha * added)[None] * 2.0 ** np.linspace(-10, 4, 561)[:, None, None]
            scaled -= scaled.max(axis=2, keepdims=True)
            log_shares = scaled - np.log(np.exp(scaled).sum(axis=2, keepdims=True))
            losses.append(-log_shares[:, np.arange(len(labels)), labels].mean(axis=1).max())
        best = drawn.fit(GDA(), drawn.support).alpha_
        chosen = losses[ALPHAS.index(best)]
        assert chosen <= min(losses) + 2e-3
        assert all(loss > chosen for alpha, loss in zip(ALPHAS, losses, strict=True) if alpha < best)


def test_the_selected_weight_follows_the_labels():
    drawn = problem(12, classes=4, dims=16, images=12)
    assert drawn.fit(GDA(), drawn.support).alpha_ == drawn.fit(GDA(), drawn.support).alpha_
    nothing = Examples(drawn.rows, np.random.default_rng(0).permutation(drawn.labels))
    assert drawn.fit(GDA(), nothing).alpha_ <= 0.01
    wrong_text = np.roll(drawn.text, 1, axis=0)
    adapter = GDA().fit(wrong_text, logit_scale=drawn.logit_scale, logit_bias=None, examples=drawn.support)
    assert adapter.diagnostics_["alpha_was_chosen"] == 1
    assert ((drawn.rows @ wrong_text.T).argmax(axis=1) == drawn.labels).mean() < 0.3
    assert (adapter.predict(drawn.rows).logits.argmax(axis=1) == drawn.labels).mean() > 0.9


def test_inputs_are_not_modified():
    drawn = problem(13)
    before = drawn.rows.copy(), drawn.labels.copy(), drawn.text.copy()
    for array in (drawn.rows, drawn.labels, drawn.text, drawn.queries):
        array.flags.writeable = False
    drawn.fit(GDA(), drawn.support).predict(drawn.queries)
    for array, was in zip((drawn.rows, drawn.labels, drawn.text), before, strict=True):
        np.testing.assert_array_equal(array, was)


def test_fitted_arrays_are_in_single_precision():
    drawn = problem(14, classes=3, dims=10)
    adapter = drawn.fit(GDA(), drawn.support)
    assert (adapter.W_.shape, adapter.b_.shape) == ((10, 3), (3,))
    assert adapter.W_.dtype == adapter.b_.dtype == np.float32


def test_the_weight_is_selected_at_the_calibrated_temperature():
    """Otherwise each fit has another scale, and the losses of held-out images cannot be compared."""
    rng = np.random.default_rng(21)
    centres = rng.standard_normal((4, 24))
    labels, asked_labels = np.repeat(np.arange(4), 12), np.repeat(np.arange(4), 200)

    def around(which):
        rows = centres[which] + 1.6 * rng.standard_normal((len(which), 24))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    text = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
    taught = GDA().fit(text, logit_scale=100.0, logit_bias=None, examples=Examples(around(labels), labels))
    logits = taught.predict(around(asked_labels)).logits
    confidence = softmax(logits).max(axis=1).mean()
    assert confidence == pytest.approx((logits.argmax(axis=1) == asked_labels).mean(), abs=0.1)
    assert softmax(logits * taught.temperature_).max(axis=1).mean() > confidence
