"""`deixis watch` as a process: ended by a signal, killed, and started again."""

import json
import signal
import subprocess
import time

import pytest

from tests.end_to_end.commands import environment
from tests.end_to_end.forked_commands import ForkedCommand

TIMEOUT_S = 60


@pytest.fixture
def inbox(tmp_path):
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def watch(server, inbox, *more):
    command = ["watch", inbox, "-l", "cat,coffee cup", "--settle", "0.2", "--server", server.url, *more]
    return ForkedCommand(*command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_there(file):
    give_up_at = time.monotonic() + TIMEOUT_S
    while not file.exists():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    return json.loads(file.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_after_the_current_image(server, inbox, photographs, number):
    process = watch(server, inbox)
    assert "watching" in process.stderr.readline()
    (inbox / "cat.jpg").write_bytes(photographs["chelsea"])
    sidecar = until_there(inbox / "cat.jpg.json")
    assert sidecar["predictions"][0]["label"] == "cat"
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "cat.jpg: cat" in out
    assert "Traceback" not in err


def test_it_resumes_after_kill_9(server, inbox, photographs):
    for number in range(30):
        (inbox / f"{number}.jpg").write_bytes(photographs["coffee"] + bytes(number))
    process = watch(server, inbox, "--existing")
    until_there(inbox / "0.jpg.json")
    process.kill()
    process.communicate()
    for sidecar in inbox.glob("*.json"):
        json.loads(sidecar.read_text())  # whole, or not there
    before = {each: each.stat().st_mtime_ns for each in inbox.glob("*.json")}
    again = watch(server, inbox, "--once")
    out, err = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, err
    assert len(list(inbox.glob("*.jpg.json"))) == 30
    assert len(out.splitlines()) == 30 - len(before)
    assert {each: each.stat().st_mtime_ns for each in before} == before
