import base64
import struct

import numpy as np
import pytest

from app.encoders.fake import FakeEncoder
from tests.api.problems import fields_of, problem_of
from tests.conftest import picture


def ask(client, given, **more):
    return client.post("/v1/embeddings", json={"input": given, **more})


def rows_of(answer):
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    assert reply["object"] == "list"
    assert [each["index"] for each in reply["data"]] == list(range(len(reply["data"])))
    return np.array([each["embedding"] for each in reply["data"]], np.float32)


def encoded(colour):
    return base64.b64encode(picture(colour)).decode()


@pytest.fixture
def encoder():
    return FakeEncoder()


@pytest.fixture
def client(make_client, encoder):
    return make_client(encoders=[encoder, FakeEncoder("other")])


def test_texts_have_the_unit_features_of_the_model(client, encoder):
    answer = ask(client, ["red", "a green ball", "red"])
    rows = rows_of(answer)
    np.testing.assert_allclose(rows, encoder.encode_texts(["red", "a green ball", "red"]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert answer.json()["model"] == "fake"
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    np.testing.assert_array_equal(rows_of(ask(client, "red")), rows[:1])


def test_images_and_texts_are_in_one_space(client):
    images = rows_of(ask(client, [encoded("red"), f"data:image/png;base64,{encoded('blue')}"], modality="image"))
    texts = rows_of(ask(client, ["red", "blue", "green"]))
    assert (images @ texts.T).argmax(axis=1).tolist() == [0, 1]


def test_base64_is_the_same_as_numbers(client):
    reply = ask(client, ["red"], encoding_format="base64").json()["data"][0]["embedding"]
    raw = base64.b64decode(reply)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(rows_of(ask(client, "red"))[0].tolist())


def test_the_model_is_chosen_and_its_dimensions_may_be_said(client, encoder):
    assert ask(client, "red", model="other").json()["model"] == "other"
    assert rows_of(ask(client, "red", dimensions=encoder.embed_dim)).shape == (1, encoder.embed_dim)
    assert fields_of(ask(client, "red", dimensions=3)) == {"dimensions"}
    assert "known: fake, other" in problem_of(ask(client, "red", model="ada"), "unknown-name")["detail"]


@pytest.mark.parametrize("given", [[], "", [""], None, 5, [1, 2, 3], [[1, 2]], {"text": "red"}])
def test_an_invalid_text_is_reported_with_its_field(shared_client, given):
    assert ask(shared_client, given).json()["errors"][0]["field"].startswith("input")


@pytest.mark.parametrize(
    ("more", "field"),
    [({"modality": "sound"}, "modality"), ({"encoding_format": "int8"}, "encoding_format"), ({"odd": 1}, "odd")],
)
def test_unknown_fields_are_reported(shared_client, more, field):
    assert fields_of(ask(shared_client, "red", **more)) == {field}


def test_too_many_or_too_long_texts_are_refused(make_client):
    client = make_client(max_labels=3)
    problem_of(ask(client, ["a"] * 4), "too-large")
    assert fields_of(ask(client, ["a", "b" * 10_001])) == {"input.1"}
    assert rows_of(ask(client, ["a"] * 3)).shape[0] == 3


def test_unreadable_images_are_reported_by_index_and_a_single_one_by_its_type(client):
    answer = ask(client, [encoded("red"), base64.b64encode(b"no picture").decode(), "%%%"], modality="image")
    assert fields_of(answer) == {"input.1", "input.2"}
    problem_of(ask(client, base64.b64encode(b"no picture").decode(), modality="image"), "not-an-image")
    problem_of(ask(client, [encoded("red")] * 9, modality="image"), "too-large")


def test_urls_are_fetched_only_where_that_is_allowed(client):
    answer = ask(client, "https://images.example.com/cat.jpg", modality="image")
    assert fields_of(answer) == {"input"}
    assert "DEIXIS_ALLOW_IMAGE_URLS" in answer.json()["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "", "multipart/form-data; boundary=b"])
def test_it_is_json(shared_client, content_type):
    answer = shared_client.post("/v1/embeddings", content=b"{}", headers={"content-type": content_type})
    problem_of(answer, "unsupported-media-type")
    broken = shared_client.post("/v1/embeddings", content=b'{"input": ', headers={"content-type": "application/json"})
    problem_of(broken, "malformed-request")


def test_what_is_embedded_is_not_kept(client, encoder):
    for _ in range(2):
        ask(client, ["something private"])
    assert encoder.encoded_texts.count("something private") == 2
