"""The classifier works in the places where those of scikit-learn do."""

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import deixis
from tests.conftest import picture

COLOURS = ["red", "green", "blue"]


@pytest.fixture
def paths(tmp_path):
    """The paths of thirty pictures, shape (30,), and their colours."""
    colours = np.array(COLOURS * 10)
    for number, colour in enumerate(colours):
        (tmp_path / f"{number}.png").write_bytes(picture(str(colour), (20 + number, 20)))
    return np.array([str(tmp_path / f"{number}.png") for number in range(30)]), colours


@pytest.fixture
def classifier(url):
    return deixis.ZeroShotClassifier(COLOURS, url=url)


def test_it_predicts_without_training(classifier, paths):
    images, colours = paths
    fitted = classifier.fit()
    assert fitted is classifier
    assert fitted.classes_.tolist() == COLOURS
    assert accuracy_score(colours, fitted.predict(images)) == 1
    assert fitted.score(images, colours) == 1
    probabilities = fitted.predict_proba(images)
    assert probabilities.shape == (30, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (fitted.classes_[probabilities.argmax(axis=1)] == colours).all()


def test_arrays_of_pixels_are_images(classifier):
    pixels = np.zeros((3, 20, 20, 3), np.uint8)
    pixels[0, ..., 0], pixels[1, ..., 1], pixels[2, ..., 2] = 255, 128, 255
    assert classifier.fit().predict(pixels).tolist() == COLOURS


def test_it_works_in_pipelines_and_cross_validation(classifier, paths):
    images, colours = paths
    assert is_classifier(classifier)
    pipeline = make_pipeline(FunctionTransformer(lambda images: images), classifier)
    assert cross_val_score(pipeline, images, colours, cv=3, error_score="raise").tolist() == [1, 1, 1]


def test_without_labels_the_classes_are_those_of_y(url, paths):
    images, colours = paths
    fitted = deixis.ZeroShotClassifier(url=url).fit(images, colours)
    assert fitted.classes_.tolist() == sorted(COLOURS)
    assert fitted.score(images, colours) == 1


def test_fit_fixes_the_version_of_the_label_set(url, paths):
    with deixis.Client(url) as client:
        client.label_sets.put("colours", COLOURS)
        fitted = deixis.ZeroShotClassifier(label_set="colours", url=url).fit()
        client.label_sets.put("colours", ["cat", "dog"])
    assert fitted.classes_.tolist() == COLOURS
    assert fitted.score(*paths) == 1


def test_images_have_one_label_also_if_the_label_set_allows_several(url, paths):
    images, _ = paths
    with deixis.Client(url) as client:
        client.label_sets.put("some-colours", COLOURS, multi_label=True)
    fitted = deixis.ZeroShotClassifier(label_set="some-colours", url=url).fit()
    np.testing.assert_allclose(fitted.predict_proba(images[:3]).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "y", "message"),
    [
        ({}, None, "there are no labels"),
        ({"labels": ["a", "b"], "label_set": "x"}, None, "exclude each other"),
        ({"labels": "red, green"}, None, "not one string"),
        ({"labels": ["red"]}, None, "two or more different labels"),
        ({"labels": ["red", "red"]}, None, "two or more different labels"),
        ({"labels": [1, 2]}, None, "must be strings"),
        ({}, [0, 1, 0], "must be strings"),
        ({"labels": ["red", "green"]}, ["red", "blue"], "blue"),
    ],
)
def test_invalid_labels_are_refused(arguments, y, message):
    with pytest.raises(ValueError, match=message):
        deixis.ZeroShotClassifier(**arguments, url="http://127.0.0.1:9").fit(None, y)


def test_an_unreadable_image_is_an_error_that_names_its_index(classifier):
    with pytest.raises(deixis.ClientError, match="image 1: "):
        classifier.fit().predict([picture(), b"no image"])


def test_predict_before_fit_is_an_error(classifier):
    with pytest.raises(NotFittedError):
        classifier.predict([picture()])


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_valid_tag_types,
    ],
    ids=lambda check: check.__name__,
)
def test_it_passes_the_estimator_checks_of_scikit_learn(check):
    """The other checks fit tables of numbers, which are not images."""
    check("ZeroShotClassifier", deixis.ZeroShotClassifier())


def test_a_clone_has_the_same_parameters(classifier):
    again = clone(classifier.set_params(method="zero-shot", batch_size=3))
    assert again.get_params() == classifier.get_params()
    assert not hasattr(again, "classes_")
