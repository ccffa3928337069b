"""Bulk classification on Ray Data: a pool of replicas, each a process with its own service, which process work units.

The resolved ``Task`` is sent to the replicas with its classes, templates and calibration, so that all replicas produce
the same rows, also without a database of label sets. Each replica compares the rest when it starts: the weights of the
model, the example images that a method learns from, and the caption database.

A replica reads its units and writes their parts to a shared folder. Rows do not pass through Ray, and all parts stay
when a replica, a node or the driver ends.
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

from app.bulk.classifier import BulkClassifier, ProgressCallback, bulk_settings
from app.bulk.parquet import pyarrow
from app.bulk.parts import PartStore, PendingUnit
from app.bulk.query import RunSpec, verify_worker
from app.bulk.run import Engine, service_in_loop
from app.encoders._base import Encoder
from app.errors import DeixisError, InvalidFieldError, NotConfiguredError, NotReadyError, ServerError
from app.main import load_encoders
from app.observability.logs import configure_logs
from app.settings import Settings
from deixis.extras import needs_extra

log = structlog.get_logger()

# Neither images nor rows pass through the object store; Ray's default is a third of the memory.
_STORE_BYTES = 256 * 2**20
# Maximum number of replicas that may crash at one part. Ray's default is to restart them without limit.
_MAX_CRASHES = 3
_HINT = "see Ray's logs for the cause, which is often too little memory"

LOCAL = "local"
"""The address of a Ray that is started for this run only."""


class ReplicaFailedError(ServerError):
    """A replica could not process a unit."""


@dataclass(frozen=True, slots=True)
class ReplicaPool:
    """The number of replicas, and the resources that Ray reserves for each.

    Args:
        min_replicas: started at the beginning.
        max_replicas: that Ray Data may start while units wait.
        cpus: of each replica.
        gpus: of each replica; replicas share a GPU if this is less than 1.
        address: of the cluster; ``local`` starts a Ray for this run.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str = LOCAL

    def validate(self) -> None:
        """Check the numbers, and that Ray is installed.

        Raises:
            InvalidFieldError: no replicas, a minimum above the maximum, or invalid resources.
            NotConfiguredError: Ray is not installed.
        """
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InvalidFieldError.of(
                "--replicas", f"{self.min_replicas}-{self.max_replicas} is not MIN-MAX with 1 <= MIN <= MAX"
            )
        if self.cpus <= 0 or self.gpus < 0:
            raise InvalidFieldError.of(
                "--replica-cpus", f"{self.cpus:g} CPUs and {self.gpus:g} GPUs are too few; name more than 0 CPUs"
            )
        _import_ray()


EncoderLoader: TypeAlias = Callable[[Settings], Sequence[Encoder]]
"""Loads the encoders; a function of a module, since replicas import it."""


def ray_engine(settings: Settings, pool: ReplicaPool, load: EncoderLoader = load_encoders) -> Engine:
    """Return the engine that classifies on Ray.

    Args:
        settings: of every replica; their folders must exist on every node.
        pool: the replicas.
        load: loads the model in every replica.
    """

    def engine(spec: RunSpec, pending: Iterator[PendingUnit], advance: ProgressCallback) -> None:
        replica_settings = bulk_settings(settings, spec.task.model).model_copy(
            update={"decode_threads": max(1, math.floor(pool.cpus))}
        )
        _run(pool, {"settings": replica_settings, "spec": spec, "load": load}, pending, advance)

    return engine


def _run(
    pool: ReplicaPool, replica_arguments: Mapping[str, Any], pending: Iterator[PendingUnit], advance: ProgressCallback
) -> None:
    """Distribute the pending units over replicas."""
    # One block per unit: Ray sends blocks to replicas, and repeats a block elsewhere if its replica crashes.
    blocks = [_table({name: [value] for name, value in asdict(unit).items()}) for unit in pending]
    if not blocks:
        return
    with _connected(pool) as ray:
        outcomes = ray.data.from_arrow(blocks).map_batches(
            Replica,
            fn_constructor_kwargs=dict(replica_arguments),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=pool.min_replicas, max_size=pool.max_replicas),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        for outcome in outcomes.iter_rows():
            if outcome["failure"] is not None:
                raise ReplicaFailedError(f"a replica failed: {outcome['failure']}")
            advance(outcome["images"], outcome["bad"])


class Replica:
    """A process with its own service, which classifies the images of units and writes their parts.

    Errors are returned in the result: some exceptions cannot be serialized, and Ray restarts a replica that does not
    start without limit.

    Args:
        settings: of the service.
        spec: of the run.
        load: loads the encoders.
    """

    def __init__(self, settings: Settings, spec: RunSpec, load: EncoderLoader) -> None:
        configure_logs("console", "warning")
        # Never closed: the process ends with the run.
        self._resources = ExitStack()
        self._failure: str | None = None
        self._parts = PartStore(spec.folder, spec.query)
        name = _import_ray().get_runtime_context().get_actor_id()
        try:
            _check_starts(self._parts.record_start(name))
            self._loop, service = self._resources.enter_context(service_in_loop(settings, load(settings)))
            self._loop.run(verify_worker(service, spec))
        except DeixisError as error:
            self._failure = error.message
        except Exception as error:
            log.exception("replica_not_started")
            self._failure = f"it does not start: {str(error) or type(error).__name__}"
        else:
            self._part_images = spec.part_images
            self._classifier = BulkClassifier(service, spec)
        self._parts.clear_starts(name)

    def __call__(self, block: Any) -> Any:
        """Process the units of a block, and return one row: images, bad images, and the failure or None."""
        images = bad = 0
        failure = self._failure

        def advance(more: int, more_bad: int) -> None:
            nonlocal images, bad
            images += more
            bad += more_bad

        if failure is None:
            try:
                units = [PendingUnit(**row) for row in block.to_pylist()]
                # A replica that crashed may have written parts of a unit.
                for unit in filter(None, map(self._parts.refresh, units)):
                    self._check_crashes(unit)
                    self._loop.run(self._classifier.run([unit], advance))
                    self._parts.clear_attempts(unit)
            except DeixisError as error:
                failure = error.message
        return _table({"images": [images], "bad": [bad], "failure": [failure]})

    def _check_crashes(self, pending: PendingUnit) -> None:
        """Record an attempt, and refuse it after too many crashes.

        Raises:
            ReplicaFailedError: several replicas have crashed at this part.
        """
        if self._parts.record_attempt(pending) <= _MAX_CRASHES:
            return
        unit, first = self._parts.unit(pending.offset), pending.parts_done * self._part_images
        name = f"'{unit.names[first]}'" if unit.names else f"number {unit.first_row + first:,}"
        raise ReplicaFailedError(
            f"{_MAX_CRASHES} replicas crashed, one after the other, at the {self._part_images:,} images from {name} of"
            f" '{unit.source or unit.path}'; {_HINT}, and repeat the command to resume"
        )


def _check_starts(starts: int) -> None:
    """Refuse another start after too many crashes.

    Raises:
        ReplicaFailedError: the replica has crashed in each of its starts.
    """
    if starts > _MAX_CRASHES:
        raise ReplicaFailedError(f"it crashed {_MAX_CRASHES} times during its start; {_HINT}")


def _table(columns: dict[str, list[Any]]) -> Any:
    pa, _ = pyarrow()
    return pa.table(columns)


@contextmanager
def _connected(pool: ReplicaPool) -> Iterator[Any]:
    """Connect to the cluster, or start a Ray and stop it at the end; a Ray of this process is used as it is."""
    ray = _import_ray()
    is_owner = not ray.is_initialized()
    level = logging.ERROR if pool.address == LOCAL else logging.WARNING
    if is_owner:
        # Ray reports its use to its makers unless this is 0.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {}
        if pool.address == LOCAL:
            # Ray gets the requested CPUs, also on a smaller machine; otherwise the run would wait without end.
            cpus = math.ceil(pool.max_replicas * pool.cpus) + 1
            options = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=pool.address, logging_level=level, **options)
            if handler is not signal.getsignal(signal.SIGTERM):  # Ray's handler ends the process without cleaning up
                signal.signal(signal.SIGTERM, handler)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise NotReadyError(f"Ray at '{pool.address}' cannot be reached: {error}") from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if pool.address == LOCAL and is_owner and gpus < pool.min_replicas * pool.gpus:
            raise InvalidFieldError.of(
                "--replica-gpus",
                f"{pool.min_replicas} replicas with {pool.gpus:g} GPUs are requested, and this machine has {gpus:g}",
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the command has its own
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(level)
        yield ray
    finally:
        if is_owner:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray  # noqa: PLC0415 - an extra, and seconds to import
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise NotConfiguredError(needs_extra("the engine ray", "ray")) from error
    return ray
