"""`deixis backup` while a server writes, and another server on what `deixis restore` makes of it."""

import json
import threading

import httpx
import pytest

from tests.end_to_end.forked_commands import deixis
from tests.end_to_end.server import serving


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_flags(request) -> list[str]:
    if request.param == "sqlite":
        return []
    return ["--database-url", request.getfixturevalue("postgres_url")]


def test_a_backup_taken_under_writes_has_all_that_was_acknowledged_before_and_nothing_torn(
    database_flags, tmp_path, photographs
):
    acknowledged: list[int] = []
    stop = threading.Event()

    def write(url: str, writer: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            number = 0
            while not stop.is_set():
                number += 1
                classes = [f"{writer} {number} {part}" for part in range(50)]
                client.put(f"/v1/label-sets/set-{writer}", json={"classes": classes}).raise_for_status()
                acknowledged.append(number)

    settings = {"DEIXIS_DATABASE_URL": database_flags[1]} if database_flags else {}
    with serving(*database_flags, data_dir=tmp_path / "one") as server, server.client() as client:
        client.put("/v1/label-sets/pets", json={"classes": ["cat", "rocket"]}).raise_for_status()
        files = [("image", (f"{name}.jpg", photographs[name], "image/jpeg")) for name in ("chelsea", "rocket")]
        client.post("/v1/label-sets/pets/images", files=files, data={"class": ["cat", "rocket"]}).raise_for_status()
        writers = [threading.Thread(target=write, args=(server.url, number)) for number in range(3)]
        for writer in writers:
            writer.start()
        before = {
            f"set-{number}": answer.json()["version"]
            for number in range(3)
            if (answer := client.get(f"/v1/label-sets/set-{number}")).status_code == 200
        }
        done = deixis("backup", tmp_path / "backup", data_dir=tmp_path / "one", **settings)
        assert done.returncode == 0, done.stderr
        stop.set()
        for writer in writers:
            writer.join()
        refused = deixis("restore", tmp_path / "backup", data_dir=tmp_path / "one", **settings)
        assert refused.returncode == 2
        assert "--replace" in refused.stderr
    assert len(acknowledged) > 3

    assert "label_set_versions" in done.stdout
    restored = deixis("restore", tmp_path / "backup", data_dir=tmp_path / "two")
    assert restored.returncode == 0, restored.stderr
    manifest = json.loads((tmp_path / "backup" / "manifest.json").read_text())
    with serving(data_dir=tmp_path / "two") as server, server.client() as client:
        for name, version in before.items():
            latest = client.get(f"/v1/label-sets/{name}").json()
            assert latest["version"] >= version
        told = 0
        for summary in client.get("/v1/label-sets").json()["label_sets"]:
            if summary["name"] == "pets":
                continue
            for version in range(1, summary["version"] + 1):
                told += 1
                found = client.get(f"/v1/label-sets/{summary['name']}", params={"version": version}).json()
                names = [each["name"] for each in found["classes"]]
                assert names == [f"{summary['name'][-1]} {version} {part}" for part in range(50)]
        assert manifest["rows"]["label_set_versions"] == told + 1
        assert len(client.get("/v1/label-sets/pets/images").json()["images"]) == 2
        answer = client.post("/classify", files={"image": photographs["chelsea"]}, data={"label_set": "pets"}).json()
        assert answer["results"][0]["predictions"][0]["label"] == "cat"


def test_the_way_back_to_an_older_schema_is_asked_for_and_shown(tmp_path):
    def database(*arguments):
        return deixis("database", *arguments, data_dir=tmp_path)

    assert "revision  none\n" in database("show").stdout
    assert deixis("keys", "create", data_dir=tmp_path).returncode == 0
    refused = database("downgrade", "0003")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert database("downgrade", "0003", "--yes").returncode == 0
    assert "revision  0003" in database("show").stdout
    unknown = database("downgrade", "0005", "--yes")
    assert unknown.returncode == 2
    assert "known: 0001, 0002" in unknown.stderr
    assert deixis("keys", "list", "--json", data_dir=tmp_path).stdout.strip() == "[]"
    shown = dict(line.split(maxsplit=1) for line in database("show").stdout.splitlines())
    assert shown["revision"] == shown["newest"] > "0003"
