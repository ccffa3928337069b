"""Which server a command uses if it has no ``--server``."""

import json
import os
import shutil
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app import __version__
from app.cli import cli
from app.cli.backends import over_http
from app.cli.server import find_server
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from tests.api.live import live
from tests.conftest import picture

OURS = {"/healthz": {"service": f"deixis {__version__}"}, "/v1/models": {"models": [{"name": "fake"}]}}


@contextmanager
def answering(answers, status=200):
    """A server that answers with the JSON of ``answers``; yield its port, and the headers of each request by path."""
    seen = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen[self.path] = dict(self.headers)
            content = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(status if self.path == "/v1/models" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port, seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """An environment without any setting, in which the user's folders are empty."""
    for name in [name for name in os.environ if name.startswith("DEIXIS_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return monkeypatch


def test_a_service_that_answers_is_used_and_named_on_standard_error(unset, run, tmp_path, empty_database):
    unset.delenv("DEIXIS_DATA_DIR")  # of the fixture
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder)
    photo = tmp_path / "photo.png"
    photo.write_bytes(picture("red"))
    asked = ("classify", photo, "-l", "red, blue", "-f", "json")
    with live(create_app(Settings(data_dir=folder), lambda _: [FakeEncoder()])) as (_, port):
        unset.setenv("DEIXIS_PORT", str(port))
        found = run(*asked)
        unset.setenv("DEIXIS_BUILD_DEFAULT_DATABASE", "false")
        in_process = run(*asked)
        unset.delenv("DEIXIS_BUILD_DEFAULT_DATABASE")
        local = run(*asked, "--local")

    assert found.exit_code == in_process.exit_code == local.exit_code == 0, found.stderr
    assert found.stderr.strip() == (
        f"Using the service at http://127.0.0.1:{port}; --local runs this command in its own process."
    )
    assert "Using" not in in_process.stderr + local.stderr
    labels = [json.loads(done.stdout)[0]["predictions"][0]["label"] for done in (found, in_process, local)]
    assert labels == ["red"] * 3
    unset.delenv("DEIXIS_SERVER")  # which --local has set


@pytest.mark.parametrize("options", [("--local", "--server", "http://a"), ("--server", "http://a", "--local")])
def test_a_command_runs_either_here_or_with_the_named_server(unset, run, options):
    refused = run("classify", "photo.jpg", "-l", "red", *options)
    assert refused.exit_code == 2
    assert "excludes --local" in refused.stderr
    unset.delenv("DEIXIS_SERVER")  # which --local has set


@pytest.mark.parametrize(
    ("answers", "status", "message"),
    [
        ({}, 200, ""),
        ({"/healthz": {"status": "ok"}}, 200, ""),
        ({"/healthz": ["deixis"]}, 200, ""),
        (OURS | {"/v1/models": {"object": "list"}}, 200, ""),
        (OURS, 500, ""),
        (OURS, 401, "is not used: it needs an API key; set DEIXIS_API_KEY, and DEIXIS_SERVER to http://127.0.0.1:"),
        ({"/healthz": {"service": "deixis 0.0.9"}}, 200, "it is version 0.0.9, and this command is"),
    ],
)
def test_another_program_or_service_is_not_used(unset, capsys, answers, status, message):
    with answering(answers, status) as (port, _):
        unset.setenv("DEIXIS_PORT", str(port))
        assert find_server(search=True) is None
    said = capsys.readouterr().err
    assert message in said if message else said == ""


def test_a_key_is_sent_to_no_program_that_was_only_found(unset, capsys):
    unset.setenv("DEIXIS_API_KEY", "secret")
    with answering(OURS) as (port, seen):
        unset.setenv("DEIXIS_PORT", str(port))
        assert find_server(search=True) is None
        assert "secret" not in str(seen)
        assert "/v1/models" not in seen
    assert "is sent only to the server that --server or DEIXIS_SERVER names" in capsys.readouterr().err


def test_the_namespace_is_sent_to_a_service_that_was_found(unset):
    unset.setenv("DEIXIS_NAMESPACE", "acme")
    with answering(OURS) as (port, seen):
        unset.setenv("DEIXIS_PORT", str(port))
        assert find_server(search=True) == f"http://127.0.0.1:{port}"
        assert seen["/v1/models"]["Deixis-Namespace"] == "acme"


@pytest.mark.parametrize(
    "name", ["DEIXIS_DATA_DIR", "DEIXIS_MODELS", "DEIXIS_DATABASE_URL", "DEIXIS_MAX_LABELS", "DEIXIS_CONFIG"]
)
def test_a_command_with_settings_of_a_service_looks_for_none(unset, tmp_path, name):
    config = tmp_path / "deixis.toml"
    config.write_text("cache_mib = 100", "utf-8")
    values = {"DEIXIS_MODELS": "embedded", "DEIXIS_MAX_LABELS": "5", "DEIXIS_CONFIG": str(config)}
    with answering(OURS) as (port, seen):
        unset.setenv("DEIXIS_PORT", str(port))
        unset.setenv(name, values.get(name, str(tmp_path)))
        assert find_server(search=True) is None
        assert not seen


@pytest.mark.parametrize("source", ["variable", "file"])
@pytest.mark.parametrize(("value", "expected"), [("http://a.example", "http://a.example"), ("local", None)])
def test_the_setting_names_the_server_or_forbids_one(unset, tmp_path, source, value, expected):
    if source == "variable":
        unset.setenv("DEIXIS_SERVER", value)
    else:
        Path(tmp_path / "deixis.toml").write_text(f"server = '{value}'", "utf-8")
        unset.setenv("DEIXIS_CONFIG", str(tmp_path / "deixis.toml"))
    with answering(OURS) as (port, seen):
        unset.setenv("DEIXIS_PORT", str(port))
        assert find_server(search=True) == expected
        assert not seen


def test_a_program_that_accepts_and_never_answers_delays_a_command_by_a_fraction_of_a_second(unset):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        unset.setenv("DEIXIS_PORT", str(silent.getsockname()[1]))
        assert find_server(search=True) is None


def test_work_that_a_server_may_refuse_looks_for_none(unset, run, tmp_path):
    unset.delenv("DEIXIS_DATA_DIR")  # of the fixture
    for colour in ("red", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        (tmp_path / "pictures" / colour / "a.png").write_bytes(picture(colour))
    with answering(OURS) as (port, seen):
        unset.setenv("DEIXIS_PORT", str(port))
        done = run("evaluate", tmp_path / "pictures", "--method", "all", "--json", "-")
        assert done.exit_code == 0, done.stderr
        assert not seen


@pytest.mark.parametrize(
    ("command", "request_line"),
    [
        (["classify", "FILE", "--labels", "cat, dog"], "POST /v1/classify"),
        (["label-sets", "list"], "GET /v1/label-sets"),
        (["captions", "list"], "GET /v1/databases"),
    ],
)
def test_a_command_says_that_it_waits_for_a_server_and_ends_if_there_is_no_answer(
    unset, tmp_path, command, request_line
):
    (tmp_path / "cat.png").write_bytes(picture())
    unset.setattr(over_http, "SILENT_S", 0.01)
    unset.setattr(over_http, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        given = [str(tmp_path / "cat.png") if each == "FILE" else each for each in command]
        done = CliRunner().invoke(cli, [*given, "--server", url])
    assert done.exit_code == 2
    assert [line for line in done.stderr.splitlines() if line] == [
        f"Waiting for {url} to answer {request_line}; without an answer, this ends after 0.2 s.",
        f"error: no response from {url}: it did not answer in time; is the server running?",
    ]
    assert done.stdout == ""
