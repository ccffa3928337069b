"""`deixis label-studio` with flags that cannot work; end_to_end/ runs it as users do."""

import socket

import pytest
from typer.testing import CliRunner

from app.cli import cli


@pytest.fixture
def refused(monkeypatch, tmp_path):
    monkeypatch.setattr("app.cli.label_studio.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    for name in ("BASIC_AUTH_USER", "BASIC_AUTH_PASS", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags) -> str:
        done = CliRunner().invoke(cli, ["label-studio", *map(str, flags)])
        assert done.exit_code == 2, done.output
        return " ".join(done.stderr.split())

    return run


def test_strangers_are_not_let_in_by_oversight(refused, monkeypatch):
    assert "BASIC_AUTH_USER and BASIC_AUTH_PASS here" in refused("--host", "0.0.0.0")
    assert "callers need no password" in refused("--host", "studio.example")
    monkeypatch.setenv("BASIC_AUTH_USER", "x")
    assert "go together" in refused()


def test_an_address_that_is_none_is_told(refused, monkeypatch):
    assert "is not of the form http://host:port" in refused("--label-studio-url", "studio:8080")
    monkeypatch.setenv("LABEL_STUDIO_URL", "ftp://studio")
    assert "LABEL_STUDIO_URL" in refused()


def test_a_port_that_is_taken_is_told(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refused("--port", port)


def test_wrong_options_of_the_method_are_told(refused):
    assert "not of the form NAME=NUMBER" in refused("--option", "beta")


def test_a_key_that_no_header_can_hold_is_told(refused, monkeypatch):
    monkeypatch.setenv("DEIXIS_API_KEY", "schlüssel")
    assert "use ASCII" in refused()
