"""A model whose towers run in encoder replicas."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from app.cluster.calls import call, trace_context
from app.cluster.messages import EncodeResponse, RemoteModelInfo, SerializedError
from app.cluster.remote_tower import RemoteTower
from app.models.served_model import ServedModel
from app.observability.metrics import Metrics, TowerMetrics
from app.prompting.text_feature_store import TextFeatureStore
from app.settings import Settings
from app.types import Pixels


def remote_model(
    info: RemoteModelInfo, handle: Any, settings: Settings, metrics: Metrics, text_features: TextFeatureStore | None
) -> ServedModel:
    """Return a model that the replicas of a deployment encode with.

    Args:
        info: the properties of the model.
        handle: of the deployment.
        settings: of the queues in this process.
        metrics: of the calls.
        text_features: stores text features.
    """
    image_metrics = TowerMetrics(metrics, info.name, "remote images")
    images: RemoteTower[Pixels] = RemoteTower(
        f"{info.name} images",
        partial(_encode, handle.encode_images, info.name, info.image_fingerprint, np.stack),
        batch_size=settings.image_batch or info.image_path.batch_size,
        metrics=image_metrics,
        max_queued=settings.max_queued_images,
    )
    image_metrics.watch(waiting=lambda: images.waiting, admitted=lambda: images.admitted)
    text_metrics = TowerMetrics(metrics, info.name, "remote texts")
    texts: RemoteTower[str] = RemoteTower(
        f"{info.name} texts",
        partial(_encode, handle.encode_texts, info.name, info.text_fingerprint, list),
        batch_size=settings.text_batch,
        metrics=text_metrics,
    )
    text_metrics.watch(waiting=lambda: texts.waiting, admitted=lambda: texts.admitted)
    return ServedModel(
        info,
        images,
        texts,
        image_fingerprint=_constant(info.image_fingerprint),
        text_fingerprint=_constant(info.text_fingerprint),
        text_features=text_features,
        metrics=(image_metrics, text_metrics),
    )


async def _encode(
    method: Any,
    model: str,
    fingerprint: str,
    pack: Callable[[Sequence[Any]], Any],
    items: Sequence[Any],
    within_s: float | None,
) -> EncodeResponse:
    # Arrays above 100 KiB go through the object store, which replicas on the same machine read without a copy.
    response: EncodeResponse | SerializedError = await call(
        method, model, fingerprint, pack(items), within_s, trace_context()
    )
    if isinstance(response, SerializedError):
        raise response.to_exception()
    return response


def _constant(fingerprint: str) -> Callable[[], Awaitable[str]]:
    async def get() -> str:
        return fingerprint

    return get
