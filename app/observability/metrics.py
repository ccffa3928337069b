"""Prometheus metrics. Names begin with ``deixis_``, times are in seconds, and the model is a label.

Each service has its own ``Metrics`` and registry, so that two services in one process are counted separately.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_SECONDS = (0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 36_000.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Callers may send any other, also to a route that does not have it.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


_Metric = TypeVar("_Metric", bound=MetricWrapperBase)


def _children(metric: _Metric) -> Callable[..., _Metric]:
    """Return a function from the values of a metric's labels to its child, which costs less than ``labels``."""
    return cache(metric.labels)


class Metrics:
    """The metrics of a service.

    Args:
        version: of this release.
    """

    def __init__(self, version: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Info("deixis_build", "The running release.", registry=self.registry).info({"version": version})
        queue, registry = ("model", "tower"), self.registry
        self.queue_depth = Gauge("deixis_queue_depth", "Items that wait for a batch.", queue, registry=registry)
        self.queue_admitted = Gauge(
            "deixis_queue_admitted", "Items that are admitted and not finished.", queue, registry=registry
        )
        self.queue_wait = Histogram(
            "deixis_queue_wait_seconds",
            "Time that an item waited for its batch to start.",
            queue,
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "deixis_batch_size", "Items in one forward pass.", queue, buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "deixis_batch_seconds", "Duration of one forward pass.", queue, buckets=_SECONDS, registry=registry
        )
        self.batch_failures = Counter(
            "deixis_batch_failures_total",
            "Batches that failed and were retried in halves, by reason.",
            (*queue, "reason"),
            registry=registry,
        )
        self.rejected = Counter(
            "deixis_rejected_total", "Items that were not admitted, by reason.", (*queue, "reason"), registry=registry
        )
        self.dropped = Counter(
            "deixis_dropped_total",
            "Admitted items that were never encoded, by reason.",
            (*queue, "reason"),
            registry=registry,
        )
        self.worker_restarts = Counter(
            "deixis_worker_restarts_total",
            "Number of times that a worker died and was restarted.",
            queue,
            registry=registry,
        )
        self.rate_limit_failures = Counter(
            "deixis_rate_limit_storage_failures_total",
            "Requests whose rates could not be counted, because the storage failed.",
            registry=registry,
        )
        self._stage_seconds = _children(
            Histogram(
                "deixis_stage_seconds",
                "Duration of each stage of a request, as in its timing_ms.",
                ("model", "stage"),
                buckets=_SECONDS,
                registry=registry,
            )
        )
        self._images = _children(
            Counter(
                "deixis_images_total",
                "Images, by outcome: classified or unreadable.",
                ("model", "outcome"),
                registry=registry,
            )
        )
        self.jobs = Counter(
            "deixis_jobs_total",
            "Jobs that ended in this process, by outcome: succeeded, failed, cancelled, or interrupted and released.",
            ("kind", "outcome"),
            registry=registry,
        )
        self.jobs_running = Gauge("deixis_jobs_running", "Jobs that run in this process.", ("kind",), registry=registry)
        self.job_seconds = Histogram(
            "deixis_job_seconds", "Duration of a job.", ("kind",), buckets=_JOB_SECONDS, registry=registry
        )
        self.loop_failures = Counter(
            "deixis_loop_failures_total",
            "Unexpected exceptions in a loop that runs as long as the process; the loop begins again.",
            ("loop",),
            registry=registry,
        )
        self._requests = _children(
            Counter(
                "deixis_http_requests_total",
                "Requests, by route, method and status; the status 499 means that the client disconnected.",
                ("handler", "method", "status"),
                registry=registry,
            )
        )
        self._request_seconds = _children(
            Histogram(
                "deixis_http_request_duration_seconds",
                "Time until the response was sent, by route and method.",
                ("handler", "method"),
                buckets=_SECONDS,
                registry=registry,
            )
        )
        self._text_cache = _children(
            Counter(
                "deixis_text_cache_total",
                "Requested class embeddings, by cache result: hit or miss.",
                ("model", "result"),
                registry=registry,
            )
        )

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count a request and record its duration.

        Args:
            handler: path of its route; never the path of the request, of which callers can make up any number.
            method: of the request; those that no route has are counted together.
            status: of the response.
            seconds: until it was sent.
        """
        method = method if method in _METHODS else "other"
        self._requests(handler, method, status).inc()
        self._request_seconds(handler, method).observe(seconds)

    def classified(self, model: str, *, good: int, bad: int, timing_ms: Mapping[str, float]) -> None:
        """Count the images of a request and record the durations of its stages."""
        self._images(model, "classified").inc(good)
        self._images(model, "unreadable").inc(bad)
        for stage, milliseconds in timing_ms.items():
            self._stage_seconds(model, stage).observe(milliseconds / 1000)

    def class_embeddings(self, model: str, hits: int, misses: int) -> None:
        """Count the cache hits and misses of the class embeddings of one request."""
        self._text_cache(model, "hit").inc(hits)
        self._text_cache(model, "miss").inc(misses)


class TowerMetrics:
    """The metrics of one tower's queue; implements ``app.models.queue.QueueMetrics``."""

    def __init__(self, metrics: Metrics, model: str, tower: str) -> None:
        self._metrics = metrics
        self._labels = (model, tower)
        self._sizes = metrics.batch_size.labels(model, tower)
        self._seconds = metrics.batch_seconds.labels(model, tower)
        self._waits = metrics.queue_wait.labels(model, tower)
        self._restarts = metrics.worker_restarts.labels(model, tower)

    def watch(self, *, waiting: Callable[[], float], admitted: Callable[[], float]) -> None:
        """Read the two gauges from these functions at each scrape."""
        self._metrics.queue_depth.labels(*self._labels).set_function(waiting)
        self._metrics.queue_admitted.labels(*self._labels).set_function(admitted)

    def forget(self) -> None:
        """Remove the metrics of a tower that no longer exists; repeated calls have no effect."""
        metrics = self._metrics
        for metric in (
            metrics.queue_depth,
            metrics.queue_admitted,
            metrics.queue_wait,
            metrics.batch_size,
            metrics.batch_seconds,
            metrics.worker_restarts,
        ):
            with suppress(KeyError):
                metric.remove(*self._labels)

    def batch(self, size: int, seconds: float) -> None:
        """Record an encoded batch."""
        self._sizes.observe(size)
        self._seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        """Record the waiting time of an item."""
        self._waits.observe(seconds)

    def rejected(self, reason: str, count: int) -> None:
        """Count items that were not admitted."""
        self._metrics.rejected.labels(*self._labels, reason).inc(count)

    def dropped(self, reason: str, count: int) -> None:
        """Count admitted items that will not be encoded."""
        if count:
            self._metrics.dropped.labels(*self._labels, reason).inc(count)

    def failed(self, reason: str) -> None:
        """Count a batch that failed."""
        self._metrics.batch_failures.labels(*self._labels, reason).inc()

    def restarted(self) -> None:
        """Count a restart of the worker."""
        self._restarts.inc()
