"""The replicas that encode: models as one process serves them, called by edges."""

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import structlog
from jaxtyping import UInt8
from opentelemetry import context, propagate
from ray import serve

from app import __version__
from app.cluster.messages import (
    EncodeResponse,
    RemoteModelInfo,
    SerializedError,
    WeightsMismatchError,
    deployment_version,
)
from app.cluster.telemetry import Exposition, own_exposition, send_traces
from app.encoders.loading import load_encoder
from app.errors import DeixisError
from app.main import load_options, serve_here
from app.models.queue import Encoded, TurnQueue
from app.models.served_model import ServedModel
from app.observability.logs import configure_logs
from app.observability.metrics import Metrics
from app.observability.tracing import stage
from app.settings import Settings

log = structlog.get_logger()


class _LoadedModel:
    """A model with its queues, which ends when nobody has it any more.

    Ray drops one when another model takes its place, and calls that are under way keep it until they are answered. Had
    it a ``__del__``, Ray would call that at once.
    """

    def __init__(self, card: RemoteModelInfo, served: ServedModel, health_probe_s: float) -> None:
        self.card = card
        self.served = served
        self._health_probe_s = health_probe_s
        self._is_watched = False
        _when_gone(self, _end, served)
        log.info("model_loaded", model=card.name)

    def watch(self) -> None:
        """Try the towers now and then, on this event loop."""
        if self._health_probe_s and not self._is_watched:
            self._is_watched = True
            watching = asyncio.get_running_loop().create_task(self.served.watch(self._health_probe_s))
            _when_gone(self, _cancel, watching)


def _when_gone(loaded: _LoadedModel, work: Callable[[Any], None], subject: object) -> None:
    weakref.finalize(loaded, work, subject).atexit = False


def _end(served: ServedModel) -> None:
    # In a thread, since it waits for those of the model, and may be called on the event loop.
    threading.Thread(target=served.close).start()


def _cancel(watching: asyncio.Task[None]) -> None:
    with suppress(RuntimeError):  # the event loop may be gone
        watching.get_loop().call_soon_threadsafe(watching.cancel)


class EncoderReplica:
    """Encodes with models that are loaded when it starts.

    Args:
        settings: of the service.
        models: names of those that it serves.
    """

    def __init__(self, settings: Settings, models: Sequence[str]) -> None:
        configure_logs(settings.log_format, settings.log_level)
        if settings.traces:
            send_traces()
        self._settings = settings
        self._metrics = Metrics(__version__)
        self._loaded: MutableMapping[str, _LoadedModel] = {model: self._load(model) for model in models}

    async def card(self, model: str) -> RemoteModelInfo:
        """Return what an edge must know of a model."""
        return (await self._get(model)).card

    async def encode_images(
        self,
        model: str,
        fingerprint: str,
        pixels: UInt8[np.ndarray, "n h w 3"],
        within_s: float | None,
        trace: Mapping[str, str],
    ) -> EncodeResponse | SerializedError:
        """Return the features of images that the model's transform made.

        Args:
            model: its name.
            fingerprint: of the image tower that is meant; features of another one would be kept under its name.
            pixels: as they lie in the object store.
            within_s: after which they are of no use.
            trace: that the caller is in.
        """
        with _within(trace), stage("encode-remote", model=model, images=len(pixels)):
            try:
                loaded = await self._get(model)
                _check_weights(model, fingerprint, loaded.card.image_fingerprint)
            except Exception as error:  # noqa: BLE001 - told to the caller
                return SerializedError.from_exception(error)
            return await _encoded(loaded.served.images, list(pixels), within_s)

    async def encode_texts(
        self, model: str, fingerprint: str, texts: Sequence[str], within_s: float | None, trace: Mapping[str, str]
    ) -> EncodeResponse | SerializedError:
        """Return the features of texts, likewise."""
        with _within(trace), stage("encode-remote", model=model, texts=len(texts)):
            try:
                loaded = await self._get(model)
                _check_weights(model, fingerprint, loaded.card.text_fingerprint)
            except Exception as error:  # noqa: BLE001 - as above
                return SerializedError.from_exception(error)
            return await _encoded(loaded.served.texts, texts, within_s)

    async def exposition(self) -> Exposition:
        """Return what Prometheus is told of this replica."""
        return own_exposition(self._metrics)

    async def check_health(self) -> None:
        """Have this replica replaced where a model encodes nothing; called by Ray."""
        for each in list(self._loaded.values()):
            each.watch()
            if each.served.problem is not None:
                raise RuntimeError(each.served.problem)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ``app.cluster.autoscaling`` decides by; called by Ray."""
        queues = [each.served.images for each in list(self._loaded.values())]
        return {
            "images": float(sum(queue.admitted for queue in queues)),
            "wait_s": max((queue.expected_wait_s for queue in queues), default=0.0),
        }

    async def _get(self, model: str) -> _LoadedModel:
        return self._loaded[model]

    def _load(self, model: str) -> _LoadedModel:
        encoder = load_encoder(model, load_options(self._settings))
        card = RemoteModelInfo.of(encoder, deployment_version(self._settings))
        # Text features are kept by the edges, which ask only for new ones.
        return _LoadedModel(
            card, serve_here(encoder, self._settings, self._metrics, None), self._settings.health_probe_s
        )


def multiplexed(at_once: int) -> type[EncoderReplica]:
    """Return replicas that load models when they are asked for; of more than ``at_once`` the least used goes."""

    class MultiplexedReplica(EncoderReplica):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings, ())
            self._loaded = weakref.WeakValueDictionary()  # Ray has them, and lets go of them

        async def _get(self, model: str) -> _LoadedModel:
            # Goes on when its caller leaves, or the next would begin to load it again.
            return await asyncio.shield(asyncio.ensure_future(self._shared(model)))

        @serve.multiplexed(max_num_models_per_replica=at_once)  # type: ignore[untyped-decorator]
        async def _shared(self, model: str) -> _LoadedModel:
            loaded = await asyncio.to_thread(self._load, model)
            self._loaded[model] = loaded
            return loaded

    return MultiplexedReplica


def _check_weights(model: str, wanted: str, loaded: str) -> None:
    if wanted != loaded:
        raise WeightsMismatchError(f"the model '{model}' has other weights there")


@contextmanager
def _within(trace: Mapping[str, str]) -> Iterator[None]:
    """Have what is done in it belong to a trace that came with a call."""
    token = context.attach(propagate.extract(trace))
    try:
        yield
    finally:
        context.detach(token)


async def _encoded(
    queue: TurnQueue[Any, np.ndarray], items: Sequence[Any], within_s: float | None
) -> EncodeResponse | SerializedError:
    """Return what became of each item; a failure where not one was admitted."""
    try:
        with queue.admit(len(items), within_s=within_s) as caller:
            encoded = await asyncio.gather(*(queue.encode(item, caller) for item in items), return_exceptions=True)
    except DeixisError as error:
        return SerializedError.from_exception(error)
    good = {place: each for place, each in enumerate(encoded) if isinstance(each, Encoded)}
    if not good:
        return SerializedError.from_exception(next(each for each in encoded if isinstance(each, BaseException)))
    rows = np.zeros((len(items), len(next(iter(good.values())).row)), np.float32)
    for place, each in good.items():
        rows[place] = each.row
    return EncodeResponse(
        rows,
        {
            place: SerializedError.from_exception(each)
            for place, each in enumerate(encoded)
            if isinstance(each, BaseException)
        },
        [good[place].queue_s if place in good else 0.0 for place in range(len(items))],
        [good[place].encode_s if place in good else 0.0 for place in range(len(items))],
    )
