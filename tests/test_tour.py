"""The tour of docs/architecture.md lists the functions that a request calls, in the order of their first call."""

import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.api.connections import ConnectionLimits, bounded
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from tests.api.live import live
from tests.conftest import picture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MAX_ROWS = 15

pytestmark = pytest.mark.blocks_event_loop("every call of a function is recorded")

CLASSES = {"classes": ["red", "green", "blue"]}
IMAGE = ("picture.png", picture("red"), "image/png")


def rows_of(heading: str) -> list[str]:
    """Return the ``file:function`` cells of the table below a heading."""
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"^\| `(app/[^`]+)` \|", section, re.MULTILINE)


@contextmanager
def recorded_calls():
    """Record the time of the first call of every function of ``app``, in this thread and in threads that it starts."""
    first: dict[str, float] = {}
    prefix = f"{ROOT}/app/"

    def profile(frame, event, argument):
        if event == "call" and (file := frame.f_code.co_filename).startswith(prefix):
            first.setdefault(f"app/{file.removeprefix(prefix)}:{frame.f_code.co_qualname}", time.perf_counter())

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield first
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Return the calls of each walk of the tour, with a live server."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("tour"),
        models=("embedded",),
        build_default_database=False,
        decode_timeout_s=None,
    )
    limits = ConnectionLimits(connections=10, head_timeout_s=30, read_timeout_s=30)
    walks = {}
    with recorded_calls() as first:
        app = create_app(settings, lambda _: [FakeEncoder()])
        with live(app, http=bounded(limits)) as (host, port), httpx.Client(base_url=f"http://{host}:{port}") as client:

            def walk(heading, method, path, status, **request):
                first.clear()
                response = client.request(method, path, **request)
                assert response.status_code == status, response.text
                deadline = time.monotonic() + 30
                while not set(rows_of(heading)) <= set(first) and time.monotonic() < deadline:
                    time.sleep(0.02)  # work in the background continues after the response
                walks[heading] = dict(first)
                return response

            # The image comes before the label set, whose classifiers are built in the background after its response.
            labels = {"labels": "red, green, blue"}
            walk("An image", "POST", "/v1/classify", 200, files={"image": IMAGE}, data=labels)
            walk("A label set", "PUT", "/v1/label-sets/colours", 201, json=CLASSES)
            example = {"files": {"image": IMAGE}, "data": {"class": "red"}}
            walk("An example image", "POST", "/v1/label-sets/colours/images", 201, **example)
            job = client.put("/v1/databases/things", json={"captions": ["a red ball", "a blue sky", "a green leaf"]})
            until_done(client, job.json()["id"])
            walk("A caption search", "POST", "/v1/databases/things/search", 200, json={"text": "a red ball"})
    return walks


def until_done(client, job_id):
    deadline = time.monotonic() + 60
    while (job := client.get(f"/v1/jobs/{job_id}").json())["status"] not in {"succeeded", "failed"}:
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    assert job["status"] == "succeeded", job


@pytest.mark.parametrize("heading", ["An image", "A label set", "An example image", "A caption search"])
def test_every_function_of_the_tour_is_called_in_the_order_of_its_table(calls, heading):
    rows = rows_of(heading)
    assert 5 <= len(rows) <= MAX_ROWS
    missing = [row for row in rows if row not in calls[heading]]
    assert not missing, sorted(calls[heading], key=calls[heading].get)
    assert sorted(rows, key=calls[heading].get) == rows
