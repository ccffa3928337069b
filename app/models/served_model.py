"""A model in service: its encoder, with a queue in front of each tower."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Self, TypeAlias

import numpy as np
from PIL import Image

from app.encoders._base import Encoder, ModelInfo
from app.models.health_probe import HealthProbe
from app.models.queue import EncodeQueue, TurnQueue
from app.observability.loops import Loops
from app.observability.metrics import Metrics, TowerMetrics
from app.prompting.text_feature_store import StoredTextEncoder, TextFeatureStore
from app.types import Pixels, TextFeatures

_PROBE_PX = 64
# A probe waits behind the work of a queue, which may be a large batch on a slow device.
_SLOWEST_PROBE_S = 300

Fingerprint: TypeAlias = Callable[[], Awaitable[str]]
"""Returns a digest that identifies a tower; the first call may take seconds."""


class _CachedFingerprint:
    """Computes a fingerprint once, in a worker thread, and caches it."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._made: asyncio.Future[str] | None = None

    async def __call__(self) -> str:
        if self._made is None or self._made.cancelled() or (self._made.done() and self._made.exception()):
            self._made = asyncio.ensure_future(asyncio.to_thread(self._make))
        return await asyncio.shield(self._made)


def _finite(model: str, wait: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """Return a function that waits for rows, and raises ``FloatingPointError`` if one has NaN or infinity.

    The queue then tries smaller batches, so that the item alone gets the error, and nothing is stored.
    """

    def checked() -> np.ndarray:
        rows = wait()
        if not np.isfinite(rows).all():
            raise FloatingPointError(
                f"model '{model}' returned features that are not finite; try DEIXIS_PRECISION=fp32"
            )
        return rows

    return checked


class ServedModel:
    """A model's encoder with one queue per tower, in this process or elsewhere.

    Args:
        encoder: describes the model and transforms images; the towers are used through the queues.
        images: the queue of the image tower.
        texts: that of the text tower.
        image_fingerprint: identifies the image tower.
        text_fingerprint: identifies the text tower.
        text_features: stores text features; None stores none.
        metrics: of the queues; removed when the queues are closed.
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
        self.text_features = text_features
        self.encode_texts = StoredTextEncoder(self.encode_new_texts, text_fingerprint, text_features)
        self._image_probe = HealthProbe(
            images, lambda: encoder.transform(Image.new("RGB", (_PROBE_PX, _PROBE_PX), "grey"))
        )
        self._text_probe = HealthProbe(texts, lambda: "a photo.")

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
        """Return a model whose towers encode in this process, each on its own thread.

        Args:
            encoder: loaded.
            metrics: of the process.
            max_queued_images: limit on admitted images.
            image_batch: images in one forward pass; None for the encoder's choice.
            text_batch: texts in one forward pass.
            stalled_after_s: seconds after which a forward pass makes the model unhealthy.
            text_features: stores text features; None stores none.
        """
        image_metrics = TowerMetrics(metrics, encoder.name, "images")
        images: EncodeQueue[Pixels, np.ndarray] = EncodeQueue(
            f"{encoder.name} images",
            lambda pixels, alone: _finite(encoder.name, encoder.begin_images(pixels, alone=alone)),
            batch_size=image_batch or encoder.image_path.batch_size,
            metrics=image_metrics,
            max_queued=max_queued_images,
            stalled_after_s=stalled_after_s,
            workers=encoder.image_streams,
        )
        image_metrics.watch(waiting=lambda: images.waiting, admitted=lambda: images.admitted)
        text_metrics = TowerMetrics(metrics, encoder.name, "texts")
        # Texts have no limit of their own: each request that waits for texts holds places for its images.
        texts: EncodeQueue[str, np.ndarray] = EncodeQueue(
            f"{encoder.name} texts",
            lambda each, _: _finite(encoder.name, partial(encoder.encode_texts, each)),
            batch_size=text_batch,
            metrics=text_metrics,
            stalled_after_s=stalled_after_s,
        )
        text_metrics.watch(waiting=lambda: texts.waiting, admitted=lambda: texts.admitted)
        return cls(
            encoder,
            images,
            texts,
            image_fingerprint=_CachedFingerprint(encoder.image_fingerprint),
            text_fingerprint=_CachedFingerprint(encoder.text_fingerprint),
            text_features=text_features,
            metrics=(image_metrics, text_metrics),
        )

    async def encode_new_texts(self, texts: Sequence[str], *, is_request: bool = True) -> TextFeatures:
        """Return unit rows (k, d) of one or more texts, without reading or filling the store."""
        features: TextFeatures = np.stack(await self.texts.run(texts, is_request=is_request))
        return features

    @property
    def last_request_at(self) -> float:
        """When a request last had a place in one of the queues; now while one has."""
        return max(self.images.last_request_at, self.texts.last_request_at)

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.encoder.name

    @property
    def problem(self) -> str | None:
        """Why nothing is encoded at the moment; None if the model works."""
        return self.images.problem or self.texts.problem or self._image_probe.problem or self._text_probe.problem

    async def watch(self, every_s: float, loops: Loops) -> None:
        """Probe each tower whenever it was idle for ``every_s`` seconds; runs until it is cancelled."""
        await asyncio.gather(
            *(
                loops.run(probe.name, partial(probe.watch, every_s), stalled_after_s=every_s + _SLOWEST_PROBE_S)
                for probe in (self._image_probe, self._text_probe)
            )
        )

    def close(self) -> None:
        """Close both queues."""
        self.images.close()
        self.texts.close()
        for tower in self._metrics:
            tower.forget()
