"""From image bytes to predictions: decode -> queue -> encode -> adapt.

The queue ends after the encoder: what follows runs per request, on that request's features alone, so that one caller's
images can never change another's answer.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from app.adapters._base import probabilities
from app.adapters.registry import METHODS
from app.batching import EncodeQueue
from app.encoders._base import Encoder
from app.errors import ClientError, DeadlineExceededError
from app.images import decode_image
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.task import (
    ClassEmbeddings,
    Classification,
    ImageFeatures,
    ImageResult,
    Pixels,
    Prediction,
    Task,
    TextFeatures,
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may be, before anything is allocated for it."""

    max_bytes: int
    max_pixels: int


class ServedModel:
    """An encoder with one queue per tower."""

    def __init__(self, encoder: Encoder, *, max_queued_images: int, image_batch: int, text_batch: int) -> None:
        self.encoder = encoder
        self.images: EncodeQueue[Pixels] = EncodeQueue(
            f"{encoder.name} images", encoder.encode_images, max_queued=max_queued_images, batch_size=image_batch
        )
        # Texts have no bound of their own: each request that waits for some holds places for its images.
        self.texts: EncodeQueue[str] = EncodeQueue(f"{encoder.name} texts", encoder.encode_texts, batch_size=text_batch)

    async def encode_texts(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts on the text queue's thread."""
        return (await self.texts.run(prompts)).features

    def close(self) -> None:
        """End both threads."""
        self.images.close()
        self.texts.close()


class Pipeline:
    """Classifies images with the models it was given, the first of which is the default.

    Args:
        models: by name, in order.
        request_timeout_s: after which ``classify`` gives up; None never.
        decode_threads: threads that decode and transform images; one request uses half of them at a time, so that its
            many or slow images do not keep those of others waiting.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        limits: ImageLimits,
        class_embedding_cache: ClassEmbeddingCache,
        request_timeout_s: float | None,
        decode_threads: int,
    ) -> None:
        self.models = models
        self.limits = limits
        self._class_embedding_cache = class_embedding_cache
        self._request_timeout_s = request_timeout_s
        self._decoders_per_request = max(1, decode_threads // 2)
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")

    @property
    def default_model(self) -> str:
        """The name of the model that a request gets when it names none."""
        return next(iter(self.models))

    async def classify(self, images: Sequence[bytes | ClientError], task: Task) -> Classification:
        """Return one result per image, in order; an image that cannot be read has its error in its place.

        Args:
            images: encoded images, or the error that already kept one from being read.
            task: with a known model and method.

        Raises:
            OverloadedError: the model's queue has no room for this many images.
            DeadlineExceededError: not done within the request's time.
        """
        model = self.models[task.model]
        try:
            async with asyncio.timeout(self._request_timeout_s) as deadline:
                with model.images.admit(len(images)):
                    began = time.perf_counter()
                    class_embeddings = await self.class_embeddings(task.model, task.templates, task.classnames)
                    texts_ready = time.perf_counter()
                    turns = asyncio.Semaphore(self._decoders_per_request)
                    decoded = await asyncio.gather(*(self._decode(image, model.encoder, turns) for image in images))
                    images_ready = time.perf_counter()
                    pixels = [image for image in decoded if not isinstance(image, ClientError)]
                    encoded = await model.images.run(pixels) if pixels else None
                adapting = time.perf_counter()
                predictions: Sequence[tuple[Prediction, ...]] = ()
                if encoded is not None:
                    predictions = await asyncio.to_thread(
                        predict, model.encoder, task, encoded.features, class_embeddings
                    )
                done = time.perf_counter()
        except TimeoutError:
            if not deadline.expired():
                raise  # an encoder's own, such as that of a replica elsewhere
            raise DeadlineExceededError(
                f"not done within {self._request_timeout_s:g} s; send fewer images or labels, or raise"
                " DEIXIS_REQUEST_TIMEOUT_S; texts that are encoded by now are kept for the next try"
            ) from None
        timing_ms = {
            "text": (texts_ready - began) * 1000,
            "decode": (images_ready - texts_ready) * 1000,
            "queue": encoded.queue_ms if encoded else 0.0,
            "encode": encoded.encode_ms if encoded else 0.0,
            "adapt": (done - adapting) * 1000,
        }
        remaining = iter(predictions)
        results = tuple(
            ImageResult(error=image) if isinstance(image, ClientError) else ImageResult(predictions=next(remaining))
            for image in decoded
        )
        return Classification(task, results, timing_ms)

    async def class_embeddings(
        self, model: str, templates: tuple[str, ...], classnames: tuple[str, ...]
    ) -> ClassEmbeddings:
        """Return the cached class embeddings, or compute them on the text queue."""
        return await self._class_embedding_cache.get(
            model, self.models[model].encode_texts, templates=templates, classnames=classnames
        )

    def close(self) -> None:
        """End every thread; what is running finishes first."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        for model in self.models.values():
            model.close()

    async def _decode(
        self, image: bytes | ClientError, encoder: Encoder, turns: asyncio.Semaphore
    ) -> Pixels | ClientError:
        if isinstance(image, ClientError):
            return image
        loop = asyncio.get_running_loop()
        async with turns:
            try:
                return await loop.run_in_executor(self._decoders, _decode_and_transform, image, encoder, self.limits)
            except ClientError as error:
                return error


def _decode_and_transform(data: bytes, encoder: Encoder, limits: ImageLimits) -> Pixels:
    image = decode_image(
        data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, target_px=encoder.image_size_px
    )
    return encoder.transform(image)


def predict(
    encoder: Encoder, task: Task, image_features: ImageFeatures, class_embeddings: ClassEmbeddings
) -> list[tuple[Prediction, ...]]:
    """Apply the task's method to the features (n, d) and return each image's ``top_k`` predictions, best first."""
    adapter = METHODS[task.method]().fit(
        class_embeddings, logit_scale=encoder.logit_scale, logit_bias=encoder.logit_bias
    )
    logits = adapter.predict_logits(image_features)
    scores = probabilities(logits, sigmoid=encoder.logit_bias is not None)
    order = np.argsort(-logits, axis=1, kind="stable")[:, : task.top_k]
    predictions = []
    for best, image, image_scores in zip(order, image_features, scores, strict=True):
        # For the best classes only, because the method has multiplied all of them already. Unit rows are so to seven
        # digits, which is enough for a cosine of 1.0000001.
        similarities = np.clip(class_embeddings[best] @ image, -1, 1)
        told = zip(best.tolist(), image_scores[best].tolist(), similarities.tolist(), strict=True)
        predictions.append(tuple(Prediction(task.classnames[index], score, cosine) for index, score, cosine in told))
    return predictions
