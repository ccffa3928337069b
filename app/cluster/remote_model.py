"""A model whose towers are elsewhere, as the pipeline knows models."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from app.cluster.calls import ask, carried_trace
from app.cluster.messages import EncodeResponse, RemoteModelInfo, SerializedError
from app.cluster.remote_tower import RemoteTower
from app.models.served_model import ServedModel
from app.observability.metrics import Metrics, TowerMetrics
from app.prompting.text_feature_store import TextFeatureStore
from app.settings import Settings
from app.types import Pixels


def remote_model(
    card: RemoteModelInfo, handle: Any, settings: Settings, metrics: Metrics, text_features: TextFeatureStore | None
) -> ServedModel:
    """Return a model that the replicas of a deployment encode with.

    Args:
        card: what they say that it is.
        handle: of the deployment.
        settings: of this process's queues.
        metrics: told of calls.
        text_features: where text features are kept.
    """
    image_metrics = TowerMetrics(metrics, card.name, "remote images")
    images: RemoteTower[Pixels] = RemoteTower(
        f"{card.name} images",
        partial(_encoded, handle.encode_images, card.name, card.image_fingerprint, np.stack),
        batch_size=settings.image_batch or card.image_path.batch_size,
        metrics=image_metrics,
        max_queued=settings.max_queued_images,
    )
    image_metrics.watch(waiting=lambda: images.waiting, admitted=lambda: images.admitted)
    text_metrics = TowerMetrics(metrics, card.name, "remote texts")
    texts: RemoteTower[str] = RemoteTower(
        f"{card.name} texts",
        partial(_encoded, handle.encode_texts, card.name, card.text_fingerprint, list),
        batch_size=settings.text_batch,
        metrics=text_metrics,
    )
    text_metrics.watch(waiting=lambda: texts.waiting, admitted=lambda: texts.admitted)
    return ServedModel(
        card,
        images,
        texts,
        image_fingerprint=_known(card.image_fingerprint),
        text_fingerprint=_known(card.text_fingerprint),
        text_features=text_features,
        metrics=(image_metrics, text_metrics),
    )


async def _encoded(
    method: Any,
    model: str,
    fingerprint: str,
    packed: Callable[[Sequence[Any]], Any],
    items: Sequence[Any],
    within_s: float | None,
) -> EncodeResponse:
    # Arrays above 100 KiB go through the object store, which a replica of the same machine reads where they lie.
    answer: EncodeResponse | SerializedError = await ask(
        method, model, fingerprint, packed(items), within_s, carried_trace()
    )
    if isinstance(answer, SerializedError):
        raise answer.to_exception()
    return answer


def _known(fingerprint: str) -> Callable[[], Awaitable[str]]:
    async def told() -> str:
        return fingerprint

    return told
