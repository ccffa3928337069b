"""Starts or resumes a run, has an engine process its units, and counts and merges the rows."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

from app import __version__
from app.bulk.classifier import BulkClassifier, ProgressCallback, bulk_settings
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
from app.bulk.query import RunSpec, query_of, resolve_task
from app.bulk.request import BulkRequest
from app.bulk.sources import plan_units, validate_sources
from app.classification.request import ClassifyRequest
from app.encoders._base import Encoder
from app.errors import ConflictError, StoreError
from app.main import Service, open_service
from app.settings import Settings


class Progress(Protocol):
    """Displays the progress of a run."""

    def warn(self, message: str) -> None:
        """Show a message about files of the sources that are skipped, before the run starts."""

    def start(self, manifest: Manifest, done: ImageCounts) -> None:
        """Show the run, and the images that an earlier command has classified."""

    def advance(self, images: int, bad: int) -> None:
        """Show that more images are classified, and how many of them are bad."""


Engine: TypeAlias = Callable[[RunSpec, Iterator[PendingUnit], ProgressCallback], None]
"""Processes the pending units of a run, and writes their parts."""


def validate(request: BulkRequest) -> None:
    """Check a request before a model is loaded; raises as ``validate_output`` and ``validate_sources``."""
    validate_output(request.out, request.part_images)
    if not is_started(request.out):  # a run that is resumed has the sources of its plan
        validate_sources(request.sources)


async def prepare_run(service: Service, query: ClassifyRequest, request: BulkRequest, max_image_bytes: int) -> RunSpec:
    """Resolve the query, once for all workers; raises as ``resolve_task``."""
    task = await resolve_task(service, query)
    return RunSpec(task, await query_of(service, task), parts_folder(request.out), request.part_images, max_image_bytes)


@contextmanager
def service_in_loop(settings: Settings, encoders: Sequence[Encoder]) -> Iterator[tuple[asyncio.Runner, Service]]:
    """Open a service for bulk classification, and yield it with its event loop."""
    with asyncio.Runner() as loop:
        opening = AsyncExitStack()
        service = loop.run(opening.enter_async_context(open_service(bulk_settings(settings), encoders)))
        try:
            yield loop, service
        finally:
            loop.run(opening.aclose())


def run_bulk(request: BulkRequest, spec: RunSpec, engine: Engine, progress: Progress) -> ImageCounts:
    """Process the pending units of a run, and return the counts of the whole run.

    Raises:
        ConflictError: the output belongs to another request or is in use by another run, or the bad images to retry are
            in a file whose parts are merged.
        InvalidFieldError: a source is missing or has changed.
        StoreError: a part cannot be written, or is missing at the end.
        DeixisError: the engine failed; parts that are written stay.
    """
    requested = Manifest(
        sources=tuple(str(path.absolute()) for path in request.sources),
        columns=asdict(request.columns),
        query=spec.query,
        part_images=request.part_images,
        units=0,
        images=None,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )
    if (finished := find_finished(request.out, requested)) is not None:
        remove_parts(request.out, finished)  # if the run was killed before it removed them
        counts = count_images(request.out)
        if request.retry_bad and counts.bad:
            raise ConflictError(
                f"the parts of '{request.out}' are merged, so its {counts.bad:,} bad images cannot be retried; name"
                " another --out, preferably a folder"
            )
        progress.start(finished, counts)
        return counts
    planned = plan_units(request.sources, request.columns, unit_images=request.part_images, warn=progress.warn)
    with open_run(request.out, requested, planned) as (parts, manifest):
        # A resumed run keeps its size of parts: the number of a part determines its images.
        spec = replace(spec, part_images=manifest.part_images)
        done = parts.count()
        retries = list(parts.with_bad_images()) if request.retry_bad else []
        progress.start(manifest, ImageCounts(done.images - done.bad) if retries else done)
        if retries:
            engine(spec, iter(retries), progress.advance)
        engine(spec, parts.pending(), progress.advance)
        missing = sum(1 for _ in parts.pending())
        if missing:
            raise StoreError(
                f"{missing} of {manifest.units} work units are missing in '{parts.folder}', although the workers have"
                " finished them; name an --out on a disk that all workers share"
            )
        counts = parts.count()
        if is_single_file(request.out):
            merge_parts(parts, manifest, request.out)
    if is_single_file(request.out):
        remove_parts(request.out, manifest)
    return counts


def process_engine(loop: asyncio.Runner, service: Service) -> Engine:
    """Return the engine that classifies in this process."""

    def engine(spec: RunSpec, pending: Iterator[PendingUnit], advance: ProgressCallback) -> None:
        loop.run(BulkClassifier(service, spec).run(pending, advance))

    return engine
