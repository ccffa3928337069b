"""A run from its question to its rows: begun or taken up, done by an engine, counted and put together."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeAlias

from app import __version__
from app.bulk.answering import Advance, Answerer, Work, question_of, settings_for_bulk, task_of
from app.bulk.manifest import Manifest
from app.bulk.output import (
    Remaining,
    Totals,
    check_out,
    finished,
    is_begun,
    is_file,
    opened,
    parts_of,
    put_together,
    remove_parts,
    totals_of,
)
from app.bulk.sources import Columns, check_sources, plan
from app.classification.resolve import ClassifyRequest
from app.encoders._base import Encoder
from app.errors import ConflictError, StoreError
from app.main import Service, open_service
from app.settings import Settings

PART_IMAGES = 2048
"""Rows of a part, which at ten images a second are three minutes' work."""


@dataclass(frozen=True, slots=True)
class Order:
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
    columns: Columns = field(default_factory=Columns)
    part_images: int = PART_IMAGES
    retry_bad: bool = False


class Progress(Protocol):
    """Is told how far a run is."""

    def tell(self, note: str) -> None:
        """Be told, before the run begins, what of the sources is passed over."""

    def begin(self, manifest: Manifest, done: Totals) -> None:
        """Be told what the run is about, and what of it was done before."""

    def advance(self, images: int, bad: int) -> None:
        """Be told how many more images are done, and how many of those are bad."""


Engine: TypeAlias = Callable[[Work, Iterator[Remaining], Advance], None]
"""Does what remains of a run, and writes its parts."""


def check(order: Order) -> None:
    """Refuse, before a model is loaded, what could only fail later; raises as ``check_out`` and ``check_sources``."""
    check_out(order.out, order.part_images)
    if not is_begun(order.out):  # else its sources are those of its plan
        check_sources(order.sources)


async def prepare(service: Service, question: ClassifyRequest, order: Order, max_image_bytes: int) -> Work:
    """Look up what is asked, once for all workers; raises as ``task_of``."""
    task = await task_of(service, question)
    return Work(task, await question_of(service, task), parts_of(order.out), order.part_images, max_image_bytes)


@contextmanager
def service_in_loop(settings: Settings, encoders: Sequence[Encoder]) -> Iterator[tuple[asyncio.Runner, Service]]:
    """Open a service for bulk work, and yield it with the loop that it runs in."""
    with asyncio.Runner() as loop:
        opening = AsyncExitStack()
        service = loop.run(opening.enter_async_context(open_service(settings_for_bulk(settings), encoders)))
        try:
            yield loop, service
        finally:
            loop.run(opening.aclose())


def carry_out(order: Order, work: Work, engine: Engine, progress: Progress) -> Totals:
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
    if (there := finished(order.out, wanted)) is not None:
        remove_parts(order.out, there)  # if it was killed just before
        totals = totals_of(order.out)
        if order.retry_bad and totals.bad:
            raise ConflictError(
                f"'{order.out}' is put together, and of its {totals.bad:,} bad images none can be asked for again; name"
                " another --out, best a folder"
            )
        progress.begin(there, totals)
        return totals
    planned = plan(order.sources, order.columns, images=order.part_images, tell=progress.tell)
    with opened(order.out, wanted, planned) as (parts, manifest):
        # A run goes on with the parts that it began with, since their places tell what is done.
        begun = Work(work.task, work.question, work.folder, manifest.part_images, work.max_image_bytes)
        done = parts.totals()
        again = list(parts.bad()) if order.retry_bad else []
        progress.begin(manifest, Totals(done.images - done.bad) if again else done)
        if again:
            engine(begun, iter(again), progress.advance)
        engine(begun, parts.remaining(), progress.advance)
        missing = sum(1 for _ in parts.remaining())
        if missing:
            raise StoreError(
                f"{missing} of {manifest.units} pieces are not in '{parts.folder}', though workers have done them;"
                " give an --out that every worker writes to, on a disk that they share"
            )
        totals = parts.totals()
        if is_file(order.out):
            put_together(parts, manifest, order.out)
    if is_file(order.out):
        remove_parts(order.out, manifest)
    return totals


def in_process(loop: asyncio.Runner, service: Service) -> Engine:
    """Return the engine that works with a service of this process."""

    def engine(work: Work, remaining: Iterator[Remaining], advance: Advance) -> None:
        loop.run(Answerer(service, work).run(remaining, advance))

    return engine
