"""One deadline limits everything that the service does for a request, wherever it waits."""

import asyncio
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from app.api.deadline import Deadline, restart_deadline
from app.errors import DeadlineExceededError
from tests.api.problems import problem_of
from tests.postgres import postgres_binaries, running_postgres

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.2
LABEL_SET = {"classes": [{"name": "cat"}, {"name": "dog"}]}
OK = ({"type": "http.response.start", "status": 200, "headers": []}, {"type": "http.response.body", "body": b"ok"})


async def answer(app, *parts, timeout_s=TIMEOUT_S):
    """Return the status of the response to a body that arrives in parts, each with a pause before it."""
    sent, coming = [], list(parts)

    async def receive():
        pause_s, more = coming.pop(0)
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": b"a", "more_body": more}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await Deadline(app, timeout_s=timeout_s)(scope, receive, send)
    assert len(sent) == 2
    return sent[0]["status"]


async def respond(send):
    for message in OK:
        await send(message)


async def test_a_request_within_the_deadline_is_answered():
    async def app(_, receive, send):
        await receive()
        await respond(send)

    assert await answer(app, (0, False)) == 200


async def test_a_request_that_waits_is_cancelled_at_the_deadline():
    ended = asyncio.Event()

    async def app(_, __, ___):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    assert await answer(app) == 504
    await asyncio.wait_for(ended.wait(), 10)


async def test_the_response_does_not_wait_for_what_cannot_be_cancelled():
    freed = asyncio.Event()

    async def app(_, __, send):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:  # as a driver that waits for its server
            await freed.wait()
            await respond(send)  # too late

    assert await asyncio.wait_for(answer(app), 10) == 504
    freed.set()


async def test_the_time_in_which_the_body_arrives_does_not_count():
    async def app(_, receive, send):
        while (await receive())["more_body"]:
            pass
        await asyncio.sleep(TIMEOUT_S / 4)
        await respond(send)

    assert await answer(app, (TIMEOUT_S, True), (TIMEOUT_S, True), (TIMEOUT_S, False)) == 200


async def test_a_request_may_restart_its_deadline():
    async def app(scope, _, send):
        request = type("Request", (), {"scope": scope})
        for _ in range(4):
            await asyncio.sleep(TIMEOUT_S / 2)
            restart_deadline(request)
        await respond(send)

    assert await answer(app) == 200


async def test_a_response_that_has_begun_ends_at_the_deadline():
    async def app(_, __, send):
        await send(OK[0])
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError):
        await answer(app)


async def test_an_error_of_the_application_is_raised():
    async def app(_, __, ___):
        raise LookupError

    with pytest.raises(LookupError):
        await answer(app)


async def test_without_a_deadline_a_request_may_take_any_time():
    async def app(_, __, send):
        await asyncio.sleep(2 * TIMEOUT_S)
        await respond(send)

    assert await answer(app, timeout_s=None) == 200


# --- a database that does not respond --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    if (binaries := postgres_binaries()) is None:
        pytest.skip("no PostgreSQL binaries")
    with running_postgres(binaries) as url:
        yield url


@contextmanager
def stopped(url):
    """Stop every process of a PostgreSQL server with SIGSTOP, as an overloaded or suspended machine does."""
    folder = Path(url.partition("host=")[2])
    main = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    processes = [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_database_that_does_not_respond_gives_504_at_the_deadline(make_client, server):
    client = make_client(database_url=SecretStr(server), request_timeout_s=1.0)
    assert client.put("/v1/label-sets/pets", json=LABEL_SET).status_code == 201
    with stopped(server):
        for method, path, body in (
            ("GET", "/v1/label-sets/pets", None),
            ("PUT", "/v1/label-sets/pets", LABEL_SET),
            ("DELETE", "/v1/label-sets/pets", None),
            ("GET", "/v1/jobs", None),
        ):
            began = time.monotonic()
            response = client.request(method, path, json=body)
            problem_of(response, "deadline-exceeded")
            assert time.monotonic() - began < 5
        began = time.monotonic()
        assert client.get("/healthz").status_code == 200
        assert problem_of(client.get("/readyz"))["status"] in {503, 504}
        assert time.monotonic() - began < 5
    give_up_at = time.monotonic() + 60
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < give_up_at
    assert client.get("/v1/label-sets").status_code == 200
