"""Runs the HTTP service for `deixis serve`."""

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import NoReturn

import structlog
import typer
import uvicorn
from fastapi import FastAPI

from app import __version__
from app.api.connections import ConnectionLimits, bounded
from app.cli.common import NOTHING_DONE, cluster_address, report_errors
from app.cli.serve_on_ray import deploy_on_ray, serve_on_ray
from app.errors import ConfigurationError
from app.main import create_app, load_encoders, prepare
from app.observability.logs import configure_logs
from app.runtime.memory import limit_arenas
from app.settings import Settings, load_settings

log = structlog.get_logger()

# File descriptors of the database, weights, caption databases, fetched images and refused connections.
_OTHER_DESCRIPTORS = 512
# Requests that wait have thousands of objects, which the default of (700, 10, 10) would look at again and again.
_GC_THRESHOLDS = (10_000, 20, 20)
# Wanted where the hard limit is unlimited, as on macOS.
_MANY_DESCRIPTORS = 10_240


class _Server(uvicorn.Server):
    """Prints its address and an example request once it listens, and drains before it stops.

    Args:
        config: the configuration of uvicorn.
        app: the application.
        drain_s: seconds between SIGTERM and the end of listening.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, *, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_s = drain_s
        self._stops_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; after the first SIGTERM only when ``drain_s`` has passed, and without waiting at another SIGINT."""
        if sig == signal.SIGINT and self.should_exit:
            # uvicorn would log that it has cancelled its own tasks.
            log.warning("stopped_without_waiting")
            _end_process(128 + sig)
        if sig == signal.SIGTERM and self._drain_s and self.started and self._stops_at is None:
            self._app.state.service.health.begin_draining()
            self._stops_at = time.monotonic() + self._drain_s
            return
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; called ten times per second."""
        if self._stops_at is not None and time.monotonic() >= self._stops_at:
            super().handle_exit(signal.SIGTERM, None)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        # Models and modules live as long as the process. A full collection that looks at their 600,000 objects stops
        # all threads for 0.4 s.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{'127.0.0.1' if shown in {'0.0.0.0', '[::]'} else shown}:{port}"  # noqa: S104 - compared only
        print(  # noqa: T201 - the only text on standard output
            f"\nDeixis {__version__} listens on {address}   (documentation: {address}/docs)\n"
            f"Try:  curl -F image=@{_sample_image()} -F labels='cat, dog, coffee cup' {address}/classify\n",
            flush=True,
        )


def _sample_image() -> str:
    """Return the path of an image for the first request: in a clone, one that is there."""
    sample = "examples/photos/cat.jpg"
    return sample if Path(sample).is_file() else "photo.jpg"


def run_service(flags: Mapping[str, str | None]) -> None:
    """Run the service until a signal ends it, with the settings of the environment and of flags that are not None."""
    with report_errors(), ExitStack() as closing:
        settings = load_settings(**flags)
        configure_logs(settings.log_format, settings.log_level)
        cluster = cluster_address()
        if settings.engine == "ray" and cluster is not None:
            deploy_on_ray(settings, cluster)
            return
        limit_arenas()
        # Checks what can fail before it loads the models, which takes longest.
        descriptors = _raise_descriptor_limit(settings.max_connections)
        listeners = _bind(settings)
        for listener in listeners:
            closing.enter_context(listener)
        asyncio.run(prepare(settings, is_local=all(_is_local(listener) for listener in listeners)))
        if settings.engine == "ray":
            for listener in listeners:
                _share(listener)
            port = listeners[0].getsockname()[1]
            serve_on_ray(settings.model_copy(update={"port": port}), None)
            return
        app = create_app(settings, lambda _: encoders)
        encoders = load_encoders(settings)
        server = _Server(
            uvicorn.Config(
                app,
                http=bounded(
                    ConnectionLimits(
                        settings.max_connections,
                        settings.head_timeout_s,
                        read_timeout_s=settings.body_timeout_s,
                        descriptors=descriptors,
                    )
                ),
                ws="none",
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=settings.shutdown_timeout_s,
                server_header=False,
            ),
            app,
            drain_s=settings.drain_s,
        )
        status = 0
        try:
            server.run(sockets=listeners)
        except KeyboardInterrupt:  # raised when the service has stopped
            if not server.started:
                raise
            status = 128 + signal.SIGINT
        except OSError as error:  # another process took the port between binding and listening
            raise _cannot_listen(settings, error) from error
    if not server.started:
        raise typer.Exit(NOTHING_DONE)
    _end_process(status)


def _end_process(status: int) -> NoReturn:
    """End the process at once, as its SIGTERM does.

    Python would first take its modules apart. Libraries of torch then report those that the garbage collector does not
    look at as leaks; to have it look at them again takes 1.6 s.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _raise_descriptor_limit(connections: int) -> int | None:
    """Raise the limit on open files as far as the system allows, and return it; None if there is no limit.

    Raises:
        ConfigurationError: the limit is too low for the connections.
    """
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - missing on Windows

    needed = connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigurationError(
            f"DEIXIS_MAX_CONNECTIONS={connections} needs {needed:,} file descriptors, and the system allows {hard:,};"
            " lower it, or raise the hard limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY:
        wanted = max(needed, soft, _MANY_DESCRIPTORS) if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return None if soft == resource.RLIM_INFINITY else soft


def _bind(settings: Settings) -> list[socket.socket]:
    """Bind the port on every address of the host, without listening yet."""
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Otherwise it would bind the IPv4 port as well, which has its own listener.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            if settings.port == 0:
                break  # a second address would get a different free port
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _cannot_listen(settings, error) from error
    return listeners


def _share(listener: socket.socket) -> None:
    """Let Ray's proxies bind and listen on the port of a socket that does not listen; it keeps others from the port.

    Set after binding, so that binding has failed if another process listens there in the same way.
    """
    if hasattr(socket, "SO_REUSEPORT"):  # enough with SO_REUSEADDR on Linux, needed on macOS, missing on Windows
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _cannot_listen(settings: Settings, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}; set DEIXIS_HOST and DEIXIS_PORT to"
        " others"
    )


def _is_local(listener: socket.socket) -> bool:
    return ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
