"""Requests with ambiguous framing and floods of headers, sent to a real server through a socket."""

import json
import re
import socket

import pytest

from benchmarks.attack.wire import framings
from tests.end_to_end.server import serving

FRAMINGS = framings()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Start one server for all tests of this module."""
    with serving("--allowed-hosts", "*", data_dir=tmp_path_factory.mktemp("attacked")) as server:
        yield server


def exchange(server, sent):
    """Send bytes and return what the server sends until it closes the connection; a timeout is an error."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    got = b""
    with socket.create_connection((host, int(port)), 30) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(65536):
                got += chunk
        except ConnectionError:
            pass  # the server closed the connection before everything was sent
    return got


@pytest.mark.parametrize("kind", FRAMINGS)
def test_an_ambiguous_request_gets_one_response_and_the_connection_is_closed(attacked, kind):
    framing = FRAMINGS[kind]
    got = exchange(attacked, framing.sent)
    statuses = re.findall(rb"HTTP/1\.1 (\d{3})", got)
    assert len(statuses) == 1, got[:500]
    status = int(statuses[0])
    assert status in framing.statuses, got[:500]
    head, _, body = got.partition(b"\r\n\r\n")
    if status >= 400:
        assert b"content-type: application/problem+json" in head.lower()
        assert json.loads(body)["status"] == status


def test_pipelined_requests_are_answered_in_order(attacked):
    requests = [b"GET /v1/label-sets/p%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(200)]
    requests[-1] = requests[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    got = exchange(attacked, b"".join(requests))
    assert re.findall(rb"unknown label set 'p(\d+)'", got) == [b"%d" % number for number in range(200)]


def test_a_request_with_expect_100_continue_gets_status_100(attacked):
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


def test_requests_cannot_inject_lines_into_the_log(attacked):
    before = len(attacked.log)
    for path in (b"/a%0aFORGED%20line", b"/a%0d%0aFORGED%20line"):
        exchange(attacked, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    exchange(
        attacked, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x1b[31mFORGED\r\nConnection: close\r\n\r\n"
    )
    with attacked.client() as client:
        assert client.get("/healthz").status_code == 200
    assert not [line for line in attacked.log[before:] if line.startswith("FORGED")]


def test_an_ordinary_request_succeeds_after_all_ambiguous_requests(attacked):
    for framing in FRAMINGS.values():
        exchange(attacked, framing.sent)
    with attacked.client() as client:
        response = client.put("/v1/label-sets/after", json={"classes": ["cat", "dog"]})
        assert response.status_code == 201
        assert client.get("/readyz").status_code == 200
