"""Decode images in threads of this process, or in separate processes that can be killed.

A decoder in C cannot be interrupted in a thread, and a crash ends its process. In a separate process it can be killed
when it takes too long, and a hostile image cannot affect the service. The cost is that the bytes and the pixels of each
image pass through a pipe.
"""

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from app.errors import NotAnImageError, NotReadyError
from app.images.decode import decode_image
from app.runtime.worker_threads import WorkerThreads
from app.types import Pixels

log = structlog.get_logger()

Transform = Callable[[Image.Image], Pixels]

# A process is replaced after this number of images, which limits memory leaks of decoders.
_IMAGES_PER_PROCESS = 1000
# Attempts to decode an image if processes end before they start with it.
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits of one encoded image: the size of its file, and its width times height."""

    max_bytes: int
    max_pixels: int


class Decoders(Protocol):
    """Decodes and transforms several images at a time."""

    @property
    def limits(self) -> ImageLimits:
        """The limits of each image."""

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Return the input of a model for an image; raises the errors of ``decode_image``.

        Args:
            data: a complete file.
            transform: the model's transform; runs in a thread of this process.
            target_px: as for ``decode_image``.
        """

    def close(self) -> None:
        """Stop the workers, after those that are running have finished."""


class ThreadDecoders:
    """Decodes in threads.

    Args:
        count: number of threads.
        limits: of each image.
    """

    def __init__(self, count: int, limits: ImageLimits) -> None:
        self.limits = limits
        self._threads = WorkerThreads(count, "decode")

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Decode and transform an image."""
        return await self._threads.run(self._decode_and_transform, data, transform, target_px)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.close()

    def _decode_and_transform(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        limits = self.limits
        return transform(
            decode_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, target_px=target_px)
        )


class ProcessDecoders:
    """Decodes in processes, and kills those that take too long or whose client disconnected; transforms in threads.

    Args:
        count: number of processes.
        limits: of each image.
        timeout_s: maximum time for decoding one image.
    """

    def __init__(self, count: int, limits: ImageLimits, timeout_s: float) -> None:
        self.limits = limits
        self._timeout_s = timeout_s
        self._threads = WorkerThreads(count, "transform")
        self._count = count
        self._processes = self._start_processes()

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Decode and transform an image.

        Raises:
            NotAnImageError: as ``decode_image``; also if the decoder took too long or crashed.
            NotReadyError: the processes ended before they started with an image.
        """
        try:
            size, pixels = await self._decode_in_process(data, target_px)
        except TimeoutError as error:
            log.warning("decoder_killed", reason="too slow", timeout_s=self._timeout_s)
            raise NotAnImageError(
                f"the image took longer than {self._timeout_s:g} s to decode; save it as a baseline JPEG or PNG"
            ) from error
        except ProcessExpired as error:
            log.warning("decoder_died", exitcode=error.exitcode)
            raise NotAnImageError("the decoder of the image crashed; save it as a baseline JPEG or PNG") from error
        except BrokenExecutor as error:
            raise NotReadyError("the processes that decode images ended and are restarted; try again") from error
        return await self._threads.run(_apply_transform, transform, size, pixels)

    async def _decode_in_process(self, data: bytes, target_px: int) -> tuple[tuple[int, int], bytes]:
        attempts = _ATTEMPTS
        while True:
            if not self._processes.active:
                self._processes = self._start_processes()
            arguments = (data, self.limits, target_px)
            try:
                # No variable for the future: it refers to the error, whose traceback refers to this frame.
                return await asyncio.wrap_future(
                    self._processes.schedule(_decode, args=arguments, timeout=self._timeout_s)
                )
            except BrokenExecutor as error:
                # The image is not the cause: pebble may raise this when the process ends that was killed for the
                # previous image.
                log.warning("decoders_broken", reason=str(error))
                attempts -= 1
                if not attempts:
                    raise

    def _start_processes(self) -> ProcessPool:
        # Spawned, because a fork of a process with threads may hold locks that are never released.
        processes = ProcessPool(
            max_workers=self._count, max_tasks=_IMAGES_PER_PROCESS, context=multiprocessing.get_context("spawn")
        )
        for _ in range(self._count):
            processes.schedule(_import_modules)  # before the first request
        return processes

    def close(self) -> None:
        """Stop processes and threads."""
        self._processes.close()  # type: ignore[no-untyped-call]
        self._processes.join()
        self._threads.close()


def _import_modules() -> None:
    """Do nothing; starting this function makes a process import its modules."""


def _decode(data: bytes, limits: ImageLimits, target_px: int) -> tuple[tuple[int, int], bytes]:
    image = decode_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, target_px=target_px)
    return image.size, image.tobytes()


def _apply_transform(transform: Transform, size: tuple[int, int], pixels: bytes) -> Pixels:
    return transform(Image.frombytes("RGB", size, pixels))
