"""The contract of the adapters, tested on each adapter that app/adapters declares."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.adapters._base import Examples
from app.adapters._discovery import adapter_classes
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.cosine import Cosine
from app.adapters.inmap import InMaP
from app.adapters.inmap_zlap import InMaPZLaP
from app.fewshot.fitting import fit, transduce
from app.scoring.numerics import softmax

ADAPTERS = adapter_classes()
EXAMPLE_ADAPTERS = [adapter for adapter in ADAPTERS if issubclass(adapter, ExampleAdapter)]


def name_of(adapter):
    return adapter.__name__


METHOD = pytest.mark.parametrize("adapter", ADAPTERS, ids=name_of)
INDUCTIVE = [adapter for adapter in ADAPTERS if not adapter.transductive]
STATELESS = pytest.mark.parametrize(
    "adapter", [adapter for adapter in ADAPTERS if not getattr(adapter, "stateful", False)], ids=name_of
)
EXAMPLE_ADAPTER = pytest.mark.parametrize("adapter", EXAMPLE_ADAPTERS, ids=name_of)
LEARNS_FROM_EXAMPLES = pytest.mark.parametrize(
    "adapter", [adapter for adapter in EXAMPLE_ADAPTERS if adapter.needs], ids=name_of
)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 16), st.integers(0, 2**32 - 1))

# InMaP runs two thousand steps for problems of every size.
CASES = settings(deadline=None, max_examples=20)

SCALE = 20.0


def unit_rows(rng, count, dims):
    rows = rng.standard_normal((count, dims))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(sizes):
    """Return class embeddings (c, d) and image features (n, d)."""
    classes, images, dims, seed = sizes
    rng = np.random.default_rng(seed)
    return unit_rows(rng, classes, dims), unit_rows(rng, images, dims)


def text_of(adapter, class_embeddings):
    """Return the text input of the adapter: three prompts around each class if it takes separate prompts."""
    if not adapter.aligned:
        return class_embeddings
    around = np.stack([class_embeddings, np.roll(class_embeddings, 1, axis=1), -class_embeddings[:, ::-1]], axis=1)
    return np.ascontiguousarray(around + 4 * class_embeddings[:, None]) / np.float32(6)


def examples_of(class_embeddings, seed=7, *, support_per_class=4, pool_per_class=8):
    """Return labelled and unlabelled images around each class (c, d), in alternating order of the classes."""
    rng = np.random.default_rng(seed)
    classes, dims = class_embeddings.shape

    def around(count):
        rows = np.tile(class_embeddings, (count, 1)) + 0.3 * unit_rows(rng, count * classes, dims)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return Examples(around(support_per_class), np.tile(np.arange(classes), support_per_class), around(pool_per_class))


def fitted(adapter, class_embeddings, *, bias=None, examples=None):
    return Fitted(adapter(), text_of(adapter, class_embeddings), SCALE, bias, examples)


class Fitted:
    """A fitted adapter that returns logits."""

    def __init__(self, adapter, text, scale, bias, examples=None):
        self.index = None
        if isinstance(adapter, ExampleAdapter):
            examples = examples or examples_of(text)
            encoder = SimpleNamespace(logit_scale=scale, logit_bias=bias)
            learned = fit(adapter, text, examples, encoder)
            self.adapter, self.predict = learned.adapter, learned.predict
        else:
            self.adapter = adapter.fit(text, logit_scale=scale, logit_bias=bias)
            self.predict = self.adapter.predict

    def predict_logits(self, image_features):
        return self.predict(image_features).logits


@METHOD
def test_the_constructor_only_stores_its_arguments(adapter):
    given_parameters = [name for name in inspect.signature(adapter).parameters if name not in {"args", "kwargs"}]
    assert sorted(vars(adapter())) == sorted(given_parameters)


@METHOD
def test_fit_returns_the_adapter_and_fitted_attributes_end_in_an_underscore(adapter):
    unfitted = adapter()
    hyperparameters = set(vars(unfitted))
    text = text_of(adapter, np.eye(3, dtype=np.float32))
    assert unfitted.fit(text, logit_scale=SCALE, logit_bias=None) is unfitted
    assert all(name.endswith("_") for name in set(vars(unfitted)) - hyperparameters)


@METHOD
@CASES
@given(sizes=SIZES)
def test_logits_are_finite_float32_with_one_column_per_class(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    for bias in (None, -5.0):
        logits = fitted(adapter, class_embeddings, bias=bias).predict_logits(image_features)
        assert logits.shape == (len(image_features), len(class_embeddings))
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()


@METHOD
@CASES
@given(sizes=SIZES)
def test_the_order_of_the_classes_only_permutes_the_logits(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    order = np.random.default_rng(sizes[-1]).permutation(len(class_embeddings))
    examples = examples_of(class_embeddings)
    place = np.argsort(order)
    permuted_examples = replace(examples, support_labels=place[examples.support_labels])
    logits = fitted(adapter, class_embeddings, examples=examples).predict_logits(image_features)
    permuted = fitted(adapter, class_embeddings[order], examples=permuted_examples).predict_logits(image_features)
    # Rounding determines the end of InMaP's two thousand steps.
    tolerance = 2e-2 if adapter in {InMaP, InMaPZLaP} else 1e-4
    np.testing.assert_allclose(softmax(permuted), softmax(logits[:, order]), atol=tolerance)


@STATELESS
@CASES
@given(sizes=SIZES)
def test_the_order_of_the_images_only_permutes_the_logits(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    order = np.random.default_rng(sizes[-1]).permutation(len(image_features))
    adapter = fitted(adapter, class_embeddings)
    np.testing.assert_allclose(
        adapter.predict_logits(image_features[order]), adapter.predict_logits(image_features)[order], atol=1e-4
    )


@pytest.mark.parametrize("adapter", INDUCTIVE, ids=name_of)
@CASES
@given(sizes=SIZES)
def test_an_image_has_the_same_logits_alone_and_in_a_batch(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    adapter = fitted(adapter, class_embeddings)
    together = adapter.predict_logits(image_features)
    for row, alone in zip(together, image_features, strict=True):
        np.testing.assert_allclose(adapter.predict_logits(alone[None])[0], row, atol=1e-4)


@STATELESS
def test_identical_images_have_the_same_logits(adapter):
    class_embeddings, image_features = drawn((4, 3, 8, 0))
    logits = fitted(adapter, class_embeddings).predict_logits(image_features[[0, 1, 0, 2, 0]])
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[4], logits[0], atol=1e-5)


@METHOD
def test_identical_classes_have_the_same_logits(adapter):
    class_embeddings, image_features = drawn((3, 4, 8, 1))
    examples = examples_of(class_embeddings)
    third = examples.support_labels == 0
    examples = replace(
        examples,
        support_features=np.concatenate([examples.support_features, examples.support_features[third]]),
        support_labels=np.concatenate([np.array([0, 1, 3])[examples.support_labels], np.full(third.sum(), 2)]),
    )
    logits = fitted(adapter, class_embeddings[[0, 1, 0, 2]], examples=examples).predict_logits(image_features)
    np.testing.assert_allclose(logits[:, 2], logits[:, 0], atol=1e-5)


@METHOD
def test_an_image_at_the_text_of_a_class_is_predicted_as_this_class(adapter):
    class_embeddings, _ = drawn((5, 1, 32, 2))
    logits = fitted(adapter, class_embeddings).predict_logits(class_embeddings)
    assert logits.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


@METHOD
@CASES
@given(sizes=SIZES, other=SIZES)
def test_fitting_again_discards_the_first_fit(adapter, sizes, other):
    class_embeddings, image_features = drawn(sizes)
    used = Fitted(adapter(), text_of(adapter, drawn(other)[0]), 3.0, 1.5)
    used.predict_logits(drawn(other)[1])
    again = Fitted(used.adapter, text_of(adapter, class_embeddings), SCALE, None).predict_logits(image_features)
    np.testing.assert_array_equal(again, fitted(adapter, class_embeddings).predict_logits(image_features))


@STATELESS
@CASES
@given(sizes=SIZES)
def test_predicting_twice_gives_the_same_logits(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    adapter = fitted(adapter, class_embeddings)
    np.testing.assert_array_equal(adapter.predict_logits(image_features), adapter.predict_logits(image_features))


@METHOD
def test_inputs_are_not_modified(adapter):
    """They are shared: the text, which is read-only, by all requests."""
    class_embeddings, image_features = drawn((4, 3, 8, 3))
    text = text_of(adapter, class_embeddings).copy()
    text.flags.writeable = False
    image_features.flags.writeable = False
    before = text.copy(), image_features.copy()
    Fitted(adapter(), text, SCALE, -2.0).predict_logits(image_features)
    np.testing.assert_array_equal(text, before[0])
    np.testing.assert_array_equal(image_features, before[1])


@METHOD
def test_two_fitted_adapters_share_no_state(adapter):
    (first_classes, first_images), (second_classes, second_images) = drawn((4, 2, 8, 4)), drawn((3, 2, 6, 5))
    alone = fitted(adapter, first_classes).predict_logits(first_images)
    first = fitted(adapter, first_classes)
    fitted(adapter, second_classes, bias=7.0).predict_logits(second_images)
    np.testing.assert_array_equal(first.predict_logits(first_images), alone)


@LEARNS_FROM_EXAMPLES
def test_without_examples_results_are_those_of_zero_shot_with_a_warning(adapter):
    class_embeddings, image_features = drawn((4, 3, 8, 6))
    result = fitted(adapter, class_embeddings, examples=Examples()).predict(image_features)
    plain = Cosine().fit(class_embeddings, logit_scale=SCALE, logit_bias=None).predict(image_features)
    np.testing.assert_allclose(result.logits, plain.logits, atol=1e-5)
    np.testing.assert_allclose(result.similarities, plain.similarities, atol=1e-6)
    assert len(result.warnings) == 1
    assert "zero-shot" in result.warnings[0]


@EXAMPLE_ADAPTER
def test_similarities_are_the_cosines_with_the_text(adapter):
    class_embeddings, image_features = drawn((4, 3, 8, 8))
    similarities = fitted(adapter, class_embeddings).predict(image_features).similarities
    np.testing.assert_allclose(similarities, image_features @ class_embeddings.T, atol=1e-6)


@EXAMPLE_ADAPTER
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf], ids=["zero", "nan", "infinite"])
def test_an_image_with_zero_features_has_finite_scores_a_warning_and_no_effect_on_others(adapter, bad):
    class_embeddings, image_features = drawn((4, 3, 8, 9))
    broken = image_features.copy()
    broken[1] = bad
    result = fitted(adapter, class_embeddings).predict(broken)
    assert np.isfinite(result.logits).all()
    assert any("zero or not finite" in warning for warning in result.warnings)
    if not adapter.stateful:
        whole = fitted(adapter, class_embeddings).predict(image_features)
        np.testing.assert_allclose(result.logits[[0, 2]], whole.logits[[0, 2]], atol=1e-4)
        assert whole.warnings == ()


@LEARNS_FROM_EXAMPLES
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf], ids=["zero", "nan", "infinite"])
def test_examples_with_zero_features_give_finite_scores_and_a_warning(adapter, bad):
    class_embeddings, image_features = drawn((4, 3, 8, 10))
    examples = examples_of(class_embeddings)
    support, pool = examples.support_features.copy(), examples.pool_features.copy()
    support[1], pool[1] = bad, bad
    broken = replace(examples, support_features=support, pool_features=pool)
    result = fitted(adapter, class_embeddings, examples=broken).predict(image_features)
    assert np.isfinite(result.logits).all()
    assert any("zero or not finite" in warning for warning in result.warnings)


@EXAMPLE_ADAPTER
@pytest.mark.parametrize(("classes", "dims"), [(1, 4), (2, 3), (12, 4)], ids=["one class", "two", "more than dims"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("per_class", [1, 2])
def test_tiny_problems_give_finite_scores(adapter, classes, dims, images, per_class):
    """One class, one image, one shot, or fewer images than neighbours."""
    class_embeddings, image_features = drawn((classes, images, dims, 11))
    examples = examples_of(class_embeddings, support_per_class=per_class, pool_per_class=per_class)
    logits = fitted(adapter, class_embeddings, examples=examples).predict_logits(image_features)
    assert logits.shape == (images, classes)
    assert np.isfinite(logits).all()


@LEARNS_FROM_EXAMPLES
def test_a_single_example_gives_finite_scores(adapter):
    class_embeddings, image_features = drawn((3, 2, 8, 12))
    lone = Examples(image_features[:1], np.array([1]), image_features[:1])
    assert np.isfinite(fitted(adapter, class_embeddings, examples=lone).predict_logits(image_features)).all()


@EXAMPLE_ADAPTER
def test_double_precision_gives_the_same_results(adapter):
    class_embeddings, image_features = drawn((4, 5, 8, 13))
    examples = examples_of(class_embeddings)
    wide = replace(
        examples,
        support_features=examples.support_features.astype(np.float64),
        pool_features=examples.pool_features.astype(np.float64),
    )
    single = fitted(adapter, class_embeddings, examples=examples).predict_logits(image_features)
    double = fitted(adapter, class_embeddings.astype(np.float64), examples=wide).predict_logits(
        image_features.astype(np.float64)
    )
    assert double.dtype == np.float32
    np.testing.assert_allclose(softmax(double), softmax(single), atol=1e-3)


@LEARNS_FROM_EXAMPLES
def test_examples_are_not_modified(adapter):
    class_embeddings, image_features = drawn((4, 3, 8, 14))
    examples = examples_of(class_embeddings)
    before = [item.copy() for item in (examples.support_features, examples.support_labels, examples.pool_features)]
    for item in (examples.support_features, examples.support_labels, examples.pool_features):
        item.flags.writeable = False
    fitted(adapter, class_embeddings, examples=examples).predict_logits(image_features)
    for was, item in zip(
        before, (examples.support_features, examples.support_labels, examples.pool_features), strict=True
    ):
        np.testing.assert_array_equal(item, was)


@LEARNS_FROM_EXAMPLES
def test_representative_examples_are_at_least_as_accurate_as_the_text(adapter):
    """The texts deviate from the class centres as much as the images do, and the example images do not."""
    true_classes, _ = drawn((5, 1, 32, 15))
    rng = np.random.default_rng(16)
    text = true_classes + 1.2 * unit_rows(rng, 5, 32)
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    examples = examples_of(true_classes, support_per_class=10, pool_per_class=40)
    test_set = examples_of(true_classes, seed=17, support_per_class=40)
    zero_shot = (test_set.support_features @ text.T).argmax(axis=1) == test_set.support_labels
    fitted_labels = fitted(adapter, text, examples=examples).predict_logits(test_set.support_features).argmax(axis=1)
    assert (fitted_labels == test_set.support_labels).mean() >= zero_shot.mean()


@EXAMPLE_ADAPTER
def test_the_images_of_a_request_as_the_pool_give_finite_scores(adapter):
    if Need.POOL not in adapter.needs:
        pytest.skip("it does not learn from unlabelled images")
    class_embeddings, _ = drawn((4, 1, 16, 18))
    images = examples_of(class_embeddings, pool_per_class=6).pool_features
    result = transduce(adapter(), class_embeddings, images, SimpleNamespace(logit_scale=SCALE, logit_bias=None))
    assert result.logits.shape == (24, 4)
    assert np.isfinite(result.logits).all()
    assert result.warnings == ()
    assert (result.logits.argmax(axis=1) == np.tile(np.arange(4), 6)).mean() > 0.9
