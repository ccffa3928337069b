"""From image bytes to predictions: decode -> queue -> encode -> adapt.

The queue ends after the encoder: what follows runs per request, on that request's features alone, so that one caller's
images can never change another's answer.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from app.adapters._base import probabilities
from app.adapters.registry import METHODS
from app.batching import Caller, EncodeQueue
from app.encoders._base import Encoder
from app.errors import ClientError, DeadlineExceededError
from app.images import decode_image
from app.metrics import Metrics, TowerMetrics
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.task import (
    ClassEmbeddings,
    Classification,
    ImageFeatures,
    ImageResult,
    Pixels,
    Prediction,
    Task,
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may be, before anything is allocated for it."""

    max_bytes: int
    max_pixels: int


class ServedModel:
    """An encoder with one queue per tower.

    Args:
        encoder: loaded.
        metrics: of the service.
        max_queued_images: images admitted at once.
        image_batch: images in one forward pass; None takes the encoder's own choice.
        text_batch: texts in one forward pass.
        stalled_after_s: a forward pass that takes longer makes the model unhealthy.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        metrics: Metrics,
        max_queued_images: int,
        image_batch: int | None,
        text_batch: int,
        stalled_after_s: float,
    ) -> None:
        self.encoder = encoder
        image_metrics = TowerMetrics(metrics, encoder.name, "images")
        self.images: EncodeQueue[Pixels] = EncodeQueue(
            f"{encoder.name} images",
            encoder.begin_images,
            batch_size=image_batch or encoder.image_path.batch_size,
            metrics=image_metrics,
            max_queued=max_queued_images,
            stalled_after_s=stalled_after_s,
        )
        image_metrics.watch(waiting=lambda: self.images.waiting, admitted=lambda: self.images.admitted)
        text_metrics = TowerMetrics(metrics, encoder.name, "texts")
        # Texts have no bound of their own: each request that waits for some holds places for its images.
        self.texts: EncodeQueue[str] = EncodeQueue(
            f"{encoder.name} texts",
            lambda texts: partial(encoder.encode_texts, texts),
            batch_size=text_batch,
            metrics=text_metrics,
            stalled_after_s=stalled_after_s,
        )
        text_metrics.watch(waiting=lambda: self.texts.waiting, admitted=lambda: self.texts.admitted)

    @property
    def problem(self) -> str | None:
        """Why nothing is encoded at the moment; None while all is well."""
        return self.images.problem or self.texts.problem

    def close(self) -> None:
        """End both threads."""
        self.images.close()
        self.texts.close()


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """An image's features (d,), and the times of its way to them on the clock of ``time.perf_counter``."""

    features: np.ndarray
    decoded: float
    began: float
    encoded: float


class Pipeline:
    """Classifies images with the models it was given, the first of which is the default.

    Args:
        models: by name, in order.
        request_timeout_s: after which ``classify`` gives up; None never.
        decode_threads: threads that decode and transform images; one request uses half of them at a time, so that its
            many or slow images do not keep those of others waiting.
        metrics: told of every request.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        limits: ImageLimits,
        class_embedding_cache: ClassEmbeddingCache,
        request_timeout_s: float | None,
        decode_threads: int,
        metrics: Metrics,
    ) -> None:
        self.models = models
        self.limits = limits
        self._class_embedding_cache = class_embedding_cache
        self._request_timeout_s = request_timeout_s
        self._metrics = metrics
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
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._request_timeout_s) as deadline:
                with model.images.admit(len(images), within_s=self._request_timeout_s) as caller:
                    # Texts are there already as a rule; new ones are encoded while the images are decoded.
                    turns = asyncio.Semaphore(self._decoders_per_request)
                    (class_embeddings, texts_ready), *read = await _all(
                        self._timed_class_embeddings(task),
                        *(self._read(image, model, caller, turns) for image in images),
                    )
                adapting = time.perf_counter()
                good = [image for image in read if not isinstance(image, ClientError)]
                predictions: Sequence[tuple[Prediction, ...]] = ()
                if good:
                    image_features = np.stack([image.features for image in good])
                    predictions = await asyncio.to_thread(
                        predict, model.encoder, task, image_features, class_embeddings
                    )
        except TimeoutError:
            if not deadline.expired():
                raise  # an encoder's own, such as that of a replica elsewhere
            raise self._too_late() from None
        except DeadlineExceededError:  # the queue noticed first
            raise self._too_late() from None
        timing_ms = _timing_ms(began, texts_ready, good, adapting, time.perf_counter())
        self._metrics.classified(task.model, good=len(good), bad=len(read) - len(good), timing_ms=timing_ms)
        remaining = iter(predictions)
        results = tuple(
            ImageResult(error=image) if isinstance(image, ClientError) else ImageResult(predictions=next(remaining))
            for image in read
        )
        return Classification(task, results, timing_ms)

    async def class_embeddings(
        self, model: str, templates: tuple[str, ...], classnames: tuple[str, ...]
    ) -> ClassEmbeddings:
        """Return the cached class embeddings, or compute them on the text queue."""
        return await self._class_embedding_cache.get(
            model, self.models[model].texts.run, templates=templates, classnames=classnames
        )

    @property
    def problem(self) -> str | None:
        """Why a model encodes nothing at the moment; None while all is well."""
        return next((problem for model in self.models.values() if (problem := model.problem) is not None), None)

    def close(self) -> None:
        """End every thread; what is running finishes first."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        for model in self.models.values():
            model.close()

    async def _timed_class_embeddings(self, task: Task) -> tuple[ClassEmbeddings, float]:
        class_embeddings = await self.class_embeddings(task.model, task.templates, task.classnames)
        return class_embeddings, time.perf_counter()

    async def _read(
        self, image: bytes | ClientError, model: ServedModel, caller: Caller[Pixels], turns: asyncio.Semaphore
    ) -> _ReadImage | ClientError:
        """Decode, transform and encode one image; each goes its way without waiting for the others."""
        if isinstance(image, ClientError):
            return image
        loop = asyncio.get_running_loop()
        async with turns:
            try:
                pixels = await loop.run_in_executor(
                    self._decoders, _decode_and_transform, image, model.encoder, self.limits
                )
            except ClientError as error:
                return error
        decoded = time.perf_counter()
        encoded = await model.images.encode(pixels, caller)
        began = decoded + encoded.queue_s
        return _ReadImage(encoded.row, decoded, began, began + encoded.encode_s)

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"not done within {self._request_timeout_s:g} s; send fewer images or labels, or raise"
            " DEIXIS_REQUEST_TIMEOUT_S; texts that are encoded by now are kept for the next try"
        )


async def _all(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return all results in order; when one fails, or the caller is cancelled, none of the others goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _timing_ms(
    began: float, texts_ready: float, images: Sequence[_ReadImage], adapting: float, done: float
) -> dict[str, float]:
    """Return the milliseconds of each stage; of several images, those of the one that was ready last."""
    last = max(images, key=lambda image: image.encoded, default=None)
    return {
        "text": (texts_ready - began) * 1000,
        "decode": (last.decoded - began) * 1000 if last else 0.0,
        "queue": (last.began - last.decoded) * 1000 if last else 0.0,
        "encode": (last.encoded - last.began) * 1000 if last else 0.0,
        "adapt": (done - adapting) * 1000,
    }


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
