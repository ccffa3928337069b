"""What Prometheus is told. Names begin with ``deixis_``, times are in seconds, and the model is a label.

One ``Metrics`` belongs to one service and has a registry of its own, so that two services in a process do not add up.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress

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

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_JOB_SECONDS = (0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 36_000.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Every metric of a service.

    Args:
        version: of this release.
    """

    def __init__(self, version: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Info("deixis_build", "The release that runs.", registry=self.registry).info({"version": version})
        queue, registry = ("model", "tower"), self.registry
        self.queue_depth = Gauge("deixis_queue_depth", "Items that wait for a batch.", queue, registry=registry)
        self.queue_admitted = Gauge(
            "deixis_queue_admitted", "Items that are admitted and not done.", queue, registry=registry
        )
        self.queue_wait = Histogram(
            "deixis_queue_wait_seconds",
            "Time that an item waited for its batch to begin.",
            queue,
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "deixis_batch_size", "Items in one forward pass.", queue, buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "deixis_batch_seconds", "Time of one forward pass.", queue, buckets=_SECONDS, registry=registry
        )
        self.batch_failures = Counter(
            "deixis_batch_failures_total",
            "Batches that failed and were tried again in halves, by reason.",
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
            "Times that a worker died and began again.",
            queue,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "deixis_stage_seconds",
            "Time that each stage of a request took, as in its timing_ms.",
            ("model", "stage"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "deixis_images_total", "Images, by whether they were classified.", ("model", "outcome"), registry=registry
        )
        self.jobs = Counter(
            "deixis_jobs_total",
            "Jobs that ended here, by how: succeeded, failed, cancelled, or interrupted and given back.",
            ("kind", "outcome"),
            registry=registry,
        )
        self.jobs_running = Gauge("deixis_jobs_running", "Jobs that run here.", ("kind",), registry=registry)
        self.job_seconds = Histogram(
            "deixis_job_seconds", "Time that a job ran.", ("kind",), buckets=_JOB_SECONDS, registry=registry
        )
        self.text_cache = Counter(
            "deixis_text_cache_total",
            "Class embeddings that were asked for, by whether they were there: hit, or miss.",
            ("model", "result"),
            registry=registry,
        )

    def exposition(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def classified(self, model: str, *, good: int, bad: int, timing_ms: Mapping[str, float]) -> None:
        """Count a request's images and the time of its stages."""
        self.images.labels(model, "classified").inc(good)
        self.images.labels(model, "unreadable").inc(bad)
        for stage, milliseconds in timing_ms.items():
            self.stage_seconds.labels(model, stage).observe(milliseconds / 1000)

    def class_embeddings(self, model: str, hits: int, misses: int) -> None:
        """Count the class embeddings of one request that were there, and those that were not."""
        self.text_cache.labels(model, "hit").inc(hits)
        self.text_cache.labels(model, "miss").inc(misses)


class TowerMetrics:
    """What one tower's queue tells: ``app.models.queue.QueueMetrics``."""

    def __init__(self, metrics: Metrics, model: str, tower: str) -> None:
        self._metrics = metrics
        self._labels = (model, tower)
        self._sizes = metrics.batch_size.labels(model, tower)
        self._seconds = metrics.batch_seconds.labels(model, tower)
        self._waits = metrics.queue_wait.labels(model, tower)
        self._restarts = metrics.worker_restarts.labels(model, tower)

    def watch(self, *, waiting: Callable[[], float], admitted: Callable[[], float]) -> None:
        """Ask these two whenever somebody reads the metrics."""
        self._metrics.queue_depth.labels(*self._labels).set_function(waiting)
        self._metrics.queue_admitted.labels(*self._labels).set_function(admitted)

    def forget(self) -> None:
        """Tell no more of a tower that is gone; twice does no harm."""
        told = self._metrics
        for metric in (
            told.queue_depth,
            told.queue_admitted,
            told.queue_wait,
            told.batch_size,
            told.batch_seconds,
            told.worker_restarts,
        ):
            with suppress(KeyError):
                metric.remove(*self._labels)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch that was encoded."""
        self._sizes.observe(size)
        self._seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        """Count the time that an item waited."""
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
        """Count a death of the worker."""
        self._restarts.inc()
