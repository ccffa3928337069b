"""Limits on bodies, images, labels and the queue: each is enforced, and the service keeps serving."""

import base64
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.problems import fields_of, problem_of
from tests.conftest import picture
from tests.gated import GatedEncoder

PNG = {"content-type": "image/png"}


@pytest.fixture
def client(shared_client):
    return shared_client


def ask(client, colours=("red",), labels="red,green,blue", **fields):
    files = [("image", (f"{colour}.png", picture(colour))) for colour in colours]
    return client.post("/v1/classify", files=files, data={"labels": labels, **fields})


def first_labels(response):
    assert response.status_code == 200, response.text
    return [each["predictions"][0]["label"] for each in response.json()["results"]]


def assert_serves(client):
    assert first_labels(ask(client, ["blue", "red"])) == ["blue", "red"]
    assert client.get("/readyz").status_code == 200


@pytest.fixture
def gated():
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


@pytest.fixture
def caller():
    """Sends a request beside the test's own."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


# --- bytes ---------------------------------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/v1/classify?labels=a", PNG),
    ("POST", "/v1/classify", {"content-type": "application/json"}),
    ("POST", "/v1/classify", {"content-type": "multipart/form-data; boundary=b"}),
    ("PUT", "/v1/label-sets/pets", {"content-type": "application/json"}),
    ("POST", "/v1/label-sets/pets/classes", {"content-type": "application/json"}),
    ("POST", "/nowhere", PNG),
]


@pytest.mark.parametrize(("method", "path", "headers"), ROUTES)
def test_a_body_that_says_it_is_too_long_is_refused_on_every_route(make_client, method, path, headers):
    client = make_client(max_request_bytes=5000, max_json_bytes=5000)
    members = problem_of(client.request(method, path, content=bytes(5001), headers=headers), "body-too-large")
    assert ("DEIXIS_MAX_REQUEST_BYTES" if "classify" in path else "send less at a time") in members["detail"]
    assert_serves(client)


@pytest.mark.parametrize(("method", "path", "headers"), ROUTES[:-1])
def test_a_body_that_turns_out_too_long_is_refused_on_every_route_that_reads_it(make_client, method, path, headers):
    client = make_client(max_request_bytes=5000, max_json_bytes=5000)
    chunks = (bytes(1000) for _ in range(6))
    response = client.request(method, path, content=chunks, headers=headers)
    assert "content-length" not in response.request.headers
    problem_of(response, "body-too-large")
    assert_serves(client)


def test_a_body_of_just_the_allowed_length_is_read(make_client):
    image = picture("red")
    client = make_client(max_request_bytes=len(image))
    for content in (image, iter([image[:10], image[10:]])):
        response = client.post("/v1/classify?labels=red,blue", content=content, headers=PNG)
        assert first_labels(response) == ["red"]


def test_a_text_field_of_a_form_has_a_smaller_limit_than_a_file(client):
    problem_of(ask(client, labels="x" * (5 * 1024 * 1024)), "too-large")
    assert_serves(client)


# --- numbers of things ---------------------------------------------------------------------------------------------


def as_json(client, images):
    body = {"images": [{"base64": base64.b64encode(each).decode()} for each in images], "labels": ["red", "blue"]}
    return client.post("/v1/classify", json=body)


def test_the_maximum_number_of_images_is_accepted_and_one_more_is_rejected(make_client, encoder):
    client = make_client()
    assert first_labels(ask(client, ["red"] * 8)) == ["red"] * 8
    assert first_labels(as_json(client, [picture("blue")] * 8)) == ["blue"] * 8
    encoder.image_batches.clear()
    for count in (9, 10, 50):
        for response in (ask(client, ["red"] * count), as_json(client, [picture()] * count)):
            assert "DEIXIS_MAX_IMAGES_PER_REQUEST" in problem_of(response, "too-large")["detail"]
    assert encoder.image_batches == []
    assert_serves(client)


def test_more_labels_than_allowed_are_refused_in_every_form(make_client):
    client = make_client(max_labels=3)
    labels = ["red", "green", "blue", "black"]
    body = {"images": [{"base64": ""}], "labels": labels}
    for response in (
        ask(client, labels=json.dumps(labels)),
        ask(client, labels=labels),
        client.post("/v1/classify", json=body),
        client.post("/v1/classify?labels=" + ",".join(labels), content=picture(), headers=PNG),
    ):
        assert "DEIXIS_MAX_LABELS" in problem_of(response, "too-large")["detail"]
    assert_serves(client)


def test_as_many_labels_as_allowed_may_each_be_a_field_of_a_form(client):
    labels = [f"label {number}" for number in range(1000)]
    assert ask(client, labels=labels, top_k=1).status_code == 200


def test_more_fields_than_any_request_needs_are_refused(client):
    problem_of(ask(client, labels=["a"] * 5000), "too-large")
    assert_serves(client)


JSON = {"content-type": "application/json"}


def test_a_list_longer_than_any_setting_allows_is_refused_without_looking_at_all_of_it(client):
    """Millions of short names are checked for minutes otherwise."""
    items, image = "[" + ",".join(['"a"'] * 300_000) + "]", '{"base64": ""}'
    numbers = "{" + ",".join(f'"{number}": -1' for number in range(300_000)) + "}"
    for method, path, body in (
        ("POST", "/v1/classify", f'{{"images": [{image}], "labels": {items}}}'),
        ("POST", "/v1/classify", f'{{"images": [{",".join([image] * 300_000)}], "labels": ["a"]}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": {items}}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": [{{"name": "a", "descriptions": {items}}}]}}'),
        ("PUT", "/v1/databases/pets", f'{{"captions": {items}}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": ["a"], "priors": {numbers}}}'),
        ("PATCH", "/v1/label-sets/pets/thresholds", f'{{"thresholds": {numbers}}}'),
        ("POST", "/v1/embeddings", f'{{"input": {items}}}'),
    ):
        response = client.request(method, path, content=body, headers=JSON)
        assert "100000" in problem_of(response, "too-large")["detail"]
        assert len(response.content) < 2000
    assert_serves(client)


MANY = ",".join(f'"{number}": 1' for number in range(100_000))
WRONG = ",".join(["1"] * 90_000)
NO_NUMBERS = ",".join(f'"{number}": "x"' for number in range(99_000))
FULL = ",".join([f"{{{','.join(f'{chr(34)}{letter}{chr(34)}: 1' for letter in 'abcdefgh')}}}"] * 40_000)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/label-sets/pets", f"{{{MANY}}}"),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": [{WRONG}]}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": [{FULL}]}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": [{{{MANY}}}]}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": [{{"name": "a", "synonyms": [{WRONG}]}}]}}'),
        ("PUT", "/v1/label-sets/pets", f'{{"classes": ["a"], "priors": {{{NO_NUMBERS}}}}}'),
        ("PATCH", "/v1/label-sets/pets/thresholds", f'{{"thresholds": {{{NO_NUMBERS}}}}}'),
        ("PATCH", "/v1/label-sets/pets/thresholds", f'{{"thresholds": {{"a": 0.5, {NO_NUMBERS}}}}}'),
        ("POST", "/v1/label-sets/pets/classes", f'{{"classes": [{FULL}]}}'),
        ("POST", "/v1/label-sets/pets/descriptions:generate", f'{{"classes": [{WRONG}]}}'),
        ("POST", "/v1/label-sets/pets/descriptions:accept", f'{{"ids": [{NO_NUMBERS.replace(": ", ",")}]}}'),
        ("PUT", "/v1/databases/pets", f"{{{MANY}}}"),
        ("PUT", "/v1/databases/pets", f'{{"captions": [{WRONG}]}}'),
        ("PUT", "/v1/databases/pets", f'{{"files": [{WRONG}]}}'),
        ("POST", "/v1/databases/pets/search", f"{{{MANY}}}"),
        ("POST", "/v1/classify", f"{{{MANY}}}"),
        ("POST", "/v1/classify", f'{{"images": [{WRONG}], "labels": [{WRONG}]}}'),
        ("POST", "/v1/classify", f'{{"images": [{FULL}], "labels": ["a"]}}'),
        ("POST", "/v1/classify", f'{{"images": [{{"base64": ""}}], "labels": ["a"], "options": {{{MANY}}}}}'),
        ("POST", "/v1/embeddings", f"{{{MANY}}}"),
        ("POST", "/v1/embeddings", f'{{"input": [{WRONG}]}}'),
        ("POST", "/v1/zero-shot-image-classification", f'{{"inputs": "a", "parameters": {{{MANY}}}}}'),
        (
            "POST",
            "/v1/zero-shot-image-classification",
            f'{{"inputs": "a", "parameters": {{"candidate_labels": [{WRONG}]}}}}',
        ),
    ],
    ids=str,
)
def test_of_very_many_errors_only_a_few_are_reported(client, method, path, body):
    """To tell each takes minutes and gigabytes, and whoever may write could stop the service."""
    response = client.request(method, path, content=body, headers=JSON)
    assert 1 <= len(problem_of(response, "invalid-field")["errors"]) < 20
    assert len(response.content) < 5000


def test_a_few_unknown_fields_are_reported_by_name(client):
    response = client.put("/v1/label-sets/pets", json={"classes": ["a"], "template": "{}", "synonyms": []})
    assert {each["field"] for each in problem_of(response, "invalid-field")["errors"]} == {"template", "synonyms"}
    many = client.put("/v1/label-sets/pets", json={str(number): 1 for number in range(12)})
    (reply,) = problem_of(many, "invalid-field")["errors"]
    assert "12 fields" in reply["problem"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"images": [{"base64": ""}], "labels": [' + b",".join([b'"a"'] * 1_000_003) + b"]}",
        b'{"images": [' + b"," * 1_000_001,
        b"," * 1_000_001,
        b'{"images": [{"base64": ""}], "labels": ["a"], ' + b"'1': 1, " * 1_000_001,
    ],
    ids=["labels", "no JSON", "nothing but commas", "fields"],
)
def test_json_with_more_commas_than_any_request_has_is_refused_before_it_is_parsed(client, monkeypatch, body):
    """Parsing it would hold the interpreter, and with it every other request."""
    monkeypatch.setattr("app.api.forms.ClassifyBody.model_validate_json", lambda *_, **__: pytest.fail("it was parsed"))
    response = client.post("/v1/classify", content=body, headers=JSON)
    assert "1,000,000" in problem_of(response, "too-large")["detail"]


def test_commas_inside_of_names_are_not_too_many(client):
    labels = ["," * 100 + str(number) for number in range(1000)]
    response = client.post(
        "/v1/classify", json={"images": [{"base64": base64.b64encode(picture()).decode()}], "labels": labels}
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    "labels", [["," * 100_001], ["," * 50_001] * 2, ["a," * 120 + "a"] * 1000], ids=["one", "two", "a thousand fields"]
)
def test_labels_in_text_with_more_commas_than_any_list_has_are_refused_before_they_are_split(
    client, monkeypatch, labels
):
    monkeypatch.setattr("app.names.labels._labels_of", lambda _: pytest.fail("they were split"))
    problem_of(ask(client, labels=labels), "too-large")


def test_of_very_many_invalid_names_a_hundred_are_reported_and_the_others_counted(make_client):
    response = make_client(max_label_chars=1).put("/v1/label-sets/pets", json={"classes": ["long"] * 5000})
    members = problem_of(response, "invalid-field")
    assert len(members["errors"]) == 100
    assert members["detail"].endswith("; and 9,989 more")  # each is too long, and all but the first are repeated
    assert members["detail"].count("classes.") == 10
    assert len(response.content) < 20_000


def test_fields_with_long_names_make_no_long_answer(client):
    options = {f"{number}{'x' * 9000}": "x" for number in range(100)}
    body = {"images": [{"base64": ""}], "labels": ["a"], "options": options}
    response = client.post("/v1/classify", json=body)
    assert len(problem_of(response, "invalid-field")["errors"]) == 100
    assert len(response.content) < 60_000


def test_a_label_that_is_too_long_is_reported_with_its_index(make_client):
    client = make_client(max_label_chars=5)
    assert fields_of(ask(client, labels="red,yellow,blue")) == {"labels.1"}
    assert_serves(client)


# --- a full queue --------------------------------------------------------------------------------------------------


def test_when_the_queue_is_full_the_answer_is_503_at_once_and_later_requests_are_served(make_client, gated, caller):
    client = make_client(encoders=[gated], max_queued_images=3, max_images_per_request=3)
    gated.images_open.clear()
    admitted = caller(ask, client, ["red", "blue"])
    assert gated.images_entered.acquire(timeout=10)
    response = ask(client, ["red", "blue"])  # answered although nothing moves
    members = problem_of(response, "overloaded")
    assert "2 of 3 places" in members["detail"]
    assert "DEIXIS_MAX_QUEUED_IMAGES" in members["detail"]
    assert int(response.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    one_more = caller(ask, client, ["green"])  # for which there is room
    gated.open()
    assert first_labels(admitted.result(10)) == ["red", "blue"]
    assert first_labels(one_more.result(10)) == ["green"]
    assert_serves(client)


def test_a_full_queue_of_one_model_does_not_refuse_for_another(make_client, gated, encoder, caller):
    encoder.name = "another"
    client = make_client(encoders=[gated, encoder], max_queued_images=1, max_images_per_request=1)
    gated.images_open.clear()
    admitted = caller(ask, client, ["red"])
    assert gated.images_entered.acquire(timeout=10)
    problem_of(ask(client, ["red"]), "overloaded")
    assert first_labels(ask(client, ["red"], model="another")) == ["red"]
    gated.open()
    assert first_labels(admitted.result(10)) == ["red"]


# --- the deadline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["images", "texts"])
def test_a_request_that_takes_too_long_gets_504_and_the_next_is_served(make_client, gated, tower):
    client = make_client(encoders=[gated], request_timeout_s=0.3, max_queued_images=2, max_images_per_request=2)
    gate = {"images": gated.images_open, "texts": gated.texts_open}[tower]
    gate.clear()
    for _ in range(3):  # more than would fit if their places were lost
        members = problem_of(ask(client, ["red", "blue"], template="{}"), "deadline-exceeded")
        assert "DEIXIS_REQUEST_TIMEOUT_S" in members["detail"]
    gated.open()
    # On a busy machine a fraction of a second may pass without any fault.
    assert any(ask(client, template="{}").status_code == 200 for _ in range(20))
    assert_serves(client)
    (model,) = client.get("/v1/models").json()["models"]
    assert model["queued_images"] == 0


def test_a_form_needs_no_temporary_folder(client, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    image = picture("red", (64, 64), "BMP") + bytes(3 * 2**20)  # BMP ignores what follows the pixels
    files = [("image", ("red.bmp", image))] * 4
    response = client.post("/v1/classify", files=files, data={"labels": "red,green"})
    assert first_labels(response) == ["red"] * 4
    assert (
        client.put("/v1/label-sets/spooled", json={"classes": [{"name": "red"}, {"name": "green"}]}).status_code == 201
    )
    response = client.post("/v1/label-sets/spooled/images", files=files[:1], data={"class": ["red"]})
    assert response.status_code == 201, response.text


def test_a_form_needs_no_file_descriptors(client, monkeypatch):
    opened = []
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *args, **options: opened.append(args))
    files = [("image", ("red.bmp", picture("red", (64, 64), "BMP") + bytes(2 * 2**20)))] * 8
    assert first_labels(client.post("/v1/classify", files=files, data={"labels": "red,green"})) == ["red"] * 8
    assert opened == []
