"""Fixtures that run commands in this process with the fake encoder; end_to_end/ runs them as users do."""

from contextlib import asynccontextmanager

import httpx
import pytest
import structlog
from typer.testing import CliRunner

from app.cli import cli
from app.cli.backends.over_http import HttpBackend
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import load_settings
from deixis import AsyncClient


@pytest.fixture
def new_encoder():
    """The class of the encoder of commands and servers."""
    return FakeEncoder


@pytest.fixture
def run(monkeypatch, tmp_path, new_encoder):
    """A function that runs a command with its own data folder, and returns the result of typer."""
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: [new_encoder()])
    monkeypatch.setattr("app.cli.backends.in_process.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    runner = CliRunner()

    def invoke(*arguments, stdin=None):
        # Commands log to standard error, structlog by default to standard output.
        with structlog.testing.capture_logs():
            return runner.invoke(cli, [str(argument) for argument in arguments], input=stdin)

    return invoke


@pytest.fixture(params=["in process", "over HTTP"])
def where(request, monkeypatch, new_encoder):
    """The options of a command that runs in process, or on a server with the same settings."""

    @asynccontextmanager
    async def open_asgi_backend(url):
        app = create_app(load_settings(), lambda _: [new_encoder()])
        client = AsyncClient(url, transport=httpx.ASGITransport(app))
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
        try:
            async with client:
                yield HttpBackend(client)
        finally:  # a server shuts down in the same way after every request
            await lifespan.__aexit__(None, None, None)

    monkeypatch.setattr("app.cli.backends.over_http.open_http_backend", open_asgi_backend)
    monkeypatch.setattr("deixis._transport.retry_after_s", lambda _: 0.0)  # retries without a wait
    return ["--server", "http://localhost"] if request.param == "over HTTP" else []
