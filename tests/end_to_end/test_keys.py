"""Keys of a real server: made, used, and revoked by the command line while it runs."""

import json
import time

from tests.end_to_end.forked_commands import deixis
from tests.end_to_end.server import serving


def make(data_dir, *flags):
    made = deixis("keys", "create", *flags, data_dir=data_dir)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def until_status(client, status, headers):
    """Ask until the answer has the status; within what the guide promises, and time for a loaded machine."""
    give_up_at = time.monotonic() + 10
    while (got := client.get("/v1/label-sets", headers=headers).status_code) != status:
        assert time.monotonic() < give_up_at, got
        time.sleep(0.05)


def test_a_server_is_closed_by_its_first_key_and_forgets_a_revoked_one(photographs, tmp_path):
    with serving(data_dir=tmp_path) as server, server.client() as client:
        assert client.get("/v1/label-sets").status_code == 200
        acme = make(tmp_path, "--scope", "write", "--namespace", "acme")
        admin = make(tmp_path, "--scope", "admin")
        until_status(client, 401, {})

        kept = client.put(
            "/v1/label-sets/things", json={"classes": ["cat", "cup"]}, headers={"Authorization": f"Bearer {acme}"}
        )
        assert kept.status_code == 201, kept.text
        assert client.get("/v1/label-sets/things", headers={"X-API-Key": admin}).status_code == 404

        picture = tmp_path / "cat.jpg"
        picture.write_bytes(photographs["chelsea"])
        arguments = ("classify", picture, "--label-set", "things", "--format", "json", "--server", server.url)
        refused = deixis(*arguments, data_dir=tmp_path)
        assert refused.returncode == 2
        assert "API key" in refused.stderr
        for who in ({"DEIXIS_API_KEY": acme}, {"DEIXIS_API_KEY": admin, "DEIXIS_NAMESPACE": "acme"}):
            done = deixis(*arguments, data_dir=tmp_path, **who)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)[0]["predictions"][0]["label"] == "cat"
        unknown = deixis(*arguments, data_dir=tmp_path, DEIXIS_API_KEY=admin)
        assert unknown.returncode == 2
        assert "unknown label set 'things'" in unknown.stderr

        assert deixis("keys", "revoke", acme.split("_")[1], data_dir=tmp_path).returncode == 0
        until_status(client, 401, {"X-API-Key": acme})
        assert client.get("/healthz").status_code == 200
    log = "".join(server.log)
    assert acme.split("_")[1] in log
    assert acme.split("_", 2)[2] not in log
    assert admin.split("_", 2)[2] not in log
