"""The edge: the application of a single process, with encoders and caption shards in other processes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.cluster.messages import RemoteModelInfo, deployment_version
from app.cluster.remote_model import remote_model
from app.cluster.remote_tower import RemoteTower
from app.cluster.shards import RemoteShards
from app.cluster.telemetry import Exposition, gather_expositions, own_exposition
from app.encoders._base import ModelInfo
from app.errors import NotReadyError
from app.main import RemoteSteps, create_app
from app.models.served_model import ServedModel
from app.observability.logs import configure_logs
from app.settings import Settings

log = structlog.get_logger()

EDGE = "edge"
_POLL_INTERVAL_S = 0.2
# Time that an edge waits for encoders of its deployment. Then it stops, since they may wait for its core.
_ENCODER_TIMEOUT_S = 600.0


class DisconnectMiddleware:
    """Reports a disconnected client as an ASGI message, as servers do; Ray raises an error instead."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect, send)


class Edge:
    """A replica of the application.

    Args:
        settings: of the service.
        encoders: handles of the encoder deployments, by model.
        shards: handles of the caption shards, by number; without shards, the edge searches the captions.
    """

    def __init__(self, settings: Settings, encoders: Mapping[str, Any], shards: Sequence[Any]) -> None:
        configure_logs(settings.log_format, settings.log_level)
        self._settings = settings
        self._version = deployment_version(settings)
        self._towers: list[RemoteTower[Any]] = []
        # With shared encoders, Ray sends a call to a replica that has loaded its model, if there is one.
        shared = settings.ray_layout.models_per_encoder is not None
        if shared:
            # A health probe of an unused model would load it in place of another one.
            self._settings = settings.model_copy(update={"health_probe_s": 0.0})
        self._encoders = {
            model: handle.options(multiplexed_model_id=model) if shared else handle
            for model, handle in encoders.items()
        }
        self._shards = shards

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; called by Ray."""
        steps = RemoteSteps(
            serve_model=self._serve_model,
            search_captions=RemoteShards(self._shards) if self._shards else None,
            exposition=self._gather_expositions,
        )
        self._app = create_app(self._settings, self._model_infos, steps)
        self._app.add_middleware(DisconnectMiddleware)
        return self._app

    async def exposition(self) -> Exposition:
        """Return the Prometheus metrics of this edge."""
        return own_exposition(self._app.state.metrics)

    async def check_health(self) -> None:
        """Fail, so that Ray replaces this edge, if no encoder has the weights that it knows; called by Ray."""
        if any(tower.is_outdated for tower in self._towers):
            raise RuntimeError("the encoders have other weights than this edge expects")

    def _model_infos(self, settings: Settings) -> list[ModelInfo]:
        """Return the models of the encoders; blocks until they are loaded."""
        return [self._model_info(model) for model in settings.models]

    def _model_info(self, model: str) -> RemoteModelInfo:
        """Return the model of an encoder that was deployed with this edge.

        An encoder of an earlier deployment will be replaced, possibly with other weights.

        Raises:
            NotReadyError: no such encoder started in time; Ray then starts another edge.
        """
        deadline = None
        while (info := self._encoders[model].model_info.remote(model).result()).version != self._version:
            now = time.monotonic()
            if deadline is None:
                log.info("waiting_for_encoders", model=model)
                deadline = now + _ENCODER_TIMEOUT_S
            elif now > deadline:
                raise NotReadyError(
                    f"no encoder of {model} was replaced within {_ENCODER_TIMEOUT_S:g} s; the cluster may not have room"
                    " for it"
                )
            time.sleep(_POLL_INTERVAL_S)
        return info  # type: ignore[no-any-return]

    async def _gather_expositions(self) -> bytes:
        name = serve.get_replica_context().app_name
        handles = {EDGE: serve.get_deployment_handle(EDGE, name)}
        for handle in (*self._encoders.values(), *self._shards):
            handles[handle.deployment_name] = handle
        return await gather_expositions(handles)

    def _serve_model(self, info: RemoteModelInfo, *others: Any) -> ServedModel:
        served = remote_model(info, self._encoders[info.name], *others)
        self._towers += [tower for tower in (served.images, served.texts) if isinstance(tower, RemoteTower)]
        return served
