"""The Ray Serve application: edges, encoders and caption shards.

A Serve config file names ``build``: ``import_path: app.cluster.application:build``, with settings as ``args``.
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

# An edge refuses requests with 503 and a Retry-After before it reaches this limit.
_MAX_REQUESTS_PER_EDGE = 1000
# An edge has one core; with a second thread, a single image does not wait for a request with many images.
_DECODE_THREADS = 2
# Concurrent calls of one replica, and calls that wait in an edge for any replica.
_CALLS_PER_REPLICA = 32
_MAX_WAITING_CALLS = 256
_AUTOSCALING_DELAY_S = 5.0
_LOOK_BACK_S = 15.0
# Rounded up: one additional replica for up to a hundred replicas.
_SURGE_PERCENT = 1
# Options of every deployment. Ray does not log requests, because edges do.
_COMMON: Mapping[str, Any] = {"health_check_period_s": 5, "logging_config": {"enable_access_log": False}}


def build(args: Mapping[str, Any]) -> Application:
    """Return the application of a Serve config file; ``args`` are settings and override the environment.

    Raises:
        ConfigurationError: a setting is invalid, or there are no API keys.
        StoreError: the database cannot be opened.
    """
    settings = load_settings(**args)
    # Ray's proxies listen on their own address, usually on every interface.
    asyncio.run(prepare(settings.model_copy(update={"host": "the cluster"}), is_local=False))
    return application(settings)


def application(settings: Settings) -> Application:
    """Return the service: edges, encoders for each model or shared by all models, and caption shards."""
    # All deployments get equal settings, which identify the replicas that were deployed together.
    settings = _with_decode_threads(settings)
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
        max_ongoing_requests=_MAX_REQUESTS_PER_EDGE,
        max_queued_requests=_MAX_REQUESTS_PER_EDGE,
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
        model: _encoder(settings, EncoderReplica, _deployment_name(model)).bind(settings, [model])
        for model in settings.models
    }


def encoders_cpus(settings: Settings) -> int:
    """Return the cores of all encoders at their maximum number."""
    layout = settings.ray_layout
    groups = len(settings.models) if layout.models_per_encoder is None else 1
    return math.ceil(groups * layout.encoders.max * layout.encoder_cpus)


def cpus_needed(settings: Settings) -> int:
    """Return the cores of all replicas at their maximum number."""
    layout = settings.ray_layout
    return layout.edges.max + encoders_cpus(settings) + layout.shards * layout.shard_replicas.max


def _with_decode_threads(settings: Settings) -> Settings:
    """Return settings with the decode threads of an edge; the default is the number of cores of this machine."""
    if "decode_threads" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"decode_threads": _DECODE_THREADS})


def _encoder(settings: Settings, replica: type[EncoderReplica], name: str) -> Any:
    return serve.deployment(
        replica,
        name=name,
        ray_actor_options={"num_cpus": settings.ray_layout.encoder_cpus, "num_gpus": settings.ray_layout.encoder_gpus},
        max_ongoing_requests=_CALLS_PER_REPLICA,
        max_queued_requests=_MAX_WAITING_CALLS,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s,
        **_COMMON,
        **_scale(settings.ray_layout.encoders, policy="app.cluster.autoscaling:replicas_for_load"),
    )


def _scale(replicas: Replicas, *, policy: str | None = None) -> dict[str, Any]:
    # Without a surge, Ray stops a replica before it starts its successor, and a single replica would interrupt the
    # service.
    surge = {"max_surge_percent": _SURGE_PERCENT} if replicas.min == 1 else {}
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.max, **surge}
    options = {} if policy is None else {"policy": AutoscalingPolicy(policy_function=policy)}
    return {
        **surge,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            upscale_delay_s=_AUTOSCALING_DELAY_S,
            target_ongoing_requests=_CALLS_PER_REPLICA / 2,
            look_back_period_s=_LOOK_BACK_S,
            **options,
        ),
    }


def _deployment_name(model: str) -> str:
    """Return the name of a model's deployment, for addresses and metrics."""
    return "encoder-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", model)
