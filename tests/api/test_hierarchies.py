"""Label sets whose classes have parents, over HTTP."""

import pytest

from tests.api.problems import fields_of, problem_of
from tests.api.test_classify import answer, as_form, as_json
from tests.conftest import picture

AT = "/v1/label-sets/shades"
CLASSES = [
    {"name": "red", "parent": "colour|warm"},
    {"name": "orange", "parent": "warm"},
    {"name": "blue", "parent": "colour|cold"},
    {"name": "green", "parent": "cold"},
    "grey",
]


@pytest.fixture
def shades(shared_client):
    assert shared_client.put(AT, json={"classes": CLASSES}).status_code in {200, 201}
    return shared_client


def path_of(client, **fields):
    (result,) = answer(as_json(client, [picture("teal")], label_set="shades", **fields))["results"]
    return result["path"], {each["label"]: each["score"] for each in result["predictions"]}


def test_a_path_leads_to_the_best_class_and_scores_are_sums_of_classes(shades):
    path, scores = path_of(shades)
    warm, cold = scores["red"] + scores["orange"], scores["blue"] + scores["green"]
    sums = {"colour": warm + cold, "warm": warm, "cold": cold, **scores}
    assert path[0]["label"] == ("colour" if sums["colour"] > scores["grey"] else "grey")
    assert path[1]["label"] == max(("warm", "cold"), key=sums.get)
    assert len(path) == 3
    for step in path:
        assert step["score"] == pytest.approx(sums[step["label"]], abs=1e-6)


def test_a_path_stops_at_the_last_label_that_has_the_minimum_score(shades):
    whole, _ = path_of(shades)
    for length in range(len(whole) + 1):
        below = whole[length - 1]["score"] if length else 1
        if length == len(whole) or whole[length]["score"] < below:
            least = below if length else 1
            assert path_of(shades, min_score=least)[0] == whole[:length]


def test_an_image_with_none_of_the_labels_has_an_empty_path(shades):
    for fields in ({"reject_below": 1.0}, {"multi_label": True, "reject_below": 1.0}):
        body = as_json(shades, [picture("teal")], label_set="shades", **fields)
        (result,) = answer(body)["results"]
        assert (result["rejected"], result["labels"] or [], result["path"]) == (True, [], [])
    assert path_of(shades, reject_below=0.0)[0]


def test_with_several_labels_the_path_leads_to_the_best_one_that_the_image_has(shared_client):
    thresholds = [{"name": name, "threshold": 0.0, "parent": "known"} for name in ("red", "orange")]
    best = [{"name": name, "threshold": 1.0, "parent": "cold"} for name in ("blue", "green", "teal")]
    body = {"classes": [*thresholds, *best], "multi_label": True}
    assert shared_client.put(AT, json=body).status_code in {200, 201}
    (result,) = answer(as_json(shared_client, [picture("teal")], label_set="shades"))["results"]
    assert result["predictions"][0]["label"] not in result["labels"]
    assert [step["label"] for step in result["path"]] == ["known", result["labels"][0]]
    score_of = {each["label"]: each["score"] for each in result["predictions"]}
    assert {step["score"] for step in result["path"]} == {score_of[result["labels"][0]]}


def test_without_parents_there_is_no_path_and_no_minimum(shared_client):
    plain = as_json(shared_client, [picture()], labels=["red", "blue"])
    assert answer(plain)["results"][0]["path"] is None
    for fields in ({"labels": "red,blue"}, {}):
        assert fields_of(as_form(shared_client, [picture()], min_score=0.5, **fields)) == {"min_score"}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([{"name": "cat", "parent": "Cat"}], "'cat' is its own parent"),
        (
            [{"name": "a", "parent": "b"}, {"name": "b", "parent": "c"}, {"name": "c", "parent": "a"}],
            "the parents form a cycle: 'a' is below 'b' is below 'c' is below 'a'",
        ),
        (
            [{"name": "cat", "parent": "pet|small"}, {"name": "ant", "parent": "wild|small"}],
            "'small' has two parents, 'pet' and 'wild'",
        ),
        ([{"name": "cat", "parent": "pet|wild|pet"}], "classes.0.parent: the parents form a cycle"),
        ([{"name": "cat", "parent": " "}], "parent"),
        ([{"name": "cat", "parent": "pet||small"}], "has an empty level"),
    ],
)
def test_parents_that_form_no_forest_are_refused(shared_client, classes, words):
    reply = shared_client.put(AT, json={"classes": classes})
    problem_of(reply, "invalid-field")
    assert words in reply.text


def test_added_classes_must_keep_the_forest(shades):
    cycle = [{"name": "colour", "parent": "red"}]
    refused = shades.post(f"{AT}/classes", json={"classes": ["pink", *cycle]})
    assert "form a cycle" in refused.text
    assert fields_of(refused) == {"classes.1.parent"}
    added = shades.post(f"{AT}/classes", json={"classes": [{"name": "pink", "parent": "warm"}]}).json()
    assert added["classes"][-1]["parent"] == "warm"
    assert shades.delete(f"{AT}/classes/red").json()["classes"][0]["name"] == "orange"


@pytest.mark.parametrize(
    ("classes", "removed", "parents"),
    [
        # The removed class is above another.
        ([{"name": "b", "parent": "a"}, {"name": "c", "parent": "b"}, "d"], "b", ["a|b", None]),
        ([{"name": "b", "parent": "a"}, {"name": "c", "parent": "b|x"}, "d"], "b", ["a|b|x", None]),
        # Only the removed class says what a label is below; once is enough.
        (
            [{"name": "c", "parent": "a|b"}, {"name": "d", "parent": "b"}, {"name": "e", "parent": "B"}],
            "c",
            ["a|b", "B"],
        ),
        ([{"name": "c", "parent": "a|b"}, "b"], "c", ["a"]),
        ([{"name": "c", "parent": "a|b"}, {"name": "d", "parent": "a|b"}], "c", ["a|b"]),
        ([{"name": "c", "parent": "a|b"}, "d"], "c", [None]),
    ],
)
def test_labels_stay_where_they_are_when_a_class_is_removed(shared_client, classes, removed, parents):
    shared_client.put(AT, json={"classes": classes})
    left = shared_client.delete(f"{AT}/classes/{removed}").json()["classes"]
    assert [each["parent"] for each in left] == parents


def test_a_class_whose_name_would_become_two_levels_of_others_is_not_removed(shared_client):
    classes = ["a|b", {"name": "x", "parent": "a|b"}, {"name": "y", "parent": "c|b"}]
    shared_client.put(AT, json={"classes": classes})
    problem_of(shared_client.delete(f"{AT}/classes/a%7Cb"), "conflict")
    assert answer(as_json(shared_client, [picture("red")], label_set="shades"))["results"][0]["path"]


def test_a_label_above_others_may_be_a_class_and_the_path_ends_there_if_it_fits_best(shared_client):
    shared_client.put(AT, json={"classes": ["red", {"name": "blue", "parent": "red"}]})
    (result,) = answer(as_json(shared_client, [picture("red")], label_set="shades"))["results"]
    assert [step["label"] for step in result["path"]] == ["red"]
    assert result["path"][0]["score"] == pytest.approx(1)
    (result,) = answer(as_json(shared_client, [picture("blue")], label_set="shades"))["results"]
    assert [step["label"] for step in result["path"]] == ["red", "blue"]
