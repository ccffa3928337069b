"""`deixis serve --engine ray`: the service on Ray Serve, on this machine or on a cluster."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from app import __version__
from app.cli.common import needs_ray
from app.errors import ConfigurationError
from app.main import prepare
from app.settings import Settings


def deploy_on_ray(settings: Settings, address: str) -> None:
    """Deploy the service on a cluster, or update the service that runs there, and return.

    Raises:
        ConfigurationError: a setting does not suit a cluster, there are no keys, or as ``serve_on_ray``.
    """
    if settings.database_url is None:
        raise ConfigurationError(
            "on a cluster every machine must reach the label sets: set DEIXIS_DATABASE_URL to a PostgreSQL database,"
            " and DEIXIS_CAPTIONS_DIR to a shared folder"
        )
    asyncio.run(prepare(settings.model_copy(update={"host": "the cluster"}), is_local=False))
    serve_on_ray(settings, address)


def serve_on_ray(settings: Settings, address: str | None) -> None:
    """Start the service on Ray; without an address, on a Ray of this machine until a signal ends it.

    Raises:
        ConfigurationError: Ray is not installed, cannot be reached, or the service cannot be started on it.
    """
    with needs_ray():
        from ray import serve  # noqa: PLC0415 - an extra, whose import takes a second

        from app.cluster.application import APPLICATION, application, cpus_needed  # noqa: PLC0415
        from app.cluster.session import connected, start_serve  # noqa: PLC0415
    with connected(settings, address, cpus=cpus_needed(settings)), _stop_event() as stopped:
        start_serve(settings)
        try:
            serve.run(application(settings), name=APPLICATION, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise ConfigurationError(f"the service cannot be started on Ray: {error}") from error
        url = f"http://{'127.0.0.1' if settings.host in {'0.0.0.0', '::'} else settings.host}:{settings.port}"  # noqa: S104 - compared only
        print(  # noqa: T201 - as `deixis serve` does
            f"\nDeixis {__version__} on Ray listens on {url}   (documentation: {url}/docs)\n"
            f"Try:  curl -F image=@photo.jpg -F labels='cat, dog, coffee cup' {url}/classify\n",
            flush=True,
        )
        if address is None:
            stopped.wait()


@contextmanager
def _stop_event() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; before it is waited for, they interrupt the start."""
    stopped = _StopEvent()

    def end(_: int, __: FrameType | None) -> None:
        stopped.set()
        if not stopped.is_waited_for:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    except KeyboardInterrupt:
        raise ConfigurationError("stopped before the service was started") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _StopEvent(threading.Event):
    is_waited_for = False

    def wait(self, timeout: float | None = None) -> bool:
        self.is_waited_for = True
        return super().wait(timeout)
