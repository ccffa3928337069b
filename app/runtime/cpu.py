"""The number of cores that this process may use, and the priority and BLAS threads of background work."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

# Of threads that no request waits for.
_NICENESS = 10

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class _BlasLimit:
    """The active limits of BLAS libraries, one for each time that a library was loaded, and the number of users."""

    lock = threading.Lock()
    users = 0
    limits: "list[threadpool_limits]" = []  # noqa: RUF012 - shared by the whole process


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Return the number of cores of the CPU affinity, or the container's quota, rounded up, if it is lower; at least 1.

    Args:
        cpu_max: the file of cgroup v2 with quota and period in microseconds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # without cgroup v2, or "max" for no quota
    return max(1, min(cores, allowed))


def lower_priority() -> None:
    """Give this thread a lower priority, if the system supports priorities of threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's matrix products to one core each, in the whole process.

    Several threads may use this at the same time; the last one restores the previous limits.
    """
    with _BlasLimit.lock:
        _BlasLimit.users += 1
        if any(library["num_threads"] != 1 for library in threadpool_info() if library["user_api"] == "blas"):
            _release_openblas_limits()
            _BlasLimit.limits.append(threadpool_limits(1, user_api="blas"))
    try:
        yield
    finally:
        with _BlasLimit.lock:
            _BlasLimit.users -= 1
            if _BlasLimit.limits and not _BlasLimit.users:
                _release_openblas_limits()
                while _BlasLimit.limits:
                    _BlasLimit.limits.pop().restore_original_limits()
                _release_openblas_limits()


def _release_openblas_limits() -> None:
    """Allow any thread to set OpenBLAS's number of threads, which is shared by the whole process.

    Otherwise threadpoolctl ignores the limits of other threads until the thread that set the first one has ended.
    """
    for library in ThreadpoolController().select(internal_api="openblas").lib_controllers:
        library.clear_controlling_thread(force=True)
