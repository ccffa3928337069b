"""What `deixis serve` does before it answers: its limit on open files, and its first collection of garbage."""

import gc
import resource
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi import FastAPI

from app.cli.serving import _raise_descriptor_limit, _Server
from app.errors import ConfigurationError

INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised", "available"),
    [
        ((1024, 4096), (4096, 4096), 4096),
        ((4096, 4096), (4096, 4096), 4096),
        ((256, INFINITE), (10_240, INFINITE), 10_240),
        ((20_000, INFINITE), (20_000, INFINITE), 20_000),
        ((INFINITE, INFINITE), None, None),
    ],
)
def test_the_soft_limit_on_open_files_is_raised(monkeypatch, limits, raised, available):
    was_set = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: was_set.append(wanted))
    assert _raise_descriptor_limit(1000) == available
    assert was_set == ([] if raised is None else [raised])


def test_a_hard_limit_below_the_connections_is_an_error(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigurationError, match="needs 1,512 file descriptors, and the system allows 1,024"):
        _raise_descriptor_limit(1000)


@pytest.mark.anyio
async def test_a_started_server_keeps_what_was_loaded_out_of_collections(monkeypatch, capsys):
    events = []
    monkeypatch.setattr(gc, "freeze", lambda: events.append("frozen"))
    app = FastAPI(lifespan=_noting(events))
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="on")
    server = _Server(config, app, drain_s=0)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    await server.shutdown()
    assert events == ["loaded", "frozen", "stopped"]
    assert "listens on http://127.0.0.1:" in capsys.readouterr().out


def _noting(events):
    @asynccontextmanager
    async def lifespan(_):
        events.append("loaded")
        yield
        events.append("stopped")

    return lifespan
