"""Real photographs are classified over HTTP with the embedded model."""

import base64
import json

import pytest

from tests.end_to_end.conftest import TRUE_LABELS

LABELS = ["cat", "coffee cup", "rocket", "astronaut", "temple", "flower", "dog", "car", "pizza", "laptop"]
HARDER = {
    "chelsea": ["cat", "dog", "rabbit", "fox", "lion", "squirrel", "hamster", "bear", "horse", "owl"],
    "coffee": [
        "coffee cup",
        "soup",
        "beer glass",
        "pizza",
        "cake",
        "wine bottle",
        "teapot",
        "ice cream",
        "sandwich",
        "bowl",
    ],
    "rocket": [
        "rocket",
        "airplane",
        "lighthouse",
        "crane",
        "tower",
        "ship",
        "helicopter",
        "bridge",
        "truck",
        "windmill",
    ],
    "china": [
        "temple",
        "church",
        "castle",
        "skyscraper",
        "barn",
        "stadium",
        "bridge",
        "lighthouse",
        "garden",
        "school",
    ],
    "flower": ["flower", "mushroom", "tree", "butterfly", "fruit", "cabbage", "bird", "grass", "leaf", "fish"],
}


@pytest.mark.parametrize("name", TRUE_LABELS)
def test_a_photograph_gets_the_correct_label_of_ten(server, photographs, name):
    with server.client() as client:
        answer = client.post("/classify", files={"image": photographs[name]}, data={"labels": json.dumps(LABELS)})

    assert answer.status_code == 200, answer.text
    predictions = answer.json()["results"][0]["predictions"]
    assert predictions[0]["label"] == TRUE_LABELS[name]


@pytest.mark.parametrize("name", HARDER)
def test_a_photograph_gets_the_correct_label_of_ten_related_ones(server, photographs, name):
    with server.client() as client:
        answer = client.post("/classify", files={"image": photographs[name]}, data={"labels": json.dumps(HARDER[name])})

    assert answer.json()["results"][0]["predictions"][0]["label"] == TRUE_LABELS[name]


def test_the_three_request_forms_give_the_same_results(server, photographs):
    image = photographs["chelsea"]
    with server.client() as client:
        answers = [
            client.post("/v1/classify", files={"image": image}, data={"labels": "cat, dog", "top_k": "2"}),
            client.post(
                "/v1/classify",
                json={"images": [{"base64": base64.b64encode(image).decode()}], "labels": ["cat", "dog"], "top_k": 2},
            ),
            client.post(
                "/v1/classify",
                params={"labels": "cat,dog", "top_k": 2},
                content=image,
                headers={"content-type": "image/jpeg"},
            ),
        ]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    results = [answer.json()["results"] for answer in answers]
    assert results[0] == results[1] == results[2]
    assert sum(prediction["score"] for prediction in results[0][0]["predictions"]) == pytest.approx(1, abs=1e-5)


def test_a_request_with_many_photographs_returns_them_in_order_with_the_scores_of_single_requests(server, photographs):
    names = list(TRUE_LABELS) * 2
    with server.client() as client:
        together = client.post(
            "/v1/classify",
            files=[("image", (name, photographs[name])) for name in names],
            data={"labels": json.dumps(LABELS), "top_k": "1"},
        ).json()["results"]
        alone = client.post(
            "/v1/classify", files={"image": photographs["china"]}, data={"labels": json.dumps(LABELS), "top_k": "1"}
        ).json()["results"]

    assert [result["predictions"][0]["label"] for result in together] == [TRUE_LABELS[name] for name in names]
    assert together[names.index("china")]["predictions"][0]["score"] == pytest.approx(
        alone[0]["predictions"][0]["score"], abs=1e-4
    )


def test_a_stored_label_set_can_be_named_with_and_without_a_version(server, photographs):
    with server.client() as client:
        first = client.put("/v1/label-sets/things", json={"classes": ["dog", "car"]})
        second = client.post("/v1/label-sets/things/classes", json={"classes": ["cat"]})
        latest, old = (
            client.post("/classify", files={"image": photographs["chelsea"]}, data={"label_set": reference}).json()
            for reference in ("things", "things@1")
        )

    assert (first.status_code, second.status_code) == (201, 200)
    assert (latest["label_set"], latest["results"][0]["predictions"][0]["label"]) == ("things@2", "cat")
    assert old["label_set"] == "things@1"
    assert {prediction["label"] for prediction in old["results"][0]["predictions"]} == {"dog", "car"}
