"""Classifies work units in one process: reading, decoding, encoding and writing overlap."""

import asyncio
import io
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from PIL import Image

from app.bulk.batches import BATCH_IMAGES, Batch, read_batches
from app.bulk.parts import PartStore, PendingUnit
from app.bulk.query import RunSpec
from app.bulk.readers import SourceFolder, SourceImage, UnreadableImage
from app.bulk.rows import Row
from app.errors import ConflictError, ServerError
from app.images.reading import UnreadableFileError, read_image_file
from app.main import Service
from app.settings import Settings
from app.types import ImageResult

# Four concurrent batches keep two cores busy while a part is written. An accelerator needs enough images in flight for
# three batches of its encoder.
_MIN_IN_FLIGHT, _MAX_IN_FLIGHT = 4, 64
_ENCODER_BATCHES_IN_FLIGHT = 3
# Threads that read files. On a network file system a file takes milliseconds.
_READER_THREADS = 16
_PROBE_PX = 64

ProgressCallback = Callable[[int, int], object]
"""Called with the number of images classified since the last call, and how many of them are bad."""


def bulk_settings(settings: Settings, model: str | None = None) -> Settings:
    """Return settings without time limits, and with only the requested model if the settings have it."""
    return settings.model_copy(
        update={
            "request_timeout_s": None,
            "max_queued_images": max(settings.max_queued_images, BATCH_IMAGES * _MAX_IN_FLIGHT),
            # Stored measurements are used; a new measurement would delay every worker.
            "tuning_seconds": 0,
            "models": (model,) if model in settings.models else settings.models,
        }
    )


class BulkClassifier:
    """Classifies the images of work units, and writes the parts.

    Args:
        service: with the model of the task.
        spec: of the run.
    """

    def __init__(self, service: Service, spec: RunSpec) -> None:
        self._service = service
        self._spec = spec
        self._parts = PartStore(spec.folder, spec.query)
        encoder_batch = service.models.get(spec.task.model).encoder.image_path.batch_size
        needed = math.ceil(_ENCODER_BATCHES_IN_FLIGHT * encoder_batch / BATCH_IMAGES)
        self._max_in_flight = min(_MAX_IN_FLIGHT, max(_MIN_IN_FLIGHT, needed))

    async def run(self, pending: Iterable[PendingUnit], advance: ProgressCallback) -> None:
        """Classify every image of the units; parts that are written stay if this fails or is cancelled.

        Raises:
            DeixisError: the model fails on every image, or a part cannot be written.
        """
        batches = read_batches(
            self._parts,
            pending,
            part_images=self._spec.part_images,
            max_image_bytes=self._spec.max_image_bytes,
        )
        running: deque[tuple[Batch, asyncio.Task[list[Row]]]] = deque()
        part_rows: list[Row] = []
        with ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="read") as readers:
            try:
                while True:
                    while len(running) < self._max_in_flight:
                        batch = await asyncio.to_thread(next, batches, None)
                        if batch is None:
                            break
                        running.append((batch, asyncio.create_task(self._rows(batch, readers))))
                    if not running:
                        return
                    batch, classifying = running[0]
                    rows = await classifying
                    running.popleft()
                    part_rows += rows
                    if batch.ends_part:
                        await asyncio.to_thread(
                            self._parts.write, batch.unit, batch.part, part_rows, ends_unit=batch.ends_unit
                        )
                        part_rows = []
                    classified = [
                        row for row, entry in zip(rows, batch.entries, strict=True) if isinstance(entry, SourceImage)
                    ]
                    advance(len(classified), sum(row.error is not None for row in classified))
            finally:
                for _, task in running:
                    task.cancel()
                await asyncio.gather(*(task for _, task in running), return_exceptions=True)
                with suppress(ValueError):  # a thread may still run the generator, and closes its files
                    batches.close()

    async def _rows(self, batch: Batch, readers: ThreadPoolExecutor) -> list[Row]:
        """Return one row for each entry of a batch."""
        images = batch.images
        contents = await asyncio.gather(*(self._content(image, batch.folder, readers) for image in images))
        readable = [content for content in contents if isinstance(content, bytes)]
        results = iter(await self._results(readable) if readable else ())
        rows = iter(
            [
                _row(image, batch.source, content if isinstance(content, UnreadableImage) else next(results))
                for image, content in zip(images, contents, strict=True)
            ]
        )
        return [entry if isinstance(entry, Row) else next(rows) for entry in batch.entries]

    async def _content(
        self, image: SourceImage, folder: SourceFolder, readers: ThreadPoolExecutor
    ) -> bytes | UnreadableImage:
        if not isinstance(image.content, Path):
            return image.content
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(readers, _read, image.content, self._spec.max_image_bytes, folder)

    async def _results(self, images: Sequence[bytes]) -> list[ImageResult | UnreadableImage]:
        """Return the result of each image; an image that makes the encoder fail does not affect the others."""
        try:
            return list(await self._classify(images))
        except (ServerError, ConflictError):
            raise
        except Exception:  # noqa: BLE001 - an encoder may raise anything
            # Raises as well, and ends the run, if the encoder fails on every image.
            await self._classify([_probe()])
        results: list[ImageResult | UnreadableImage] = []
        for image in images:
            try:
                results += await self._classify([image])
            except (ServerError, ConflictError):
                raise
            except Exception as error:  # noqa: BLE001
                results.append(UnreadableImage(f"the model fails on this image: {str(error) or type(error).__name__}"))
        return results

    async def _classify(self, images: Sequence[bytes]) -> Sequence[ImageResult]:
        """Return the results of the pipeline.

        Raises:
            ConflictError: the examples of the label set, or the caption database, have changed since the run started.
        """
        task, generation = self._spec.task, self._spec.query.get("database")
        classification = await self._service.pipeline.classify(images, task)
        # A classification without a readable image names the database without its generation.
        if classification.database not in (task.database, generation):
            raise ConflictError(
                f"the caption database is now '{classification.database}', and the run uses '{generation}'; start again"
                " with another --out"
            )
        examples = classification.examples
        if examples is not None and examples.revision != task.examples_revision:
            raise ConflictError(
                f"the examples of '{task.label_set_reference}' now have revision {examples.revision}, and the run uses"
                f" revision {task.examples_revision}; start again with another --out"
            )
        return classification.results


def _read(file: Path, max_bytes: int, folder: SourceFolder) -> bytes | UnreadableImage:
    try:
        return read_image_file(file, max_bytes)
    except UnreadableFileError as error:
        if isinstance(error.__cause__, OSError):
            folder.verify(file)
        return UnreadableImage(str(error))


def _row(image: SourceImage, source: str | None, result: ImageResult | UnreadableImage) -> Row:
    if isinstance(result, UnreadableImage):
        return Row(image.key, source, error=result.reason)
    if result.error is not None:
        return Row(image.key, source, error=result.error.message)
    return Row(image.key, source, result)


def _probe() -> bytes:
    """Return an image that any encoder can encode."""
    file = io.BytesIO()
    Image.new("RGB", (_PROBE_PX, _PROBE_PX), "grey").save(file, "PNG")
    return file.getvalue()
