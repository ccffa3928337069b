"""`deixis keys`, and what `deixis serve` wants to know of them before it listens."""

import json
import re
import sqlite3

import pytest
from typer.testing import CliRunner

from app.api.auth.keys import key_digest
from app.cli import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("app.cli.stored_data.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def no_models(monkeypatch):
    """Loading models is where a server that was not refused arrives."""

    def arrived(_):
        raise InterruptedError

    monkeypatch.setattr("app.cli.serving.load_encoders", arrived)


def test_a_key_is_printed_alone_and_only_its_hash_is_kept(run, tmp_path):
    made = run("keys", "create", "--scope", "write", "--namespace", "acme", "--rate", "60/min", "--note", " the  shop ")

    assert made.exit_code == 0, made.stderr
    shown = made.stdout.removesuffix("\n")
    found = re.fullmatch(r"dx_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", shown)
    assert found
    assert found[1] in made.stderr
    (listed,) = json.loads(run("keys", "list", "--json").stdout)
    assert listed.pop("created_at")
    assert listed == {
        "id": found[1],
        "scope": "write",
        "namespace": "acme",
        "note": "the shop",
        "rate": "60/minute",
        "image_rate": None,
        "concurrency": None,
        "last_used_at": None,
        "revoked_at": None,
    }
    with sqlite3.connect(tmp_path / "data" / "deixis.sqlite3") as connection:
        kept = "\n".join(connection.iterdump())
    connection.close()
    assert shown not in kept
    assert key_digest(shown).hex().upper() in kept.upper()


def test_the_list_is_a_table_and_tells_which_are_revoked(run):
    ids = [run("keys", "create", "--note", note).stdout.split("_")[1] for note in ("first", "[red]second")]

    revoked = run("keys", "revoke", ids[0])

    assert revoked.exit_code == 0
    lines = run("keys", "list").stdout.splitlines()
    state = {key_id: next(line for line in lines if key_id in line) for key_id in ids}
    assert "revoked" in state[ids[0]]
    assert "valid" in state[ids[1]]
    assert "[red]second" in state[ids[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--rate", "often"), "--rate: 'often' is not a rate"),
        (("create", "--image-rate", "0/min"), "--image-rate"),
        (("create", "--namespace", "Acme!"), "--namespace"),
        (("revoke", "0123456789ab"), "unknown key '0123456789ab'"),
    ],
)
def test_invalid_options_are_errors_of_one_line_and_create_no_key(run, arguments, message):
    done = run("keys", *arguments)

    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads(run("keys", "list", "--json").stdout) == []


@pytest.mark.parametrize("scope", ["root", ""])
def test_a_scope_that_there_is_not_is_a_wrong_flag(run, scope):
    assert run("keys", "create", "--scope", scope).exit_code == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nothing_listens_to_other_machines_before_there_is_a_key(run, no_models, host):
    done = run("serve", "--port", 0, "--host", host)

    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {host} can be reached from other machines, and there are no API keys")
    assert done.stderr.count("\n") == 1
    run("keys", "create", "--scope", "admin")
    assert isinstance(run("serve", "--port", 0, "--host", host).exception, InterruptedError)


@pytest.mark.parametrize("policy", ["off", "required"])
def test_whoever_says_how_it_is_meant_may_listen(run, no_models, policy):
    done = run("serve", "--port", 0, "--host", "0.0.0.0", "--keys", policy)
    assert isinstance(done.exception, InterruptedError)


def test_a_file_of_keys_is_enough_to_listen(run, no_models, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nid = "one"\nkey = "a key that has enough characters"\n')
    done = run("serve", "--port", 0, "--host", "0.0.0.0", "--api-keys-file", file)
    assert isinstance(done.exception, InterruptedError)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_alone_needs_no_key(run, no_models, host):
    assert isinstance(run("serve", "--port", 0, "--host", host).exception, InterruptedError)


def test_a_file_of_keys_that_cannot_be_read_ends_the_start(run, no_models, tmp_path):
    done = run("serve", "--port", 0, "--api-keys-file", tmp_path / "none.toml")
    assert done.exit_code == 2
    assert "none.toml" in done.stderr
    assert done.stderr.count("\n") == 1
