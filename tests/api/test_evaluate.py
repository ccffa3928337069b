"""Methods compared over HTTP, on the caller's labelled images."""

import pytest

from tests.api.problems import fields_of
from tests.api.test_descriptions import ended, told
from tests.conftest import picture

COLOURS = ("red", "green", "blue")
AT = "/v1/label-sets/colours:evaluate"


@pytest.fixture
def colours(client):
    classes = [{"name": colour, "descriptions": [f"It is {colour}.", f"All {colour}."]} for colour in COLOURS]
    client.put("/v1/label-sets/colours", json={"classes": classes}).raise_for_status()
    return client


def post(client, images, classes, at=AT, **fields):
    files = [("image", (f"{number}.png", image)) for number, image in enumerate(images)]
    return client.post(at, files=files, data={"class": classes, **fields})


def test_every_method_is_run_and_a_verdict_told(colours):
    images = [picture(colour) for colour in COLOURS * 4]
    job = ended(colours, post(colours, images, COLOURS * 4))
    assert (job["kind"], job["label_set"], job["status"]) == ("evaluate", "colours", "succeeded")
    assert job["done"] == job["total"] > 0
    result = job["result"]
    assert (result["images"], result["model"], result["skipped"]) == (12, "fake", [])
    by_method = {each["method"]: each for each in result["methods"]}
    assert {"zero-shot", "cupl", "autoclip"} <= set(by_method)
    assert any(name.startswith("waffle") for name in by_method)
    assert by_method["zero-shot"]["evaluation"]["top1"] == 1.0
    assert result["verdict"]


def test_a_label_that_is_wrong_is_a_miss(colours):
    job = ended(colours, post(colours, [picture("red"), picture("green")], ["red", "blue"]))
    by_method = {each["method"]: each for each in job["result"]["methods"]}
    assert by_method["zero-shot"]["evaluation"]["top1"] == 0.5


def test_more_images_are_taken_than_in_one_request_to_classify(colours):
    images = [picture(colour) for colour in COLOURS * 10]
    assert ended(colours, post(colours, images, COLOURS * 10))["result"]["images"] == 30


def test_an_image_that_cannot_be_read_is_left_out_and_told(colours):
    job = ended(colours, post(colours, [picture("red"), b"nonsense", picture("blue")], ["red", "green", "blue"]))
    assert job["result"]["images"] == 2
    (skipped,) = job["result"]["skipped"]
    assert skipped["image"] == 1
    assert skipped["problem"]


def test_what_cannot_be_evaluated_begins_no_job(colours, make_client):
    red = picture("red")
    told(post(colours, [red], ["purple"]), 404, "unknown-name")
    told(post(colours, [red], ["red"], at="/v1/label-sets/none:evaluate"), 404, "unknown-name")
    told(post(colours, [red], ["red"], model="none"), 404, "unknown-name")
    told(post(colours, [b"nonsense"], ["red"]), 415, "not-an-image")
    assert fields_of(post(colours, [red, red], ["red"])) == {"class"}
    assert fields_of(post(colours, [red], [])) == {"class"}
    assert fields_of(colours.post(AT, files=[("class", (None, "red"))])) == {"image"}
    assert fields_of(post(colours, [red], ["red"], labels="red")) == {"labels"}
    told(colours.post(AT, json={}), 415, "unsupported-media-type")
    assert colours.get("/v1/jobs").json()["jobs"] == []


def test_too_many_images_are_refused_with_the_setting_to_raise(make_client):
    client = make_client(max_evaluation_images=2)
    client.put("/v1/label-sets/colours", json={"classes": list(COLOURS)})
    problem = told(post(client, [picture("red")] * 3, ["red"] * 3), 413, "too-large")
    assert "DEIXIS_MAX_EVALUATION_IMAGES" in problem["detail"]
