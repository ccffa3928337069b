"""What goes wrong while requests are under way: each with the outcome it deserves, counted; nobody left over."""

import asyncio
import collections
import json
import threading
import time

import httpx
import pytest

from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.models import queue as batching
from tests.api.live import live
from tests.api.problems import problem_of
from tests.conftest import picture
from tests.gated import GatedEncoder

LABELS = ["red", "green", "blue"]
GREY = picture((128, 128, 128))


class FaultyEncoder(GatedEncoder):
    """Fails for pure grey pictures, by ``fault``; has room for ``room`` images at a time."""

    def __init__(self):
        super().__init__()
        self.fault = None
        self.room = 1000

    def encode_images(self, pixels):
        rows = super().encode_images(pixels)
        if len(pixels) > self.room:
            raise MemoryError("no room")
        if self.fault is not None and any((image == 128).all() for image in pixels):
            raise self.fault
        return rows


@pytest.fixture
def faulty():
    return FaultyEncoder()


@pytest.fixture
def serve(settings, faulty):
    opened = []

    def start(**changes):
        server = live(create_app(settings.model_copy(update={"image_batch": 8, **changes}), lambda _: [faulty]))
        host, port = server.__enter__()
        opened.append(server)
        return f"http://{host}:{port}"

    yield start
    faulty.open()
    for server in opened:
        server.__exit__(None, None, None)


async def ask(client, image):
    return await client.post("/classify", files={"image": image}, data={"labels": json.dumps(LABELS)})


def ask_together(url, images, *, before=None):
    """Send one request per image at once; return the answers in order."""

    async def together():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            tasks = [asyncio.create_task(ask(client, image)) for image in images]
            if before is not None:
                await asyncio.to_thread(before)
            return await asyncio.gather(*tasks)

    return asyncio.run(together())


def sample(url, name, **labels):
    """Return the sum of a metric's samples with these labels."""
    wanted = {f'{label}="{value}"' for label, value in labels.items()}
    total = 0.0
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")) and all(label in line for label in wanted):
            total += float(line.rsplit(" ", 1)[1])
    return total


def until(condition):
    """Wait until it holds."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def statuses(answers):
    return collections.Counter(answer.status_code for answer in answers)


def nothing_left(url):
    (model,) = httpx.get(f"{url}/v1/models").json()["models"]
    return model["queued_images"] == 0 and sample(url, "deixis_queue_depth") == 0


def full_batch(faulty, url, odd):
    """Return the answers to one odd picture among eight of one batch, the first of which kept the device busy."""
    faulty.images_open.clear()
    images = [picture("red"), *[picture("blue")] * 3, odd, *[picture("green")] * 4]

    def when_all_wait():
        until(lambda: sample(url, "deixis_queue_admitted", tower="images") >= 8)
        time.sleep(0.2)
        faulty.open()

    return ask_together(url, images, before=when_all_wait)


def test_a_bad_image_among_those_of_others_is_refused_alone(serve, faulty):
    url = serve()
    answers = full_batch(faulty, url, b"this is no image")
    problem_of(answers[4], "not-an-image")
    assert statuses(answers) == {200: 8, 415: 1}
    assert sample(url, "deixis_images_total", outcome="unreadable") == 1
    assert sample(url, "deixis_images_total", outcome="classified") == 8
    assert nothing_left(url)


def test_an_image_that_the_encoder_fails_at_fails_alone(serve, faulty):
    url = serve()
    faulty.fault = RuntimeError("a kernel failed")
    answers = full_batch(faulty, url, GREY)
    problem_of(answers[4], "internal-error")
    assert statuses(answers) == {200: 8, 500: 1}
    assert sample(url, "deixis_batch_failures_total", reason="error") >= 1
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert nothing_left(url)


def test_too_little_memory_for_a_batch_is_met_with_smaller_ones(serve, faulty):
    url = serve()
    faulty.room = 2
    answers = full_batch(faulty, url, picture("blue"))
    assert statuses(answers) == {200: 9}
    assert sample(url, "deixis_batch_failures_total", reason="out of memory") >= 1
    assert nothing_left(url)


def test_too_little_memory_for_one_image_is_reported(serve, faulty):
    url = serve()
    faulty.room = 0
    (answer,) = ask_together(url, [picture("red")])
    problem_of(answer, "not-ready")
    assert "memory" in answer.json()["detail"]


def test_a_dead_worker_fails_its_requests_and_health_and_is_restarted(serve, faulty, monkeypatch):
    monkeypatch.setattr(batching, "_RESTART_AFTER_S", 3.0)
    url = serve()
    faulty.fault = SystemExit("killed")
    answers = full_batch(faulty, url, GREY)
    assert set(statuses(answers)) <= {200, 503}
    lost = [answer for answer in answers if answer.status_code == 503]
    assert lost
    for answer in lost:
        problem_of(answer, "not-ready")
        assert int(answer.headers["retry-after"]) >= 1
    for probe in ("/healthz", "/readyz"):
        assert "SystemExit" in problem_of(httpx.get(f"{url}{probe}"), "not-ready")["detail"]
    faulty.fault = None
    until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
    assert statuses(ask_together(url, [GREY, picture("red")])) == {200: 2}
    assert sample(url, "deixis_worker_restarts_total", tower="images") == 1
    assert nothing_left(url)


def test_a_forward_pass_that_hangs_flips_health_until_it_ends(serve, faulty):
    url = serve(stall_timeout_s=0.2, request_timeout_s=20)
    faulty.images_open.clear()
    first = threading.Thread(target=ask_together, args=(url, [picture("red")]))
    first.start()
    until(lambda: httpx.get(f"{url}/healthz").status_code == 503)
    assert "running for more than 0.2 s" in httpx.get(f"{url}/healthz").json()["detail"]
    (refused,) = ask_together(url, [picture("red")])
    problem_of(refused, "not-ready")
    faulty.open()
    first.join(10)
    until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
    assert statuses(ask_together(url, [picture("red")])) == {200: 1}


@pytest.mark.parametrize("stage", ["waiting", "decoding", "texts"])
def test_a_client_that_leaves_is_not_worked_for(serve, faulty, stage):
    """Whether its image waits for a batch, or is not decoded yet, or its labels are not encoded."""
    decoding = threading.Event()
    if stage == "decoding":
        transform = faulty.transform

        def slow(image):
            if image.getpixel((0, 0)) == (0, 0, 255):
                assert decoding.wait(10)
            return transform(image)

        faulty.transform = slow
    url = serve()
    assert statuses(ask_together(url, [picture("red")])) == {200: 1}
    faulty.image_batches.clear()
    gate = faulty.texts_open if stage == "texts" else faulty.images_open
    gate.clear()
    labels = ["never", "seen"] if stage == "texts" else LABELS

    async def leave():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            busy = None
            if stage == "waiting":
                busy = asyncio.create_task(ask(client, picture("red")))
                await asyncio.to_thread(until, lambda: sample(url, "deixis_queue_admitted", tower="images") == 1)
                await asyncio.sleep(0.2)
            admitted = 1 if busy else 0
            async with httpx.AsyncClient(base_url=url) as leaving:
                files = [("image", picture("blue"))] * 3
                gone = asyncio.create_task(
                    leaving.post("/classify", files=files, data={"labels": json.dumps(labels)}, timeout=30)
                )
                await asyncio.to_thread(
                    until, lambda: sample(url, "deixis_queue_admitted", tower="images") == admitted + 3
                )
                await asyncio.sleep(0.1)
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
            # Its places are free while what it waited for still is not there.
            await asyncio.to_thread(until, lambda: sample(url, "deixis_queue_admitted", tower="images") == admitted)
            decoding.set()
            faulty.open()
            if busy:
                assert (await busy).status_code == 200

    asyncio.run(leave())
    if stage == "waiting":
        assert sample(url, "deixis_dropped_total", reason="cancelled") == 3
        assert faulty.image_batches == [1]
    assert nothing_left(url)
    assert statuses(ask_together(url, [picture("red")])) == {200: 1}
    assert sample(url, "deixis_http_requests_total", status="499") == 1


def test_what_waits_too_long_gets_504_and_is_not_encoded(serve, faulty):
    url = serve(request_timeout_s=0.3, image_batch=1)
    # Until the texts are there, for a busy machine may take longer than the limit over the first request.
    until(lambda: statuses(ask_together(url, [picture("red")])) == {200: 1})
    faulty.image_batches.clear()
    faulty.images_open.clear()
    dropped = sample(url, "deixis_dropped_total")
    answers = ask_together(url, [picture("red")] * 3)
    assert statuses(answers) == {504: 3}
    faulty.open()
    until(lambda: sample(url, "deixis_dropped_total") - dropped + sum(faulty.image_batches) == 3)
    assert sum(faulty.image_batches) < 3
    assert nothing_left(url)


def test_requests_beyond_the_queue_get_retry_after_and_are_counted(serve, faulty):
    url = serve(max_queued_images=8)
    answers = full_batch_and_more(faulty, url)
    assert statuses(answers) == {200: 8, 503: 12}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    assert sample(url, "deixis_rejected_total", reason="overloaded") == 12
    assert nothing_left(url)


def full_batch_and_more(faulty, url):
    faulty.images_open.clear()

    def when_all_are_told():
        until(lambda: sample(url, "deixis_rejected_total", reason="overloaded") == 12)
        faulty.open()

    return ask_together(url, [picture("red")] * 20, before=when_all_are_told)


def test_callers_share_batches(serve, faulty):
    url = serve()
    assert statuses(full_batch(faulty, url, picture("red"))) == {200: 9}
    assert max(faulty.image_batches) >= 4
    assert sample(url, "deixis_batch_size_sum", tower="images") == sum(faulty.image_batches)


def test_metrics_tell_what_happened_by_route_and_never_by_path(make_client):
    client = make_client(encoders=[FakeEncoder()])
    for _ in range(2):
        client.post("/classify", files={"image": picture("red")}, data={"labels": "red, green"})
    client.get("/no/such/route/1")
    client.get("/no/such/route/2")
    for method in ("PROPFIND", "MKCOL"):
        assert client.request(method, "/v1/models").status_code == 405
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    assert 'deixis_images_total{model="fake",outcome="classified"} 2.0' in text
    assert 'deixis_text_cache_total{model="fake",result="miss"} 2.0' in text
    assert 'deixis_text_cache_total{model="fake",result="hit"} 2.0' in text
    for stage in ("text", "decode", "queue", "encode", "adapt"):
        assert f'deixis_stage_seconds_count{{model="fake",stage="{stage}"}} 2.0' in text
    assert 'deixis_http_requests_total{handler="/classify",method="POST",status="200"} 2.0' in text
    assert 'deixis_http_requests_total{handler="/v1/models",method="other",status="405"} 2.0' in text
    assert "such" not in text
    assert 'deixis_build_info{version="' in text
    assert "process_resident_memory_bytes" in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert all(name.startswith(("deixis_", "process_", "python_")) for name in names), names
