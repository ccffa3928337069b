"""How many cores this process may use, which in a container is not how many the machine has, and who goes first."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

# As far as a thread steps back that nobody waits for.
_NICENESS = 10

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class _Limit:
    """NumPy's limit, and how many want it; one more limit for each library that came since the first."""

    lock = threading.Lock()
    wanted = 0
    limits: "list[threadpool_limits]" = []  # noqa: RUF012 - one for all


def usable_cores(cpu_max: Path = _CPU_MAX) -> int:
    """Return the cores of the CPU affinity, or the container's quota rounded up where that is less; at least 1.

    Args:
        cpu_max: the file in which cgroup v2 has the quota and its period, both in microseconds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # no cgroup v2, or "max": no quota
    return max(1, min(cores, allowed))


def lower_priority() -> None:
    """Give this thread a lower priority, where the system has one for threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have NumPy's matrix products use one core each while this lasts, in the whole process.

    Several may want it at a time; with the last of them what was before comes back.
    """
    with _Limit.lock:
        _Limit.wanted += 1
        if any(each["num_threads"] != 1 for each in threadpool_info() if each["user_api"] == "blas"):
            _let_any_thread_set_limits()
            _Limit.limits.append(threadpool_limits(1, user_api="blas"))
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.wanted -= 1
            if _Limit.limits and not _Limit.wanted:
                _let_any_thread_set_limits()
                while _Limit.limits:
                    _Limit.limits.pop().restore_original_limits()
                _let_any_thread_set_limits()


def _let_any_thread_set_limits() -> None:
    """Free the number of OpenBLAS's threads, which belongs to the whole process, from the one that set it first.

    threadpoolctl passes over what any other thread sets, until that one has ended.
    """
    for each in ThreadpoolController().select(internal_api="openblas").lib_controllers:
        each.clear_controlling_thread(force=True)
