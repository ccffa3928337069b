"""A connection to Ray, on a cluster or begun on this machine, that ends well."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import serve

from app.cores import usable_cores
from app.errors import ConfigurationError
from app.settings import Settings

_ENDED_WITHIN_S = 10.0
_FOUND_WITHIN_S = 5.0


@contextmanager
def connected(settings: Settings, *, cpus: int) -> Iterator[None]:
    """Be connected to the cluster of the settings, or to a Ray that begins and ends with the block.

    Args:
        settings: name the cluster.
        cpus: what all replicas need; on this machine they are all started, whatever its cores.

    Raises:
        ConfigurationError: Ray cannot be reached, or begun.
    """
    is_own = settings.ray_address is None
    try:
        _find(settings.ray_address)
        ray.init(
            address=settings.ray_address,
            num_cpus=max(usable_cores(), cpus) if is_own else None,
            include_dashboard=False if is_own else None,
            logging_level=settings.log_level,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"Ray cannot be reached at '{settings.ray_address or 'this machine'}': {error}; see DEIXIS_RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        if is_own:
            _end(serve.shutdown, within_s=settings.shutdown_timeout_s + _ENDED_WITHIN_S)
        _end(ray.shutdown, within_s=_ENDED_WITHIN_S)


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
