"""`deixis bulk`: label images in great numbers, into Parquet."""

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
from app.bulk.run import PART_IMAGES, BulkRequest, check, prepare_run, process_engine, run_bulk, service_in_loop
from app.bulk.sources import ParquetColumns
from app.classification.resolve import ClassifyRequest
from app.cli.backends import InProcess
from app.cli.common import (
    NOTHING_DONE,
    SOME_FAILED,
    CoverageOption,
    DatabaseOption,
    Engine,
    FalseRejectionRateOption,
    LabelSetOption,
    LabelsOption,
    MethodOption,
    ModelOption,
    OptionsOption,
    TemplateOption,
    cluster_address,
    err,
    out,
    prepare_names,
    read_labels,
    read_options,
    share_of,
    told_plainly,
)
from app.errors import InvalidFieldError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.runtime.ray_layout import parse_replicas
from app.settings import load_settings

# Where no bar can be shown, a line is.
_LINE_EVERY_S = 30.0


def bulk_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders (searched whole), .tar, .tar.gz, .tgz, .tar.zst and .parquet files, image files, and globs."
        ),
    ],
    to: Annotated[
        Path, typer.Option("--out", help="A folder for parts of Parquet, or a file NAME.parquet for all in one.")
    ],
    labels: LabelsOption = None,
    label_set: LabelSetOption = None,
    no_labels: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--no-labels", help="Find names for the images in a caption database.")
    ] = False,
    model: ModelOption = None,
    method: MethodOption = None,
    template: TemplateOption = None,
    database: DatabaseOption = None,
    option: OptionsOption = None,
    reject_below: Annotated[
        float | None,
        typer.Option("--reject-below", min=0, max=1, help="An image whose best score is lower has none of the labels."),
    ] = None,
    false_rejection_rate: FalseRejectionRateOption = None,
    coverage: CoverageOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Predictions per image.")] = 5,
    column: Annotated[
        str | None,
        typer.Option("--column", help="Of Parquet: the column of the images, as bytes or as paths. By default found."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Of Parquet: the column that names the images. By default path or row."),
    ] = None,
    part_images: Annotated[
        int, typer.Option("--part-images", min=1, help="The most rows of a part, of which an interruption loses one.")
    ] = PART_IMAGES,
    retry_bad: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--retry-bad", help="Ask again for the images of a folder of parts whose row has an error."),
    ] = False,
    engine: Annotated[
        Engine, typer.Option("--engine", help="In this process, or in many on Ray (the extra `ray`).")
    ] = Engine.PROCESS,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="Address of the Ray cluster, by default RAY_ADDRESS; without either, a Ray is started for this run.",
        ),
    ] = None,
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="N|MIN-MAX", help="On Ray: processes with a model each.")
    ] = "1",
    replica_cpus: Annotated[float, typer.Option("--replica-cpus", help="On Ray: the cores set aside for each.")] = 2,
    replica_gpus: Annotated[float, typer.Option("--replica-gpus", help="On Ray: the GPUs set aside for each.")] = 0,
) -> None:
    """Label images in great numbers, and write the labels to Parquet; a run that was ended goes on where it was.

    An image that cannot be read has its reason in the column `error`. The same command again continues, and asks
    nothing twice. Exit status: 0 if every image was classified, 1 if some were not, 2 if nothing could be done.
    """
    with told_plainly():
        if sum((labels is not None, label_set is not None, no_labels)) != 1:
            raise InvalidFieldError.of("--labels", "give one of --labels, --label-set and --no-labels")
        question = ClassifyRequest(
            labels=read_labels(labels),
            label_set=label_set,
            method=method,
            model=model,
            template=template,
            top_k=top_k,
            options=read_options(option),
            reject_below=reject_below,
            false_rejection_rate=share_of(false_rejection_rate, "--false-rejection-rate"),
            coverage=share_of(coverage, "--coverage"),
            database=database,
        )
        order = BulkRequest(sources, to, ParquetColumns(column, key), part_images, retry_bad)
    configure_logs("console", "warning")
    began = time.monotonic()
    with told_plainly(), _told_when_stopped(to):
        check(order)
        pool = _pool(replicas, replica_cpus, replica_gpus, ray_address) if engine is Engine.RAY else None
        totals = _carried_out(question, order, pool)
    elapsed = f"{time.monotonic() - began:,.0f} s"
    out.print(f"{totals.images:,} images, {totals.bad:,} bad, in {escape(str(to))} ({elapsed})", highlight=False)
    if totals.bad or not totals.images:
        raise typer.Exit(SOME_FAILED if totals.bad < totals.images else NOTHING_DONE)


def _pool(count: str, cpus: float, gpus: float, address: str | None) -> ReplicaPool:
    try:
        replicas = parse_replicas(count)
    except ValueError as error:
        raise InvalidFieldError.of("--replicas", str(error)) from error
    pool = ReplicaPool(replicas.min, replicas.max, cpus, gpus, address or cluster_address() or LOCAL)
    pool.check()
    return pool


def _carried_out(question: ClassifyRequest, order: BulkRequest, pool: ReplicaPool | None) -> ImageCounts:
    settings = bulk_settings(load_settings(), question.model)
    with err.status("Loading the model"):
        encoders = load_encoders(settings)
    with service_in_loop(settings, encoders) as (loop, service):
        loop.run(prepare_names(InProcess(service), question))
        work = loop.run(prepare_run(service, question, order, settings.max_image_bytes))
        if pool is None:
            with _Bar() as bar:
                return run_bulk(order, work, process_engine(loop, service), bar)
    # The model here has told what the question is about; replicas need its memory.
    del encoders, service
    with _Bar() as bar:
        return run_bulk(order, work, ray_engine(settings, pool), bar)


@contextmanager
def _told_when_stopped(to: Path) -> Iterator[None]:
    """At Ctrl-C or SIGTERM say what is kept, and end with the status that shells give to the signal."""
    stopped_by = signal.SIGINT

    def terminated(*_: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.SIGTERM
        interrupt = signal.getsignal(signal.SIGINT)  # of a loop that runs, it ends its work in order
        if callable(interrupt):
            interrupt(signal.SIGINT, None)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt:
        folder = parts_folder(to)
        kept = len(part_files(folder)) if folder.is_dir() else 0
        err.print(
            f"stopped: {kept:,} parts are kept in '{escape(str(folder))}', and the same command goes on",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + stopped_by) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Bar:
    """A bar on standard error: images, how many of them are bad, and images per second of this run.

    Where that is no terminal, it is a line about every half a minute.
    """

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._line: TaskID | None = None
        self._total: int | None = None
        self._before = self._done = self._bad = 0
        self._began = self._line_at = time.monotonic()

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, note: str) -> None:
        """Say it in a line of its own."""
        err.print(escape(note), highlight=False, soft_wrap=True)

    def begin(self, manifest: Manifest, done: ImageCounts) -> None:
        """Show what was done before."""
        self._total, self._before, self._done, self._bad = manifest.images, done.images, done.images, done.bad
        self._line = self._bar.add_task("Classifying", total=self._total, told=self._told())
        self._bar.update(self._line, completed=self._done)
        self._began = self._line_at = time.monotonic()
        if done.images:
            err.print(
                f"going on with the run of {manifest.began_at}: {done.images:,} images are done;"
                " what has come to the sources since is not in it",
                highlight=False,
                soft_wrap=True,
            )

    def advance(self, images: int, bad: int) -> None:
        """Show what more is done."""
        assert self._line is not None
        self._done += images
        self._bad += bad
        self._bar.update(self._line, completed=self._done, told=self._told())
        if not err.is_terminal and time.monotonic() - self._line_at >= _LINE_EVERY_S:
            self._line_at = time.monotonic()
            err.print(f"Classifying: {self._told()}", highlight=False, soft_wrap=True)

    def _told(self) -> str:
        of = "" if self._total is None else f" of {self._total:,}"
        rate = (self._done - self._before) / max(1e-3, time.monotonic() - self._began)
        return f"{self._done:,}{of} images, {self._bad:,} bad, {rate:,.1f}/s"
