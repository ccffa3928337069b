"""Where images are decoded: in threads of this process, or in processes that can be killed.

A decoder in C cannot be stopped from outside its thread, and one that crashes takes the process with it. In a process
of its own it can be killed when it takes too long, and what a hostile image does to it ends there. The price is that
the bytes of each image, and its pixels, pass through a pipe.
"""

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import structlog
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from app.errors import NotAnImageError, NotReadyError
from app.images.decode import decode_image
from app.types import Pixels

log = structlog.get_logger()

Transform = Callable[[Image.Image], Pixels]

# Whatever a decoder leaks goes with its process.
_IMAGES_PER_PROCESS = 1000
# Of processes that end before they begin with the image.
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one encoded image may be: its bytes, and its pixels, width times height."""

    max_bytes: int
    max_pixels: int


class Decoders(Protocol):
    """Decodes and transforms images, several at a time."""

    @property
    def limits(self) -> ImageLimits:
        """What each image may be."""

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Return what a model sees of an image; raises as ``decode_image``.

        Args:
            data: a whole file.
            transform: of the model; runs in a thread of this process.
            target_px: as for ``decode_image``.
        """

    def close(self) -> None:
        """End what is idle, and wait for the rest."""


class ThreadDecoders:
    """Decodes in threads.

    Args:
        count: images at a time.
        limits: of each.
    """

    def __init__(self, count: int, limits: ImageLimits) -> None:
        self.limits = limits
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Decode as ``Decoders`` says."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._work, data, transform, target_px)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _work(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        limits = self.limits
        return transform(
            decode_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, target_px=target_px)
        )


class ProcessDecoders:
    """Decodes in processes, and kills one that takes too long or whose caller left; transforms in threads.

    Args:
        count: images at a time.
        limits: of each.
        timeout_s: for decoding one.
    """

    def __init__(self, count: int, limits: ImageLimits, timeout_s: float) -> None:
        self.limits = limits
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="transform")
        self._count = count
        self._processes = self._begun()

    async def decode(self, data: bytes, transform: Transform, target_px: int) -> Pixels:
        """Decode as ``Decoders`` says.

        Raises:
            NotAnImageError: as ``decode_image``, or the decoder took too long or crashed.
            NotReadyError: the processes ended without having begun with any image.
        """
        try:
            size, pixels = await self._in_a_process(data, target_px)
        except TimeoutError as error:
            log.warning("decoder_killed", reason="too slow", timeout_s=self._timeout_s)
            raise NotAnImageError(
                f"the image took longer than {self._timeout_s:g} s to decode; save it as a plain JPEG or PNG"
            ) from error
        except ProcessExpired as error:
            log.warning("decoder_died", exitcode=error.exitcode)
            raise NotAnImageError("the image made its decoder crash; save it as a plain JPEG or PNG") from error
        except BrokenExecutor as error:
            raise NotReadyError("the processes that decode images ended, and begin again; try again") from error
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _transformed, transform, size, pixels)

    async def _in_a_process(self, data: bytes, target_px: int) -> tuple[tuple[int, int], bytes]:
        attempts = _ATTEMPTS
        while True:
            if not self._processes.active:
                self._processes = self._begun()
            arguments = (data, self.limits, target_px)
            decoding = self._processes.schedule(_decode, args=arguments, timeout=self._timeout_s)
            try:
                return await asyncio.wrap_future(decoding)
            except BrokenExecutor as error:
                # Not the image's fault, which had not begun: pebble may tell so when a process ends that was killed
                # for the image before.
                log.warning("decoders_broken", reason=str(error))
                attempts -= 1
                if not attempts:
                    raise

    def _begun(self) -> ProcessPool:
        # Not forked: a fork of a process with threads may hold locks that nobody will release.
        processes = ProcessPool(
            max_workers=self._count, max_tasks=_IMAGES_PER_PROCESS, context=multiprocessing.get_context("spawn")
        )
        for _ in range(self._count):
            processes.schedule(_begin)  # before the first caller waits for it
        return processes

    def close(self) -> None:
        """End processes and threads."""
        self._processes.close()  # type: ignore[no-untyped-call]
        self._processes.join()
        self._threads.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Have a process that has imported what it needs."""


def _decode(data: bytes, limits: ImageLimits, target_px: int) -> tuple[tuple[int, int], bytes]:
    image = decode_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, target_px=target_px)
    return image.size, image.tobytes()


def _transformed(transform: Transform, size: tuple[int, int], pixels: bytes) -> Pixels:
    return transform(Image.frombytes("RGB", size, pixels))
