"""Results say how probably none of the labels fits, and requests can reject such images without a threshold."""

import pytest

from app.names.kinds import WordKinds
from tests.api.problems import fields_of, problem_of
from tests.api.test_classify import answer, as_form, as_json
from tests.api.test_examples import teach, with_things
from tests.conftest import picture

COLOURS = ["red", "green", "blue"]
WORDS = ("red rose", "green leaf", "blue sky", *(f"word {number}" for number in range(600)))


@pytest.fixture
def make_prepared(make_client, monkeypatch):
    """Start services whose models have negative words of the test."""

    def make(words=WORDS, groups=None):
        monkeypatch.setattr("app.main._read_negative_words", lambda: (words, WordKinds(words, groups or {})))
        client = make_client()
        client.portal.call(client.app.state.service.negative_words.prepare_all)
        return client

    return make


@pytest.fixture
def prepared(make_prepared):
    return make_prepared()


def _results(client, *colours, **fields):
    return answer(as_json(client, [picture(colour) for colour in colours], **fields))["results"]


def _warnings(result):
    return [warning for warning in result["warnings"] if "probably none of the labels fits" in warning]


def test_an_image_that_no_label_fits_has_a_high_score_and_a_warning_of_its_own(prepared):
    known = _results(prepared, *COLOURS, labels=COLOURS)
    assert all(result["out_of_vocabulary"]["score"] < 0.5 for result in known)
    red, blue = _results(prepared, "red", "blue", labels=["green", "blue"])
    assert red["out_of_vocabulary"]["score"] > 0.5 > blue["out_of_vocabulary"]["score"]
    assert (red["weak_match"], blue["weak_match"]) == (True, False)
    assert (len(_warnings(red)), len(_warnings(blue))) == (1, 0)


def test_until_the_words_are_encoded_nothing_is_known(client):
    (result,) = _results(client, "red", labels=["green", "blue"], explain=True)
    assert (result["out_of_vocabulary"]["score"], result["out_of_vocabulary"]["nearest"]) == (None, None)
    assert (result["weak_match"], result["warnings"]) == (None, [])
    response = as_json(client, [picture("red")], labels=COLOURS, reject="auto")
    assert "are being encoded" in problem_of(response, "not-ready")["detail"]


def test_words_for_kinds_of_a_label_do_not_compete_with_it(make_prepared):
    alone, with_group = (
        _results(make_prepared(groups=groups), "red", labels=["colour"])[0]["out_of_vocabulary"]["score"]
        for groups in ({}, {"red rose": {"colour"}})
    )
    assert with_group < alone


def test_synonyms_of_a_class_are_labels_too(prepared):
    classes = [{"name": "thing", "synonyms": ["red rose"]}]
    prepared.put("/v1/label-sets/roses", json={"classes": classes}).raise_for_status()
    (result,) = _results(prepared, "red", label_set="roses", explain=True)
    assert "red rose" not in [near["word"] for near in result["out_of_vocabulary"]["nearest"]]


def test_if_almost_all_words_are_kinds_of_the_labels_nothing_can_compete(make_prepared):
    client = make_prepared(groups={word: {"thing"} for word in WORDS[200:]})
    reply = answer(as_json(client, [picture("red")], labels=["thing"], reject="auto"))
    (result,) = reply["results"]
    assert (result["out_of_vocabulary"]["score"], result["rejected"], result["weak_match"]) == (None, None, None)
    assert any("too few words" in warning for warning in result["warnings"])


def test_an_explanation_has_the_words_that_are_nearer_than_every_label(prepared):
    red, blue = _results(prepared, "red", "blue", labels=["green", "blue"], explain=True)
    near = red["out_of_vocabulary"]["nearest"]
    assert near[0]["word"] == "red rose"
    best = max(prediction["similarity"] for prediction in red["predictions"])
    assert 1 <= len(near) <= 10
    assert all(each["similarity"] > best for each in near)
    assert "red rose" not in [each["word"] for each in blue["out_of_vocabulary"]["nearest"]]


@pytest.mark.parametrize("send", [as_form, as_json])
def test_auto_rejects_the_images_that_probably_show_none_of_the_labels(prepared, send):
    reply = answer(send(prepared, [picture("red"), picture("blue")], labels=["green", "blue"], reject="auto"))
    assert [result["rejected"] for result in reply["results"]] == [True, False]
    for result in reply["results"]:
        assert result["rejection_score"] == pytest.approx(1 - result["out_of_vocabulary"]["score"], abs=1e-6)


def test_auto_uses_enough_labelled_examples_and_else_the_words(prepared):
    with_things(prepared)
    teach(prepared)
    few = answer(as_json(prepared, [picture("red")], label_set="things", reject="auto"))
    assert (few["calibration"]["reject_by"], few["calibration"]["reject_below"]) == ("in-vocabulary", 0.5)
    assert few["results"][0]["rejected"] is not None
    teach(prepared, each=8)
    enough = answer(as_json(prepared, [picture("red")], label_set="things", reject="auto"))["calibration"]
    rate = answer(as_json(prepared, [picture("red")], label_set="things", false_rejection_rate=0.05))["calibration"]
    assert enough == rate
    assert enough["reject_by"] == "class-mean"


def test_a_method_that_learned_from_images_gives_no_warning(prepared):
    with_things(prepared)
    teach(prepared)
    (zero_shot,) = _results(prepared, "white", label_set="things", method="zero-shot")
    (learned,) = _results(prepared, "white", label_set="things", method="gda")
    assert zero_shot["weak_match"] is not None
    assert (learned["weak_match"], _warnings(learned)) == (None, [])


@pytest.mark.parametrize("other", [{"reject_below": 0.5}, {"false_rejection_rate": 0.1}])
def test_auto_excludes_a_threshold_and_a_rate(shared_client, other):
    response = as_json(shared_client, [picture("red")], labels=COLOURS, reject="auto", **other)
    (name,) = other
    assert f"either {name} or reject" in problem_of(response, "invalid-field")["detail"]
    assert fields_of(response) == {name}


@pytest.mark.parametrize("fields", [{"reject": "auto"}, {"labels": COLOURS, "reject": "never"}])
def test_auto_is_the_only_value_and_needs_labels(shared_client, fields):
    assert fields_of(as_json(shared_client, [picture("red")], **fields)) == {"reject"}
