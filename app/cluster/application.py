"""The deployments of the service on Ray Serve, joined.

``build`` is what a Serve config file names: ``import_path: app.cluster.application:build``, with settings as ``args``.
"""

import asyncio
import math
import re
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from app.cluster.edge import EDGE, Edge
from app.cluster.encoder_replica import EncoderReplica, multiplexed
from app.cluster.shards import ShardReplica
from app.main import prepare
from app.runtime.ray_layout import Replicas
from app.settings import Settings, load_settings

APPLICATION = "deixis"

# Of one edge; before that its own queue is full, and answers 503 with the time to wait.
_REQUESTS_PER_EDGE = 1000
# Of one edge, on its one core; a second, so that a lone picture does not wait for a request of many.
_DECODE_THREADS = 2
# Calls of one encoder replica at once, of which its queue makes batches, and calls that wait at an edge for any.
_CALLS_PER_REPLICA = 32
_CALLS_WAITING = 256
_AUTOSCALING_DELAY_S = 5.0
_LOOKED_BACK_S = 15.0
# Of a hundred replicas or fewer, one more.
_ONE_MORE_PERCENT = 1
# Of every deployment. Edges log requests as one process does.
_COMMON: Mapping[str, Any] = {"health_check_period_s": 5, "logging_config": {"enable_access_log": False}}


def build(args: Mapping[str, Any]) -> Application:
    """Return the application of a Serve config file; ``args`` are settings, before those of the environment.

    Raises:
        ConfigurationError: a setting that cannot work, or nobody has a key.
        StoreError: the database cannot be opened.
    """
    settings = load_settings(**args)
    # Ray's proxies decide where they listen, which is the whole network as a rule.
    asyncio.run(prepare(settings.model_copy(update={"host": "the cluster"}), is_local=False))
    return application(settings)


def application(settings: Settings) -> Application:
    """Return the service: edges, an encoder deployment for each model or one for all, and the parts of captions."""
    # All get the same settings, by which they know those that were deployed with them.
    settings = _with_decoders_of_an_edge(settings)
    layout = settings.ray_layout
    if layout.models_per_encoder is None:
        models = encoders(settings)
    else:
        replicas = _encoder(settings, multiplexed(layout.models_per_encoder), "encoder")
        models = dict.fromkeys(settings.models, replicas.bind(settings))
    shards = [
        serve.deployment(
            ShardReplica,
            name=f"captions-{number}",
            ray_actor_options={"num_cpus": 1},
            max_ongoing_requests=_CALLS_PER_REPLICA,
            **_COMMON,
            **_scale(layout.shard_replicas),
        ).bind(settings)
        for number in range(layout.shards)
    ]
    edge = serve.deployment(
        serve.ingress()(Edge),
        name=EDGE,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_REQUESTS_PER_EDGE,
        max_queued_requests=_REQUESTS_PER_EDGE,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        **_COMMON,
        **_scale(layout.edges),
    )
    bound: Application = edge.bind(settings, models, shards)
    return bound


def encoders(settings: Settings) -> dict[str, Application]:
    """Return a deployment for each model."""
    return {
        model: _encoder(settings, EncoderReplica, _name_of(model)).bind(settings, [model]) for model in settings.models
    }


def encoders_cpus(settings: Settings) -> int:
    """Return the cores that all encoders ask for together when there are as many as there may be."""
    layout = settings.ray_layout
    groups = len(settings.models) if layout.models_per_encoder is None else 1
    return math.ceil(groups * layout.encoders.max * layout.encoder_cpus)


def cpus_needed(settings: Settings) -> int:
    """Return the same of all replicas."""
    layout = settings.ray_layout
    return layout.edges.max + encoders_cpus(settings) + layout.shards * layout.shard_replicas.max


def _with_decoders_of_an_edge(settings: Settings) -> Settings:
    """Have edges not decode in as many threads as there are cores where they are deployed, unless that is wanted."""
    if "decode_threads" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"decode_threads": _DECODE_THREADS})


def _encoder(settings: Settings, replica: type[EncoderReplica], name: str) -> Any:
    return serve.deployment(
        replica,
        name=name,
        ray_actor_options={"num_cpus": settings.ray_layout.encoder_cpus, "num_gpus": settings.ray_layout.encoder_gpus},
        max_ongoing_requests=_CALLS_PER_REPLICA,
        max_queued_requests=_CALLS_WAITING,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        **_COMMON,
        **_scale(settings.ray_layout.encoders, policy="app.cluster.autoscaling:replicas_for_load"),
    )


def _scale(replicas: Replicas, *, policy: str | None = None) -> dict[str, Any]:
    # Ray stops a replica before it starts its successor, and a lone one would answer nobody meanwhile.
    surge = {"max_surge_percent": _ONE_MORE_PERCENT} if replicas.min == 1 else {}
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max, **surge}
    chosen = {} if policy is None else {"policy": AutoscalingPolicy(policy_function=policy)}
    return {
        **surge,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            upscale_delay_s=_AUTOSCALING_DELAY_S,
            target_ongoing_requests=_CALLS_PER_REPLICA / 2,
            look_back_period_s=_LOOKED_BACK_S,
            **chosen,
        ),
    }


def _name_of(model: str) -> str:
    """Return the name of a model's deployment, which stands in addresses and metrics."""
    return "encoder-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", model)
