"""Encoder replicas: they serve models as a single process does, and edges call them."""

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
from app.observability.loops import Loops
from app.observability.metrics import Metrics
from app.observability.tracing import stage
from app.settings import Settings

log = structlog.get_logger()


class _LoadedModel:
    """A model and its queues, which close when the last reference disappears.

    Ray drops the reference when another model replaces this one; calls in progress hold their own reference. A
    ``__del__`` method would not work, because Ray calls it immediately.
    """

    def __init__(self, info: RemoteModelInfo, served: ServedModel, health_probe_s: float, loops: Loops) -> None:
        self.info = info
        self.served = served
        self._health_probe_s = health_probe_s
        self._loops = loops
        self._is_probed = False
        _on_release(self, _close, served)
        log.info("model_loaded", model=info.name)

    def start_probes(self) -> None:
        """Start the health probes of the towers on this event loop."""
        if self._health_probe_s and not self._is_probed:
            self._is_probed = True
            probes = asyncio.get_running_loop().create_task(self.served.watch(self._health_probe_s, self._loops))
            _on_release(self, _cancel, probes)


def _on_release(model: _LoadedModel, action: Callable[[Any], None], argument: object) -> None:
    weakref.finalize(model, action, argument).atexit = False


def _close(served: ServedModel) -> None:
    # Closing waits for the threads of the model, and may be called on the event loop.
    threading.Thread(target=served.close).start()


def _cancel(probes: asyncio.Task[None]) -> None:
    with suppress(RuntimeError):  # the event loop may be closed
        probes.get_loop().call_soon_threadsafe(probes.cancel)


class EncoderReplica:
    """Encodes with models that it loads when it starts.

    Args:
        settings: of the service.
        models: to serve.
    """

    def __init__(self, settings: Settings, models: Sequence[str]) -> None:
        configure_logs(settings.log_format, settings.log_level)
        if settings.traces:
            send_traces()
        self._settings = settings
        self._metrics = Metrics(__version__)
        self._loops = Loops(self._metrics)
        self._loaded: MutableMapping[str, _LoadedModel] = {model: self._load(model) for model in models}

    async def model_info(self, model: str) -> RemoteModelInfo:
        """Return the properties of a model that an edge needs."""
        return (await self._get(model)).info

    async def encode_images(
        self,
        model: str,
        fingerprint: str,
        pixels: UInt8[np.ndarray, "n h w 3"],
        within_s: float | None,
        trace: Mapping[str, str],
    ) -> EncodeResponse | SerializedError:
        """Return the features of transformed images.

        Args:
            model: name of the model.
            fingerprint: of the image tower that the edge expects; it stores features under this fingerprint.
            pixels: the images.
            within_s: seconds until the request of the images ends.
            trace: context of the caller's trace.
        """
        with _attached(trace), stage("encode-remote", model=model, images=len(pixels)):
            try:
                loaded = await self._get(model)
                _check_weights(model, fingerprint, loaded.info.image_fingerprint)
            except Exception as error:  # noqa: BLE001 - returned to the caller
                return SerializedError.from_exception(error)
            return await _encode(loaded.served.images, list(pixels), within_s)

    async def encode_texts(
        self, model: str, fingerprint: str, texts: Sequence[str], within_s: float | None, trace: Mapping[str, str]
    ) -> EncodeResponse | SerializedError:
        """Return the features of texts; the arguments are those of ``encode_images``."""
        with _attached(trace), stage("encode-remote", model=model, texts=len(texts)):
            try:
                loaded = await self._get(model)
                _check_weights(model, fingerprint, loaded.info.text_fingerprint)
            except Exception as error:  # noqa: BLE001 - returned to the caller
                return SerializedError.from_exception(error)
            return await _encode(loaded.served.texts, texts, within_s)

    async def exposition(self) -> Exposition:
        """Return the Prometheus metrics of this replica."""
        return own_exposition(self._metrics)

    async def check_health(self) -> None:
        """Fail, so that Ray replaces this replica, if a model does not encode; called by Ray."""
        for model in list(self._loaded.values()):
            model.start_probes()
            if model.served.problem is not None:
                raise RuntimeError(model.served.problem)
        if (problem := self._loops.problem) is not None:
            raise RuntimeError(problem)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the numbers for ``app.cluster.autoscaling``; called by Ray."""
        queues = [model.served.images for model in list(self._loaded.values())]
        return {
            "images": float(sum(queue.admitted for queue in queues)),
            "wait_s": max((queue.expected_wait_s for queue in queues), default=0.0),
        }

    async def _get(self, model: str) -> _LoadedModel:
        return self._loaded[model]

    def _load(self, model: str) -> _LoadedModel:
        encoder = load_encoder(model, load_options(self._settings))
        info = RemoteModelInfo.of(encoder, deployment_version(self._settings))
        # Edges store text features, and request only new ones.
        return _LoadedModel(
            info,
            serve_here(encoder, self._settings, self._metrics, None),
            self._settings.health_probe_s,
            self._loops,
        )


def multiplexed(max_models: int) -> type[EncoderReplica]:
    """Return a replica that loads models on demand, and unloads the least recently used above ``max_models``."""

    class MultiplexedReplica(EncoderReplica):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings, ())
            self._loaded = weakref.WeakValueDictionary()  # Ray holds the models, and drops them

        async def _get(self, model: str) -> _LoadedModel:
            # Loading continues when the caller disconnects; otherwise the next call would start it again.
            return await asyncio.shield(asyncio.ensure_future(self._load_shared(model)))

        @serve.multiplexed(max_num_models_per_replica=max_models)  # type: ignore[untyped-decorator]
        async def _load_shared(self, model: str) -> _LoadedModel:
            loaded = await asyncio.to_thread(self._load, model)
            self._loaded[model] = loaded
            return loaded

    return MultiplexedReplica


def _check_weights(model: str, expected: str, loaded: str) -> None:
    if expected != loaded:
        raise WeightsMismatchError(f"the encoder has other weights of the model '{model}'")


@contextmanager
def _attached(trace: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace of a caller in this block."""
    token = context.attach(propagate.extract(trace))
    try:
        yield
    finally:
        context.detach(token)


async def _encode(
    queue: TurnQueue[Any, np.ndarray], items: Sequence[Any], within_s: float | None
) -> EncodeResponse | SerializedError:
    """Encode items; returns an error if none of them was encoded."""
    try:
        with queue.admit(len(items), within_s=within_s) as ticket:
            outcomes = await asyncio.gather(*(queue.encode(item, ticket) for item in items), return_exceptions=True)
    except DeixisError as error:
        return SerializedError.from_exception(error)
    encoded = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, Encoded)}
    if not encoded:
        return SerializedError.from_exception(next(error for error in outcomes if isinstance(error, BaseException)))
    rows = np.zeros((len(items), len(next(iter(encoded.values())).row)), np.float32)
    for place, outcome in encoded.items():
        rows[place] = outcome.row
    return EncodeResponse(
        rows,
        {
            place: SerializedError.from_exception(error)
            for place, error in enumerate(outcomes)
            if isinstance(error, BaseException)
        },
        [encoded[place].queue_s if place in encoded else 0.0 for place in range(len(items))],
        [encoded[place].encode_s if place in encoded else 0.0 for place in range(len(items))],
    )
