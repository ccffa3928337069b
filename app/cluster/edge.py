"""The edge: the application of a single process, whose towers and searches are elsewhere."""

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
_ASKED_AGAIN_AFTER_S = 0.2
# For encoders of its version an edge waits so long, and then makes room for them: they may wait for the core it has.
_WAITED_FOR_S = 600.0


class DisconnectMiddleware:
    """Tells the application of a caller who left in the way that servers do: Ray raises an error of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def received() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await self._app(scope, received, send)


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
        self._version = deployment_version(settings)
        self._towers: list[RemoteTower[Any]] = []
        # Where encoders share models, a call goes to one that has its model, if there is one.
        shared = settings.ray_layout.models_per_encoder is not None
        if shared:
            # To try one that nobody asks for would have it loaded in the place of another.
            self._settings = settings.model_copy(update={"health_probe_s": 0.0})
        self._encoders = {
            model: each.options(multiplexed_model_id=model) if shared else each for model, each in encoders.items()
        }
        self._shards = shards

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; called by Ray."""
        steps = RemoteSteps(
            serve_model=self._serve,
            search_captions=RemoteShards(self._shards) if self._shards else None,
            exposition=self._gather,
        )
        self._app = create_app(self._settings, self._cards, steps)
        self._app.add_middleware(DisconnectMiddleware)
        return self._app

    async def exposition(self) -> Exposition:
        """Return what Prometheus is told of this edge."""
        return own_exposition(self._app.state.metrics)

    async def check_health(self) -> None:
        """Have this edge replaced where it knows a model by weights that no encoder has any more; called by Ray."""
        if any(tower.is_outdated for tower in self._towers):
            raise RuntimeError("the encoders have other weights than those that this edge knows")

    def _cards(self, settings: Settings) -> list[ModelInfo]:
        """Ask what the models are; in a thread, for as long as they take to load."""
        return [self._card(model) for model in settings.models]

    def _card(self, model: str) -> RemoteModelInfo:
        """Return that of an encoder that was deployed with this edge, and not of one that is about to be replaced.

        Raises:
            NotReadyError: none came; Ray starts another edge then.
        """
        give_up_at = None
        while (card := self._encoders[model].card.remote(model).result()).version != self._version:
            now = time.monotonic()
            if give_up_at is None:
                log.info("waiting_for_encoders", model=model)
                give_up_at = now + _WAITED_FOR_S
            elif now > give_up_at:
                raise NotReadyError(f"no encoder of {model} was replaced within {_WAITED_FOR_S:g} s; is there room?")
            time.sleep(_ASKED_AGAIN_AFTER_S)
        return card  # type: ignore[no-any-return]

    async def _gather(self) -> bytes:
        name = serve.get_replica_context().app_name
        handles = {EDGE: serve.get_deployment_handle(EDGE, name)}
        for handle in (*self._encoders.values(), *self._shards):
            handles[handle.deployment_name] = handle
        return await gather_expositions(handles)

    def _serve(self, card: RemoteModelInfo, *others: Any) -> ServedModel:
        served = remote_model(card, self._encoders[card.name], *others)
        self._towers += [each for each in (served.images, served.texts) if isinstance(each, RemoteTower)]
        return served
