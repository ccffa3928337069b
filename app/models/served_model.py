"""A model that is served: its encoder, with a queue in front of each tower."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Self, TypeAlias

import numpy as np
from PIL import Image

from app.encoders._base import Encoder, ModelInfo
from app.models.health_probe import HealthProbe
from app.models.queue import EncodeQueue, TurnQueue
from app.observability.metrics import Metrics, TowerMetrics
from app.prompting.text_feature_store import StoredTextEncoder, TextFeatureStore
from app.types import Pixels, TextFeatures

_CANARY_PX = 64

Fingerprint: TypeAlias = Callable[[], Awaitable[str]]
"""Gives what tells a tower from every other; the first time that may take seconds."""


class _Once:
    """What takes seconds in a thread, and is the same ever after; here what tells a tower from every other."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._made: asyncio.Future[str] | None = None

    async def __call__(self) -> str:
        if self._made is None or self._made.cancelled() or (self._made.done() and self._made.exception()):
            self._made = asyncio.ensure_future(asyncio.to_thread(self._make))
        return await asyncio.shield(self._made)


class ServedModel:
    """A model's encoder with one queue per tower, wherever these encode.

    Args:
        encoder: tells what the model is, and transforms images; what the towers compute goes through the queues.
        images: the queue of the image tower.
        texts: that of the text tower.
        image_fingerprint: gives what tells the image tower from every other.
        text_fingerprint: gives the same of the text tower.
        text_features: where text features are kept; None keeps none.
        metrics: of the queues, which tell no more of them once they are closed, and keep none of it in memory.
    """

    def __init__(
        self,
        encoder: ModelInfo,
        images: TurnQueue[Pixels, np.ndarray],
        texts: TurnQueue[str, np.ndarray],
        *,
        image_fingerprint: Fingerprint,
        text_fingerprint: Fingerprint,
        text_features: TextFeatureStore | None = None,
        metrics: Sequence[TowerMetrics] = (),
    ) -> None:
        self.encoder = encoder
        self._metrics = metrics
        self.images = images
        self.texts = texts
        self.image_fingerprint = image_fingerprint
        self.text_fingerprint = text_fingerprint
        self.encode_texts = StoredTextEncoder(self.encode_new_texts, text_fingerprint, text_features)
        self._image_canary = HealthProbe(
            images, lambda: encoder.transform(Image.new("RGB", (_CANARY_PX, _CANARY_PX), "grey"))
        )
        self._text_canary = HealthProbe(texts, lambda: "a photo.")

    @classmethod
    def here(
        cls,
        encoder: Encoder,
        *,
        metrics: Metrics,
        max_queued_images: int,
        image_batch: int | None,
        text_batch: int,
        stalled_after_s: float,
        text_features: TextFeatureStore | None = None,
    ) -> Self:
        """Return a model whose towers encode in this process, each on a thread of its own.

        Args:
            encoder: loaded.
            metrics: of the service.
            max_queued_images: images admitted at once.
            image_batch: images in one forward pass; None takes the encoder's own choice.
            text_batch: texts in one forward pass.
            stalled_after_s: a forward pass that takes longer makes the model unhealthy.
            text_features: where text features are kept; None keeps none.
        """
        image_metrics = TowerMetrics(metrics, encoder.name, "images")
        images: EncodeQueue[Pixels, np.ndarray] = EncodeQueue(
            f"{encoder.name} images",
            encoder.begin_images,
            batch_size=image_batch or encoder.image_path.batch_size,
            metrics=image_metrics,
            max_queued=max_queued_images,
            stalled_after_s=stalled_after_s,
        )
        image_metrics.watch(waiting=lambda: images.waiting, admitted=lambda: images.admitted)
        text_metrics = TowerMetrics(metrics, encoder.name, "texts")
        # Texts have no bound of their own: each request that waits for some holds places for its images.
        texts: EncodeQueue[str, np.ndarray] = EncodeQueue(
            f"{encoder.name} texts",
            lambda each: partial(encoder.encode_texts, each),
            batch_size=text_batch,
            metrics=text_metrics,
            stalled_after_s=stalled_after_s,
        )
        text_metrics.watch(waiting=lambda: texts.waiting, admitted=lambda: texts.admitted)
        return cls(
            encoder,
            images,
            texts,
            image_fingerprint=_Once(encoder.image_fingerprint),
            text_fingerprint=_Once(encoder.text_fingerprint),
            text_features=text_features,
            metrics=(image_metrics, text_metrics),
        )

    async def encode_new_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d) of at least one text, none of which is looked up or kept."""
        features: TextFeatures = np.stack(await self.texts.run(texts))
        return features

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.encoder.name

    @property
    def problem(self) -> str | None:
        """Why nothing is encoded at the moment; None while all is well."""
        return self.images.problem or self.texts.problem or self._image_canary.problem or self._text_canary.problem

    async def watch(self, every_s: float) -> None:
        """Try each tower whenever it did nothing for so long; until it is cancelled."""
        await asyncio.gather(self._image_canary.watch(every_s), self._text_canary.watch(every_s))

    def close(self) -> None:
        """End both queues."""
        self.images.close()
        self.texts.close()
        for each in self._metrics:
            each.forget()
