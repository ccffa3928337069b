"""Answers say if no label fits better than unrelated labels do."""

import numpy as np
import pytest

from app.models.unrelated import measure_unrelated
from app.scoring.unrelated import UnrelatedSimilarity
from tests.api.test_classify import answer, as_json
from tests.api.test_examples import teach, with_things
from tests.conftest import picture


def _warnings(client, colour, **fields):
    (result,) = answer(as_json(client, [picture(colour)], **fields))["results"]
    return [warning for warning in result["warnings"] if "probably none of the labels fits" in warning]


@pytest.fixture
def served(client):
    (served,) = client.app.state.service.models
    served.unrelated = UnrelatedSimilarity(np.full((2, 100), 0.5))
    return served


def test_an_image_that_no_label_fits_has_a_warning_of_its_own(client, served):
    labels = ["red", "green", "blue"]
    assert _warnings(client, "red", labels=labels) == []
    (warning,) = _warnings(client, "red", labels=["green", "blue"])
    assert "than to the best of unrelated words (0.50)" in warning
    both = answer(as_json(client, [picture("red"), picture("blue")], labels=["green", "blue"]))["results"]
    assert [(result["weak_match"], bool(result["warnings"])) for result in both] == [(True, True), (False, False)]
    served.unrelated = None
    (unknown,) = answer(as_json(client, [picture("red")], labels=["green", "blue"]))["results"]
    assert (unknown["weak_match"], unknown["warnings"]) == (None, [])


def test_a_method_that_learned_from_images_gives_no_such_warning(client, served):
    with_things(client)
    teach(client)
    assert _warnings(client, "white", label_set="things", method="zero-shot")
    assert _warnings(client, "white", label_set="things", method="gda") == []


def test_a_model_is_measured_with_photographs_and_words(client):
    words = ["red", "green", *(f"word {number}" for number in range(98))]
    models, photographs = client.app.state.service.models, [picture("red"), b"no image", picture("green")]
    client.portal.call(measure_unrelated, models, photographs, words, "a {} thing.")
    (served,) = models
    assert served.unrelated.typical_best(1) < 0.5
    assert served.unrelated.typical_best(1000) < 0.99, "the best word of each photograph is left out"


@pytest.mark.parametrize(("limits", "measured"), [({"max_queued_images": 1}, True), ({"max_image_bytes": 10}, False)])
def test_limits_of_the_service_do_not_make_the_measurement_fail(make_client, limits, measured):
    client = make_client(**limits)
    models, photographs = client.app.state.service.models, [picture("red"), picture("green")]
    client.portal.call(measure_unrelated, models, photographs, ["red", "dog"], "a {} thing.")
    (served,) = models
    assert (served.unrelated is not None) == measured
