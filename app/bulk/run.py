"""A run from its question to its rows: begun or taken up, done by an engine, counted and put together."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeAlias

from app import __version__
from app.bulk.classifier import BulkClassifier, ProgressCallback, RunSpec, bulk_settings, query_of, resolve_task
from app.bulk.manifest import Manifest
from app.bulk.parts import (
    ImageCounts,
    PendingUnit,
    count_images,
    find_finished,
    is_single_file,
    is_started,
    merge_parts,
    open_run,
    parts_folder,
    remove_parts,
    validate_output,
)
from app.bulk.sources import ParquetColumns, plan, validate_sources
from app.classification.resolve import ClassifyRequest
from app.encoders._base import Encoder
from app.errors import ConflictError, StoreError
from app.main import Service, open_service
from app.settings import Settings

PART_IMAGES = 2048
"""Rows of a part, which at ten images a second are three minutes' work."""


@dataclass(frozen=True, slots=True)
class BulkRequest:
    """What is to be done.

    Args:
        sources: as for ``app.bulk.sources.plan``.
        out: a folder of parts, or a Parquet file.
        columns: of Parquet sources.
        part_images: the most rows of a part.
        retry_bad: ask again for the images whose row has an error.
    """

    sources: Sequence[Path]
    out: Path
    columns: ParquetColumns = field(default_factory=ParquetColumns)
    part_images: int = PART_IMAGES
    retry_bad: bool = False


class Progress(Protocol):
    """Is told how far a run is."""

    def tell(self, note: str) -> None:
        """Be told, before the run begins, what of the sources is passed over."""

    def begin(self, manifest: Manifest, done: ImageCounts) -> None:
        """Be told what the run is about, and what of it was done before."""

    def advance(self, images: int, bad: int) -> None:
        """Be told how many more images are done, and how many of those are bad."""


Engine: TypeAlias = Callable[[RunSpec, Iterator[PendingUnit], ProgressCallback], None]
"""Does what remains of a run, and writes its parts."""


def check(order: BulkRequest) -> None:
    """Check a request before a model is loaded; raises as ``validate_output`` and ``validate_sources``."""
    validate_output(order.out, order.part_images)
    if not is_started(order.out):  # else its sources are those of its plan
        validate_sources(order.sources)


async def prepare_run(service: Service, question: ClassifyRequest, order: BulkRequest, max_image_bytes: int) -> RunSpec:
    """Look up what is asked, once for all workers; raises as ``resolve_task``."""
    task = await resolve_task(service, question)
    return RunSpec(task, await query_of(service, task), parts_folder(order.out), order.part_images, max_image_bytes)


@contextmanager
def service_in_loop(settings: Settings, encoders: Sequence[Encoder]) -> Iterator[tuple[asyncio.Runner, Service]]:
    """Open a service for bulk work, and yield it with the loop that it runs in."""
    with asyncio.Runner() as loop:
        opening = AsyncExitStack()
        service = loop.run(opening.enter_async_context(open_service(bulk_settings(settings), encoders)))
        try:
            yield loop, service
        finally:
            loop.run(opening.aclose())


def run_bulk(order: BulkRequest, work: RunSpec, engine: Engine, progress: Progress) -> ImageCounts:
    """Do what remains of a run, and return the counts of all of it.

    Raises:
        ConflictError: the place holds something else, another run goes on there, or the parts with bad images that are
            to be asked for again are put together.
        InvalidFieldError: sources that are not there, or have changed.
        StoreError: what is done cannot be written, or is not where it should be.
        DeixisError: nothing can be answered any more; what is written is kept.
    """
    wanted = Manifest(
        sources=tuple(str(path.absolute()) for path in order.sources),
        columns=asdict(order.columns),
        question=work.question,
        part_images=order.part_images,
        units=0,
        images=None,
        began_at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )
    if (there := find_finished(order.out, wanted)) is not None:
        remove_parts(order.out, there)  # if it was killed just before
        totals = count_images(order.out)
        if order.retry_bad and totals.bad:
            raise ConflictError(
                f"'{order.out}' is put together, and of its {totals.bad:,} bad images none can be asked for again; name"
                " another --out, best a folder"
            )
        progress.begin(there, totals)
        return totals
    planned = plan(order.sources, order.columns, images=order.part_images, tell=progress.tell)
    with open_run(order.out, wanted, planned) as (parts, manifest):
        # A run goes on with the parts that it began with, since their places tell what is done.
        begun = RunSpec(work.task, work.question, work.folder, manifest.part_images, work.max_image_bytes)
        done = parts.totals()
        again = list(parts.bad()) if order.retry_bad else []
        progress.begin(manifest, ImageCounts(done.images - done.bad) if again else done)
        if again:
            engine(begun, iter(again), progress.advance)
        engine(begun, parts.pending(), progress.advance)
        missing = sum(1 for _ in parts.pending())
        if missing:
            raise StoreError(
                f"{missing} of {manifest.units} pieces are not in '{parts.folder}', though workers have done them;"
                " give an --out that every worker writes to, on a disk that they share"
            )
        totals = parts.totals()
        if is_single_file(order.out):
            merge_parts(parts, manifest, order.out)
    if is_single_file(order.out):
        remove_parts(order.out, manifest)
    return totals


def process_engine(loop: asyncio.Runner, service: Service) -> Engine:
    """Return the engine that works with a service of this process."""

    def engine(work: RunSpec, remaining: Iterator[PendingUnit], advance: ProgressCallback) -> None:
        loop.run(BulkClassifier(service, work).run(remaining, advance))

    return engine
