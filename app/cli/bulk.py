"""`deixis bulk`: classify the images of folders and archives, and write Parquet."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from app.bulk.classifier import bulk_settings
from app.bulk.manifest import Manifest
from app.bulk.parts import ImageCounts, part_files, parts_folder
from app.bulk.ray_engine import LOCAL, ReplicaPool, ray_engine
from app.bulk.run import PART_IMAGES, BulkRequest, prepare_run, process_engine, run_bulk, service_in_loop, validate
from app.bulk.sources import ParquetColumns
from app.classification.request import ClassifyRequest
from app.cli.backends import InProcessBackend
from app.cli.common import (
    NOTHING_DONE,
    SOME_FAILED,
    Engine,
    cluster_address,
    err,
    out,
    prepare_database,
    report_errors,
)
from app.cli.options import takes_request
from app.errors import InvalidFieldError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.runtime.ray_layout import parse_replicas
from app.settings import load_settings

# Interval of progress lines without a terminal.
_LINE_INTERVAL_S = 30.0


@takes_request(
    *("labels", "label_set", "model", "method", "template", "database", "option", "reject_below"),
    *("false_rejection_rate", "coverage", "top_k"),
    top_k=5,
)
def bulk_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders (searched recursively), .tar, .tar.gz, .tgz, .tar.zst and .parquet files, image files, and"
            " patterns."
        ),
    ],
    to: Annotated[
        Path, typer.Option("--out", help="A folder for the parts, or a file NAME.parquet for all rows in one file.")
    ],
    request: ClassifyRequest,
    no_labels: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--no-labels", help="Discover the labels of each image in a caption database.")
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", help="Parquet: the column of the images, as bytes or paths. By default selected by its name."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Parquet: the column of the names of the images. By default the path or the row number."
        ),
    ] = None,
    part_images: Annotated[
        int,
        typer.Option(
            "--part-images", min=1, help="Maximum number of rows in a part. An interruption loses at most one part."
        ),
    ] = PART_IMAGES,
    retry_bad: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--retry-bad", help="Classify the images whose row has an error again."),
    ] = False,
    engine: Annotated[
        Engine, typer.Option("--engine", help="Classify in this process, or in several on Ray (the extra `ray`).")
    ] = Engine.PROCESS,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="Address of the Ray cluster, by default RAY_ADDRESS; without either, a Ray is started for this run.",
        ),
    ] = None,
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="N|MIN-MAX", help="Ray: number of processes, each with a model.")
    ] = "1",
    replica_cpus: Annotated[float, typer.Option("--replica-cpus", help="Ray: cores reserved for each process.")] = 2,
    replica_gpus: Annotated[float, typer.Option("--replica-gpus", help="Ray: GPUs reserved for each process.")] = 0,
) -> None:
    """Classify images in folders, tar files and Parquet files, and write the labels to Parquet.

    To resume an interrupted run, repeat the command; images that are classified are not classified again. Images that
    cannot be read have the reason in the column `error`. Exit status: 0 if all images were classified, 1 if some were
    not, 2 if none were or the command failed.
    """
    with report_errors():
        if sum((request.labels is not None, request.label_set is not None, no_labels)) != 1:
            raise InvalidFieldError.of("--labels", "pass exactly one of --labels, --label-set and --no-labels")
    bulk_request = BulkRequest(sources, to, ParquetColumns(column, key), part_images, retry_bad)
    configure_logs("console", "warning")
    started = time.monotonic()
    with report_errors(), _report_interruption(to):
        validate(bulk_request)
        pool = _pool(replicas, replica_cpus, replica_gpus, ray_address) if engine is Engine.RAY else None
        counts = _run(request, bulk_request, pool)
    elapsed = f"{time.monotonic() - started:,.0f} s"
    out.print(f"{counts.images:,} images, {counts.bad:,} bad, in {escape(str(to))} ({elapsed})", highlight=False)
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
    with err.status("Loading the model"):
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
        self._started = self._line_printed = time.monotonic()

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
        self._started = self._line_printed = time.monotonic()
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
        if not err.is_terminal and time.monotonic() - self._line_printed >= _LINE_INTERVAL_S:
            self._line_printed = time.monotonic()
            err.print(f"Classifying: {self._status()}", highlight=False, soft_wrap=True)

    def _status(self) -> str:
        total = "" if self._total is None else f" of {self._total:,}"
        rate = (self._done - self._done_before) / max(1e-3, time.monotonic() - self._started)
        return f"{self._done:,}{total} images, {self._bad:,} bad, {rate:,.1f}/s"
