"""Reports about a service under way: health, crowds, clients that leave, time limits, proxies and memory."""

import gc
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from app.api.connections import ConnectionLimits, bounded
from app.encoders.fake import FakeEncoder
from app.main import create_app
from tests.api.live import live
from tests.api.problems import problem_of
from tests.conftest import picture
from tests.field.asking import best_of, classify, embed, results_of
from tests.field.reports import report
from tests.gated import GatedEncoder


class FlawedEncoder(FakeEncoder):
    """Raises ``fault`` for green images."""

    fault: BaseException | None = None

    def encode_images(self, pixels):
        if self.fault is not None and any((image == (0, 128, 0)).all() for image in pixels):
            raise self.fault
        return super().encode_images(pixels)


@pytest.fixture
def flawed():
    return FlawedEncoder()


@pytest.fixture
def gated():
    encoder = GatedEncoder()
    yield encoder
    encoder.open()


@pytest.fixture
def serve(settings, gated):
    """A function that serves the gated encoder behind a socket."""

    @contextmanager
    def start(**changes):
        app = create_app(settings.model_copy(update=changes), lambda _: [gated])
        with (
            live(app, http=bounded(ConnectionLimits(100, 20, 20)), ws="none") as (host, port),
            httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as client,
        ):
            yield client
            gated.open()

    return start


def until(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def admitted(client):
    """Return the number of images that wait or run."""
    (model,) = client.get("/v1/models").json()["models"]
    return model["queued_images"]


def leave(client, image, *, sent=1.0, once=lambda: None):
    """Send a share of an upload, and close the connection without reading."""
    request = client.build_request("POST", "/v1/classify", files={"image": image}, data={"labels": "red,blue"})
    body = request.read()
    head = f"POST /v1/classify HTTP/1.1\r\nHost: {request.headers['host']}\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: {request.headers['content-type']}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
        connection.sendall(head.encode() + body[: round(sent * len(body))])
        once()


# --- failures and health ---------------------------------------------------------------------------------------------


@report("michaelfeil/infinity#242", "After one exception of the model, the server accepted no further request.")
def test_after_an_error_of_the_model_the_next_request_is_answered(make_client, flawed):
    client = make_client([flawed])
    flawed.fault = ValueError("shape '[2, 512]' is invalid for input of size 524288")
    problem_of(classify(client, picture("green")), "internal-error")
    assert best_of(classify(client, picture("red"))) == ["red"]
    assert client.get("/healthz").status_code == 200


@report("Lightning-AI/LitServe#532", "A worker crashed, and the server stayed up and said that it was healthy.")
def test_the_death_of_the_worker_is_seen_in_health_and_is_not_final(make_client, flawed, monkeypatch):
    monkeypatch.setattr("app.models.queue._RESTART_AFTER_S", 3.0)  # time to ask for its health
    client = make_client([flawed])
    flawed.fault = SystemExit("killed")
    problem_of(classify(client, picture("green")), "not-ready")
    assert "restarted" in problem_of(client.get("/healthz"), "not-ready")["detail"]
    until(lambda: client.get("/healthz").status_code == 200)
    assert best_of(classify(client, picture("red"))) == ["red"]


@report(
    "openvinotoolkit/model_server#4503", "The servable stayed up while every request hung, until somebody restarted it."
)
def test_a_model_that_hangs_is_seen_in_health(serve, gated):
    with serve(stall_timeout_s=0.2) as client, ThreadPoolExecutor() as pool:
        gated.images_open.clear()
        waiting = pool.submit(classify, client, picture("red"))
        until(lambda: client.get("/healthz").status_code == 503)
        problem_of(client.get("/readyz"), "not-ready")
        gated.open()
        assert best_of(waiting.result()) == ["red"]
        until(lambda: client.get("/healthz").status_code == 200)


@report("immich-app/immich#25706", "Searches by text failed on a fresh server until an image had been uploaded.")
def test_the_first_request_of_a_service_may_be_about_texts(make_client):
    client = make_client()
    assert len(embed(client, ["a cat"]).json()["data"]) == 1


# --- crowds and clients that leave -----------------------------------------------------------------------------------


@report("bentoml/BentoML#3669", "Three requests at the same time broke the server, and all later ones failed.")
def test_requests_at_the_same_time_are_all_answered(make_client):
    client = make_client()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda colour: classify(client, picture(colour)), ["red", "green", "blue"] * 4))
    assert [best_of(answer) for answer in answers] == [["red"], ["green"], ["blue"]] * 4


@report("bentoml/BentoML#4670", "Requests that arrived together were computed one by one.")
def test_requests_that_arrive_together_are_one_batch(serve, gated):
    with serve(image_batch=8) as client, ThreadPoolExecutor(6) as pool:
        gated.images_open.clear()
        answers = [pool.submit(classify, client, picture("red"))]
        assert gated.images_entered.acquire(timeout=20)
        answers += [pool.submit(classify, client, picture("blue")) for _ in range(5)]
        until(lambda: admitted(client) >= 5)
        gated.open()
        assert [best_of(answer.result()) for answer in answers] == [["red"], *[["blue"]] * 5]
    assert max(gated.image_batches) > 1


@report("Lightning-AI/LitServe#165", "The work for a client that had gone was done all the same.")
def test_images_of_a_client_that_left_are_not_encoded(serve, gated):
    with serve(image_batch=1) as client, ThreadPoolExecutor() as pool:
        gated.images_open.clear()
        first = pool.submit(classify, client, picture("red"))
        assert gated.images_entered.acquire(timeout=20)
        leave(client, picture("blue"), once=lambda: until(lambda: admitted(client) == 2))
        until(lambda: admitted(client) == 1)
        gated.open()
        assert best_of(first.result()) == ["red"]
        assert best_of(classify(client, picture("green"))) == ["green"]
    assert gated.image_batches == [1, 1]


@report("ray-project/ray#41199", "A client that left during its batch ended the loop that makes batches.")
def test_a_client_that_leaves_during_its_batch_disturbs_nobody(serve, gated):
    with serve() as client:
        gated.images_open.clear()
        leave(client, picture("blue"), once=lambda: gated.images_entered.acquire(timeout=20))
        until(lambda: admitted(client) == 0)
        gated.open()
        assert best_of(classify(client, picture("green"))) == ["green"]
        assert client.get("/healthz").status_code == 200


@report("sgl-project/sglang#39216", "A client that disconnected in the middle took down the whole engine.")
def test_a_client_that_leaves_during_its_upload_disturbs_nobody(serve):
    with serve() as client:
        for share in (0.2, 0.5, 0.9):
            leave(client, picture("blue", (300, 300), "BMP"), sent=share)
        assert best_of(classify(client, picture("green"))) == ["green"]
        assert client.get("/healthz").status_code == 200


@report("weaviate/weaviate#3165", "A slow model looked like a fault of the program that asked, for want of a limit.")
def test_a_request_that_takes_too_long_is_ended_with_the_reason(serve, gated):
    with serve(request_timeout_s=0.3) as client:
        until(lambda: classify(client, picture("red")).status_code == 200)
        gated.images_open.clear()
        members = problem_of(classify(client, picture("red")), "deadline-exceeded")
        assert "0.3" in members["detail"]


# --- connections and proxies -----------------------------------------------------------------------------------------


@report("Kludex/uvicorn#2722", "A Java client offered `Upgrade: h2c`, and the body of its request was lost.")
@pytest.mark.parametrize("chunked", [True, False])
def test_a_request_that_offers_http_2_keeps_its_body(serve, chunked):
    body = json.dumps({"input": "a cat"}).encode()
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB"
    with serve() as client:
        address = (client.base_url.host, client.base_url.port)
        host = b"Host: %s:%d" % (address[0].encode(), address[1])
        head = b"\r\n".join([b"POST /v1/embeddings HTTP/1.1", host, b"Content-Type: application/json", length, upgrade])
        with socket.create_connection(address, 20) as connection:
            connection.sendall(head + b"\r\n\r\n" + framed)
            assert connection.recv(20).startswith(b"HTTP/1.1 200")


@report("fastapi/fastapi#15", "Behind a proxy with a prefix, the documentation looked for its description at the root.")
def test_the_documentation_works_below_any_prefix(shared_client):
    page = shared_client.get("/docs").text
    addresses = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)
    assert any("openapi.json" in address for address in addresses)
    assert [address for address in addresses if address.startswith(("/", "http"))] == []


@report("marqo-ai/marqo#189", "The error for an image that could not be downloaded did not say what was wrong.")
def test_an_image_that_cannot_be_fetched_is_named_with_the_reason(make_client):
    client = make_client(allow_image_urls=True)
    images = [{"url": "http://127.0.0.1/a.png"}]
    response = client.post("/v1/classify", json={"images": images, "labels": ["red", "blue"]})
    assert "127.0.0.1" in problem_of(response)["detail"]
    assert response.status_code < 500


# --- memory ----------------------------------------------------------------------------------------------------------


@report("immich-app/immich#3142", "The memory of the service grew with each image that it had seen.")
def test_images_of_answered_requests_are_freed(shared_client):
    def kept():
        gc.collect()
        return sum(issubclass(type(each), Image.Image) for each in gc.get_objects())

    def ask():
        results_of(classify(shared_client, *[picture("red")] * 6, picture("blue")[:-20], b"no image"))

    ask()
    before = kept()
    for _ in range(10):
        ask()
    assert kept() <= before


@report("michaelfeil/infinity#517", "Hundreds of calls raised the memory from a few gigabytes to 40.")
def test_threads_do_not_grow_with_requests(shared_client):
    classify(shared_client, picture("red"))
    before = threading.active_count()
    for number in range(60):
        results_of(classify(shared_client, picture("red"), labels=["red", f"thing {number}"]))
    assert threading.active_count() <= before + 8  # a pool may still be filling up
