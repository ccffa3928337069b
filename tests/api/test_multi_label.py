"""Images that may have several labels, over HTTP."""

import json

import pytest

from app.classification.methods import METHODS
from app.encoders.fake import FakeEncoder
from tests.api.problems import fields_of
from tests.api.test_classify import answer, as_body, as_form, as_json
from tests.api.test_examples import SELECTION, add, added, shade, teach, with_things
from tests.conftest import picture

COLOURS = ["red", "green", "blue"]
# Red and green, as much of either.
YELLOW = picture("yellow")


def put(client, name, classes, **fields):
    response = client.put(f"/v1/label-sets/{name}", json={"classes": classes, **fields})
    response.raise_for_status()
    return response.json()


def labels_of(reply):
    return [result["labels"] for result in reply["results"]]


def test_every_form_gives_the_labels_above_their_threshold(shared_client):
    fields = {"reject_below": 0.9, "multi_label": True}
    sent = {**fields, "multi_label": "true", "labels": ",".join(COLOURS)}
    answers = [
        answer(as_form(shared_client, [YELLOW], **sent)),
        answer(as_json(shared_client, [YELLOW], labels=COLOURS, **fields)),
        answer(as_body(shared_client, YELLOW, **sent)),
    ]
    assert answers[0] == answers[1] == answers[2]
    (result,) = answers[0]["results"]
    assert answers[0]["multi_label"] is True
    assert sorted(result["labels"]) == ["green", "red"]
    assert [(each["above"], each["threshold"]) for each in result["predictions"]] == [(True, 0.9)] * 2 + [(False, 0.9)]
    assert (result["rejected"], result["weak_match"], result["warnings"]) == (False, None, [])
    for each in result["predictions"]:
        assert each["above"] == (each["score"] >= each["threshold"])


def test_a_label_scores_the_same_alone_and_among_others(shared_client):
    def scores(labels):
        (result,) = answer(as_json(shared_client, [YELLOW], labels=labels, multi_label=True))["results"]
        assert result["warnings"] == []
        return {each["label"]: each["score"] for each in result["predictions"]}

    together = scores(COLOURS)
    assert [scores([colour])[colour] for colour in COLOURS] == pytest.approx([together[each] for each in COLOURS])
    assert sum(together.values()) > 1.5


def test_softmax_and_sigmoid_models_score_alike(make_client):
    client = make_client([FakeEncoder("softmax"), FakeEncoder("sigmoid", logit_bias=-8.0)])
    softmax, sigmoid = (
        answer(as_json(client, [YELLOW], labels=COLOURS, multi_label=True, model=model))["results"][0]["predictions"]
        for model in ("softmax", "sigmoid")
    )
    assert [each["score"] for each in sigmoid] == pytest.approx([each["score"] for each in softmax], abs=1e-6)


def test_labels_and_their_scores_are_all_of_them_whatever_top_k_says(shared_client):
    reply = answer(
        as_json(shared_client, [YELLOW, picture("blue")], labels=["red", "green"], multi_label=True, top_k=1,
                reject_below=0.9)
    )  # fmt: skip
    assert [sorted(labels) for labels in labels_of(reply)] == [["green", "red"], []]
    both, none = ([each["label"] for each in result["predictions"]] for result in reply["results"])
    assert both == reply["results"][0]["labels"]
    assert len(none) == 1  # the best one, for a look at its score
    assert [result["rejected"] for result in reply["results"]] == [False, True]


def test_a_label_set_says_that_images_have_several_labels_and_from_which_score(shared_client):
    stored = put(shared_client, "several", [{"name": "red", "threshold": 1}, "green", "blue"], multi_label=True)
    assert (stored["multi_label"], [each["threshold"] for each in stored["classes"]]) == (True, [1, None, None])
    reply = answer(as_json(shared_client, [YELLOW], label_set="several"))
    assert reply["multi_label"] is True
    (result,) = reply["results"]
    assert {each["label"]: each["threshold"] for each in result["predictions"]} == {"red": 1, "green": 0.5, "blue": 0.5}
    assert "red" not in result["labels"]
    assert "green" in result["labels"]
    # A request may say otherwise, in both directions.
    (one,) = answer(as_json(shared_client, [YELLOW], label_set="several", multi_label=False))["results"]
    assert (one["labels"], sum(each["score"] for each in one["predictions"])) == (None, pytest.approx(1))
    put(shared_client, "single", [{"name": "red", "threshold": 0}, "green"])
    assert answer(as_json(shared_client, [YELLOW], label_set="single"))["results"][0]["labels"] is None
    (all_of_them,) = labels_of(answer(as_json(shared_client, [YELLOW], label_set="single", multi_label=True)))
    assert sorted(all_of_them) == ["green", "red"]


def test_changes_of_classes_keep_thresholds_and_the_mode(shared_client):
    put(shared_client, "kept", [{"name": "red", "threshold": 0}, "green"], multi_label=True)
    path = "/v1/label-sets/kept"
    shared_client.post(f"{path}/classes", json={"classes": [{"name": "blue", "threshold": 0.7}]}).raise_for_status()
    body = shared_client.delete(f"{path}/classes/green").json()
    assert [(each["name"], each["threshold"]) for each in body["classes"]] == [("red", 0), ("blue", 0.7)]
    assert body["multi_label"] is True
    for threshold in (-0.1, 1.1, "much"):
        refused = shared_client.put(path, json={"classes": [{"name": "red", "threshold": threshold}]})
        assert fields_of(refused) == {"classes.0.threshold"}


def test_synonyms_share_the_score_of_their_class(shared_client):
    classes = [{"name": "tomato", "synonyms": ["red"]}, "green"]
    put(shared_client, "synonyms", classes, multi_label=True, merge_synonyms="max")
    (result,) = answer(as_json(shared_client, [YELLOW], label_set="synonyms"))["results"]
    assert all(each["score"] > 0.9 for each in result["predictions"])


def test_what_assumes_one_label_per_image_is_refused(make_client):
    client = with_things(make_client())
    added(add(client, [shade(kind, 0) for kind in range(3)]))
    fields = {"label_set": "things", "multi_label": True}
    for name, method in METHODS.items():
        response = as_json(client, [YELLOW], **fields, method=name)
        if method.learner is None:
            assert answer(response)["results"][0]["labels"] is not None, name
        else:
            assert fields_of(response) == {"method"}, name
            assert "several" in response.json()["detail"]
    for name in ("coverage", "false_rejection_rate"):
        assert fields_of(as_json(client, [YELLOW], **fields, **{name: 0.5})) == {name}
    # The methods are compared for images with one label, so the evidence does not decide.
    assert answer(as_json(client, [YELLOW], **fields))["method"] == "zero-shot"
    assert "several labels" in answer(as_json(client, [YELLOW], **fields, method="auto"))["reason"]


def test_the_examples_of_a_label_set_for_several_labels_still_select_a_method(make_client):
    client = make_client()
    put(client, "things", ["tomato", "leaf", "sky"], multi_label=True)
    teach(client, each=12)
    selected = client.get(SELECTION).json()["method"]
    assert METHODS[selected].learner is not None
    reply = answer(as_json(client, [shade(0, 70)], label_set="things", multi_label=False))
    assert (reply["method"], reply["results"][0]["predictions"][0]["label"]) == (selected, "tomato")
    assert answer(as_json(client, [shade(0, 70)], label_set="things"))["method"] == "zero-shot"


def test_labels_that_are_discovered_are_refused(shared_client):
    refused = shared_client.post("/v1/classify", files={"image": YELLOW}, data={"multi_label": json.dumps(True)})
    assert fields_of(refused) == {"multi_label"}
