"""Request ids, the access log, limits on bodies, and security headers."""

import asyncio
import logging

import pytest
import structlog

from app.api.middleware import AccessLog, BodyBudget, BodyLimits, BoundedBody
from app.main import create_app
from app.observability.metrics import Metrics
from tests.api.problems import problem_of
from tests.conftest import picture

anyio_test = pytest.mark.anyio


@pytest.fixture
def client(shared_client):
    return shared_client


# --- the request's id ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "0" * 128, "a.b-c_D9", "123e4567-e89b-12d3-a456-426614174000"])
def test_a_harmless_request_id_is_echoed_in_headers_problems_and_results(client, given):
    headers = {"X-Request-ID": given}
    assert client.get("/healthz", headers=headers).headers["x-request-id"] == given
    assert problem_of(client.get("/nowhere", headers=headers))["request_id"] == given
    response = client.post(
        "/v1/classify",
        files=[("image", ("a", picture())), ("image", ("b", b"bad"))],
        data={"labels": "a"},
        headers=headers,
    )
    assert response.json()["results"][1]["error"]["request_id"] == given


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "x" * 129, "a\tb", "<script>", "a;b", 'a"b', "é", "犬", "a\x1b[31mb", "{}", "a/b", "%0d%0a"],
)
def test_a_request_id_that_could_do_harm_is_replaced(client, given):
    response = client.get("/healthz", headers={"X-Request-ID": given.encode()})
    (reply,) = response.headers.get_list("x-request-id")
    assert len(reply) == 32
    assert reply.isalnum()


def test_without_one_every_request_has_an_id_of_its_own(client):
    reply = [client.get("/healthz").headers["x-request-id"] for _ in range(20)]
    assert len(set(reply)) == 20


# --- the log -------------------------------------------------------------------------------------------------------


def logged(client, *arguments, **options):
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        response = client.request(*arguments, **options)
    return response, [each for each in logs if each["event"] == "request"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/label-sets/pets", 415),
        ("GET", "/v1/classify", 405),
    ],
)
def test_every_request_is_logged_once_with_its_id_status_and_time(client, method, path, status):
    response, (entry,) = logged(client, method, path)
    assert (entry["method"], entry["path"], entry["status"]) == (method, path, status)
    assert entry["request_id"] == response.headers["x-request-id"]
    assert 0 <= entry["duration_ms"] < 60_000
    assert response.status_code == status


def test_what_callers_ask_about_is_not_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as logs:
        client.post(
            "/v1/classify?labels=a-private-word",
            content=picture(),
            headers={"content-type": "image/png", "authorization": "Bearer a-private-word"},
        )
    assert len(logs) == 1
    assert "a-private-word" not in str(logs)


def test_a_refused_body_is_logged_too(make_client):
    response, (entry,) = logged(make_client(max_json_bytes=10), "PUT", "/v1/label-sets/pets", content=b"x" * 11)
    assert response.status_code == entry["status"] == 413


@anyio_test
@pytest.mark.parametrize(
    ("method", "path", "media_type"),
    [
        ("POST", "/v1/classify", b"image/png"),
        ("POST", "/v1/classify", b"application/json"),
        ("POST", "/v1/classify", b"multipart/form-data; boundary=b"),
        ("PUT", "/v1/label-sets/pets", b"application/json"),
    ],
)
async def test_a_disconnect_before_the_end_of_the_body_is_not_logged_as_an_error(
    settings, encoder, method, path, media_type
):
    arriving = iter([{"type": "http.request", "body": b"--b\r\n", "more_body": True}, {"type": "http.disconnect"}])
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", media_type), (b"content-length", b"1000")],
    }

    async def receive():
        return next(arriving)

    async def send(message):
        pass

    app = create_app(settings, lambda _: [encoder])
    async with app.router.lifespan_context(app):
        with structlog.testing.capture_logs() as logs:
            await app(scope, receive, send)
    assert {each["log_level"] for each in logs} == {"info"}
    events = {each["event"] for each in logs}
    assert {"request"} <= events <= {"request", "client_disconnected"}
    # FastAPI reads the bodies of the other routes, and makes a malformed request of one that is cut short.
    assert "client_disconnected" in events or path != "/v1/classify"


@anyio_test
@pytest.mark.parametrize(("answered", "status"), [(False, 499), (True, 200)])
async def test_a_cancelled_request_is_logged_with_its_status(answered, status):
    """As Ray does when a caller hangs up."""

    async def app(scope, receive, send):
        if answered:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/classify"}
    with structlog.testing.capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        await AccessLog(app, metrics=Metrics())(scope, None, send)
    assert [each["status"] for each in logs] == [status]


# --- the bound on bodies -------------------------------------------------------------------------------------------


async def answer_of(app, chunks, headers=(), path="/"):
    """Send a request in chunks; return the messages of the answer and how many chunks were taken."""
    sent, remaining = [], list(chunks)

    async def receive():
        body = remaining.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(remaining)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    return sent, len(chunks) - len(remaining)


def limited(app, max_bytes=10, max_json_bytes=10, timeout_s=60, budget=None):
    limits = BodyLimits(max_bytes, max_json_bytes, timeout_s, budget or BodyBudget(1000), "/images".__eq__)
    return BoundedBody(app, limits=limits)


async def echo(scope, receive, send):
    """Answer with the body, read whole."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def forgiving_echo(scope, receive, send):
    """Turn whatever happens while reading into an answer of its own, as frameworks do."""
    try:
        await echo(scope, receive, send)
    except Exception:  # noqa: BLE001 - as frameworks do
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"broken"})


@anyio_test
async def test_bodies_without_images_have_a_bound_of_their_own():
    """They are parsed on the event loop, where every caller would wait for a large one."""
    app = limited(echo, max_bytes=100, max_json_bytes=10)
    statuses = [(await answer_of(app, [b"x" * 50], path=path))[0][0]["status"] for path in ("/images", "/other")]
    assert statuses == [200, 413]


@anyio_test
@pytest.mark.parametrize("chunks", [[b""], [b"1234567890"], [b"12345", b"67890"], [b"", b"1", b""]])
async def test_a_body_within_the_bound_passes_as_it_is(chunks):
    sent, taken = await answer_of(limited(echo), chunks)
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["body"] == b"".join(chunks)
    assert taken == len(chunks)


@anyio_test
@pytest.mark.parametrize("inner", [echo, forgiving_echo])
async def test_a_body_beyond_the_bound_is_not_read_to_its_end_and_answered_once(inner):
    sent, taken = await answer_of(limited(inner), [b"123456"] * 50)
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 413
    assert taken == 2


@anyio_test
@pytest.mark.parametrize("declared", [b"11", b"99999999999999999999999", b"9" * 5000])
async def test_a_body_that_is_declared_too_long_is_not_read_at_all(declared):
    sent, taken = await answer_of(limited(echo), [b"1"], [(b"content-length", declared)])
    assert sent[0]["status"] == 413
    assert taken == 0


@anyio_test
@pytest.mark.parametrize("declared", [b"-1", b"x", b"", b"1", b"\xb2"])
async def test_a_length_that_is_not_true_does_not_lift_the_bound(declared):
    headers = [(b"content-length", declared)]
    assert (await answer_of(limited(echo), [b"12345"], headers))[0][0]["status"] == 200
    assert (await answer_of(limited(echo), [b"12345"] * 3, headers))[0][0]["status"] == 413


@anyio_test
async def test_an_answer_that_began_before_the_bound_was_passed_is_not_answered_again():
    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    sent, _ = await answer_of(limited(early), [b"x" * 11])
    assert [each["type"] for each in sent] == ["http.response.start"]


@anyio_test
async def test_other_asgi_scopes_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await limited(app, 0)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


# --- headers for browsers ------------------------------------------------------------------------------------------

ELSEWHERE = "https://app.example.com"


def asked_from(client, origin, method="GET", path="/v1/models"):
    """Return the answers to a browser's question in advance, and to the request itself."""
    asking = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": "if-match"}
    return client.options(path, headers=asking), client.request(method, path, headers={"Origin": origin})


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/healthz", "/metrics", "/openapi.json"])
def test_every_answer_tells_browsers_to_make_nothing_else_of_it(client, path):
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_refused_bodies_have_the_headers_too_and_the_documentation_a_policy_of_its_own(make_client):
    client = make_client(max_json_bytes=10)
    refused = client.put("/v1/label-sets/a", json={"classes": ["a long one"]})
    assert refused.status_code == 413
    assert refused.headers["x-content-type-options"] == "nosniff"
    page = client.get("/docs").headers
    assert page.get_list("content-security-policy") == [page["content-security-policy"]]
    assert "frame-ancestors 'none'" in page["content-security-policy"]
    assert page["x-content-type-options"] == "nosniff"


def test_pages_of_other_origins_may_read_nothing_by_default(client):
    before, answer = asked_from(client, ELSEWHERE)
    assert before.status_code == 405
    assert not any(name.startswith("access-control") for name in {*before.headers, *answer.headers})


def test_pages_of_the_origins_of_the_operator_may_and_others_may_not(make_client):
    client = make_client(cors_origins=(ELSEWHERE, "http://localhost:5173"))
    for origin in (ELSEWHERE, "http://localhost:5173"):
        before, answer = asked_from(client, origin, "DELETE", "/v1/label-sets/none")
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == origin
        assert {"PATCH", "DELETE"} <= set(before.headers["access-control-allow-methods"].split(", "))
        assert answer.headers["access-control-allow-origin"] == origin
        assert "ETag" in answer.headers["access-control-expose-headers"]
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert "access-control-allow-credentials" not in answer.headers
    for origin in ("https://evil.example", ELSEWHERE + ".evil.example", "null"):
        before, answer = asked_from(client, origin)
        assert before.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_any_origin_may_where_the_operator_says_so(make_client):
    _, answer = asked_from(make_client(cors_origins=("*",)), ELSEWHERE)
    assert answer.headers["access-control-allow-origin"] == "*"


@anyio_test
@pytest.mark.parametrize("coding", [b"gzip", b"br", b"Deflate", b"identity, gzip"])
async def test_a_compressed_body_is_refused_unread(coding):
    """A few bytes of it could become gigabytes."""
    sent, taken = await answer_of(limited(echo), [b"1"], [(b"content-encoding", coding)])
    assert sent[0]["status"] == 415
    assert taken == 0
    assert (await answer_of(limited(echo), [b"1"], [(b"content-encoding", b"Identity")]))[0][0]["status"] == 200


async def trickled(app, chunk, delay_s, count=10_000):
    """Send a body chunk by chunk; return the messages of the answer and how many chunks were taken."""
    sent, taken = [], 0

    async def receive():
        nonlocal taken
        await asyncio.sleep(delay_s)
        taken += 1
        return {"type": "http.request", "body": chunk, "more_body": taken < count}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/images", "headers": []}, receive, send)
    return sent, taken


@anyio_test
@pytest.mark.parametrize("inner", [echo, forgiving_echo])
async def test_a_body_that_trickles_is_given_up_however_regular_it_comes(inner):
    budget = BodyBudget(1000)
    async with asyncio.timeout(20):
        sent, taken = await trickled(limited(inner, max_bytes=1000, timeout_s=0.2, budget=budget), b"1", 0.05)
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"0.2 s for each pause; send the body faster" in sent[1]["body"]
    assert 0 < taken < 10
    assert budget.reserve(1000)


@anyio_test
async def test_what_arrived_fast_earns_no_pause():
    budget, is_idle = BodyBudget(2**30), asyncio.Event()
    sent, messages = [], [{"type": "http.request", "body": bytes(2**26), "more_body": True}]

    async def receive():
        if not messages:
            is_idle.set()
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    app = limited(echo, max_bytes=2**30, timeout_s=0.5, budget=budget)
    async with asyncio.timeout(20):  # 32.5 s are there for 64 MiB
        await app({"type": "http", "method": "POST", "path": "/images", "headers": []}, receive, send)
    assert is_idle.is_set()
    assert sent[0]["status"] == 408
    assert budget.reserve(2**30)


@anyio_test
async def test_a_large_body_has_longer_to_arrive():
    app = limited(echo, max_bytes=2**30, timeout_s=0.5, budget=BodyBudget(2**30))
    async with asyncio.timeout(60):
        sent, taken = await trickled(app, bytes(2**20), 0.1, count=10)  # a second in all
    assert sent[0]["status"] == 200
    assert taken == 10


@anyio_test
async def test_to_wait_for_the_client_to_leave_has_no_time_limit():
    """As routes do that answer for long."""

    async def watching(scope, receive, send):
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    messages = [{"type": "http.request", "body": b"1"}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        if len(messages) == 1:
            await asyncio.sleep(0.3)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    app = limited(watching, timeout_s=0.05)
    await app({"type": "http", "method": "POST", "path": "/images", "headers": []}, receive, send)
    assert sent[0]["status"] == 200


@anyio_test
async def test_bodies_together_have_a_bound_and_give_back_what_they_took():
    budget, leave = BodyBudget(10), asyncio.Event()

    async def slow(scope, receive, send):
        await receive()
        await leave.wait()
        await echo(scope, receive, send)

    async def failing(scope, receive, send):
        await receive()
        raise ZeroDivisionError

    first = asyncio.create_task(answer_of(limited(slow, budget=budget), [b"123456", b""]))
    await asyncio.sleep(0)
    sent, _ = await answer_of(limited(echo, budget=budget), [b"12345"])
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert (await answer_of(limited(echo, budget=budget), [b"1234"]))[0][0]["status"] == 200
    leave.set()
    assert (await first)[0][0]["status"] == 200
    with pytest.raises(ZeroDivisionError):
        await answer_of(limited(failing, budget=budget), [b"1234567890"])
    assert (await answer_of(limited(echo, budget=budget), [b"1234567890"]))[0][0]["status"] == 200


@anyio_test
async def test_a_body_that_lost_a_part_on_its_way_is_refused():
    sent, _ = await answer_of(limited(echo), [b"12"], [(b"content-length", b"3")])
    assert sent[0]["status"] == 400
    assert b"Content-Length is 3" in sent[1]["body"]
