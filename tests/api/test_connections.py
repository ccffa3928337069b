"""Connections that are slow, silent, too many, or no HTTP, against a real socket."""

import asyncio
import json
import re
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.api.connections import MAX_HEAD_BYTES, PROBE_CONNECTIONS, ConnectionLimits, bounded
from tests.api.live import live

LATE_S = 0.4
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = b"GET / HTTP/1.1\r\nX: " + b"a" * 1000


async def app(scope, receive, send):
    """Answer with the length of the body; or with as many bytes as the path says."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    answer = bytes(int(scope["path"][1:])) if scope["path"][1:].isdigit() else str(length).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


async def echo(scope, receive, send):
    """Answer with the request as the application received it."""
    if scope["type"] == "lifespan":
        await app(scope, receive, send)
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    request = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
    answer = json.dumps(request | {"headers": headers, "body": body.decode()}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


@contextmanager
def serving(connections=100, head_timeout_s=LATE_S, read_timeout_s=LATE_S, descriptors=None, app=app, **config):
    limits = ConnectionLimits(connections, head_timeout_s, read_timeout_s, descriptors)
    with live(app, http=bounded(limits), ws="none", **config) as address, ExitStack() as opened:

        def connect():
            return opened.enter_context(socket.create_connection(address, 20))

        yield connect


def rest_of(connection):
    """Read until the other side closes; a connection that is reset has ended too."""
    got = b""
    try:
        while chunk := connection.recv(65536):
            got += chunk
    except ConnectionError:
        pass
    return got


def problem_in(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert b"connection: close" in head.lower()
    members = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % members["status"])
    return members["status"], members["type"].rpartition(":")[2]


def read_answer(connection):
    """Read one answer, by the length it says."""
    got = b""
    while chunk := connection.recv(65536):
        got += chunk
        head, end, body = got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if end and len(body) >= int(length[1]):
            break
    return got


def answered(connection):
    """Ask, and tell whether the answer is the application's."""
    connection.sendall(GET)
    return read_answer(connection).endswith(b"\r\n\r\n0")


def trickle(connection, data, every_s=0.05):
    """Send byte by byte until the other side has had enough; return what it said."""
    connection.settimeout(every_s)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            said = connection.recv(65536)
        except TimeoutError:
            continue
        connection.settimeout(20)
        return said + rest_of(connection)
    raise AssertionError("the other side waits for ever")


def test_a_silent_client_gets_a_timeout_and_is_disconnected():
    with serving() as connect:
        assert problem_in(rest_of(connect())) == (408, "request-timeout")


@pytest.mark.parametrize("sent", [SLOW, b"X-Slow: a\r\n" * 100, b"\r\n" * 500])
def test_headers_that_trickle_are_not_waited_for(sent):
    with serving() as connect:
        slow = connect()
        if sent.startswith(b"X"):
            slow.sendall(b"GET / HTTP/1.1\r\n")
        said = trickle(slow, sent)
        assert problem_in(said) == (408, "request-timeout")
        assert answered(connect())


def test_line_ends_between_requests_do_not_keep_a_connection_open():
    with serving(timeout_keep_alive=60) as connect:
        kept = connect()
        assert answered(kept)
        assert problem_in(trickle(kept, b"\r\n" * 500)) == (408, "request-timeout")


def test_a_further_request_that_trickles_is_not_waited_for():
    with serving(timeout_keep_alive=60) as connect:
        kept = connect()
        assert answered(kept)
        assert problem_in(trickle(kept, SLOW)) == (408, "request-timeout")


def test_an_idle_connection_is_kept_for_as_long_as_it_says():
    with serving(timeout_keep_alive=60) as connect:
        kept = connect()
        for _ in range(3):
            assert answered(kept)
            time.sleep(2 * LATE_S)
        assert answered(kept)


def test_an_idle_connection_ends_without_a_word():
    with serving(timeout_keep_alive=1) as connect:
        kept = connect()
        assert answered(kept)
        assert rest_of(kept) == b""


def test_a_request_may_take_longer_than_its_headers():
    with serving() as connect:
        one = connect()
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(3 * LATE_S)
        one.sendall(b"b")
        assert read_answer(one).endswith(b"\r\n\r\n2")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * (MAX_HEAD_BYTES // 2) + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 40 * MAX_HEAD_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 10 * MAX_HEAD_BYTES,
    ],
    ids=["address", "one header", "many headers", "a header without end", "headers without end"],
)
def test_a_head_that_is_too_large_is_refused(head):
    with serving(head_timeout_s=60) as connect:
        one = connect()
        one.settimeout(20)
        with suppress(ConnectionError):
            one.sendall(head)
        assert problem_in(rest_of(one)) == (431, "head-too-large")
        assert answered(connect())


def test_a_head_within_the_bound_is_answered():
    with serving() as connect:
        one = connect()
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (MAX_HEAD_BYTES - 100) + b"\r\n\r\n")
        assert read_answer(one).endswith(b"\r\n\r\n0")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the hello of TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX\x00: a\r\n\r\n",
    ],
)
def test_invalid_http_gets_a_problem_response(sent):
    with serving() as connect:
        one = connect()
        one.sendall(sent)
        status, kind = problem_in(rest_of(one))
        assert (status, kind) == (400, "malformed-request")
        assert answered(connect())


def test_more_connections_than_allowed_are_refused_and_room_comes_back():
    with serving(connections=3, head_timeout_s=60) as connect:
        kept = [connect() for _ in range(3)]
        assert all(answered(each) for each in kept)
        refused = connect()
        said = rest_of(refused)
        assert problem_in(said) == (503, "overloaded")
        assert b"retry-after: 1" in said.lower()
        assert all(answered(each) for each in kept)
        kept.pop().close()
        give_up_at = time.monotonic() + 20
        while True:
            again = connect()
            again.sendall(GET)
            if read_answer(again).startswith(b"HTTP/1.1 200"):
                break
            again.close()
            assert time.monotonic() < give_up_at
            time.sleep(0.05)


def test_nonsense_behind_a_request_does_not_change_its_answer():
    with serving() as connect:
        one = connect()
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab\x00\x01\x02nonsense")
        said = rest_of(one)
        assert said.startswith(b"HTTP/1.1 ")
        assert said.count(b"HTTP/1.1 ") <= 2
        assert b"\r\n\r\n2" in said or problem_in(said)[0] == 400


def test_a_client_that_does_not_read_is_given_up():
    with serving(timeout_keep_alive=60) as connect:
        greedy = connect()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        # More than the buffers of both sockets hold. The event loop copies what they do not, at once.
        greedy.sendall(b"GET /12000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(5 * LATE_S)
        assert len(rest_of(greedy)) < 12_000_000
        assert answered(connect())


def test_a_client_that_reads_slowly_and_steadily_gets_everything():
    with serving(read_timeout_s=5) as connect:
        steady = connect()
        steady.sendall(b"GET /3000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = 0
        while chunk := steady.recv(200_000):
            got += len(chunk)
            time.sleep(0.02)
        assert got > 3_000_000


# --- the application receives the request that was sent --------------------------------------------------------------

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def head(line, *headers):
    return line + b" HTTP/1.1\r\nHost: x\r\n" + b"".join(headers)


def length(body):
    return b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


SENT = {
    "h2c with a body": [(head(b"POST /a?b=c", H2C) + length(b"body"), "POST", "/a", "body")],
    "h2c with chunks": [
        (
            head(b"PUT /a", H2C) + b"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
            "PUT",
            "/a",
            "body",
        )
    ],
    "h2c without a body": [(head(b"GET /a", H2C) + b"\r\n", "GET", "/a", "")],
    "h2c twice": [(head(b"POST /%d" % n, H2C) + length(b"b%d" % n), "POST", f"/{n}", f"b{n}") for n in range(40)],
    "websocket on POST": [
        (head(b"POST /a", b"Connection: upgrade\r\nUpgrade: websocket\r\n") + length(b"body"), "POST", "/a", "body")
    ],
    "websocket": [
        (
            head(b"GET /a", b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"),
            "GET",
            "/a",
            "",
        )
    ],
    "several protocols": [
        (
            head(b"POST /a", b"Upgrade: h2c, foo/1, TLS/1.0\r\nConnection: keep-alive, Upgrade\r\n") + length(b"body"),
            "POST",
            "/a",
            "body",
        )
    ],
    "a body that is a request": [
        (head(b"POST /a", H2C) + length(b"GET /stolen HTTP/1.1\r\n\r\n"), "POST", "/a", "GET /stolen HTTP/1.1\r\n\r\n")
    ],
    "an upgrade without a connection option": [
        (head(b"POST /a", b"Upgrade: h2c\r\n") + length(b"body"), "POST", "/a", "body")
    ],
    "expect": [(head(b"POST /a", b"Expect: 100-continue\r\n") + length(b"body"), "POST", "/a", "body")],
    "trailers": [
        (
            head(b"POST /a")
            + b"Transfer-Encoding: chunked\r\n\r\n4;ext=1\r\nbody\r\n0\r\nX-Api-Key: k\r\nHost: y\r\n\r\n",
            "POST",
            "/a",
            "body",
        )
    ],
    "pipelined": [
        (head(b"POST /a") + length(b"one"), "POST", "/a", "one"),
        (head(b"POST /b", H2C) + length(b"two"), "POST", "/b", "two"),
        (head(b"GET /c") + b"\r\n", "GET", "/c", ""),
    ],
    "percent": [(head(b"GET /a%20b%3Fc") + b"\r\n", "GET", "/a b?c", "")],
    "an absolute target": [(b"GET http://x/a HTTP/1.1\r\nHost: y\r\n\r\n", "GET", "/a", "")],
    "an absolute target without a path": [(b"GET HTTP://x?q HTTP/1.1\r\nHost: y\r\n\r\n", "GET", "/", "")],
}


@pytest.fixture(scope="module")
def echoing():
    with serving(app=echo, timeout_keep_alive=60, head_timeout_s=20, read_timeout_s=20) as connect:
        yield connect


@pytest.mark.parametrize("pieces", ["at once", "byte by byte"])
@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
def test_the_application_receives_the_request_that_was_sent(echoing, sent, pieces):
    data = b"".join(raw for raw, *_ in sent) + LAST
    one = echoing()
    for piece in (
        [data] if pieces == "at once" else [data[at : at + 1] for at in range(min(len(data), 600))] + [data[600:]]
    ):
        one.sendall(piece)
    answers = bodies_of(rest_of(one))
    assert [(each["method"], each["path"], each["body"]) for each in answers] == [
        *((method, path, body) for _, method, path, body in sent),
        ("GET", "/last", ""),
    ]
    for each in answers:
        assert each["headers"]["host"] == "x"
        assert not {"x-api-key", "http2-settings"} & each["headers"].keys()


@pytest.mark.parametrize(
    "offer",
    [
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nConnection: close\r\nUpgrade: websocket\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET /a HTTP/1.0\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"POST /a HTTP/1.0\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\nbody",
    ],
    ids=["two headers", "one header", "1.0", "1.0 with a body"],
)
def test_an_offer_on_a_connection_that_closes_is_answered(echoing, offer):
    one = echoing()
    one.sendall(offer)
    (answer,) = bodies_of(rest_of(one))
    assert answer["path"] == "/a"
    assert answer["body"] == ("body" if offer.startswith(b"POST") else "")


def bodies_of(said):
    bodies = []
    while said:
        answer_head, _, rest = said.partition(b"\r\n\r\n")
        if answer_head == b"HTTP/1.1 100 Continue":
            said = rest
            continue
        size = int(re.search(rb"content-length: (\d+)", answer_head.lower())[1])
        bodies.append(json.loads(rest[:size]))
        said = rest[size:]
    return bodies


def test_an_old_client_is_not_asked_to_continue(echoing):
    one = echoing()
    one.sendall(b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nbody")
    said = rest_of(one)
    assert said.startswith(b"HTTP/1.1 200")
    assert bodies_of(said)[0]["body"] == "body"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0", 400),
        (head(b"POST /a", H2C) + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nbody", 400),
    ],
    ids=["connect", "the preface of HTTP/2", "two lengths"],
)
def test_what_is_no_request_to_this_server_is_refused_once(echoing, sent, status):
    one = echoing()
    one.sendall(sent)
    assert problem_in(rest_of(one))[0] == status


@pytest.mark.parametrize("rest", [b"0\r\nX: ", b"4;x="], ids=["a trailer", "a chunk extension"])
def test_a_body_without_bytes_does_not_fill_the_memory(echoing, rest):
    one = echoing()
    one.settimeout(20)
    one.sendall(head(b"POST /a") + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
    with suppress(ConnectionError):
        for _ in range(100):
            one.sendall(b"a" * MAX_HEAD_BYTES)
    assert problem_in(rest_of(one)) == (431, "head-too-large")


# --- probes while the connections or the file descriptors are used up ------------------------------------------------


def probe(connection, path=b"/healthz"):
    connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    return rest_of(connection)


def test_probes_are_answered_while_all_connections_are_used():
    with serving(connections=2, head_timeout_s=60, app=echo, timeout_keep_alive=60) as connect:
        kept = [connect() for _ in range(2)]
        for path in (b"/healthz", b"/readyz", b"/metrics", b"/healthz?x"):
            said = probe(connect(), path)
            assert said.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in said.lower()
        assert problem_in(probe(connect(), b"/v1/models")) == (503, "overloaded")
        assert kept


def test_silent_connections_above_the_limit_do_not_keep_probes_out():
    with serving(connections=2, head_timeout_s=60, app=echo, timeout_keep_alive=60) as connect:
        kept = [connect() for _ in range(2)]
        silent = [connect() for _ in range(PROBE_CONNECTIONS + 1)]
        assert problem_in(rest_of(silent[0])) == (503, "overloaded")
        assert probe(connect()).startswith(b"HTTP/1.1 200")
        assert kept


def test_connections_are_refused_while_file_descriptors_are_scarce():
    here = socket.socket()
    lowest = here.fileno()
    here.close()
    with serving(descriptors=lowest + 2 * 64, app=echo, timeout_keep_alive=60, head_timeout_s=60) as connect:
        said = probe(connect(), b"/v1/models")
        assert problem_in(said) == (503, "overloaded")
        assert b"file descriptors" in said
        assert probe(connect()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_data_written_as_the_connection_ends_are_dropped_without_an_error(loop):
    new_loop = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    errors = []

    class Ending(bounded(ConnectionLimits(connections=9, head_timeout_s=9, read_timeout_s=9))):
        def data_received(self, data):
            self.transport.abort()

        def connection_lost(self, exc):
            self.transport.write(b"late")  # as a task does that runs just before
            super().connection_lost(ConnectionResetError())
            self.loop.call_soon(self.transport.write, bytes(100_000))  # as a pipelined request

    async def end():
        config = uvicorn.Config(app, log_config=None)
        config.load()
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda _, context: errors.append(context))
        server = await running.create_server(lambda: Ending(config, ServerState(), {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET")
        with suppress(ConnectionError):
            await reader.read()
        for _ in range(5):  # callbacks of the end
            await asyncio.sleep(0)
        writer.close()
        server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(end())
    assert not errors
