"""Methods compared over HTTP, on the caller's labelled images, or on the stored examples."""

import json

import pytest

from app.classification.methods import METHODS
from tests.api.problems import fields_of
from tests.api.test_descriptions import ended, expect_problem
from tests.api.test_examples import CLASSES, add, added, at_rest, shade, teach, with_things
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


def test_every_method_is_run_and_the_result_has_a_verdict(colours):
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


def test_the_result_of_a_few_images_is_small_however_many_classes_there_are(client):
    """The watchdog of the event loop also sees this job."""
    classes = [f"class {number}" for number in range(2000)]
    client.put("/v1/label-sets/many", json={"classes": classes}).raise_for_status()
    job = ended(client, post(client, [picture()], ["class 7"], "/v1/label-sets/many:evaluate"))
    evaluation = job["result"]["methods"][0]["evaluation"]
    assert evaluation["class_count"] == len(evaluation["classes"]) <= 2
    ((label, _, count),) = (cell.values() for cell in evaluation["confusion"])
    assert (label, count, evaluation["confusion_count"]) == ("class 7", 1, 1)
    assert len(json.dumps(job)) < 20_000
    (listed,) = client.get("/v1/jobs").json()["jobs"]
    assert "result" not in listed


def test_a_label_that_is_wrong_is_a_miss(colours):
    job = ended(colours, post(colours, [picture("red"), picture("green")], ["red", "blue"]))
    by_method = {each["method"]: each for each in job["result"]["methods"]}
    assert by_method["zero-shot"]["evaluation"]["top1"] == 0.5


def test_more_images_are_taken_than_in_one_request_to_classify(colours):
    images = [picture(colour) for colour in COLOURS * 10]
    assert ended(colours, post(colours, images, COLOURS * 10))["result"]["images"] == 30


def test_an_unreadable_image_is_skipped_and_reported(colours):
    job = ended(colours, post(colours, [picture("red"), b"nonsense", picture("blue")], ["red", "green", "blue"]))
    assert job["result"]["images"] == 2
    (skipped,) = job["result"]["skipped"]
    assert skipped["image"] == 1
    assert skipped["problem"]


def test_what_cannot_be_evaluated_begins_no_job(colours, make_client):
    red = picture("red")
    expect_problem(post(colours, [red], ["purple"]), 404, "unknown-name")
    expect_problem(post(colours, [red], ["red"], at="/v1/label-sets/none:evaluate"), 404, "unknown-name")
    expect_problem(post(colours, [red], ["red"], model="none"), 404, "unknown-name")
    expect_problem(post(colours, [b"nonsense"], ["red"]), 415, "not-an-image")
    assert fields_of(post(colours, [red, red], ["red"])) == {"class"}
    assert fields_of(post(colours, [red], [])) == {"class"}
    assert fields_of(colours.post(AT, files=[("class", (None, "red"))])) == {"image"}
    assert fields_of(post(colours, [red], ["red"], labels="red")) == {"labels"}
    for media_type in ("image/png", "text/plain", ""):
        answer = colours.post(AT, content=red, headers={"content-type": media_type})
        expect_problem(answer, 415, "unsupported-media-type")
    assert colours.get("/v1/jobs").json()["jobs"] == []


def test_too_many_images_are_refused_with_the_limit(make_client):
    client = make_client(max_evaluation_images=2)
    client.put("/v1/label-sets/colours", json={"classes": list(COLOURS)})
    problem = expect_problem(post(client, [picture("red")] * 3, ["red"] * 3), 413, "too-large")
    assert "more than 2 images" in problem["detail"]


# --- on stored examples --------------------------------------------------------------------------------------------

STORED = "/v1/label-sets/things:evaluate"


def by_method(job):
    assert job["status"] == "succeeded", job
    return {row["method"]: row for row in job["result"]["methods"]}


def test_without_images_the_labelled_examples_are_cross_validated(client):
    with_things(client)
    teach(client, each=6)
    job = ended(client, client.post(STORED, json={}))
    result = job["result"]
    assert (result["images"], result["labelled"], result["unlabelled"], result["folds"]) == (18, 18, 0, 5)
    assert (result["model"], result["skipped"]) == ("fake", [])
    rows = by_method(job)
    assert {"zero-shot", "gda", "tip-adapter"} <= set(rows)
    assert not {name for name in rows if name in METHODS and METHODS[name].stateful}
    for row in rows.values():
        evaluation = row["evaluation"]
        low, high = row["interval"]
        assert 0 <= low <= evaluation["top1"] <= high <= 1
        assert 0 <= evaluation["macro_f1"] <= 1
        assert 0 <= evaluation["ece"] <= 1
        assert evaluation["nll"] > 0
        assert row["ms_per_image"] >= 0
    # The words say nothing of these pictures, which the examples tell apart.
    assert rows["zero-shot"]["evaluation"]["top1"] < 0.5
    assert rows["gda"]["evaluation"]["top1"] == 1
    assert rows["gda"]["to_baseline"]["mean"] == pytest.approx(1 - rows["zero-shot"]["evaluation"]["top1"])
    assert any("gda" in each or "tip-adapter" in each for each in result["verdict"])
    assert all("unlabelled" in each for each in result["not_run"])


def test_the_selection_and_an_evaluation_on_the_same_examples_say_the_same(client):
    with_things(client)
    teach(client, each=5)
    rows = by_method(ended(client, client.post(STORED, json={"model": "fake"})))
    for row in client.get("/v1/label-sets/things/selection").json()["leaderboard"]:
        evaluation = rows[row["method"]]["evaluation"]
        assert row["accuracy"] == evaluation["top1"]
        assert row["macro_f1"] == pytest.approx(evaluation["macro_f1"])
        assert row["nll"] == pytest.approx(evaluation["nll"])
        assert row["ece"] == pytest.approx(evaluation["ece"])


@pytest.mark.parametrize("unlabelled", [False, True], ids=["no examples", "unlabelled ones"])
def test_there_is_nothing_to_evaluate_on_without_labelled_examples(client, unlabelled):
    with_things(client)
    if unlabelled:
        added(add(client, [shade(kind, 0) for kind in range(3)]))
        at_rest(client)
    job = ended(client, client.post(STORED, json={}))
    assert job["status"] == "failed"
    assert "'things' has no labelled example images" in job["error"]


def test_an_evaluation_on_stored_examples_that_cannot_be_begins_no_job(client):
    with_things(client)
    expect_problem(client.post(STORED, json={"model": "none"}), 404, "unknown-name")
    expect_problem(client.post(STORED, json={"template": "phto"}), 404, "unknown-name")
    expect_problem(client.post("/v1/label-sets/none:evaluate", json={}), 404, "unknown-name")
    assert fields_of(client.post(STORED, json={"method": "gda"})) == {"method"}
    assert fields_of(client.post(STORED, json={"model": 1})) == {"model"}
    for body in ("", "{"):
        answer = client.post(STORED, content=body, headers={"content-type": "application/json"})
        expect_problem(answer, 400, "malformed-request")
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_images_of_a_request_are_answered_by_what_is_learned_from_the_stored_ones(client):
    with_things(client)
    images = [shade(number % 3, 40 + number) for number in range(9)]
    names = [CLASSES[number % 3] for number in range(9)]
    alone = ended(client, post(client, images, names, at=STORED))
    assert (alone["result"]["labelled"], alone["result"]["folds"]) == (0, 0)
    assert not {"gda", "tip-adapter", "zlap"} & set(by_method(alone))
    teach(client, each=4, unlabelled=24)
    taught = ended(client, post(client, images, names, at=STORED))
    result = taught["result"]
    assert (result["images"], result["labelled"], result["unlabelled"], result["folds"]) == (9, 12, 24, 0)
    rows = by_method(taught)
    assert {"gda", "tip-adapter", "zlap"} <= set(rows)
    assert rows["gda"]["evaluation"]["top1"] == 1
    assert rows["zero-shot"]["evaluation"] == by_method(alone)["zero-shot"]["evaluation"]
    counts = client.get("/v1/label-sets/things/images").json()["counts"]
    assert sum(counts["labelled"].values()) + counts["unlabelled"] == 36


def test_examples_of_which_none_can_be_held_out_are_not_evaluated_on(client):
    """The row of a method that has learned from nothing would be that of zero-shot under another name."""
    with_things(client)
    added(add(client, [shade(kind, 0) for kind in range(3)], CLASSES))
    job = ended(client, client.post(STORED, json={}))
    if job["status"] == "succeeded":
        assert "gda" not in by_method(job)


def test_a_job_that_has_ended_well_has_done_all_its_steps(client):
    with_things(client)
    tried = teach(client)
    evaluated = ended(client, client.post(STORED, json={}))
    for job in (tried, evaluated):
        assert job["done"] == job["total"] > 0


# --- several classes per image -------------------------------------------------------------------------------------


def test_images_of_several_classes_are_measured_by_label(colours):
    """The fake encoder finds a colour in a picture of it; of mixed pictures it finds one of the two."""
    pictures = [picture(colour) for colour in COLOURS * 3] + [picture("red"), picture("black")]
    classes = [*COLOURS * 3, '["red", "blue"]', ""]
    result = ended(colours, post(colours, pictures, classes))["result"]
    assert (result["images"], result["model"], result["folds"], result["skipped"]) == (11, "fake", 5, [])
    whole = result["at_default"]
    assert whole["labels_per_image"] == pytest.approx(11 / 11)
    assert {row["name"]: row["support"] for row in whole["labels"]} == {"red": 4, "green": 3, "blue": 4}
    red = whole["labels"][0]
    assert (red["name"], red["recall"]) == ("red", 1)
    assert 0.5 < whole["mean_average_precision"] <= 1
    assert 0 <= result["at_shared"]["micro_f1"] <= 1
    assert set(result["thresholds"]) == set(COLOURS)
    assert "methods" not in result


def test_one_class_per_image_is_measured_by_label_on_request_only(colours):
    images = [picture(colour) for colour in COLOURS * 3]
    by_label = ended(colours, post(colours, images, COLOURS * 3, multi_label="true"))["result"]
    assert by_label["at_default"]["mean_average_precision"] == 1
    compared = ended(colours, post(colours, images, COLOURS * 3, multi_label="false"))["result"]
    assert compared["methods"]
    assert fields_of(post(colours, images, COLOURS * 3, multi_label="maybe")) == {"multi_label"}
    assert fields_of(post(colours, images[:1], [""], multi_label="true")) == {"class"}
    expect_problem(post(colours, images[:1], ['["red", "puma"]']), 404, "unknown-name")


def test_stored_examples_of_several_classes_are_measured_by_label_and_not_compared(client):
    with_things(client)
    teach(client, each=6)
    both = [shade(0, number) for number in range(20, 24)]
    added(add(client, both, ['["tomato", "sky"]']))
    result = ended(client, client.post(STORED, json={"multi_label": True}))["result"]
    assert result["images"] == 22
    assert {row["name"]: row["support"] for row in result["at_default"]["labels"]} == {
        "tomato": 10,
        "leaf": 6,
        "sky": 10,
    }
    assert ended(client, client.post(STORED, json={}))["result"]["images"] == 18


def test_a_label_set_for_several_labels_is_measured_by_label_unless_the_request_says_otherwise(client):
    with_things(client)
    teach(client, each=6)
    client.put("/v1/label-sets/things", json={"classes": list(CLASSES), "multi_label": True}).raise_for_status()
    assert "at_default" in ended(client, client.post(STORED, json={}))["result"]
    assert "methods" in ended(client, client.post(STORED, json={"multi_label": False}))["result"]
    images, classes = [shade(kind, 30) for kind in range(3)], list(CLASSES)[:3]
    assert "at_default" in ended(client, post(client, images, classes, STORED))["result"]
    assert "methods" in ended(client, post(client, images, classes, STORED, multi_label="false"))["result"]
