"""What every adapter promises, tried on each that is registered."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.adapters.registry import ADAPTERS


def name_of(adapter):
    return adapter.__name__


METHOD = pytest.mark.parametrize("adapter", ADAPTERS, ids=name_of)
INDUCTIVE = [adapter for adapter in ADAPTERS if not adapter.transductive]
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 16), st.integers(0, 2**32 - 1))

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
    """Return what the adapter takes: where it takes prompts by themselves, three around each class."""
    if not adapter.aligned:
        return class_embeddings
    around = np.stack([class_embeddings, np.roll(class_embeddings, 1, axis=1), -class_embeddings[:, ::-1]], axis=1)
    return np.ascontiguousarray(around + 4 * class_embeddings[:, None]) / np.float32(6)


def fitted(adapter, class_embeddings, *, bias=None):
    return Fitted(adapter(), text_of(adapter, class_embeddings), SCALE, bias)


class Fitted:
    """A fitted adapter whose logits are asked for."""

    def __init__(self, adapter, text, scale, bias):
        self.adapter = adapter.fit(text, logit_scale=scale, logit_bias=bias)

    def predict_logits(self, image_features):
        return self.adapter.predict(image_features).logits


@METHOD
def test_the_constructor_only_keeps_its_arguments(adapter):
    given_parameters = [name for name in inspect.signature(adapter).parameters if name not in {"args", "kwargs"}]
    assert sorted(vars(adapter())) == sorted(given_parameters)


@METHOD
def test_fit_returns_the_adapter_and_what_it_learned_ends_in_an_underscore(adapter):
    unfitted = adapter()
    hyperparameters = set(vars(unfitted))
    text = text_of(adapter, np.eye(3, dtype=np.float32))
    assert unfitted.fit(text, logit_scale=SCALE, logit_bias=None) is unfitted
    assert all(name.endswith("_") for name in set(vars(unfitted)) - hyperparameters)


@METHOD
@given(sizes=SIZES)
def test_logits_are_finite_float32_rows_of_one_per_class(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    for bias in (None, -5.0):
        logits = fitted(adapter, class_embeddings, bias=bias).predict_logits(image_features)
        assert logits.shape == (len(image_features), len(class_embeddings))
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()


@METHOD
@given(sizes=SIZES)
def test_the_order_of_the_classes_only_orders_the_logits(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    order = np.random.default_rng(sizes[-1]).permutation(len(class_embeddings))
    logits = fitted(adapter, class_embeddings).predict_logits(image_features)
    permuted = fitted(adapter, class_embeddings[order]).predict_logits(image_features)
    np.testing.assert_allclose(permuted, logits[:, order], atol=1e-4)


@METHOD
@given(sizes=SIZES)
def test_the_order_of_the_images_only_orders_the_logits(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    order = np.random.default_rng(sizes[-1]).permutation(len(image_features))
    adapter = fitted(adapter, class_embeddings)
    np.testing.assert_allclose(
        adapter.predict_logits(image_features[order]), adapter.predict_logits(image_features)[order], atol=1e-4
    )


@pytest.mark.parametrize("adapter", INDUCTIVE, ids=name_of)
@given(sizes=SIZES)
def test_an_image_gets_the_same_logits_alone_as_in_a_batch(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    adapter = fitted(adapter, class_embeddings)
    together = adapter.predict_logits(image_features)
    for row, alone in zip(together, image_features, strict=True):
        np.testing.assert_allclose(adapter.predict_logits(alone[None])[0], row, atol=1e-4)


@METHOD
def test_images_that_are_the_same_get_the_same_logits(adapter):
    class_embeddings, image_features = drawn((4, 3, 8, 0))
    logits = fitted(adapter, class_embeddings).predict_logits(image_features[[0, 1, 0, 2, 0]])
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[4], logits[0], atol=1e-5)


@METHOD
def test_classes_that_are_the_same_get_the_same_logits(adapter):
    class_embeddings, image_features = drawn((3, 4, 8, 1))
    logits = fitted(adapter, class_embeddings[[0, 1, 0, 2]]).predict_logits(image_features)
    np.testing.assert_allclose(logits[:, 2], logits[:, 0], atol=1e-5)


@METHOD
def test_an_image_on_a_class_is_that_class(adapter):
    class_embeddings, _ = drawn((5, 1, 32, 2))
    logits = fitted(adapter, class_embeddings).predict_logits(class_embeddings)
    assert logits.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


@METHOD
@given(sizes=SIZES, other=SIZES)
def test_fitting_again_forgets_the_first_time(adapter, sizes, other):
    class_embeddings, image_features = drawn(sizes)
    used = Fitted(adapter(), text_of(adapter, drawn(other)[0]), 3.0, 1.5)
    used.predict_logits(drawn(other)[1])
    again = Fitted(used.adapter, text_of(adapter, class_embeddings), SCALE, None).predict_logits(image_features)
    np.testing.assert_array_equal(again, fitted(adapter, class_embeddings).predict_logits(image_features))


@METHOD
@given(sizes=SIZES)
def test_predicting_twice_gives_the_same(adapter, sizes):
    class_embeddings, image_features = drawn(sizes)
    adapter = fitted(adapter, class_embeddings)
    np.testing.assert_array_equal(adapter.predict_logits(image_features), adapter.predict_logits(image_features))


@METHOD
def test_the_inputs_are_not_written_to(adapter):
    """They are shared: the text by every request, which is why it comes read-only."""
    class_embeddings, image_features = drawn((4, 3, 8, 3))
    text = text_of(adapter, class_embeddings).copy()
    text.flags.writeable = False
    image_features.flags.writeable = False
    before = text.copy(), image_features.copy()
    Fitted(adapter(), text, SCALE, -2.0).predict_logits(image_features)
    np.testing.assert_array_equal(text, before[0])
    np.testing.assert_array_equal(image_features, before[1])


@METHOD
def test_two_fitted_adapters_share_nothing(adapter):
    (first_classes, first_images), (second_classes, second_images) = drawn((4, 2, 8, 4)), drawn((3, 2, 6, 5))
    first = fitted(adapter, first_classes)
    alone = first.predict_logits(first_images)
    fitted(adapter, second_classes, bias=7.0).predict_logits(second_images)
    np.testing.assert_array_equal(first.predict_logits(first_images), alone)
