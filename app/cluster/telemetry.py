"""Traces and metrics of several processes."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import structlog
from opentelemetry import trace
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve

from app.observability.metrics import Metrics
from app.observability.tracing import enable_stages

log = structlog.get_logger()

_GATHER_TIMEOUT_S = 3.0

Exposition: TypeAlias = tuple[str, bytes]
"""The name of a replica, and its metrics in the text format of Prometheus."""


def own_exposition(metrics: Metrics) -> Exposition:
    """Return the exposition of this replica."""
    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}/{replica.unique_id}", metrics.exposition()


def send_traces() -> None:
    """Export the spans of this process to the endpoint of OpenTelemetry's variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    enable_stages()


async def gather_expositions(handles: Mapping[str, Any]) -> bytes:
    """Return the metrics of all replicas as one exposition, with the label ``replica``.

    A replica that does not respond in time is left out.

    Args:
        handles: of deployments whose replicas have a method ``exposition``, by name.
    """

    async def request(handle: Any) -> list[Any]:
        responses: list[Any] = await handle.broadcast("exposition").results_async(
            timeout_s=_GATHER_TIMEOUT_S, return_exceptions=True
        )
        return responses

    expositions: list[Exposition] = []
    outcomes = await asyncio.gather(*map(request, handles.values()), return_exceptions=True)
    for name, outcome in zip(handles, outcomes, strict=True):
        for response in [outcome] if isinstance(outcome, BaseException) else outcome:
            if isinstance(response, tuple):
                expositions.append(response)
            else:
                log.warning("metrics_not_gathered", deployment=name, reason=str(response) or type(response).__name__)
    return await asyncio.to_thread(join_expositions, sorted(expositions))


def join_expositions(expositions: Iterable[Exposition]) -> bytes:
    """Return one exposition, with the label ``replica`` on each sample."""
    families: dict[str, Metric] = {}
    for replica, text in expositions:
        for family in text_string_to_metric_families(text.decode()):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                joined.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))

    class Joined(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Joined())
    return generate_latest(registry)
