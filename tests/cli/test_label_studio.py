"""`deixis label-studio` with invalid options; end_to_end/ runs it as users do."""

import socket

import pytest
from typer.testing import CliRunner

from app.cli import cli


@pytest.fixture
def refused(monkeypatch, tmp_path):
    monkeypatch.setattr("app.cli.label_studio_server.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    for name in ("BASIC_AUTH_USER", "BASIC_AUTH_PASS", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags) -> str:
        done = CliRunner().invoke(cli, ["label-studio", *map(str, flags)])
        assert done.exit_code == 2, done.output
        return " ".join(done.stderr.split())

    return run


def test_a_public_address_needs_a_login(refused, monkeypatch):
    assert "set BASIC_AUTH_USER and BASIC_AUTH_PASS" in refused("--host", "0.0.0.0")
    assert "clients need no login" in refused("--host", "studio.example")
    monkeypatch.setenv("BASIC_AUTH_USER", "x")
    assert "only one of BASIC_AUTH_USER and BASIC_AUTH_PASS" in refused()


def test_an_invalid_address_of_label_studio_is_an_error(refused, monkeypatch):
    assert "is not of the form http://host:port" in refused("--label-studio-url", "studio:8080")
    monkeypatch.setenv("LABEL_STUDIO_URL", "ftp://studio")
    assert "LABEL_STUDIO_URL" in refused()


def test_a_port_in_use_is_an_error(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refused("--port", port)


def test_invalid_options_of_the_method_are_an_error(refused):
    assert "not of the form NAME=NUMBER" in refused("--option", "beta")


def test_a_key_that_is_not_ascii_is_an_error(refused, monkeypatch):
    monkeypatch.setenv("DEIXIS_API_KEY", "schlüssel")
    assert "use ASCII" in refused()
