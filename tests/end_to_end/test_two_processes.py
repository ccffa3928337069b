"""Two servers on one PostgreSQL: what one acknowledged, the other knows."""

import time

import pytest

from tests.end_to_end.forked_commands import deixis
from tests.end_to_end.server import serving

pytestmark = pytest.mark.postgres


def test_each_of_two_servers_sees_what_the_other_acknowledged(postgres_url, photographs, tmp_path):
    flags = ("--database-url", postgres_url)
    with (
        serving(*flags, data_dir=tmp_path / "one") as first,
        serving(*flags, data_dir=tmp_path / "two") as second,
        first.client() as here,
        second.client() as there,
    ):

        def label_of(client, reference):
            answer = client.post("/classify", files={"image": photographs["chelsea"]}, data={"label_set": reference})
            return answer.json()["results"][0]["predictions"][0]["label"] if answer.is_success else answer.status_code

        # Changes are read from the database by every request, so that there is nothing to wait for.
        for number, classes in enumerate((["cat", "rocket"], ["kitten", "rocket"], ["tabby cat", "car"]), 1):
            writer, reader = (here, there) if number % 2 else (there, here)
            assert writer.put("/v1/label-sets/pets", json={"classes": classes}).json()["version"] == number
            assert reader.get("/v1/label-sets/pets").json()["version"] == number
            assert label_of(reader, "pets") == label_of(writer, "pets") == classes[0]
        assert label_of(there, "pets@1") == "cat"
        assert there.post("/v1/label-sets/pets/classes", json={"classes": ["cat"]}).json()["version"] == 4
        assert here.get("/v1/label-sets/pets").json()["version"] == 4
        assert here.delete("/v1/label-sets/pets").status_code == 204
        assert label_of(there, "pets") == label_of(there, "pets@1") == 404
        assert there.get("/v1/label-sets").json()["label_sets"] == []

        key = deixis("keys", "create", "--scope", "admin", data_dir=tmp_path, DEIXIS_DATABASE_URL=postgres_url)
        secret = key.stdout.strip()
        for client in (here, there):
            within_seconds(lambda client=client: client.get("/v1/label-sets").status_code == 401)
            assert client.get("/v1/label-sets", headers={"X-API-Key": secret}).status_code == 200
        revoked = deixis("keys", "revoke", secret.split("_")[1], data_dir=tmp_path, DEIXIS_DATABASE_URL=postgres_url)
        assert revoked.returncode == 0
        for client in (here, there):
            within_seconds(
                lambda client=client: client.get("/v1/label-sets", headers={"X-API-Key": secret}).status_code == 401
            )


def within_seconds(is_so):
    """Wait for what the guide promises within a second, and longer on a loaded machine."""
    give_up_at = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
