"""Priors of a request: which ones apply, and their weights from the example images of the label set."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from app.classification.method_names import ESTIMATE, UNIFORM
from app.errors import InvalidFieldError
from app.names.class_names import numbers_of
from app.names.namespaces import own_name
from app.scoring.priors import counted_frequencies, frequencies_of, predicted_frequencies, prior_weights
from app.store.examples import StoredFeatures
from app.types import ImageFeatures, LabelSet, Logits, Priors

MAX_REFERENCE_IMAGES = 2000
"""Unlabelled images whose predictions are averaged; a larger pool is sampled evenly."""

_ENOUGH_LABELLED = 40


def read_priors(
    given: Mapping[str, float] | str | None, classnames: Sequence[str], label_set: LabelSet | None
) -> Priors | None:
    """Return the priors of a request, by default those of the label set; None for none.

    Args:
        given: by the request: a number for each class, ``ESTIMATE`` or ``UNIFORM``.
        classnames: of the task.
        label_set: that is used; None for labels of the request.

    Raises:
        InvalidFieldError: a class has no number, or a number is not above 0, or there is nothing to estimate from.
    """
    if given == UNIFORM:
        return None
    if given == ESTIMATE:
        if label_set is None:
            problem = f"'{ESTIMATE}' counts labelled example images, which only a label set has"
            raise InvalidFieldError.of("priors", f"{problem}; give label_set, or a number for each label")
        if not label_set.examples_revision:
            raise _nothing_to_count(label_set)
        return Priors()
    if isinstance(given, str):
        raise InvalidFieldError.of("priors", f"'{given}' is not '{ESTIMATE}', '{UNIFORM}' or a number for each class")
    numbers = label_set.priors if given is None and label_set is not None else given
    if numbers is None:
        return None
    values = numbers_of(numbers, classnames, "priors")
    return Priors(tuple(frequencies_of(np.array(values)).tolist()))


def weighted(
    priors: Priors,
    classes: int,
    temperature: float,
    *,
    label_set: LabelSet | None = None,
    stored: StoredFeatures | None = None,
    class_logits: Callable[[ImageFeatures], Logits] | None = None,
) -> tuple[Priors, tuple[str, ...]]:
    """Return the priors with their weights, and warnings.

    They are relative to the mean prediction for the unlabelled images, or for the labelled ones if there are none.
    Estimated frequencies are compared with the predictions for the same images that were counted, so that their random
    errors cancel. Without images, predictions are assumed to be uniform on average.

    Args:
        priors: without weights.
        classes: the number of classes.
        temperature: that divides the logits.
        label_set: whose example images are used; None for labels of the request.
        stored: the example images.
        class_logits: returns the logits (n, c) of images; None if it would change by this, or learns from the request.

    Raises:
        InvalidFieldError: the frequencies are to be estimated, and no image is labelled.
    """
    warnings: tuple[str, ...] = ()
    frequencies = None if priors.frequencies is None else np.array(priors.frequencies)
    images = np.zeros((0, 0), np.float32)
    if stored is not None and class_logits is not None:
        images = stored.pool_features if len(stored.pool_features) else stored.support_features
    if frequencies is None:
        assert label_set is not None
        assert stored is not None
        labelled = len(stored.support_labels)
        if not labelled:
            raise _nothing_to_count(label_set)
        if labelled < _ENOUGH_LABELLED:
            warnings = (
                f"the priors are estimated from {labelled:,} labelled images; about {_ENOUGH_LABELLED} are needed",
            )
        frequencies = counted_frequencies(stored.support_labels, classes)
        images = stored.support_features if class_logits is not None else images
    if class_logits is None or not len(images):
        predicted = np.full(classes, 1 / classes)
    else:
        predicted = predicted_frequencies(class_logits(images), temperature)
    weights = prior_weights(frequencies, predicted)
    return Priors(tuple(frequencies.tolist()), tuple(weights.tolist())), warnings


def _nothing_to_count(label_set: LabelSet) -> InvalidFieldError:
    return InvalidFieldError.of(
        "priors",
        f"'{ESTIMATE}' counts labelled example images, and '{own_name(label_set.name)}' has none; add about"
        f" {_ENOUGH_LABELLED} that show the classes as often as your images do, or give a number for each class",
    )
