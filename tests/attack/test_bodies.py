"""Malformed JSON and forms get a problem, and never an internal error."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import picture

ROUTES = [
    ("POST", "/v1/classify"),
    ("PUT", "/v1/label-sets/odd"),
    ("POST", "/v1/label-sets/pets/classes"),
    ("POST", "/v1/label-sets/pets:evaluate"),
    ("POST", "/v1/label-sets/pets/images"),
    ("POST", "/v1/label-sets/pets/descriptions:reject"),
    ("POST", "/v1/databases/things/search"),
    ("PUT", "/v1/databases/things"),
]
FIELDS = [
    *("labels", "classes", "images", "image", "base64", "url", "text", "label_set", "top_k", "options", "method"),
    *(
        "template",
        "templates",
        "name",
        "descriptions",
        "prompt",
        "ids",
        "limit",
        "folder",
        "files",
        "captions",
        "recall",
    ),
]

UNUSUAL_TEXTS = ["pets", "pets@1", "a, b", "\u0000", "\ud800", "../../etc/passwd", "x" * 300, "{}", "{0.__class__}"]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
    | st.sampled_from(UNUSUAL_TEXTS),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=20,
)


@pytest.fixture
def client_with_label_set(shared_client):
    shared_client.put("/v1/label-sets/pets", json={"classes": ["cat", "dog"]}).raise_for_status()
    return shared_client


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_random_json_gives_a_result_or_a_problem(client_with_label_set, method, path):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=6))
    def ask(body):
        content = json.dumps(body).encode()
        response = client_with_label_set.request(
            method, path, content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code < 500 or response.status_code == 501, response.text
        if response.status_code >= 400:
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["status"] == response.status_code

    ask()
    files = {"image": picture("red")}
    assert client_with_label_set.post("/classify", files=files, data={"labels": "red, blue"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "text",
    [
        *("[" * 100_000, '{"a":' * 100_000, "", "null", "NaN", "1e999999", "9" * 100_000, "{}x", '"'),
        *('{"labels": ["a"], "labels": ["b"]}', '{"a": "\\ud800"}', '{"\\u0000": 1}', "[1,]" * 1000),
    ],
)
def test_deep_or_broken_json_gives_a_problem(client_with_label_set, method, path, text):
    response = client_with_label_set.request(
        method, path, content=text.encode(), headers={"content-type": "application/json"}
    )
    assert response.status_code in {400, 413, 415, 422, 501}, response.text
    assert response.headers["content-type"] == "application/problem+json"


@given(st.binary(max_size=400))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_bytes_as_a_form_give_a_problem(shared_client, content):
    for content_type in ("multipart/form-data; boundary=b", "multipart/form-data"):
        body = b"--b\r\n" + content + b"\r\n--b--\r\n"
        response = shared_client.post("/v1/classify", content=body, headers={"content-type": content_type})
        assert response.status_code in {400, 413, 422}
        assert response.headers["content-type"] == "application/problem+json"
