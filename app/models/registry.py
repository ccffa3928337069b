"""The models in service: looked up by name, and used to encode images and texts."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from app.errors import ClientError, DeadlineExceededError, NotAnImageError, UnknownNameError
from app.images.decoder_pool import Decoders
from app.models.background import BackgroundEncoding
from app.models.queue import Ticket
from app.models.served_model import ServedModel
from app.observability.loops import Loops
from app.observability.tracing import past_stage, stage
from app.prompting.text_feature_store import StoredTextEncoder
from app.runtime.turns import Turns
from app.types import Pixels, TextFeatures

# Texts of a label set that are encoded before they are stored.
_TEXTS_PER_WRITE = 256


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """Unit features (d,) of one image, and when each stage ended, on the clock of ``time.perf_counter``."""

    features: np.ndarray
    decoded_at: float
    encode_began_at: float
    encoded_at: float


class ModelRegistry:
    """Models by name, in the order of the settings; the first is the default.

    Args:
        models: served models by name; none for commands that only read and write label sets.
        decoders: decode images; closed with the registry.
        decoders_per_request: images that one request decodes at a time, so that a large request does not delay others.
        request_timeout_s: seconds after which ``deadline`` expires; None for no limit.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        decoders: Decoders,
        decoders_per_request: int,
        request_timeout_s: float | None,
    ) -> None:
        self._models = dict(models)
        self._decoders = decoders
        self._decoders_per_request = decoders_per_request
        self.request_timeout_s = request_timeout_s
        self._created_at = time.perf_counter()
        self.turns = Turns(lambda: self.last_used_at)
        self._background = BackgroundEncoding(self.turns)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models, the default first."""
        return tuple(self._models)

    @property
    def default(self) -> str:
        """The name of the model that is used where a request names none."""
        return next(iter(self._models))

    def get(self, name: str | None = None) -> ServedModel:
        """Return a model, by default the default one.

        Raises:
            UnknownNameError: no such model is in service.
        """
        name = self.default if name is None else name
        try:
            return self._models[name]
        except KeyError:
            raise UnknownNameError("model", name, self._models) from None

    @property
    def max_image_bytes(self) -> int:
        """The size in bytes above which an image is refused."""
        return self._decoders.limits.max_bytes

    async def encode_texts(self, model: str, texts: Sequence[str]) -> TextFeatures:
        """Return one unit row per text (k, d), without reading or filling the store of text features.

        Raises:
            OverloadedError: too many requests wait for this model.
            DeadlineExceededError: the request's time is over.
        """
        served = self.get(model)
        # Texts have no places of their own in the queue; such a request takes the place of one image.
        async with self.deadline():
            with served.images.admit(1, within_s=self.request_timeout_s):
                return await served.encode_new_texts(texts)

    async def encode_in_background(self, model: str, texts: Sequence[str]) -> TextFeatures:
        """Return one unit row per text (k, d), a few texts at a time while no request needs any model."""
        served = self.get(model)
        encode = partial(served.encode_new_texts, is_request=False)
        rows: list[np.ndarray] = await self._background.encode((model, "texts"), encode, texts)
        return np.stack(rows)

    async def store_texts(self, model: str, texts: Sequence[str]) -> None:
        """Encode the texts that the store of text features lacks, as ``encode_in_background``, and store them.

        A request that needs one of them meanwhile does not wait for this: it encodes the text itself.
        """
        if self.get(model).text_features is None:
            return
        encode = self.background_texts(model)
        for first in range(0, len(texts), _TEXTS_PER_WRITE):
            await encode(texts[first : first + _TEXTS_PER_WRITE])

    def background_texts(self, model: str) -> StoredTextEncoder:
        """Return what reads text features from the store, and encodes the others as ``encode_in_background``."""
        served = self.get(model)
        return StoredTextEncoder(
            partial(self.encode_in_background, model), served.text_fingerprint, served.text_features
        )

    async def encode_images(
        self, model: str, images: Sequence[bytes | ClientError], *, has_deadline: bool = False
    ) -> list[np.ndarray | ClientError]:
        """Return each image's unit features (d,), or the error that kept it from being decoded.

        Args:
            model: a name of ``names``.
            images: encoded images, or the error that kept one from being read.
            has_deadline: give up after ``request_timeout_s``.

        Raises:
            OverloadedError: the model's queue has no room for all of the images.
            DeadlineExceededError: the request's time is over.
        """
        served = self.get(model)
        if not has_deadline:
            return await self._encode_images(served, images)
        async with self.deadline():
            return await self._encode_images(served, images, within_s=self.request_timeout_s)

    async def encode_images_in_background(
        self, model: str, images: Sequence[bytes | ClientError]
    ) -> list[np.ndarray | ClientError]:
        """Return the same, a few images at a time while no request needs any model; raises as ``encode_images``."""
        encode = partial(self._encode_images, self.get(model), is_request=False)
        return await self._background.encode((model, "images"), encode, images)

    async def _encode_images(
        self,
        served: ServedModel,
        images: Sequence[bytes | ClientError],
        *,
        within_s: float | None = None,
        is_request: bool = True,
    ) -> list[np.ndarray | ClientError]:
        with self.admitted(served, len(images), within_s=within_s, is_request=is_request) as read:
            encoded = await gather_or_cancel(*(read(image) for image in images))
        return [image if isinstance(image, ClientError) else image.features for image in encoded]

    @contextmanager
    def admitted(
        self, served: ServedModel, count: int, *, within_s: float | None, is_request: bool = True
    ) -> Iterator["ImageReader"]:
        """Take places for images in a model's queue, and yield what decodes and encodes each of them.

        Raises:
            OverloadedError: the queue has no room for ``count`` images.
        """
        with served.images.admit(count, within_s=within_s, is_request=is_request) as ticket:
            yield ImageReader(served, self._decoders, ticket, asyncio.Semaphore(self._decoders_per_request))

    @property
    def last_used_at(self) -> float:
        """When a request last had a place in a queue, on the clock of ``time.perf_counter``; at first, the start."""
        return max([self._created_at, *(served.last_request_at for served in self)])

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """Limit what runs inside to ``request_timeout_s``.

        Raises:
            DeadlineExceededError: it took longer.
        """
        try:
            async with asyncio.timeout(self.request_timeout_s) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise  # raised by an encoder, for example a remote replica
            raise self._too_late() from None
        except DeadlineExceededError:  # raised by the queue, before the timeout expired
            raise self._too_late() from None

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the request took longer than {self.request_timeout_s:g} s; send fewer images or labels, or raise"
            " DEIXIS_REQUEST_TIMEOUT_S; texts that have been encoded are kept for the next request"
        )

    @property
    def problem(self) -> str | None:
        """Why a model encodes nothing at the moment; None if all models work."""
        return next((problem for served in self if (problem := served.problem) is not None), None)

    async def watch(self, every_s: float, loops: Loops) -> None:
        """Probe each model that has been idle for ``every_s`` seconds; runs until it is cancelled."""
        await asyncio.gather(*(served.watch(every_s, loops) for served in self))

    def close(self) -> None:
        """End the decoders and the queues; blocks until running work has finished."""
        self._decoders.close()
        for served in self:
            served.close()


class ImageReader:
    """Decodes, transforms and encodes the images of one request, each independently of the others.

    Args:
        served: the model.
        decoders: shared by all requests.
        ticket: of the request, in the model's queue.
        turns: limits how many images of the request are decoded at a time.
    """

    def __init__(
        self, served: ServedModel, decoders: Decoders, ticket: Ticket[Pixels, np.ndarray], turns: asyncio.Semaphore
    ) -> None:
        self._served = served
        self._decoders = decoders
        self._ticket = ticket
        self._turns = turns

    async def __call__(self, image: bytes | ClientError) -> EncodedImage | ClientError:
        """Return the image's features, or the error that kept it from being read or decoded."""
        if isinstance(image, ClientError):
            return image
        encoder = self._served.encoder
        async with self._turns:
            try:
                with stage("decode", bytes=len(image)):
                    pixels = await self._decoders.decode(image, encoder.transform, encoder.image_size_px)
            except ClientError as error:
                return error
        decoded_at = time.perf_counter()
        try:
            encoded = await self._served.images.encode(pixels, self._ticket)
        except FloatingPointError:
            model = self._served.name
            return NotAnImageError(
                f"the model '{model}' returns NaN or infinity for this image; try another image, or"
                " DEIXIS_PRECISION=fp32"
            )
        encode_began_at = decoded_at + encoded.queue_s
        encoded_at = encode_began_at + encoded.encode_s
        past_stage("queue", decoded_at, encode_began_at)
        past_stage("encode", encode_began_at, encoded_at)
        return EncodedImage(encoded.row, decoded_at, encode_began_at, encoded_at)


async def gather_or_cancel(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return all results in order; if one fails, or the caller is cancelled, cancel the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        while tasks:  # the traceback of an error refers to this frame, which must not refer to tasks with the error
            tasks.pop().cancel()
