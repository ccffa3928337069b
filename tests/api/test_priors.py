"""Priors of requests and label sets, over HTTP."""

import json

import pytest

from tests.api.problems import fields_of, problem_of
from tests.api.test_classify import answer, as_body, as_form, as_json
from tests.api.test_examples import AT, add, added, shade, with_things
from tests.conftest import picture

LABELS = ["red", "green", "blue"]
COUNTS = {"red": 6, "green": 1, "blue": 3}
SEND = "/v1/label-sets/colours"


def scores_of(response):
    (result,) = answer(response)["results"]
    return {each["label"]: each["score"] for each in result["predictions"]}


@pytest.fixture
def colours(shared_client):
    """Return a client with a label set that has priors."""
    body = {"classes": LABELS, "priors": COUNTS}
    reply = shared_client.put(SEND, json=body)
    assert reply.json()["priors"] == COUNTS
    return shared_client


def test_every_form_takes_counts_and_returns_frequencies(shared_client):
    image = picture("teal")
    plain = scores_of(as_json(shared_client, [image], labels=LABELS))
    replies = [
        as_json(shared_client, [image], labels=LABELS, priors=COUNTS),
        as_form(shared_client, [image], labels=json.dumps(LABELS), priors=json.dumps(COUNTS)),
        as_body(shared_client, image, labels=",".join(LABELS), priors=json.dumps(COUNTS)),
    ]
    total = sum(plain[label] * COUNTS[label] for label in LABELS)
    for reply in replies:
        assert reply.json()["priors"] == pytest.approx({"red": 0.6, "green": 0.1, "blue": 0.3})
        # Without example images, predictions are taken to be uniform on average: Bayes' rule.
        expected = {label: plain[label] * COUNTS[label] / total for label in LABELS}
        assert scores_of(reply) == pytest.approx(expected, abs=1e-6)


def test_priors_are_not_used_unless_someone_asks(shared_client):
    assert answer(as_json(shared_client, [picture("teal")], labels=LABELS))["priors"] is None


def test_a_label_set_brings_its_priors_and_a_request_can_switch_them_off_or_replace_them(colours):
    image = picture("teal")
    given = answer(as_json(colours, [image], labels=LABELS, priors=COUNTS))
    stored = answer(as_json(colours, [image], label_set="colours"))
    assert (stored["priors"], stored["results"]) == (given["priors"], given["results"])
    off = answer(as_json(colours, [image], label_set="colours", priors="uniform"))
    assert off["priors"] is None
    assert off["results"] == answer(as_json(colours, [image], labels=LABELS))["results"]
    other = answer(as_json(colours, [image], label_set="colours", priors={"red": 1, "green": 1, "blue": 2}))
    assert other["priors"] == {"red": 0.25, "green": 0.25, "blue": 0.5}


def test_a_single_label_has_the_frequency_1(shared_client):
    reply = answer(as_json(shared_client, [picture()], labels=["red"], priors={"red": 3}))
    assert reply["priors"] == {"red": 1}


@pytest.mark.parametrize(
    ("priors", "field", "words"),
    [
        ({"red": 1, "green": 2, "blu": 3}, "priors.blu", "did you mean 'blue'"),
        ({"red": 1, "green": 2}, "priors", "no number is given for 'blue'"),
        ({"red": 1, "green": 2, "blue": 0}, "priors.blue", "above 0"),
        ({"red": 1, "green": 2, "blue": -3}, "priors.blue", "above 0"),
        ({"red": 1, "green": 2, "blue": 3, " blue ": 3}, "priors.blue", "twice"),
        ({"red": 1, "green": 2, "blue": "many"}, "priors", "must have a number for each label"),
        ({"red": 1, "green": 2, "blue": 10**400}, "priors", "has a number above 1e+308 for 'blue'"),
        ({"red": 1, "green": 2, "blue": True}, "priors.blue", "should be a number; given: true"),
        ({}, "priors", "no number is given"),
        ("estimated", "priors", r"must be an object such as {\"cat\": 120, \"dog\": 40}, or"),
        ([1, 2, 3], "priors", "must be an object"),
        ("estimate", "priors", "only a label set has"),
    ],
)
def test_priors_that_break_a_rule_are_refused(shared_client, priors, field, words):
    reply = as_json(shared_client, [picture()], labels=LABELS, priors=priors)
    detail = problem_of(reply, "invalid-field")
    assert fields_of(reply) == {field}
    assert words in json.dumps(detail, ensure_ascii=False)


def test_numbers_that_json_cannot_write_are_refused(shared_client):
    for number in ("NaN", "Infinity", "1e999"):
        priors = f'{{"red": 1, "green": 2, "blue": {number}}}'
        assert fields_of(as_body(shared_client, picture(), labels="red,green,blue", priors=priors)) == {"priors.blue"}


def test_priors_need_labels_and_exclude_guarantees_without_them(colours):
    assert fields_of(as_json(colours, [picture()], priors=COUNTS)) == {"priors"}
    for promise in ("coverage", "false_rejection_rate"):
        reply = as_json(colours, [picture()], label_set="colours", **{promise: 0.2})
        assert fields_of(reply) == {promise}
        assert "priors 'uniform'" in reply.text


def test_a_label_set_has_priors_for_all_classes_or_for_none(colours):
    body = {"classes": ["owl"], "priors": {"owl": 2}}
    added_class = colours.post(f"{SEND}/classes", json=body)
    assert added_class.json()["priors"] == {**COUNTS, "owl": 2}
    assert fields_of(colours.post(f"{SEND}/classes", json={"classes": ["fox"]})) == {"priors"}
    removed = colours.delete(f"{SEND}/classes/red")
    assert removed.json()["priors"] == {"green": 1, "blue": 3, "owl": 2}
    colours.put(SEND, json={"classes": LABELS})
    assert fields_of(colours.post(f"{SEND}/classes", json=body)) == {"priors"}
    assert fields_of(colours.put(SEND, json={"classes": LABELS, "priors": {"red": 1}})) == {"priors"}


def test_estimated_priors_are_the_smoothed_counts_of_the_labelled_images(client):
    things = with_things(client)
    names = [each["name"] for each in things.get(AT).json()["classes"]]
    image = shade(0, 99)
    assert fields_of(as_json(things, [image], label_set="things", priors="estimate")) == {"priors"}
    added(add(things, [shade(1, 50)]))
    reply = as_json(things, [image], label_set="things", priors="estimate", method="zero-shot")
    assert "has none; add about 40" in reply.text
    kinds = [0, 0, 0, 1]
    images = [shade(kind, number) for number, kind in enumerate(kinds)]
    added(add(things, images, [names[kind] for kind in kinds]))
    reply = answer(as_json(things, [image], label_set="things", priors="estimate", method="zero-shot"))
    assert list(reply["priors"].values()) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    (warning,) = [text for text in reply["results"][0]["warnings"] if "priors" in text]
    assert warning == "the priors are estimated from 4 labelled images; about 40 are needed"
    # New example images count at once.
    added(add(things, [shade(2, 60)], [names[2]]))
    reply = answer(as_json(things, [image], label_set="things", priors="estimate", method="zero-shot"))
    assert list(reply["priors"].values()) == pytest.approx([4 / 8, 2 / 8, 2 / 8])


def test_given_priors_are_relative_to_the_predictions_for_the_unlabelled_images(client):
    things = with_things(client)
    pool = [shade(0, number) for number in range(6)]
    added(add(things, pool))
    ask = {"label_set": "things", "method": "zero-shot", "top_k": 3}
    each = [scores_of(as_json(things, [image], **ask)) for image in pool]
    predicted = {name: (sum(scores[name] for scores in each) + 1) / (6 + 3) for name in each[0]}
    image = shade(2, 70)
    plain = scores_of(as_json(things, [image], **ask))
    counts = dict(zip(plain, (5, 2, 1), strict=True))
    reply = scores_of(as_json(things, [image], **ask, priors=counts))
    total = sum(plain[name] * counts[name] / predicted[name] for name in plain)
    expected = {name: plain[name] * counts[name] / predicted[name] / total for name in plain}
    assert reply == pytest.approx(expected, abs=1e-4)
