"""`deixis serve --engine ray`: the service on Ray Serve, on this machine or on a cluster."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from app import __version__
from app.cores import usable_cores
from app.errors import ConfigurationError
from app.settings import Settings

_ENDED_WITHIN_S = 10.0


def serve_on_ray(settings: Settings) -> None:
    """Start it and, on this machine alone, wait for a signal to end it; on a cluster it goes on without this command.

    Raises:
        ConfigurationError: Ray is not installed, cannot be reached, or a setting that does not go with it.
    """
    # Before Ray is imported, which reads them then, and would report to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "app.cluster.proxy:middlewares")
    try:
        import ray  # noqa: PLC0415 - an extra, whose import takes a second
        from ray import serve  # noqa: PLC0415

        from app.cluster.application import APPLICATION, application, cpus_needed  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"the engine ray needs the extra ray ({error}); run: pip install 'deixis[server,ray]'"
        ) from error
    if settings.ray_address is not None and settings.database_url is None:
        raise ConfigurationError(
            "on a cluster label sets must be where every machine can reach them: set DEIXIS_DATABASE_URL to a"
            " PostgreSQL database, and DEIXIS_CAPTIONS_DIR to a folder that they share"
        )
    try:
        ray.init(
            address=settings.ray_address,
            # Of one machine all that is asked for is started, whatever its cores.
            num_cpus=None if settings.ray_address else max(usable_cores(), cpus_needed(settings)),
            include_dashboard=None if settings.ray_address else False,
            logging_level=settings.log_level,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"Ray cannot be reached at '{settings.ray_address or 'this machine'}': {error}; see DEIXIS_RAY_ADDRESS"
        ) from error
    ended, started = threading.Event(), False

    def end(_: int, __: FrameType | None) -> None:
        ended.set()
        if not started:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": settings.host,
                "port": settings.port,
                "keep_alive_timeout_s": settings.keep_alive_s,
            },
            logging_config={"log_level": settings.log_level.upper(), "enable_access_log": False},
        )
        try:
            serve.run(application(settings), name=APPLICATION, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise ConfigurationError(f"the service cannot be started on Ray: {error}") from error
        started = True
        address = f"http://{'127.0.0.1' if settings.host in {'0.0.0.0', '::'} else settings.host}:{settings.port}"  # noqa: S104 - compared only
        print(  # noqa: T201 - as `deixis serve` does
            f"\nDeixis {__version__} on Ray listens on {address}   (documentation: {address}/docs)\n"
            f"Try:  curl -F image=@photo.jpg -F labels='cat, dog, coffee cup' {address}/classify\n",
            flush=True,
        )
        if settings.ray_address is None:
            ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if settings.ray_address is None:
            _end(serve.shutdown, within_s=settings.shutdown_timeout_s + _ENDED_WITHIN_S)
        _end(ray.shutdown, within_s=_ENDED_WITHIN_S)


def _end(end: Callable[[], object], *, within_s: float) -> None:
    """Do it, for so long: where a signal went to all processes of a group, there may be nobody left to answer."""
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(within_s)
