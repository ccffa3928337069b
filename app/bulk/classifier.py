"""Bulk work in one process: images are read, decoded and encoded at the same time, and written part by part.

The question is looked up once, as a ``Task``, so that a label set, its examples or the method chosen for it may change
meanwhile without a change of answers. Each request is of a few images, and a few are under way at once.
"""

import asyncio
import io
import json
import math
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from app.bulk.parts import PartStore, PendingUnit
from app.bulk.readers import SourceFolder, SourceImage, UnreadableImage, read_unit, too_large
from app.bulk.rows import Row
from app.classification.methods import METHODS
from app.classification.resolve import ClassifyRequest
from app.errors import ConflictError, InvalidFieldError, ServerError
from app.main import Service
from app.settings import Settings
from app.types import ImageResult, Task

# Images in one request; and requests under way at once, of which four keep two cores busy while a part is written, and
# as many as three of the encoder's batches keep an accelerator busy.
BATCH = 16
_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 4, 64
_ENCODER_BATCHES_IN_FLIGHT = 3
# Files that are read at once: on a network, each takes milliseconds in which nothing else need wait.
_READERS = 16
# Of the images of one request, so that the largest ones do not fill the memory.
_BATCH_BYTES = 32 * 2**20
_PROBE_PX = 64

ProgressCallback = Callable[[int, int], object]
"""Is told how many more images are done, and how many of those are bad."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What every worker of a run must know.

    Args:
        task: what is asked of each image.
        question: the same for the manifest and the metadata; see ``query_of``.
        folder: of the parts.
        part_images: the most rows of a part.
        max_image_bytes: larger images are not read.
    """

    task: Task
    question: Mapping[str, Any]
    folder: Path
    part_images: int
    max_image_bytes: int


def bulk_settings(settings: Settings, model: str | None = None) -> Settings:
    """Return settings for one caller, who waits for as long as it takes; of the models only the one that is asked."""
    return settings.model_copy(
        update={
            "request_timeout_s": None,
            "max_queued_images": max(settings.max_queued_images, BATCH * _MOST_IN_FLIGHT),
            # A measurement that there is, is used; a new one would hold up every worker.
            "tuning_seconds": 0,
            "models": (model,) if model in settings.models else settings.models,
        }
    )


async def resolve_task(service: Service, question: ClassifyRequest) -> Task:
    """Look up everything that a question names.

    Raises:
        InvalidFieldError: answers would depend on which images are asked about together, or on those before.
        DeixisError: as ``Resolver.resolve``.
    """
    task = await service.resolver.resolve(question)
    if task.database is not None:
        return task
    if METHODS[task.method].stateful:
        raise InvalidFieldError.of(
            "method",
            f"'{task.method}' remembers the images before, so that answers depend on their order; name another",
        )
    if (await service.classifiers.get(task)).transductive:
        raise InvalidFieldError.of(
            "method",
            f"'{task.method}' would look at the images of a request together, and those in bulk are cut anyhow; add"
            " example images that it can learn from to the label set, or name another",
        )
    return task


async def query_of(service: Service, task: Task) -> dict[str, Any]:
    """Return, as JSON holds it, all that the answers to a task depend on; what is a default is left out."""
    model = service.models.get(task.model)
    classes = [asdict(entry) for entry in task.classes]
    told: dict[str, Any] = {
        "model": task.model,
        "model_fingerprint": await model.image_fingerprint(),
        "method": task.method,
        "label_set": task.label_set_reference,
        "labels": list(task.classnames) if task.label_set is None and task.database is None else None,
        # Of another database the same name and version may be another label set.
        "classes_sha256": None if task.label_set is None else sha256(json.dumps(classes).encode()).hexdigest(),
        "examples_revision": task.examples_revision or None,
        "database": None if task.database is None else await _generation(service, task.database),
        "templates": list(task.templates),
        "options": dict(task.options) or None,
        "scoring": {name: value for name, value in asdict(task.scoring).items() if value is not None},
        "merge_synonyms": task.merge_synonyms.value,
        "top_k": task.top_k,
    }
    return {name: value for name, value in told.items() if value is not None}


async def _generation(service: Service, name: str) -> str:
    return f"{name}@{(await service.captions.databases.state(name)).generation}"


async def verify_worker(service: Service, work: RunSpec) -> None:
    """See that this process would answer as the one that looked the question up.

    Raises:
        ConflictError: another model of that name, other examples, or another caption database.
        UnknownNameError: no such model, label set or caption database here.
    """
    task, told = work.task, work.question
    if task.label_set is not None and METHODS[task.method].learns:
        revision = (await service.label_sets.find(task.label_set.reference)).examples_revision
        if revision != task.examples_revision:
            raise ConflictError(
                f"label set '{task.label_set.reference}' has examples of revision {revision} here, and the run is about"
                f" {task.examples_revision}; let all workers open the same database, DEIXIS_DATABASE_URL"
            )
    here = await query_of(service, task)
    for name in ("model_fingerprint", "database"):
        if here.get(name) != told.get(name):
            raise ConflictError(
                f"the {name.replace('_', ' ')} is {here.get(name)} here, and the run is about {told.get(name)};"
                " let all workers have the same models and caption databases"
            )


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are asked about together, among rows that need not be asked for, and where all of their rows go."""

    unit: int
    source: str | None
    root: SourceFolder
    part: int
    ends_part: bool
    ends_unit: bool
    items: list[SourceImage | Row] = field(default_factory=list)


def read_batches(
    parts: PartStore, remaining: Iterable[PendingUnit], *, part_images: int, max_image_bytes: int
) -> Generator[Batch, None, None]:
    """Yield the images of units in order, none of a batch in two parts; also an empty one, for a unit without images.

    Args:
        parts: of the run.
        remaining: of them.
        part_images: rows of a part; the last one of a unit may have fewer.
        max_image_bytes: as for ``read_unit``.

    Raises:
        InvalidFieldError: a source has gone, or changed.
    """
    roots: dict[tuple[str | None, str], SourceFolder] = {}
    for each in remaining:
        unit = parts.unit(each.offset)
        place = (unit.source, unit.path)
        root = roots.get(place)
        if root is None:
            root = roots[place] = SourceFolder(unit)
        elif unit.source is not None:  # of an earlier unit, since when there may be another folder
            root.check(Path(unit.path))
        items: list[SourceImage | Row] = []
        count, asked, size = each.parts_done * part_images, 0, 0
        found: Iterator[SourceImage | Row] = read_unit(unit, skip=count, max_image_bytes=max_image_bytes)
        to_its_end = True
        if each.again:
            rows, to_its_end = parts.rows(each)
            found = islice(_asked_again(found, rows), None if to_its_end else part_images)
        for item, is_last in _last_told(found):
            part = count // part_images
            if item is not None:
                items.append(item)
                count += 1
            if isinstance(item, SourceImage):
                asked += 1
                size += len(item.content) if isinstance(item.content, bytes) else 0
            ends_part = is_last or count == (part + 1) * part_images
            if ends_part or asked == BATCH or size >= _BATCH_BYTES:
                yield Batch(each.number, unit.source, root, part, ends_part, is_last and to_its_end, items)
                items, asked, size = [], 0, 0


def _asked_again(items: Iterator[SourceImage | Row], rows: Sequence[Row]) -> Iterator[SourceImage | Row]:
    """Yield the rows that are good, and in the places of others, and behind all, the images."""
    for item, row in zip_longest(items, rows):
        yield row if item is None or (row is not None and row.error is None) else item


def _last_told(items: Iterator[SourceImage | Row]) -> Iterator[tuple[SourceImage | Row | None, bool]]:
    """Yield each item, and whether it is the last; one None where there is no item."""
    before = next(items, None)
    for item in items:
        yield before, False
        before = item
    yield before, True


class BulkClassifier:
    """Answers the images of units, and writes the parts.

    Args:
        service: with the task's model.
        work: the task, and where the parts go.
    """

    def __init__(self, service: Service, work: RunSpec) -> None:
        self._service = service
        self._work = work
        self._parts = PartStore(work.folder, work.question)
        encoded_at_once = service.models.get(work.task.model).encoder.image_path.batch_size
        wanted = math.ceil(_ENCODER_BATCHES_IN_FLIGHT * encoded_at_once / BATCH)
        self._in_flight = min(_MOST_IN_FLIGHT, max(_LEAST_IN_FLIGHT, wanted))

    async def run(self, remaining: Iterable[PendingUnit], advance: ProgressCallback) -> None:
        """Answer every image of the units; what was written stays if this is cancelled or fails.

        Raises:
            DeixisError: nothing can be answered any more, or written.
        """
        batches = read_batches(
            self._parts,
            remaining,
            part_images=self._work.part_images,
            max_image_bytes=self._work.max_image_bytes,
        )
        running: deque[tuple[Batch, asyncio.Task[list[Row]]]] = deque()
        rows: list[Row] = []
        with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as readers:
            try:
                while True:
                    while len(running) < self._in_flight:
                        batch = await asyncio.to_thread(next, batches, None)
                        if batch is None:
                            break
                        running.append((batch, asyncio.create_task(self._answered(batch, readers))))
                    if not running:
                        return
                    batch, answering = running[0]
                    answered = await answering
                    running.popleft()
                    rows += answered
                    if batch.ends_part:
                        await asyncio.to_thread(
                            self._parts.write, batch.unit, batch.part, rows, ends_unit=batch.ends_unit
                        )
                        rows = []
                    asked = [
                        row for row, item in zip(answered, batch.items, strict=True) if isinstance(item, SourceImage)
                    ]
                    advance(len(asked), sum(row.error is not None for row in asked))
            finally:
                for _, task in running:
                    task.cancel()
                await asyncio.gather(*(task for _, task in running), return_exceptions=True)
                with suppress(ValueError):  # cancelled while a thread is in it, which closes its files with it
                    batches.close()

    async def _answered(self, batch: Batch, readers: ThreadPoolExecutor) -> list[Row]:
        loop = asyncio.get_running_loop()
        most = self._work.max_image_bytes
        asked = [item for item in batch.items if isinstance(item, SourceImage)]
        contents: list[bytes | UnreadableImage] = await asyncio.gather(
            *(
                loop.run_in_executor(readers, _read, item.content, most, batch.root)
                if isinstance(item.content, Path)
                else _as_it_is(item.content)
                for item in asked
            )
        )
        readable = [content for content in contents if isinstance(content, bytes)]
        answers = iter(await self._results(readable) if readable else ())
        told = [content if isinstance(content, UnreadableImage) else next(answers) for content in contents]
        rows = iter([_row(item, batch.source, each) for item, each in zip(asked, told, strict=True)])
        return [item if isinstance(item, Row) else next(rows) for item in batch.items]

    async def _results(self, images: Sequence[bytes]) -> list[ImageResult | UnreadableImage]:
        """Return each image's result; one that makes an encoder fail does not take the others with it."""
        try:
            return list(await self._classified(images))
        except (ServerError, ConflictError):
            raise
        except Exception:  # noqa: BLE001 - whatever an encoder raises
            # Fails as well, and ends the run, where no image is to blame.
            await self._classified([_probe()])
        results: list[ImageResult | UnreadableImage] = []
        for image in images:
            try:
                results += await self._classified([image])
            except (ServerError, ConflictError):
                raise
            except Exception as error:  # noqa: BLE001
                results.append(UnreadableImage(f"the model fails on it: {str(error) or type(error).__name__}"))
        return results

    async def _classified(self, images: Sequence[bytes]) -> Sequence[ImageResult]:
        """Return the pipeline's results, if they rest on what the run is about.

        Raises:
            ConflictError: the examples of the label set, or the caption database, have changed meanwhile.
        """
        task, pinned = self._work.task, self._work.question.get("database")
        told = await self._service.pipeline.classify(images, task)
        # Where not one image could be read, the generation is not told.
        if told.database not in (task.database, pinned):
            raise ConflictError(
                f"the caption database is '{told.database}' now, and the run is about '{pinned}'; begin anew with"
                " another --out"
            )
        if told.examples is not None and told.examples.revision != task.examples_revision:
            raise ConflictError(
                f"the examples of '{task.label_set_reference}' are of revision {told.examples.revision} now, and the"
                f" run is about {task.examples_revision}; begin anew with another --out"
            )
        return told.results


async def _as_it_is(content: bytes | UnreadableImage) -> bytes | UnreadableImage:
    return content


def _read(file: Path, most_bytes: int, root: SourceFolder) -> bytes | UnreadableImage:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a device may never end
            return UnreadableImage("is no file")
        if status.st_size > most_bytes:
            return too_large(status.st_size, most_bytes)
        return file.read_bytes()
    except (OSError, ValueError) as error:
        root.check(file)
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            return UnreadableImage("the link leads nowhere")
        return UnreadableImage(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _row(item: SourceImage, source: str | None, told: ImageResult | UnreadableImage) -> Row:
    if isinstance(told, UnreadableImage):
        return Row(item.key, source, error=told.reason)
    if told.error is not None:
        return Row(item.key, source, error=told.error.message)
    return Row(item.key, source, told)


def _probe() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (_PROBE_PX, _PROBE_PX), "grey").save(file, "PNG")
    return file.getvalue()
