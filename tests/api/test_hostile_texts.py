"""Texts that are slow to work on, in every field of every route that the OpenAPI document lists."""

import json
import threading
import time
from urllib.parse import quote

import httpx
import pytest

from app.main import create_app
from tests.api.live import live
from tests.conftest import picture

TEXTS = {
    "combining marks": "a" + "\u0301" * 60_000 + "\u0316" * 60_000,
    "combining marks within the limit": "a\u0301\u0316" * 3000,
    "a word of 100,000 letters": "x" * 100_000,
    "bidirectional and control characters": "\u202e\u2066\u200b\x00\x1b\x7f" * 10_000,
    "white space": " " * 100_000 + "x",
    "braces": "{}" * 50_000,
    "separators": ";,\n|/" * 20_000,
    "half of a surrogate pair": "\ud800" * 10_000,
}
# Of a request line; longer ones get 431.
MAX_URL_TEXT_CHARS = 600
MAX_HEALTH_S = 0.5
JSON = "application/json"
FORM = "multipart/form-data"


class Prober:
    """Asks /healthz without pause, and keeps the longest time that an answer took."""

    def __init__(self, address):
        self._client = httpx.Client(base_url=address, timeout=60)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest_s = 0.0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()
        self._client.close()

    def _run(self):
        while not self._stopped.is_set():
            began = time.perf_counter()
            assert self._client.get("/healthz").status_code == 200
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)


@pytest.fixture
def server(settings, encoder):
    app = create_app(settings, lambda _: [encoder])
    with live(app) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
        yield client


def test_no_text_in_any_field_blocks_the_service_or_makes_it_fail(server):
    document = server.get("/openapi.json").json()
    requests = list(hostile_requests(document))
    assert len({name for name, *_ in requests}) > 60
    slow, failed = [], []
    with Prober(str(server.base_url)) as prober:
        for name, method, path, options in requests:
            for _ in range(2):  # a machine that is busy with something else is slow once
                prober.slowest_s = 0.0
                status = server.request(method, path, **options).status_code
                if prober.slowest_s < MAX_HEALTH_S:
                    break
            else:
                slow.append((name, round(prober.slowest_s, 2)))
            if status >= 500 and status not in {501, 503}:
                failed.append((name, status))
    assert slow == []
    assert failed == []


def hostile_requests(document):
    """Yield a name, method, path and options of httpx for every text in every field."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = operation.get("parameters", [])
            texts = [p for p in parameters if p["in"] in {"path", "query"} and is_text(p["schema"], document)]
            plain = filled(path, parameters)
            for parameter in texts:
                for kind, text in TEXTS.items():
                    name = f"{method} {path} {parameter['name']}: {kind}"
                    cut = text[:MAX_URL_TEXT_CHARS].encode("utf-8", "replace").decode()
                    if parameter["in"] == "path":
                        yield name, method, filled(path, parameters, parameter["name"], quote(cut, safe="")), {}
                    else:
                        yield name, method, plain, {"params": {parameter["name"]: cut}}
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                yield from hostile_bodies(method, plain, path, media_type, content["schema"], document)


def filled(path, parameters, hostile=None, text=""):
    """Return the path with a text in one of its parameters, and ``x`` in the others."""
    for parameter in parameters:
        path = path.replace(f"{{{parameter['name']}}}", text if parameter["name"] == hostile else "x")
    return path


def hostile_bodies(method, plain, path, media_type, schema, document):
    for field, make in text_fields(schema, document):
        for kind, text in TEXTS.items():
            name = f"{method} {path} {media_type} {field}: {kind}"
            if media_type == JSON:
                yield name, method, plain, {"content": json.dumps(make(text)), "headers": {"content-type": JSON}}
            elif media_type == FORM and field != "image":
                value = text.encode("utf-8", "replace")
                files = [(field, (None, value)), ("image", ("a.png", picture(), "image/png"))]
                yield name, method, plain, {"files": files}


def resolved(schema, document):
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def variants(schema, document):
    schema = resolved(schema, document)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return [found for each in schema[key] for found in variants(each, document)]
    return [schema]


def is_text(schema, document):
    return any(each.get("type") == "string" for each in variants(schema, document))


def sample(schema, document):
    """Return a plausible value of a field that the request must have."""
    schema = variants(schema, document)[0]
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "string":
            return "x"
        case "array":
            return [sample(schema["items"], document)]
        case "object":
            return {name: sample(schema["properties"][name], document) for name in schema.get("required", [])}
        case "boolean":
            return False
    return 1


def text_fields(schema, document):
    """Yield the path of each text in a schema, and a function that returns a body with a text at that place."""
    for variant in variants(schema, document):
        match variant.get("type"):
            case "string":
                yield "", lambda text: text
            case "array":
                for field, make in text_fields(variant["items"], document):
                    yield f"[].{field}".rstrip("."), lambda text, make=make: [make(text)]
            case "object":
                base = {name: sample(variant["properties"][name], document) for name in variant.get("required", [])}
                for name, inner in variant.get("properties", {}).items():
                    for field, make in text_fields(inner, document):
                        yield (
                            f"{name}.{field}".rstrip("."),
                            lambda text, name=name, make=make, base=base: {**base, name: make(text)},
                        )
                yield "a field without a name", lambda text, base=base: {**base, text: 1}
