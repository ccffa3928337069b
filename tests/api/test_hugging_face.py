import base64

import pytest

from tests.api.problems import fields_of, problem_of
from tests.conftest import picture

ROUTE = "/v1/zero-shot-image-classification"
LABELS = ["green", "red", "blue"]


def ask(client, image, labels=LABELS, **more):
    inputs = image if isinstance(image, str) else base64.b64encode(image).decode()
    parameters = {"candidate_labels": labels, **more.pop("parameters", {})}
    return client.post(ROUTE, json={"inputs": inputs, "parameters": parameters, **more})


def test_the_answer_has_every_label_the_best_first_with_scores_that_sum_to_1(client):
    answer = ask(client, picture("red"))
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    assert reply[0]["label"] == "red"
    assert sorted(each["label"] for each in reply) == sorted(LABELS)
    assert [each["score"] for each in reply] == sorted((each["score"] for each in reply), reverse=True)
    assert sum(each["score"] for each in reply) == pytest.approx(1)
    assert all(each.keys() == {"label", "score"} for each in reply)


def test_it_answers_as_classify_does_with_the_same_template(client):
    template = "a blurry photo of {}"
    reply = ask(client, picture("blue"), parameters={"hypothesis_template": template}).json()
    same = client.post(
        "/v1/classify",
        files={"image": picture("blue")},
        data={"labels": ",".join(LABELS), "template": template, "top_k": 3},
    ).json()
    assert reply == [{"label": each["label"], "score": each["score"]} for each in same["results"][0]["predictions"]]


def test_a_data_url_will_do(client):
    url = f"data:image/png;base64,{base64.b64encode(picture('green')).decode()}"
    assert ask(client, url).json()[0]["label"] == "green"


def test_errors_are_reported_with_their_field(client):
    problem_of(ask(client, b"no picture"), "not-an-image")
    problem_of(ask(client, "%%%"), "not-an-image")
    problem_of(ask(client, picture("red"), model="nope"), "unknown-name")
    assert fields_of(ask(client, picture("red"), labels=[])) == {"parameters.candidate_labels"}
    assert fields_of(ask(client, picture("red"), labels=["a", "", "a"])) == {
        "parameters.candidate_labels.1",
        "parameters.candidate_labels.2",
    }
    refused = ask(client, picture("red"), parameters={"hypothesis_template": "a {0}"})
    assert fields_of(refused) == {"parameters.hypothesis_template"}
    assert fields_of(ask(client, picture("red"), parameters={"odd": 1})) == {"parameters.odd"}
    assert fields_of(client.post(ROUTE, json={"inputs": "x"})) == {"parameters"}
    problem_of(ask(client, picture("red"), parameters={"hypothesis_template": "no place"}), "unknown-name")
    problem_of(client.post(ROUTE, content=b"x", headers={"content-type": "image/png"}), "unsupported-media-type")
    refused = ask(client, "http://x.example/a.jpg")
    assert fields_of(refused) == {"inputs"}
    assert "DEIXIS_ALLOW_IMAGE_URLS" in refused.json()["detail"]
