"""Mutated and hostile images get a result or a problem, and do not affect other images."""

import base64

import pytest

from benchmarks.attack.corpus import MUTATIONS, hostile_images, mutants, seeds
from tests.api.problems import problem_of
from tests.conftest import picture

MUTANTS = 480
HOSTILE = hostile_images()
LABELS = ["red", "green", "blue"]


def classify(client, image, form):
    if form == "form":
        return client.post("/v1/classify", files={"image": ("x.jpg", image)}, data={"labels": ",".join(LABELS)})
    if form == "json":
        images = [{"base64": base64.b64encode(image).decode()}]
        return client.post("/v1/classify", json={"labels": LABELS, "images": images})
    return client.post(
        "/v1/classify", content=image, headers={"content-type": "image/jpeg"}, params={"labels": ",".join(LABELS)}
    )


def assert_result_or_problem(response, what):
    if response.status_code == 200:
        (result,) = response.json()["results"]
        assert len(result["predictions"]) == 3, what
        return
    assert response.status_code in {413, 415, 422}, f"{what}: {response.text}"
    assert response.headers["content-type"] == "application/problem+json", what


def test_the_corpus_is_reproducible_and_has_every_format_and_mutation():
    images = list(mutants(MUTANTS))
    assert images == list(mutants(MUTANTS))
    assert {kind.partition(",")[0] for kind, _ in images} == set(seeds())
    assert {kind.partition(", ")[2] for kind, _ in images} == set(MUTATIONS)
    assert len({image for _, image in images}) > 0.95 * MUTANTS


def test_images_are_valid_before_their_mutation(shared_client):
    for kind, image in seeds().items():
        response = classify(shared_client, image, "form")
        assert response.status_code == 200, f"{kind}: {response.text}"


@pytest.mark.parametrize("form", ["form", "json", "body"])
def test_a_mutated_image_gets_a_result_or_a_problem(shared_client, form):
    statuses = set()
    for number, (kind, image) in enumerate(mutants(MUTANTS)):
        if number % 3 == ("form", "json", "body").index(form):
            response = classify(shared_client, image, form)
            assert_result_or_problem(response, kind)
            statuses.add(response.status_code)
    assert {200, 415} <= statuses
    assert classify(shared_client, picture("red"), form).json()["results"][0]["predictions"][0]["label"] == "red"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_image_gets_a_result_or_a_problem(shared_client, kind):
    assert_result_or_problem(classify(shared_client, HOSTILE[kind], "form"), kind)


def test_bad_images_do_not_affect_good_images_of_the_same_request(shared_client):
    images = [image for _, image in mutants(MUTANTS, seed=5)]
    for first in range(0, MUTANTS, 7):
        files = [("image", ("x", image)) for image in (*images[first : first + 7], picture("blue"))]
        response = shared_client.post("/v1/classify", files=files, data={"labels": ",".join(LABELS)})
        results = response.json()["results"]
        assert len(results) == len(files)
        assert results[-1]["predictions"][0]["label"] == "blue"
        for result in results[:-1]:
            assert (result["error"] is None) == bool(result["predictions"])
            assert result["error"] is None or result["error"]["status"] in {413, 415}


def test_only_readable_images_become_examples(shared_client):
    shared_client.put("/v1/label-sets/pets", json={"classes": LABELS}).raise_for_status()
    images = [image for _, image in mutants(60, seed=6)]
    files = [("image", ("x", image)) for image in images]
    response = shared_client.post("/v1/label-sets/pets/images", files=files, data={"class": ["red"] * 60})
    added = response.json()
    assert added["added"] + added["duplicates"] + len(added["skipped"]) == 60
    assert added["skipped"]
    listed = shared_client.get("/v1/label-sets/pets/images", params={"limit": 100}).json()["images"]
    assert len(listed) == added["added"]
    assert all(example["models"] == 1 for example in listed)


def test_an_error_does_not_contain_text_of_the_image(shared_client):
    page = HOSTILE["svg"]
    assert "passwd" not in problem_of(classify(shared_client, page, "form"), "not-an-image")["detail"]
