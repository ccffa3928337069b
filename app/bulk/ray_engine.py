"""Bulk work on Ray Data: a pool of replicas, each a process with a service of its own, and units handed to them.

The question travels as the ``Task`` that the driver has looked up, classes, templates and calibration in it, so that
every replica answers the same even where it has no database of label sets. What cannot travel is compared when a
replica starts: the weights of the model, the example images that a method learns from, the caption database.

A replica reads its units and writes their parts itself, into a folder that all share: rows need not pass through Ray,
and whatever was written when a replica, a node or the driver ends is kept, as it is in one process.
"""

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import structlog

from app.bulk.classifier import BulkClassifier, ProgressCallback, RunSpec, bulk_settings, verify_worker
from app.bulk.parquet import pyarrow
from app.bulk.parts import PartStore, PendingUnit
from app.bulk.run import Engine, service_in_loop
from app.encoders._base import Encoder
from app.errors import DeixisError, InvalidFieldError, NotConfiguredError, NotReadyError, ServerError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.settings import Settings

log = structlog.get_logger()

# Neither images nor rows pass through it; Ray's own choice is a third of the memory.
_STORE_BYTES = 256 * 2**20
# Replicas that may die at one part; by default Ray makes one after the other, without end.
_MOST_DEATHS = 3
_REASON = "Ray's logs may tell why, often too little memory"

LOCAL = "local"
"""The address of a Ray that is started for this run alone."""


class ReplicaFailedError(ServerError):
    """A replica could not do its part."""


@dataclass(frozen=True, slots=True)
class ReplicaPool:
    """How many processes there are, and what Ray sets aside for each.

    Args:
        least: that are there from the beginning.
        most: that Ray Data may start while there is work waiting.
        cpus: of each.
        gpus: of each; less than 1 shares one.
        address: of the cluster; ``local`` starts a Ray for this run.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str = LOCAL

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InvalidFieldError: no replica, fewer at most than at least, or nothing for each.
            NotConfiguredError: Ray is not installed.
        """
        if not 1 <= self.least <= self.most:
            raise InvalidFieldError.of("--replicas", f"{self.least}-{self.most} is not MIN-MAX with 1 <= MIN <= MAX")
        if self.cpus <= 0 or self.gpus < 0:
            raise InvalidFieldError.of("--replica-cpus", f"{self.cpus:g} CPUs and {self.gpus:g} GPUs are too few")
        _ray()


EncoderLoader: TypeAlias = Callable[[Settings], Sequence[Encoder]]
"""Gives the encoders; sent to replicas by its name."""


def ray_engine(settings: Settings, pool: ReplicaPool, load: EncoderLoader = load_encoders) -> Engine:
    """Return the engine that works on Ray.

    Args:
        settings: of every replica; folders in them must be there on every node.
        pool: how many replicas, and where.
        load: what every replica loads its model with.
    """

    def engine(work: RunSpec, remaining: Iterator[PendingUnit], advance: ProgressCallback) -> None:
        alone = bulk_settings(settings, work.task.model).model_copy(
            update={"decode_threads": max(1, math.floor(pool.cpus))}
        )
        _run(pool, {"settings": alone, "work": work, "load": load}, remaining, advance)

    return engine


def _run(
    pool: ReplicaPool, replica: Mapping[str, Any], remaining: Iterator[PendingUnit], advance: ProgressCallback
) -> None:
    """Hand what remains to replicas, which are made with the arguments ``replica``."""
    # One block for each unit: a block is what Ray hands to a replica, and what it tries again elsewhere.
    blocks = [_table({name: [value] for name, value in asdict(each).items()}) for each in remaining]
    if not blocks:
        return
    with _connected(pool) as ray:
        answered = ray.data.from_arrow(blocks).map_batches(
            Replica,
            fn_constructor_kwargs=dict(replica),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        for told in answered.iter_rows():
            if told["failed"] is not None:
                raise ReplicaFailedError(f"a replica failed: {told['failed']}")
            advance(told["images"], told["bad"])


class Replica:
    """A process with a service of its own, which answers the images of units and writes their parts.

    Errors are told in its rows, since some of ours cannot be sent as exceptions, and a replica that does not start
    would be started again and again.

    Args:
        settings: of the service.
        work: what is to be done.
        load: gives the encoders.
    """

    def __init__(self, settings: Settings, work: RunSpec, load: EncoderLoader) -> None:
        configure_logs("console", "warning")
        # Never closed: the process ends with the run.
        self._opened = ExitStack()
        self._problem: str | None = None
        self._parts = PartStore(work.folder, work.question)
        name = _ray().get_runtime_context().get_actor_id()
        try:
            _check_starts(self._parts.begin_start(name))
            self._loop, service = self._opened.enter_context(service_in_loop(settings, load(settings)))
            self._loop.run(verify_worker(service, work))
        except DeixisError as error:
            self._problem = error.message
        except Exception as error:
            log.exception("replica_not_started")
            self._problem = f"it does not start: {str(error) or type(error).__name__}"
        else:
            self._part_images = work.part_images
            self._answerer = BulkClassifier(service, work)
        self._parts.end_start(name)

    def __call__(self, block: Any) -> Any:
        """Do the units of a block, and return one row: how many images, how many of them bad, and why it failed."""
        images = bad = 0
        failed = self._problem

        def advance(more: int, more_bad: int) -> None:
            nonlocal images, bad
            images += more
            bad += more_bad

        if failed is None:
            try:
                given = [PendingUnit(**row) for row in block.to_pylist()]
                # Of a unit that a replica died at, its parts are there.
                for each in filter(None, map(self._parts.refresh, given)):
                    self._check_deaths(each)
                    self._loop.run(self._answerer.run([each], advance))
                    self._parts.end(each)
            except DeixisError as error:
                failed = error.message
        return _table({"images": [images], "bad": [bad], "failed": [failed]})

    def _check_deaths(self, each: PendingUnit) -> None:
        """See that not every replica dies at these images.

        Raises:
            ReplicaFailedError: several have, one after the other.
        """
        if self._parts.begin(each) <= _MOST_DEATHS:
            return
        unit, first = self._parts.unit(each.offset), each.parts_done * self._part_images
        name = f"'{unit.names[first]}'" if unit.names else f"number {unit.first_row + first:,}"
        raise ReplicaFailedError(
            f"{_MOST_DEATHS} replicas died, one after the other, at the {self._part_images:,} images from {name} on of"
            f" '{unit.source or unit.path}'; {_REASON}, and the same command goes on"
        )


def _check_starts(starts: int) -> None:
    """See that it does not die whenever it is started, which Ray would do again without end.

    Raises:
        ReplicaFailedError: it has.
    """
    if starts > _MOST_DEATHS:
        raise ReplicaFailedError(f"it died {_MOST_DEATHS} times before it had started; {_REASON}")


def _table(columns: dict[str, list[Any]]) -> Any:
    pa, _ = pyarrow()
    return pa.table(columns)


@contextmanager
def _connected(pool: ReplicaPool) -> Iterator[Any]:
    """Connect to the cluster, or start a Ray and stop it at the end; one that this process has already, is used."""
    ray = _ray()
    ours = not ray.is_initialized()
    level = logging.ERROR if pool.address == LOCAL else logging.WARNING
    if ours:
        # Nothing is told to anybody unless the operator wants that.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {}
        if pool.address == LOCAL:
            # What a replica is said to take is there, whatever the machine has, or the run would wait forever.
            cpus = math.ceil(pool.most * pool.cpus) + 1
            options = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=pool.address, logging_level=level, **options)
            if terminated is not signal.getsignal(signal.SIGTERM):  # Ray's own only ends the process
                signal.signal(signal.SIGTERM, terminated)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise NotReadyError(f"Ray at '{pool.address}' cannot be reached: {error}") from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if pool.address == LOCAL and ours and gpus < pool.least * pool.gpus:
            raise InvalidFieldError.of(
                "--replica-gpus", f"{pool.least} times {pool.gpus:g} GPUs are wanted, and there are {gpus:g}"
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one of ours
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(level)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415 - an extra, and seconds to import
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise NotConfiguredError("Ray is missing; run: pip install 'deixis[server,ray]'") from error
    return ray
