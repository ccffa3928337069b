"""Traces and metrics of several processes, brought together."""

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

log = structlog.get_logger()

_GATHERED_WITHIN_S = 3.0

Exposition: TypeAlias = tuple[str, bytes]
"""Who tells it, and its metrics in Prometheus's text."""


def own_exposition(metrics: Metrics) -> Exposition:
    """Return that of this replica."""
    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}/{replica.unique_id}", metrics.exposition()


def send_traces() -> None:
    """Send this process's spans where OpenTelemetry's own variables say, as edges do."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


async def gather_expositions(handles: Mapping[str, Any]) -> bytes:
    """Return the metrics of every replica in Prometheus's text, under one name each, told apart by their labels.

    One that does not answer in time is left out.

    Args:
        handles: of deployments whose replicas have a method ``exposition``, by name.
    """

    async def told(handle: Any) -> list[Any]:
        answers: list[Any] = await handle.broadcast("exposition").results_async(
            timeout_s=_GATHERED_WITHIN_S, return_exceptions=True
        )
        return answers

    found: list[Exposition] = []
    answers = await asyncio.gather(*map(told, handles.values()), return_exceptions=True)
    for name, each in zip(handles, answers, strict=True):
        told_errors = [each] if isinstance(each, BaseException) else [one for one in each if not isinstance(one, tuple)]
        for error in told_errors:
            log.warning("metrics_not_gathered", deployment=name, reason=str(error) or type(error).__name__)
        found += [] if isinstance(each, BaseException) else [one for one in each if isinstance(one, tuple)]
    return await asyncio.to_thread(joined_expositions, sorted(found))


def joined_expositions(expositions: Iterable[Exposition]) -> bytes:
    """Return expositions as one, each sample with the label ``replica``, which is who told it."""
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
