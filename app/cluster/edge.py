"""The edge: the application of a single process, whose towers and searches are elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve

from app.cluster.handles import ask, carried_trace
from app.cluster.shards import RemoteShards
from app.cluster.telemetry import Exposition, gather_expositions, own_exposition
from app.cluster.towers import RemoteTower
from app.cluster.wire import Card, Failure, Reply
from app.encoders._base import Described
from app.logs import configure_logs
from app.main import Steps, create_app
from app.metrics import Metrics, TowerMetrics
from app.prompting.text_features import TextFeatureStore
from app.served import ServedModel
from app.settings import Settings
from app.task import Pixels

EDGE = "edge"


class Edge:
    """A replica of the application.

    Args:
        settings: of the service.
        encoders: handles of the deployments that encode, by model.
        shards: handles of those that search captions, by the number of their part; none searches them here.
    """

    def __init__(self, settings: Settings, encoders: Mapping[str, Any], shards: Sequence[Any]) -> None:
        configure_logs(settings.log_format, settings.log_level)
        self._settings = settings
        self._encoders = encoders
        self._shards = shards

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; called by Ray."""
        steps = Steps(
            serve_model=self._serve,
            search_captions=RemoteShards(self._shards) if self._shards else None,
            exposition=self._gather,
        )
        self._app = create_app(self._settings, self._cards, steps)
        return self._app

    async def exposition(self) -> Exposition:
        """Return what Prometheus is told of this edge."""
        return own_exposition(self._app.state.metrics)

    def _cards(self, settings: Settings) -> list[Described]:
        """Ask what the models are; in a thread, for as long as they take to load."""
        return [self._encoders[model].card.remote(model).result() for model in settings.models]

    async def _gather(self) -> bytes:
        name = serve.get_replica_context().app_name
        handles = {EDGE: serve.get_deployment_handle(EDGE, name)}
        for handle in (*self._encoders.values(), *self._shards):
            handles[handle.deployment_name] = handle
        return await gather_expositions(handles)

    def _serve(
        self, encoder: Described, settings: Settings, metrics: Metrics, text_features: TextFeatureStore | None
    ) -> ServedModel:
        assert isinstance(encoder, Card)
        handle = self._encoders[encoder.name]
        told = TowerMetrics(metrics, encoder.name, "images from here")
        images: RemoteTower[Pixels] = RemoteTower(
            f"{encoder.name} images",
            partial(_ask, handle.encode_images, encoder.name, np.stack),
            batch_size=settings.image_batch or encoder.image_path.batch_size,
            metrics=told,
            max_queued=settings.max_queued_images,
        )
        told.watch(waiting=lambda: images.waiting, admitted=lambda: images.admitted)
        told = TowerMetrics(metrics, encoder.name, "texts from here")
        texts: RemoteTower[str] = RemoteTower(
            f"{encoder.name} texts",
            partial(_ask, handle.encode_texts, encoder.name, list),
            batch_size=settings.text_batch,
            metrics=told,
        )
        told.watch(waiting=lambda: texts.waiting, admitted=lambda: texts.admitted)
        return ServedModel(
            encoder,
            images,
            texts,
            image_fingerprint=_known(encoder.image_fingerprint),
            text_fingerprint=_known(encoder.text_fingerprint),
            text_features=text_features,
        )


async def _ask(
    method: Any, model: str, packed: Callable[[Sequence[Any]], Any], items: Sequence[Any], within_s: float | None
) -> Reply:
    # Arrays above 100 KiB go through the object store, which a replica of the same machine reads where they lie.
    answer: Reply | Failure = await ask(method, model, packed(items), within_s, carried_trace())
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


def _known(fingerprint: str) -> Callable[[], Any]:
    async def told() -> str:
        return fingerprint

    return told
