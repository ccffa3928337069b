"""Mutated images and some made on purpose: each is answered for what it is, and nothing is left behind."""

import base64

import pytest

from benchmarks.attack.corpus import MUTATIONS, made_on_purpose, mutants, seeds
from tests.api.problems import problem_of
from tests.conftest import picture

EVERY = 480
ON_PURPOSE = made_on_purpose()
LABELS = ["red", "green", "blue"]


def ask(client, image, form):
    if form == "form":
        return client.post("/v1/classify", files={"image": ("x.jpg", image)}, data={"labels": ",".join(LABELS)})
    if form == "json":
        images = [{"base64": base64.b64encode(image).decode()}]
        return client.post("/v1/classify", json={"labels": LABELS, "images": images})
    return client.post(
        "/v1/classify", content=image, headers={"content-type": "image/jpeg"}, params={"labels": ",".join(LABELS)}
    )


def assert_answered(answer, what):
    if answer.status_code == 200:
        (result,) = answer.json()["results"]
        assert len(result["predictions"]) == 3, what
        return
    assert answer.status_code in {413, 415, 422}, f"{what}: {answer.text}"
    assert answer.headers["content-type"] == "application/problem+json", what


def test_the_corpus_is_the_same_each_time_and_has_every_format_and_mutation():
    every = list(mutants(EVERY))
    assert every == list(mutants(EVERY))
    assert {kind.partition(",")[0] for kind, _ in every} == set(seeds())
    assert {kind.partition(", ")[2] for kind, _ in every} == set(MUTATIONS)
    assert len({image for _, image in every}) > 0.95 * EVERY


def test_the_images_that_are_mutated_are_whole_before(shared_client):
    for kind, image in seeds().items():
        answer = ask(shared_client, image, "form")
        assert answer.status_code == 200, f"{kind}: {answer.text}"


@pytest.mark.parametrize("form", ["form", "json", "body"])
def test_mutated_images_are_answered(shared_client, form):
    statuses = set()
    for number, (kind, image) in enumerate(mutants(EVERY)):
        if number % 3 == ("form", "json", "body").index(form):
            answer = ask(shared_client, image, form)
            assert_answered(answer, kind)
            statuses.add(answer.status_code)
    assert {200, 415} <= statuses
    assert ask(shared_client, picture("red"), form).json()["results"][0]["predictions"][0]["label"] == "red"


@pytest.mark.parametrize("kind", ON_PURPOSE)
def test_what_is_made_on_purpose_is_answered(shared_client, kind):
    assert_answered(ask(shared_client, ON_PURPOSE[kind], "form"), kind)


def test_a_bad_image_does_no_harm_to_those_beside_it(shared_client):
    every = [image for _, image in mutants(EVERY, seed=5)]
    for first in range(0, EVERY, 7):
        files = [("image", ("x", image)) for image in (*every[first : first + 7], picture("blue"))]
        answer = shared_client.post("/v1/classify", files=files, data={"labels": ",".join(LABELS)})
        results = answer.json()["results"]
        assert len(results) == len(files)
        assert results[-1]["predictions"][0]["label"] == "blue"
        for result in results[:-1]:
            assert (result["error"] is None) == bool(result["predictions"])
            assert result["error"] is None or result["error"]["status"] in {413, 415}


def test_mutated_images_are_no_examples_unless_they_can_be_read(shared_client):
    shared_client.put("/v1/label-sets/pets", json={"classes": LABELS}).raise_for_status()
    images = [image for _, image in mutants(60, seed=6)]
    files = [("image", ("x", image)) for image in images]
    answer = shared_client.post("/v1/label-sets/pets/images", files=files, data={"class": ["red"] * 60})
    reply = answer.json()
    assert reply["added"] + reply["duplicates"] + len(reply["skipped"]) == 60
    assert reply["skipped"]
    listed = shared_client.get("/v1/label-sets/pets/images", params={"limit": 100}).json()["images"]
    assert len(listed) == reply["added"]
    assert all(each["models"] == 1 for each in listed)


def test_a_refusal_repeats_nothing_of_the_image(shared_client):
    page = ON_PURPOSE["svg"]
    assert "passwd" not in problem_of(ask(shared_client, page, "form"), "not-an-image")["detail"]
