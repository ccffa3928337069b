"""What was acknowledged is there after kill -9, and a graceful stop loses no answer."""

import collections
import json
import shutil
import signal
import subprocess
import threading
import time

import httpx
import pytest

from tests.end_to_end.server import serving


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_flags(request) -> list[str]:
    if request.param == "sqlite":
        return []
    return ["--database-url", request.getfixturevalue("postgres_url")]


def test_kill_9_in_a_burst_of_writes_loses_nothing_acknowledged(database_flags, tmp_path):
    """Four writers put whole sets and add classes until the server is killed under them."""
    acknowledged: dict[str, int] = {}
    grown: list[str] = []
    enough = threading.Event()

    def put(url: str, writer: int) -> None:
        with httpx.Client(base_url=url) as client:
            for number in range(10_000):
                name = f"set-{writer}-{number % 7}"
                try:
                    answer = client.put(f"/v1/label-sets/{name}", json={"classes": [f"class {number}", "other"]})
                except httpx.HTTPError:
                    return
                assert answer.status_code in {200, 201}, answer.text
                acknowledged[f"{name}@{answer.json()['version']}"] = number
                if len(acknowledged) > 60 and len(grown) > 10:
                    enough.set()

    def grow(url: str) -> None:
        with httpx.Client(base_url=url) as client:
            client.put("/v1/label-sets/grown", json={"classes": ["seed"]}).raise_for_status()
            for number in range(10_000):
                try:
                    answer = client.post("/v1/label-sets/grown/classes", json={"classes": [f"leaf {number}"]})
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200, answer.text
                grown.append(f"leaf {number}")

    with serving(*database_flags, data_dir=tmp_path) as server:
        writers = [threading.Thread(target=put, args=(server.url, number)) for number in range(3)]
        writers.append(threading.Thread(target=grow, args=(server.url,)))
        for writer in writers:
            writer.start()
        assert enough.wait(60), "the writers were too slow to be interrupted"
        server.signal(signal.SIGKILL)
        for writer in writers:
            writer.join()
        assert server.wait() == -signal.SIGKILL

    with serving(*database_flags, data_dir=tmp_path) as server, server.client() as client:
        for reference, number in acknowledged.items():
            name, _, version = reference.partition("@")
            found = client.get(f"/v1/label-sets/{name}", params={"version": version})
            assert found.status_code == 200, reference
            assert [each["name"] for each in found.json()["classes"]] == [f"class {number}", "other"]
        latest = [each["name"] for each in client.get("/v1/label-sets/grown").json()["classes"]]
        assert latest[: len(grown) + 1] == ["seed", *grown]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, of which most is taken by a file that can be deleted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    (place / "ballast").write_bytes(bytes(3_000_000))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_told_and_what_was_acknowledged_stays(small_disk, tmp_path):
    flags = ["--database-url", f"sqlite:///{small_disk / 'deixis.sqlite3'}"]
    classes = [f"a class with a long name, number {number}" for number in range(500)]
    acknowledged: list[int] = []
    with serving(*flags, data_dir=tmp_path / "data") as server, server.client() as client:
        while True:
            answer = client.put("/v1/label-sets/growing", json={"classes": [*classes, f"write {len(acknowledged)}"]})
            if not answer.is_success:
                break
            acknowledged.append(answer.json()["version"])
            assert len(acknowledged) < 1000
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:deixis:problem:store-unavailable"
        assert "make room on the disk" in answer.json()["detail"]
        assert acknowledged == list(range(1, len(acknowledged) + 1))
        assert client.get("/v1/label-sets/growing").json()["version"] == acknowledged[-1]
        (small_disk / "ballast").unlink()
        again = client.put("/v1/label-sets/growing", json={"classes": ["there is room"]})
        assert again.json()["version"] == acknowledged[-1] + 1
        server.signal(signal.SIGKILL)
        server.wait()
    with serving(*flags, data_dir=tmp_path / "data") as server, server.client() as client:
        for number, version in enumerate(acknowledged):
            found = client.get("/v1/label-sets/growing", params={"version": version}).json()
            assert [each["name"] for each in found["classes"]] == [*classes, f"write {number}"]


def test_a_stop_lets_running_requests_finish(tmp_path, photographs):
    """SIGTERM arrives while a request of many photographs is being answered."""
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        files = [("image", (str(number), photographs["rocket"])) for number in range(48)]
        answers.append(httpx.post(f"{url}/classify", files=files, data={"labels": "rocket, cat"}, timeout=60))

    with serving("--log-format", "json", data_dir=tmp_path) as server:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        with server.client() as client:
            # The model's queue tells when the request is inside: it refuses what would not fit beside it.
            while client.get("/v1/models").json()["models"][0]["queued_images"] == 0:
                assert asking.is_alive()
        server.signal(signal.SIGTERM)
        asking.join()
        # uvicorn ends by the signal that it was sent, once everything is closed.
        assert server.wait() == -signal.SIGTERM

    assert answers[0].status_code == 200
    assert len(answers[0].json()["results"]) == 48
    events = [json.loads(line)["event"] for line in server.log]
    assert "unexpected_error" not in events
    assert "stopping" in events


def test_a_stop_under_load_answers_everyone_that_it_let_in(tmp_path, photographs):
    """Each request is answered whole or never began: as many answers of 200 as the log has."""
    outcomes: collections.Counter[str] = collections.Counter()

    def ask_until_it_is_gone(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while True:
                try:
                    files = {"image": photographs["rocket"]}
                    answer = client.post("/classify", files=files, data={"labels": "rocket, cat"})
                except (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
                    outcomes["cut short" if "incomplete" in str(error) else "not let in"] += 1
                    return
                outcomes[str(answer.status_code)] += 1

    with serving("--log-format", "json", data_dir=tmp_path) as server:
        callers = [threading.Thread(target=ask_until_it_is_gone, args=(server.url,)) for _ in range(16)]
        for caller in callers:
            caller.start()
        while outcomes["200"] < 50:
            time.sleep(0.05)
        server.signal(signal.SIGTERM)
        for caller in callers:
            caller.join(60)
        assert server.wait() == -signal.SIGTERM

    events = [json.loads(line) for line in server.log]
    answered = [each for each in events if each.get("path") == "/classify"]
    assert outcomes["200"] == sum(each["status"] == 200 for each in answered)
    assert set(outcomes) == {"200", "not let in"}
    assert outcomes["not let in"] == 16
    assert {each["status"] for each in answered} == {200}
    assert "unexpected_error" not in {each["event"] for each in events}
