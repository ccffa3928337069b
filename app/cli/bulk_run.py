"""Runs `deixis bulk`: its progress, its interruption and its summary."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from app.bulk.classifier import bulk_settings
from app.bulk.manifest import Manifest
from app.bulk.parts import ImageCounts, part_files, parts_folder
from app.bulk.ray_engine import LOCAL, ReplicaPool, ray_engine
from app.bulk.request import BulkRequest
from app.bulk.run import prepare_run, process_engine, run_bulk, service_in_loop, validate
from app.classification.request import ClassifyRequest
from app.cli.backends.in_process import InProcessBackend
from app.cli.common import (
    NOTHING_DONE,
    SOME_FAILED,
    Engine,
    cluster_address,
    err,
    line_printer,
    loading_models,
    out,
    prepare_database,
    report_errors,
)
from app.errors import InvalidFieldError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.runtime.ray_layout import parse_replicas
from app.settings import load_settings


def run_bulk_command(
    request: ClassifyRequest,
    bulk_request: BulkRequest,
    *,
    engine: Engine,
    ray_address: str | None,
    replicas: str,
    replica_cpus: float,
    replica_gpus: float,
) -> None:
    """Classify the images and print how many; the other arguments are the options of the command."""
    configure_logs("console", "warning")
    started = time.monotonic()
    with report_errors(), _report_interruption(bulk_request.out):
        validate(bulk_request)
        pool = _pool(replicas, replica_cpus, replica_gpus, ray_address) if engine is Engine.RAY else None
        counts = _run(request, bulk_request, pool)
    elapsed = f"{time.monotonic() - started:,.0f} s"
    shown = escape(str(bulk_request.out))
    out.print(f"{counts.images:,} images, {counts.bad:,} bad, in {shown} ({elapsed})", highlight=False)
    if counts.bad or not counts.images:
        raise typer.Exit(SOME_FAILED if counts.bad < counts.images else NOTHING_DONE)


def _pool(count: str, cpus: float, gpus: float, address: str | None) -> ReplicaPool:
    try:
        replicas = parse_replicas(count)
    except ValueError as error:
        raise InvalidFieldError.of("--replicas", str(error)) from error
    pool = ReplicaPool(replicas.min, replicas.max, cpus, gpus, address or cluster_address() or LOCAL)
    pool.validate()
    return pool


def _run(request: ClassifyRequest, bulk_request: BulkRequest, pool: ReplicaPool | None) -> ImageCounts:
    settings = bulk_settings(load_settings(), request.model)
    with loading_models(settings.image_backend):
        encoders = load_encoders(settings)
    with service_in_loop(settings, encoders) as (loop, service):
        loop.run(prepare_database(InProcessBackend(service), request))
        spec = loop.run(prepare_run(service, request, bulk_request, settings.max_image_bytes))
        if pool is None:
            with _ProgressBar() as bar:
                return run_bulk(bulk_request, spec, process_engine(loop, service), bar)
    # The request is resolved, and the replicas may need the memory of this model.
    del encoders, service
    with _ProgressBar() as bar:
        return run_bulk(bulk_request, spec, ray_engine(settings, pool), bar)


@contextmanager
def _report_interruption(to: Path) -> Iterator[None]:
    """At Ctrl-C or SIGTERM, print how many parts are saved, and exit with the shell's status for the signal."""
    received = signal.SIGINT

    def terminate(*_: object) -> None:
        nonlocal received
        received = signal.SIGTERM
        interrupt = signal.getsignal(signal.SIGINT)  # the handler of a running event loop cancels its tasks in order
        if callable(interrupt):
            interrupt(signal.SIGINT, None)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        folder = parts_folder(to)
        saved = len(part_files(folder)) if folder.is_dir() else 0
        err.print(
            f"stopped: {saved:,} parts are saved in '{escape(str(folder))}'; repeat the command to resume",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + received) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _ProgressBar:
    """Shows on standard error the number of images, the bad images among them, and images per second of this run.

    Without a terminal it prints a line about every half minute.
    """

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None
        self._total: int | None = None
        self._done_before = self._done = self._bad = 0
        self._started = time.monotonic()
        self._print_line = line_printer()

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def warn(self, message: str) -> None:
        """Print a message on its own line."""
        err.print(escape(message), highlight=False, soft_wrap=True)

    def start(self, manifest: Manifest, done: ImageCounts) -> None:
        """Show the bar, with the images that an earlier command has classified."""
        self._total, self._done_before, self._done, self._bad = manifest.images, done.images, done.images, done.bad
        self._task = self._bar.add_task("Classifying", total=self._total, status=self._status())
        self._bar.update(self._task, completed=self._done)
        self._started = time.monotonic()
        self._print_line = line_printer()
        if done.images:
            err.print(
                f"resuming the run of {manifest.started_at}: {done.images:,} images are done; files added to the"
                " sources since then are not included",
                highlight=False,
                soft_wrap=True,
            )

    def advance(self, images: int, bad: int) -> None:
        """Add images that are classified."""
        assert self._task is not None
        self._done += images
        self._bad += bad
        self._bar.update(self._task, completed=self._done, status=self._status())
        self._print_line(f"Classifying: {self._status()}")

    def _status(self) -> str:
        total = "" if self._total is None else f" of {self._total:,}"
        rate = (self._done - self._done_before) / max(1e-3, time.monotonic() - self._started)
        return f"{self._done:,}{total} images, {self._bad:,} bad, {rate:,.1f}/s"
