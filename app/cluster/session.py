"""A connection to Ray, on a cluster or begun on this machine, that ends well."""

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

_ENDED_WITHIN_S = 10.0
_FOUND_WITHIN_S = 5.0


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
        _find(address)
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
            _end(serve.shutdown, within_s=settings.shutdown_timeout_s + _ENDED_WITHIN_S)
        _end(ray.shutdown, within_s=_ENDED_WITHIN_S)


@contextmanager
def without_proxies(address: str | None) -> Iterator[None]:
    """Run Serve, without proxies if it is started here. It ends with the block, unless others deployed to it."""
    is_begun_on_cluster = _serve_details() is None and address is not None
    serve.start(proxy_location="Disabled")
    try:
        yield
    finally:
        if is_begun_on_cluster and not serve.status().applications:
            serve.shutdown()


def start_serve(settings: Settings) -> None:
    """Have Serve run with proxies that listen as the settings say.

    Raises:
        ConfigurationError: it runs there and listens otherwise, which only its start decides, or it cannot listen.
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
        # What Ray raises has the traceback of another process before it.
        reason = str(error).strip().rpartition("\n")[2]
        raise ConfigurationError(
            f"Ray's proxies cannot listen on {settings.host}:{settings.port}: {reason}; see DEIXIS_PORT"
        ) from error


def _serve_details() -> dict[str, Any] | None:
    """Return what Serve says of itself, None where it does not run; nothing public tells where its proxies listen."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_details()


def _check_same(options: dict[str, Any], running: dict[str, Any]) -> None:
    if running["proxy_location"] == "Disabled":
        differences = ["has no proxies"]
    else:
        found = running["http_options"]
        differences = [f"has {name} {found[name]}, not {told}" for name, told in options.items() if found[name] != told]
    if differences:
        raise ConfigurationError(
            f"Ray Serve runs on this cluster already and {', '.join(differences)}, which only its start decides:"
            " set DEIXIS_HOST, DEIXIS_PORT and DEIXIS_KEEP_ALIVE_S to what it has, or run `serve shutdown` first,"
            " which ends everything that it serves there"
        )


def _find(address: str | None) -> None:
    """See that somebody listens at an address, for which Ray itself waits for minutes; raises OSError."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_FOUND_WITHIN_S).close()


def _end(end: Callable[[], object], *, within_s: float) -> None:
    """Do it, for so long: where a signal went to all processes of a group, there may be nobody left to answer."""
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(within_s)
