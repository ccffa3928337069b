"""Measures models again whose tuning is provisional, in a process of its own while no request runs.

The process ends as soon as a request arrives. The service keeps the tower that it has, and the next start uses the
result: to replace a tower in service, memory for both would be needed.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Literal

import structlog
from pebble import ProcessPool

from app.encoders._base import LoadOptions, Tuning
from app.encoders.loading import load_encoder
from app.encoders.tuning import MAX_CPU_BY_OTHERS
from app.models.registry import ModelRegistry
from app.observability.logs import configure_logs
from app.runtime.cpu import OtherProcesses, lower_process_priority
from app.runtime.memory import fits_twice

log = structlog.get_logger()

# Without requests before an attempt; doubled with each attempt that leads to no result.
_IDLE_S, _MAX_IDLE_S = 60.0, 3600.0


async def tune_when_idle(
    models: ModelRegistry,
    measure: Callable[[str], Awaitable[Tuning | None]],
    *,
    cpu_in_use: Callable[[], float | None] | None = None,
    idle_s: float = _IDLE_S,
    every_s: float = 10.0,
    watch_every_s: float = 0.1,
) -> None:
    """Measure the models with a provisional tuning again, one at a time, until each has a final one.

    Args:
        models: in service.
        measure: measures a model and stores the result; cancelled when a request arrives.
        cpu_in_use: returns the share of the CPU that processes used since the last call; by default all processes.
        idle_s: seconds without requests before an attempt.
        every_s: seconds between two checks whether the machine is idle.
        watch_every_s: seconds between two checks whether a request has arrived.
    """
    provisional = [served.name for served in models if served.encoder.tuning and served.encoder.tuning.provisional]
    cpu_in_use = cpu_in_use or OtherProcesses(own_s=lambda: 0.0).share
    while provisional:
        await asyncio.sleep(every_s)
        is_busy = (cpu_in_use() or 0.0) > MAX_CPU_BY_OTHERS
        if is_busy or time.perf_counter() - models.last_used_at < idle_s or not fits_twice():
            continue
        name = provisional.pop(0)
        try:
            tuning = await _unless_used(models, measure(name), watch_every_s)
        except Exception as error:
            log.warning("tuning_failed", model=name, exc_info=error)
            continue
        if tuning is None or tuning.provisional:
            provisional.append(name)
            idle_s = min(2 * idle_s, _MAX_IDLE_S)
            log.info("tuning_postponed", model=name, reason="request" if tuning is None else "other processes")
            continue
        path, served = tuning.image_path(), models.get(name)
        log.info("tuned", model=name, image_path=path, in_use=served.encoder.image_path, used="from the next start")


async def _unless_used(
    models: ModelRegistry, measured: Awaitable[Tuning | None], watch_every_s: float
) -> Tuning | None:
    """Return the result, or None if a model was used before it was there."""
    began = time.perf_counter()
    task = asyncio.ensure_future(measured)
    try:
        while not task.done():
            if models.last_used_at > began:
                return None
            await asyncio.wait([task], timeout=watch_every_s)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def measure_in_process(
    spec: str, *, options: LoadOptions, log_format: Literal["json", "console"]
) -> Tuning | None:
    """Measure a model in a process of lowest priority, store the result and return it; cancelling ends the process.

    Args:
        spec: name of the model.
        options: as it is loaded.
        log_format: of the warnings of the process.

    Raises:
        ModelUnavailableError: the model cannot be loaded.
    """
    # Spawned, because a fork of a process with threads may hold locks that are never released.
    processes = ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))
    try:
        return await asyncio.wrap_future(processes.schedule(_measure, args=(spec, options, log_format)))
    finally:
        await asyncio.to_thread(_end, processes)


def _end(processes: ProcessPool) -> None:
    processes.stop()  # type: ignore[no-untyped-call]
    processes.join()


def _measure(spec: str, options: LoadOptions, log_format: Literal["json", "console"]) -> Tuning | None:
    lower_process_priority()
    configure_logs(log_format, "warning")
    return load_encoder(spec, replace(options, measure_again=True)).tuning
