"""Malformed requests and failures of the service: each gets a problem response, and the service keeps serving."""

import base64
import json

import pytest
import structlog

from app.encoders.fake import FakeEncoder
from tests.api.problems import STATUS_BY_TYPE, fields_of, problem_of
from tests.conftest import picture

CLASSIFY = "/v1/classify"
PETS = "/v1/label-sets/pets"
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
PNG = "image/png"
IMAGE = json.dumps({"base64": base64.b64encode(picture()).decode()})


@pytest.fixture
def client(shared_client):
    return shared_client


def form(*parts, end=True):
    """Return a body of parts, each given as its headers and its content."""
    body = b"".join(b"--b\r\n" + headers + b"\r\n\r\n" + content + b"\r\n" for headers, content in parts)
    return body + (b"--b--\r\n" if end else b"")


def field(name, content=b"a", extra=b""):
    return b'Content-Disposition: form-data; name="' + name + b'"' + extra, content


def file(name=b"image", content=None, extra=b""):
    headers = b'Content-Disposition: form-data; name="' + name + b'"; filename="a.png"' + extra
    return headers, picture() if content is None else content


def classify_json(body):
    return "POST", CLASSIFY, JSON, body


def classify_form(body, media_type=FORM):
    return "POST", CLASSIFY, media_type, body


def label_set(body):
    return "PUT", PETS, JSON, body


def with_image(fields):
    return classify_json('{"images": [' + IMAGE + "], " + fields + "}")


def with_labels(labels):
    return with_image(f'"labels": {labels}')


DEEP = "[" * 100_000
HUGE_INT = "1" * 10_000

# Each is a client error; the value is the method, the path, the content type and the body.
MALFORMED = {
    # No JSON
    "json: empty": classify_json(""),
    "json: a word": classify_json("labels"),
    "json: cut short": classify_json('{"images": [{"base64": "'),
    "json: something behind": classify_json('{"images": [], "labels": ["a"]} x'),
    "json: two keys without a comma": classify_json('{"images": [] "labels": []}'),
    "json: single quotes": classify_json("{'images': []}"),
    "json: nested 100,000 deep": classify_json(DEEP),
    "json: nested 100,000 deep and closed": classify_json(DEEP + "]" * 100_000),
    "json: objects nested 100,000 deep": classify_json('{"a":' * 100_000),
    "json: labels nested deep": with_labels(DEEP),
    "json: not UTF-8": classify_json(b'{"images": [], "labels": ["\xff\xfe"]}'),
    "json: UTF-16": classify_json('{"images": []}'.encode("utf-16")),
    "json: a byte order mark": classify_json("\ufeff{}"),
    "json: a lone surrogate": with_labels('["\\ud800"]'),
    "json: a lone surrogate as a field": classify_json('{"\\ud800": 1}'),
    "json: a control character": with_labels('["a\nb"]'),
    "json: NUL bytes": classify_json(b"\0" * 100),
    "json: Infinity": classify_json("Infinity"),
    # JSON of another shape
    "shape: null": classify_json("null"),
    "shape: a number": classify_json("1"),
    "shape: a list": classify_json("[]"),
    "shape: no images": classify_json('{"labels": ["a"]}'),
    "shape: empty images": classify_json('{"images": [], "labels": ["a"]}'),
    "shape: images null": classify_json('{"images": null, "labels": ["a"]}'),
    "shape: images of text": classify_json('{"images": "abc", "labels": ["a"]}'),
    "shape: an image of text": classify_json('{"images": ["abc"], "labels": ["a"]}'),
    "shape: base64 null": classify_json('{"images": [{"base64": null}], "labels": ["a"]}'),
    "shape: labels NaN": with_labels("NaN"),
    "shape: a label NaN": with_labels("[NaN]"),
    "shape: a label 1e999": with_labels("[1e999]"),
    "shape: a huge number as label": with_labels(f"[{HUGE_INT}]"),
    "shape: labels a number": with_labels("7"),
    "shape: labels an object": with_labels('{"a": 1}'),
    "shape: a huge top_k": with_image(f'"labels": ["a"], "top_k": {HUGE_INT}'),
    "shape: top_k NaN": with_image('"labels": ["a"], "top_k": NaN'),
    "shape: explain maybe": with_image('"labels": ["a"], "explain": "maybe"'),
    "shape: model a list": with_image('"labels": ["a"], "model": ["fake"]'),
    "shape: a field of another service": with_image('"candidate_labels": ["a"]'),
    # Label sets
    "label set: empty": label_set(""),
    "label set: no JSON": label_set("cat, dog"),
    "label set: nested 100,000 deep": label_set(DEEP),
    "label set: objects nested 100,000 deep": label_set('{"classes":' * 100_000),
    "label set: not UTF-8": label_set(b'{"classes": ["\xff"]}'),
    "label set: a lone surrogate": label_set('{"classes": ["\\ud800"]}'),
    "label set: a lone surrogate as a field": label_set('{"\\ud800": 1}'),
    "label set: a lone surrogate in a class": label_set('{"classes": [{"name": "a", "\\udfff": 1}]}'),
    "label set: a lone surrogate as templates": label_set('{"classes": ["a"], "templates": "\\ud800"}'),
    "label set: a lone surrogate in a template": label_set('{"classes": ["a"], "templates": "{} \\ud800"}'),
    "label set: a class NaN": label_set('{"classes": [NaN]}'),
    "label set: a huge number": label_set('{"classes": [' + HUGE_INT + "]}"),
    "label set: a number out of range": label_set('{"classes": [1e999]}'),
    "label set: null": label_set("null"),
    "label set: as a form": ("PUT", PETS, "application/x-www-form-urlencoded", "classes=cat"),
    "label set: without a content type": ("PUT", PETS, None, '{"classes": '),
    "label set: as text": ("PUT", PETS, "text/plain", '{"classes": ["cat"]}'),
    "label set: as curl sends it": (
        "POST",
        PETS + "/classes",
        "application/x-www-form-urlencoded",
        '{"classes": ["a"]}',
    ),
    "label set: as other JSON": ("PUT", PETS, "application/merge-patch+json", '{"classes": ["cat"]}'),
    "label set: add as text": ("POST", PETS + "/classes", "text/plain", '{"classes": ["cat"]}'),
    "label set: add nested 100,000 deep": ("POST", PETS + "/classes", JSON, '{"classes":' * 100_000),
    "label set: add nothing": ("POST", PETS + "/classes", JSON, "{}"),
    # Forms
    "form: empty": classify_form(b""),
    "form: no boundary": classify_form(form(file()), "multipart/form-data"),
    "form: an empty boundary": classify_form(form(file()), "multipart/form-data; boundary="),
    "form: another boundary": classify_form(form(file()), "multipart/form-data; boundary=c"),
    "form: a boundary of 10,000 characters": classify_form(b"", "multipart/form-data; boundary=" + "b" * 10_000),
    "form: not a form": classify_form(b"hello"),
    "form: no parts": classify_form(form()),
    "form: no image": classify_form(form(field(b"labels"))),
    "form: a part without a name": classify_form(form((b"Content-Disposition: form-data", b"a"))),
    "form: a part with an empty name": classify_form(form(file(), field(b"labels"), field(b""))),
    "form: a part without headers": classify_form(b"--b\r\n\r\na\r\n--b--\r\n"),
    "form: a broken header": classify_form(form((b"no colon here", b"a"))),
    "form: an image that is no file": classify_form(form(field(b"image"), field(b"labels"))),
    "form: labels as a file": classify_form(form(file(), file(b"labels", b"a"))),
    "form: an unknown file": classify_form(form(file(), field(b"labels"), file(b"mask"))),
    "form: cut short in a header": classify_form(form(file())[:20]),
    "form: only its beginning": classify_form(b"--b\r\n"),
    "form: labels nested deep": classify_form(form(file(), field(b"labels", DEEP.encode()))),
    "form: an unknown field in odd bytes": classify_form(form(file(), field(b"\xff\xfe"))),
    "form: an odd character set": classify_form(form(file(b"xn--a-\xff"), field(b"labels")), FORM + "; charset=idna"),
    "form: another odd character set": classify_form(form(file(), field(b"\xff-a")), FORM + "; charset=punycode"),
    "form: a character set that makes surrogates": classify_form(
        form(file(), field(b"labels"), field(b"+2AA-")), FORM + "; charset=utf-7"
    ),
    "form: a label that is a surrogate": classify_form(
        form(file(), field(b"labels", b"+2AA-")), FORM + "; charset=utf-7"
    ),
    "form: a template that is a surrogate": classify_form(
        form(file(), field(b"labels"), field(b"template", b"+2AA-")), FORM + "; charset=utf-7"
    ),
    "form: a model that is a surrogate": classify_form(
        form(file(), field(b"labels"), field(b"model", b"+2AA-")), FORM + "; charset=utf-7"
    ),
    "form: a label set that is a surrogate": classify_form(
        form(file(), field(b"label_set", b"+2AA-")), FORM + "; charset=utf-7"
    ),
    # Images as the body
    "image: empty": ("POST", CLASSIFY + "?labels=a", PNG, b""),
    "image: no labels": ("POST", f"{CLASSIFY}?method=zero-shot", PNG, picture()),
    "image: labels nested deep": ("POST", CLASSIFY + "?labels=" + "[" * 30_000, PNG, picture()),
    "image: labels in odd bytes": ("POST", CLASSIFY + "?labels=a&%ff=%fe", PNG, picture()),
    "image: labels that are no array": ("POST", CLASSIFY + "?labels=[a", PNG, picture()),
    "image: cut short": ("POST", CLASSIFY + "?labels=a", PNG, picture()[:50]),
    "image: an SVG": ("POST", CLASSIFY + "?labels=a", "image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    # Content types
    "type: none": ("POST", CLASSIFY + "?labels=a", None, b"no image"),
    "type: text": ("POST", CLASSIFY, "text/plain", "labels=a"),
    "type: an urlencoded form": ("POST", CLASSIFY, "application/x-www-form-urlencoded", "labels=a"),
    "type: octets": ("POST", CLASSIFY, "application/octet-stream", b"no image"),
    "type: other JSON": ("POST", CLASSIFY, "application/vnd.api+json", "{}"),
    "type: only a semicolon": ("POST", CLASSIFY, ";", b"no image"),
    "type: a form of another kind": ("POST", CLASSIFY, "multipart/mixed; boundary=b", form(file())),
    # Routes and methods
    "route: none": ("GET", "/v2/classify", None, None),
    "route: a slash too many": ("GET", PETS + "/", None, None),
    "route: a slash too many to classify": ("POST", CLASSIFY + "/", JSON, "{}"),
    "route: a slash too many behind a probe": ("GET", "/healthz/", None, None),
    "route: odd bytes": ("GET", "/%ff%fe", None, None),
    "route: a line break": ("GET", "/a%0d%0ab", None, None),
    "route: up": ("GET", "/docs/..%2f..%2fetc%2fpasswd", None, None),
    "method: GET": ("GET", CLASSIFY, None, None),
    "method: DELETE": ("DELETE", CLASSIFY, None, None),
    "method: POST": ("POST", PETS, JSON, "{}"),
    "method: an invented one": ("BREW", "/healthz", None, None),
    "name: odd bytes": ("GET", "/v1/label-sets/%ff%fe", None, None),
    "name: a NUL": ("GET", "/v1/label-sets/a%00b", None, None),
    "name: a class of odd bytes": ("DELETE", PETS + "/classes/%00%ff", None, None),
    "list: after a NUL": ("GET", "/v1/label-sets?after=%00", None, None),
}


def send(client, method, path, media_type, body):
    headers = {} if media_type is None else {"content-type": media_type}
    return client.request(method, path, content=body, headers=headers)


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_gets_a_client_error_as_a_problem(client, request_):
    response = send(client, *request_)
    assert 400 <= response.status_code < 500
    assert problem_of(response)["type"] in STATUS_BY_TYPE


def test_the_service_still_serves_after_every_malformed_request(make_client, encoder):
    client = make_client()
    for request_ in MALFORMED.values():
        send(client, *request_)
    response = send(client, "POST", CLASSIFY + "?labels=red,blue", PNG, picture("red"))
    assert response.json()["results"][0]["predictions"][0]["label"] == "red"
    assert encoder.image_batches == [1]


# --- problem types and details --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("json: cut short", "malformed-request"),
        ("json: nested 100,000 deep", "malformed-request"),
        ("json: not UTF-8", "malformed-request"),
        ("shape: null", "invalid-field"),
        ("shape: no images", "invalid-field"),
        ("label set: no JSON", "malformed-request"),
        ("label set: nested 100,000 deep", "malformed-request"),
        ("label set: not UTF-8", "malformed-request"),
        ("label set: a huge number", "malformed-request"),
        ("label set: as a form", "unsupported-media-type"),
        ("label set: without a content type", "unsupported-media-type"),
        ("label set: as text", "unsupported-media-type"),
        ("label set: as curl sends it", "unsupported-media-type"),
        ("label set: as other JSON", "unsupported-media-type"),
        ("label set: add as text", "unsupported-media-type"),
        ("form: no boundary", "malformed-request"),
        ("form: a part without a name", "malformed-request"),
        ("form: labels nested deep", "malformed-request"),
        ("form: no image", "invalid-field"),
        ("form: an image that is no file", "invalid-field"),
        ("image: empty", "not-an-image"),
        ("image: cut short", "not-an-image"),
        ("type: none", "unsupported-media-type"),
        ("type: text", "unsupported-media-type"),
        ("route: none", "unknown-route"),
        ("route: a slash too many", "unknown-route"),
        ("route: a slash too many to classify", "unknown-route"),
        ("route: a slash too many behind a probe", "unknown-route"),
        ("method: GET", "method-not-allowed"),
    ],
)
def test_a_malformed_request_gets_the_type_of_its_fault(client, name, slug):
    problem_of(send(client, *MALFORMED[name]), slug)


@pytest.mark.parametrize("path", [f"{PETS}:describe", "/v1/databases/things:find", f"{PETS}/descriptions:write"])
def test_an_unknown_action_is_an_unknown_route(client, path):
    response = client.post(path, json={})
    problem_of(response, "unknown-route")
    assert "allow" not in response.headers


def test_the_allow_header_lists_the_methods_of_the_route(client):
    assert client.get(CLASSIFY).headers["allow"] == "POST"
    assert "GET" in client.request("BREW", "/healthz").headers["allow"]


@pytest.mark.parametrize("path", [PETS + "/", CLASSIFY + "/", "/healthz/", "/v1/label-sets/", "/docs/"])
def test_no_request_is_redirected(client, path):
    """A redirect would bypass a proxy's prefix, and make some clients send the body again."""
    for method in ("GET", "POST"):
        response = client.request(method, path, follow_redirects=False)
        problem_of(response, "unknown-route")
        assert "location" not in response.headers


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("label set: nested 100,000 deep", "recursion limit exceeded at line 1 column"),
        ("label set: objects nested 100,000 deep", "recursion limit exceeded at line 1 column"),
        ("label set: add nested 100,000 deep", "recursion limit exceeded at line 1 column"),
        ("label set: a huge number", "number out of range at line 1 column"),
        ("form: no boundary", "has no boundary; leave this header to the HTTP client"),
        ("form: an empty boundary", "has no boundary; leave this header to the HTTP client"),
        ("form: only its beginning", "ends before its last boundary"),
        ("form: not a form", "ends before its last boundary"),
    ],
)
def test_the_detail_says_where_and_why_a_body_cannot_be_parsed(client, name, reason):
    assert reason in problem_of(send(client, *MALFORMED[name]), "malformed-request")["detail"]


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;v=1"])
def test_parameters_and_the_case_of_a_content_type_do_not_matter(make_client, media_type):
    client = make_client()
    assert send(client, "PUT", PETS, media_type, '{"classes": ["cat"]}').status_code == 201
    assert send(client, "POST", PETS + "/classes", media_type, '{"classes": ["dog"]}').status_code == 200


def test_all_invalid_fields_are_reported_with_the_first_invalid_item_of_each_list(client):
    body = {"images": [{"base64": 1}, {}], "labels": ["a", 2], "top_k": "x", "lables": []}
    response = client.post(CLASSIFY, json=body)
    assert fields_of(response) == {"images.0.base64", "labels.1", "top_k", "lables"}


def test_a_problem_does_not_repeat_a_large_value_in_full(client):
    for response in (
        client.post(
            CLASSIFY, json={"images": [{"base64": "!" * 100_000}], "labels": ["x" * 100_000], "top_k": "y" * 100_000}
        ),
        client.put(PETS, json={"classes": ["x" * 100_000], "templates": "z" * 100_000}),
        client.put(PETS, json={"classes": ["cat"], "w" * 100_000: 1}),
        client.post(CLASSIFY + "?labels=a&model=" + "m" * 50_000, content=picture(), headers={"content-type": PNG}),
        client.get("/" + "p" * 50_000),
    ):
        problem_of(response)
        assert len(response.content) < 10_000


# --- server errors --------------------------------------------------------------------------------------------------


class Breaking(FakeEncoder):
    """Raises in the method that ``breaks`` names."""

    breaks = None

    def transform(self, image):
        self._break_if_set("transform")
        return super().transform(image)

    def encode_images(self, pixels):
        self._break_if_set("encode_images")
        return super().encode_images(pixels)

    def encode_texts(self, texts):
        self._break_if_set("encode_texts")
        return super().encode_texts(texts)

    def _break_if_set(self, method):
        if self.breaks == method:
            raise RuntimeError("CUDA error: a secret at /home/operator")


@pytest.mark.parametrize("method", ["transform", "encode_images", "encode_texts"])
def test_an_encoder_error_gives_500_without_internals_and_the_next_request_succeeds(make_client, method):
    encoder = Breaking()
    client = make_client(encoders=[encoder])
    encoder.breaks = method
    with structlog.testing.capture_logs() as logs:
        response = send(client, "POST", CLASSIFY + "?labels=red", PNG, picture("red"))
    members = problem_of(response, "internal-error")
    assert response.status_code == 500
    assert not any(word in response.text for word in ("secret", "CUDA", "Traceback", "RuntimeError", ".py"))
    # The health probe transforms an image too, and its loop reports the same error.
    errors = [entry["event"] for entry in logs if entry["log_level"] == "error" and entry["event"] != "loop_failed"]
    assert errors == ["unexpected_error"]
    assert [entry["status"] for entry in logs if entry["event"] == "request"] == [500]
    assert "request_id" in members["detail"]
    encoder.breaks = None
    assert send(client, "POST", CLASSIFY + "?labels=red", PNG, picture("red")).status_code == 200


def test_a_500_carries_the_request_id_of_the_caller(make_client):
    encoder = Breaking()
    client = make_client(encoders=[encoder])
    encoder.breaks = "encode_images"
    headers = {"content-type": PNG, "X-Request-ID": "mine-1"}
    response = client.post(CLASSIFY + "?labels=red", content=picture(), headers=headers)
    assert problem_of(response, "internal-error")["request_id"] == response.headers["x-request-id"] == "mine-1"


def test_a_database_failure_gives_503_and_readyz_reports_it(make_client):
    client = make_client()

    def fail(*_, **__):
        from app.errors import StoreError

        raise StoreError("the database at sqlite failed: disk I/O error; check the disk")

    service = client.app.state.service
    service.label_sets.get = service.label_sets.list = service.health.check_ready = fail
    for response in (client.get(PETS), client.get("/v1/label-sets"), client.get("/readyz")):
        assert "disk I/O error" in problem_of(response, "store-unavailable")["detail"]
    assert client.get("/healthz").status_code == 200
    assert send(client, "POST", CLASSIFY + "?labels=red", PNG, picture("red")).status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/classify", "POST"),
        ("/v1/label-sets/pets", "GET, PUT, DELETE"),
        ("/v1/label-sets/pets/images", "GET, POST, DELETE"),
        ("/v1/databases/things", "GET, PUT, DELETE"),
        ("/v1/jobs/1", "GET, DELETE"),
        ("/v1/label-sets/pets:evaluate", "POST"),
        ("/healthz", "GET, HEAD"),
        ("/openapi.json", "GET"),
    ],
)
def test_a_disallowed_method_is_reported_with_all_allowed_ones(client, path, allowed):
    for method in ("OPTIONS", "PATCH", "TRACE", "MADE-UP"):
        response = client.request(method, path)
        assert problem_of(response, "method-not-allowed")["detail"].endswith(f"allowed: {allowed}")
        assert response.headers["Allow"] == allowed


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/embeddings", {"type": "invalid_request_error", "param": None, "code": "body-too-large"}),
        ("/", "text"),
        ("/models/fake", "text"),
        ("/v1/zero-shot-image-classification", "text"),
        ("/v1/classify", None),
    ],
)
def test_a_problem_has_the_error_of_the_api_whose_path_it_is_also_before_its_route_is_known(make_client, path, error):
    client = make_client(max_request_bytes=1000, max_json_bytes=1000)
    members = problem_of(client.post(path, json={"input": "x" * 2000}), "body-too-large")
    if error == "text":
        error = members["detail"]
    elif error is not None:
        error = {"message": members["detail"], **error}
    assert members.get("error") == error
