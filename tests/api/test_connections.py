"""Connections that are slow, silent, too many, or no HTTP, against a real socket."""

import json
import re
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from app.api.connections import MAX_HEAD_BYTES, ConnectionLimits, bounded
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


@contextmanager
def serving(connections=100, head_timeout_s=LATE_S, read_timeout_s=LATE_S, **config):
    limits = ConnectionLimits(connections, head_timeout_s, read_timeout_s)
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
        greedy.sendall(b"GET /50000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(5 * LATE_S)
        assert len(rest_of(greedy)) < 50_000_000
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
