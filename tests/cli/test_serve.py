"""What `deixis serve` does before it answers: its limit on open files, its port, and its first garbage collection."""

import gc
import resource
import socket
from contextlib import asynccontextmanager

import pytest
import typer
import uvicorn
from fastapi import FastAPI

from app.cli import serving
from app.cli.serving import _raise_descriptor_limit, _Server, run_service
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


def test_the_port_is_held_for_rays_proxies_and_for_nobody_else(monkeypatch, tmp_path):
    """Ray starts seconds after the port was chosen; its proxies set both options before they bind."""
    tried = []

    def listen(port, *options):
        with socket.socket() as other:
            for option in options:
                other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client, other.accept()[0] as accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"

    def start_ray(settings, address):
        assert address is None
        tried.append(settings.port)
        with pytest.raises(OSError, match="already in use"):
            listen(settings.port)
        for _ in range(2):  # a proxy that crashes is restarted
            listen(settings.port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)

    monkeypatch.setattr(serving, "serve_on_ray", start_ray)
    monkeypatch.setattr(serving, "prepare", _nothing)
    run_service({"engine": "ray", "port": "0", "data_dir": str(tmp_path)})
    (port,) = tried
    assert port > 0
    listen(port, socket.SO_REUSEADDR)  # released at the end


def test_a_port_on_which_another_ray_listens_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "serve_on_ray", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(serving, "prepare", _nothing)
    with socket.socket() as other:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(typer.Exit):
            run_service({"engine": "ray", "port": str(port), "data_dir": str(tmp_path)})
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


async def _nothing(*_, **__):
    pass


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
