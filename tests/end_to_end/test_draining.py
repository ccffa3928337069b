"""A server that was told to stop says so first."""

import signal
import socket
import time

import pytest

from tests.end_to_end.server import serving


def until_ready_is(client, status):
    give_up_at = time.monotonic() + 20
    while (answer := client.get("/readyz")).status_code != status:
        assert time.monotonic() < give_up_at, answer.text
        time.sleep(0.02)
    return answer


@pytest.mark.parametrize(("again", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_sigterm_makes_it_unready_while_it_serves_on_and_a_second_signal_ends_the_wait(
    photographs, tmp_path, again, status
):
    with serving("--drain-s", "600", data_dir=tmp_path) as server, server.client() as client:
        server.signal(signal.SIGTERM)
        assert "stopping" in until_ready_is(client, 503).json()["detail"]
        assert client.get("/healthz").status_code == 200
        answer = client.post("/classify", files={"image": photographs["chelsea"]}, data={"labels": "cat, dog"})
        assert answer.json()["results"][0]["predictions"][0]["label"] == "cat"
        server.signal(again)
        assert server.wait(60) == status
        assert "Finished server process" in server.log[-1]


def test_a_second_interrupt_ends_it_without_waiting_for_requests(tmp_path):
    with serving(data_dir=tmp_path) as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), 20) as upload:
            head = (
                "POST /v1/classify HTTP/1.1",
                "Host: 127.0.0.1",
                "Content-Type: image/jpeg",
                "Content-Length: 9",
                "",
                "",
            )
            upload.sendall("\r\n".join(head).encode())
            with server.client() as client:
                assert client.get("/healthz").status_code == 200
            server.signal(signal.SIGINT)
            give_up_at = time.monotonic() + 20
            while not any("Waiting for connections" in line for line in server.log):
                assert time.monotonic() < give_up_at, server.log
                time.sleep(0.02)
            server.signal(signal.SIGINT)
            assert server.wait(10) == 128 + signal.SIGINT
    assert "stopped_without_waiting" in server.log[-1]
    assert not any("Traceback" in line for line in server.log)


def test_a_server_with_torch_stops_without_reports_of_its_libraries(tmp_path):
    with serving("--image-backend", "torch", data_dir=tmp_path, forked=False) as server:
        server.signal(signal.SIGINT)
        assert server.wait(60) == 128 + signal.SIGINT
        assert "Finished server process" in server.log[-1]


def test_it_stops_by_itself_when_the_time_is_over(tmp_path):
    with serving("--drain-s", "0.5", data_dir=tmp_path) as server, server.client() as client:
        assert client.get("/readyz").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait(60) == -signal.SIGTERM
