"""Connects to Ray on a cluster, or starts and stops a Ray on this machine."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from app.errors import ConfigurationError
from app.runtime.cpu import usable_cores
from app.settings import Settings

_STOP_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 5.0


@contextmanager
def connected(settings: Settings, address: str | None, *, cpus: int) -> Iterator[None]:
    """Connect to a cluster, or to a Ray on this machine that starts and ends with the block.

    Args:
        settings: of the service.
        address: of the cluster; None starts a Ray on this machine.
        cpus: cores that all replicas need; a Ray on this machine gets as many, even if the machine has fewer.

    Raises:
        ConfigurationError: Ray cannot be reached or started.
    """
    is_own = address is None
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            num_cpus=max(usable_cores(), cpus) if is_own else None,
            include_dashboard=False if is_own else None,
            logging_level=settings.log_level,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"Ray cannot be reached at '{address or 'this machine'}': {error}; check RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        if is_own:
            _run_for(serve.shutdown, timeout_s=settings.shutdown_timeout_s + _STOP_TIMEOUT_S)
        _run_for(ray.shutdown, timeout_s=_STOP_TIMEOUT_S)


@contextmanager
def without_proxies(address: str | None) -> Iterator[None]:
    """Start Serve without proxies unless it runs already; stop it at the end if it has no other applications."""
    is_started_here = _serve_details() is None and address is not None
    serve.start(proxy_location="Disabled")
    try:
        yield
    finally:
        if is_started_here and not serve.status().applications:
            serve.shutdown()


def start_serve(settings: Settings) -> None:
    """Start Serve with proxies that listen on the address of the settings.

    Raises:
        ConfigurationError: Serve already runs with other options, or its proxies cannot listen on this address.
    """
    options = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": settings.keep_alive_s}
    running = _serve_details()
    if running is not None:
        _check_same(options, running)
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options=options,
            logging_config={"log_level": settings.log_level.upper(), "enable_access_log": False},
        )
    except (RuntimeError, TimeoutError) as error:
        if running is None:
            serve.shutdown()
        # The message of Ray starts with the traceback of another process.
        reason = str(error).strip().rpartition("\n")[2]
        raise ConfigurationError(
            f"Ray's proxies cannot listen on {settings.host}:{settings.port}: {reason}; set DEIXIS_HOST or DEIXIS_PORT"
        ) from error


def _serve_details() -> dict[str, Any] | None:
    """Return the options of Serve, None if it does not run; Ray has no public function for them."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_details()


def _check_same(options: dict[str, Any], running: dict[str, Any]) -> None:
    if running["proxy_location"] == "Disabled":
        differences = ["has no proxies"]
    else:
        current = running["http_options"]
        differences = [
            f"has {name} {current[name]}, not {value}" for name, value in options.items() if current[name] != value
        ]
    if differences:
        raise ConfigurationError(
            f"Ray Serve already runs on this cluster and {', '.join(differences)}; its options are fixed at its"
            " start: set DEIXIS_HOST, DEIXIS_PORT and DEIXIS_KEEP_ALIVE_S to its values, or run `serve shutdown` first,"
            " which stops all its applications"
        )


def _check_reachable(address: str | None) -> None:
    """Raise OSError if nothing listens on an address; Ray itself would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


def _run_for(stop: Callable[[], object], *, timeout_s: float) -> None:
    """Run a function for at most this time; after a signal to the process group, Ray may no longer respond."""
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(timeout_s)
