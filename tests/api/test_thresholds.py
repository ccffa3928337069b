"""Thresholds of labels, what they find on the example images, and storing them, over HTTP."""

import json

import pytest

from app.encoders.fake import FakeEncoder
from tests.api.problems import fields_of
from tests.api.test_classify import answer, as_json
from tests.api.test_examples import AT, add, added, finished, shade
from tests.conftest import picture

THRESHOLDS = f"{AT}/thresholds"
CLASSES = ["red", "green", "blue"]  # which the fake encoder tells apart
# The kind of a shade, its number, and its classes.
TRUTH = [(kind, number, {CLASSES[kind]}) for number in range(4) for kind in range(3)]
TRUTH += [(0, 90, {"red", "green"}), (1, 91, {"red", "green"})]


def put(client, *classes, **fields):
    client.put(AT, json={"classes": list(classes), "multi_label": True, **fields}).raise_for_status()


@pytest.fixture
def taught(client):
    """Return the client, with four examples of each class and two with two classes."""
    put(client, {"name": "red", "threshold": 0.25}, "green", "blue")
    images = [shade(kind, number) for kind, number, _ in TRUTH]
    finished(client, added(add(client, images, [json.dumps(sorted(names)) for *_, names in TRUTH]))["job"])
    return client


def measured(client, query=""):
    response = client.get(f"{THRESHOLDS}{query}")
    assert response.status_code == 200, response.text
    return response.json()


def selected_at(curve, threshold):
    """Return the images that a threshold selects, and those of them with the label."""
    return next(
        ((predicted, correct) for level, predicted, correct in zip(*curve.values(), strict=True) if level >= threshold),
        (0, 0),
    )


def test_a_curve_counts_what_answers_would_give(taught):
    reply = measured(taught)
    assert (reply["label_set"], reply["version"], reply["multi_label"]) == ("things@1", 1, True)
    assert (reply["model"], reply["images"], reply["calibrated"]) == ("fake", 14, True)
    results = [
        answer(as_json(taught, [shade(kind, number)], label_set="things"))["results"][0] for kind, number, _ in TRUTH
    ]
    by_label = {each["label"]: each for each in reply["labels"]}
    assert list(by_label) == CLASSES
    for label, found in by_label.items():
        given = [label in result["labels"] for result in results]
        right = [label in names and is_given for (_, _, names), is_given in zip(TRUTH, given, strict=True)]
        assert selected_at(found["curve"], found["threshold"]) == (sum(given), sum(right))
        assert found["images"] == sum(label in names for *_, names in TRUTH)
        scores = {each["score"] for result in results for each in result["predictions"] if each["label"] == label}
        assert found["curve"]["thresholds"] == pytest.approx(sorted(scores), abs=1e-4)


def test_the_threshold_of_a_class_replaces_the_automatic_one(taught):
    red, green, _ = measured(taught)["labels"]
    assert (red["own"], red["threshold"]) == (0.25, 0.25)
    assert red["automatic"] != 0.25
    assert (green["own"], green["threshold"]) == (None, green["automatic"])
    # Fitted to the same scores by the job.
    assert green["suggested"] == pytest.approx(green["automatic"], abs=1e-3)


def test_suggestions_meet_the_goal_or_say_why_not(taught):
    for goal in ("precision", "recall"):
        for label in measured(taught, f"?{goal}=0.5")["labels"]:
            predicted, correct = selected_at(label["curve"], label["suggested"])
            assert correct / (predicted if goal == "precision" else label["images"]) >= 0.5
            assert label["reason"] is None
        for label in measured(taught, f"?{goal}=0.99")["labels"]:
            assert label["suggested"] is None
            assert "99" in label["reason"]


@pytest.mark.parametrize("goal", ["", "?precision=0.5", "?recall=0.5"])
def test_a_stored_suggestion_selects_the_same_images_in_answers(taught, goal):
    suggested = measured(taught, goal)["labels"]
    sent = {"thresholds": {each["label"]: each["suggested"] for each in suggested}}
    taught.patch(THRESHOLDS, json=sent).raise_for_status()
    results = [
        answer(as_json(taught, [shade(kind, number)], label_set="things"))["results"][0] for kind, number, _ in TRUTH
    ]
    given = [label for result in results for label in result["labels"]]
    expected = {each["label"]: selected_at(each["curve"], each["suggested"])[0] for each in suggested}
    assert {label: given.count(label) for label in CLASSES} == expected


def test_thresholds_are_stored_as_a_new_version(taught):
    sent = {"thresholds": {"red": None, "blue": 1}}
    stored = taught.patch(THRESHOLDS, json=sent, headers={"If-Match": '"1"'})
    assert (stored.status_code, stored.headers["ETag"]) == (200, '"2"')
    assert [each["threshold"] for each in stored.json()["classes"]] == [None, None, 1.0]
    assert stored.json() == taught.get(AT).json()
    assert [each["own"] for each in measured(taught)["labels"]] == [None, None, 1.0]
    (result,) = answer(as_json(taught, [shade(2, 3)], label_set="things"))["results"]
    assert {each["label"]: each["threshold"] for each in result["predictions"]}["blue"] == 1.0
    assert taught.get(f"{AT}?version=1").json()["classes"][0]["threshold"] == 0.25


@pytest.mark.parametrize("whole", [False, True])
def test_scores_stay_calibrated_while_only_thresholds_change(taught, whole):
    """Thresholds are those of calibrated scores; a comparison of the methods takes a while, and needs none of them."""
    before = measured(taught)
    if whole:
        put(taught, "red", {"name": "green", "threshold": 0.6}, "blue")
    else:
        taught.patch(THRESHOLDS, json={"thresholds": {"green": 0.6, "red": None}}).raise_for_status()
    after = measured(taught)
    assert (after["version"], after["calibrated"]) == (2, True)
    assert [each["curve"] for each in after["labels"]] == [each["curve"] for each in before["labels"]]
    selected = taught.get(f"{AT}/selection").json()
    assert (selected["version"], selected["current"]) == (2, True)


@pytest.mark.parametrize("change", [{"templates": "a drawing of {}."}, {"classes": ["red", "green", "grey"]}])
def test_other_texts_need_another_comparison(taught, change):
    sent = {"classes": CLASSES, "multi_label": True} | change
    taught.put(AT, json=sent).raise_for_status()
    assert taught.get(f"{AT}/selection").json()["current"] is False


def test_a_version_that_was_replaced_is_not_changed(taught):
    taught.patch(THRESHOLDS, json={"thresholds": {"blue": 0.5}}).raise_for_status()
    refused = taught.patch(THRESHOLDS, json={"thresholds": {"blue": 0.6}}, headers={"If-Match": '"1"'})
    assert refused.status_code == 412
    assert taught.get(AT).json()["version"] == 2


@pytest.mark.parametrize(
    ("thresholds", "status", "field"),
    [
        ({}, 422, "thresholds"),
        (None, 422, "thresholds"),
        ({"blue": 1.01}, 422, "thresholds.blue"),
        ({"blue": -0.1}, 422, "thresholds.blue"),
        ({"blue": "high"}, 422, "thresholds.blue"),
        ({"blue": 0.1, " blue ": 0.9}, 422, "thresholds.blue"),
        ({"blue": 0.5, "sea": 0.5}, 404, None),
    ],
)
def test_wrong_thresholds_change_nothing(client, thresholds, status, field):
    put(client, *CLASSES)
    refused = client.patch(THRESHOLDS, json={"thresholds": thresholds})
    assert refused.status_code == status
    if field is not None:
        assert fields_of(refused) == {field}
    assert client.get(AT).json()["version"] == 1


@pytest.mark.parametrize(
    "query", ["?precision=0", "?precision=1", "?recall=1.5", "?recall=nan", "?precision=0.5&recall=0.5"]
)
def test_goals_that_make_no_sense_are_refused(client, query):
    put(client, *CLASSES)
    assert client.get(THRESHOLDS + query).status_code == 422


def test_without_examples_the_thresholds_in_use_are_returned(client):
    put(client, {"name": "red", "threshold": 0.7}, "green", multi_label=False)
    reply = measured(client)
    assert (reply["images"], reply["calibrated"], reply["multi_label"]) == (0, False, False)
    red, green = reply["labels"]
    assert (red["threshold"], green["threshold"]) == (0.7, 0.5)
    for label in (red, green):
        assert label["images"] == 0
        assert label["average_precision"] is label["suggested"] is None
        assert label["reason"] == "there are no labelled example images"
        assert label["curve"] == {"thresholds": [], "predicted": [], "correct": []}


def test_a_model_that_came_later_lacks_features_and_says_so(taught, make_client):
    later = make_client(encoders=[FakeEncoder("fake"), FakeEncoder("late")])
    assert measured(later)["images"] == 14
    reply = measured(later, "?model=late")
    assert (reply["images"], reply["calibrated"]) == (0, False)
    reason = "there are no labelled example images with features of this model"
    assert {each["reason"] for each in reply["labels"]} == {reason}


def test_images_without_a_class_are_not_counted(client):
    put(client, *CLASSES)
    added(add(client, [picture("red")]))
    assert measured(client)["images"] == 0


def test_unknown_names_are_refused(client):
    assert client.get("/v1/label-sets/none/thresholds").status_code == 404
    assert client.patch("/v1/label-sets/none/thresholds", json={"thresholds": {"a": 0.5}}).status_code == 404
    put(client, *CLASSES)
    assert client.get(f"{THRESHOLDS}?model=none").status_code == 404
