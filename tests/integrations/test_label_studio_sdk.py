"""What the backend answers, judged by Label Studio's own SDK, where that is installed."""

import pytest

from tests.integrations.test_label_studio import (  # noqa: F401 - fixtures
    CONFIG,
    SEVERAL,
    predict,
    service_url,
    start,
    studio,
    tasks_of,
)

label_interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
objects = pytest.importorskip("label_studio_sdk.label_interface.objects")


@pytest.mark.parametrize("config", [CONFIG, SEVERAL])
def test_predictions_are_valid_for_their_configuration(start, config):  # noqa: F811
    backend = start(reject_below=0.75)
    sources = [f"/data/upload/3/{colour}.png" for colour in ("red", "green", "blue", "yellow")]
    interface = label_interface.LabelInterface(config)
    interface.validate()
    found = predict(backend, tasks_of(*sources), config)
    for each in found:
        assert interface.validate_prediction(each, return_errors=True) == []
        assert objects.PredictionValue.model_validate(each).score == each["score"]
    assert [bool(each["result"]) for each in found] == [True, True, True, False]


def test_a_choice_outside_the_configuration_is_invalid(start):  # noqa: F811
    (found,) = predict(start(), tasks_of("/data/upload/3/green.png"))
    other = label_interface.LabelInterface(CONFIG.replace("verde", "vert"))
    assert other.validate_prediction(found, return_errors=True) != []
