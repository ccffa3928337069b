"""Framing that can be read in two ways, and floods of headers, against the real server by a socket."""

import json
import re
import socket

import pytest

from benchmarks.attack.wire import framings
from tests.end_to_end.server import serving

FRAMINGS = framings()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """One server, whose log is left out, for every request of this module."""
    with serving(data_dir=tmp_path_factory.mktemp("attacked")) as server:
        yield server


def exchange(server, sent):
    """Send bytes and return all that comes back until the server ends the connection; no answer is an error."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    got = b""
    with socket.create_connection((host, int(port)), 30) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(65536):
                got += chunk
        except ConnectionError:
            pass  # the server had enough before all was sent
    return got


@pytest.mark.parametrize("kind", FRAMINGS)
def test_a_request_of_strange_framing_has_one_answer_and_ends_the_connection(attacked, kind):
    framing = FRAMINGS[kind]
    got = exchange(attacked, framing.sent)
    answers = re.findall(rb"HTTP/1\.1 (\d{3})", got)
    assert len(answers) == 1, got[:500]
    status = int(answers[0])
    assert status in framing.statuses, got[:500]
    head, _, body = got.partition(b"\r\n\r\n")
    if status >= 400:
        assert b"content-type: application/problem+json" in head.lower()
        assert json.loads(body)["status"] == status


def test_two_hundred_requests_sent_before_reading_are_answered_in_turn(attacked):
    asked = [b"GET /v1/label-sets/p%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(200)]
    asked[-1] = asked[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    got = exchange(attacked, b"".join(asked))
    assert re.findall(rb"unknown label set 'p(\d+)'", got) == [b"%d" % number for number in range(200)]


def test_a_client_that_expects_continue_gets_it(attacked):
    head = b"POST /v1/classify?labels=a,b HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1\r\n"
    host, _, port = attacked.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(head + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"x")
        got = b""
        while chunk := connection.recv(65536):
            got += chunk
    assert got.startswith(b"HTTP/1.1 415 ")


def test_what_callers_send_makes_no_line_of_the_log_by_itself(attacked):
    before = len(attacked.log)
    for path in (b"/a%0aFORGED%20line", b"/a%0d%0aFORGED%20line"):
        exchange(attacked, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    exchange(
        attacked, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x1b[31mFORGED\r\nConnection: close\r\n\r\n"
    )
    with attacked.client() as client:
        assert client.get("/healthz").status_code == 200
    assert not [line for line in attacked.log[before:] if line.startswith("FORGED")]


def test_an_ordinary_request_is_answered_after_all_of_this(attacked):
    for framing in FRAMINGS.values():
        exchange(attacked, framing.sent)
    with attacked.client() as client:
        asked = client.put("/v1/label-sets/after", json={"classes": ["cat", "dog"]})
        assert asked.status_code == 201
        assert client.get("/readyz").status_code == 200
