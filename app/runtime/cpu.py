"""The cores that this process may use, their use by others, and the priority and BLAS threads of background work."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

# Of threads that no request waits for, added to that of the process.
_NICENESS = 10
_LOWEST_NICENESS = 19

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_STAT = Path("/proc/stat")


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


class OtherProcesses:
    """Measures the CPU that other processes use; Linux only.

    Args:
        stat: the file with the CPU time of all processes, which includes that of other virtual machines ("steal").
        own_s: returns the CPU seconds that are not those of others; by default of this process.
    """

    def __init__(self, stat: Path = _STAT, own_s: Callable[[], float] = time.process_time) -> None:
        self._stat = stat
        self._own_s = own_s
        self._last = self._read()

    def share(self) -> float | None:
        """Return their share of the usable cores since the last call, in [0, 1]; None if the system does not say.

        Cores that this process may not use at the same time, by its quota, count as free for others.
        """
        last, self._last = self._last, self._read()
        if last is None or self._last is None:
            return None
        (cores, all_s, own_s, at), (_, all_before_s, own_before_s, before) = self._last, last
        taken = (all_s - all_before_s - (own_s - own_before_s)) / max(at - before, 1e-9)
        usable = usable_cores()
        return min(1.0, max(0.0, taken - (cores - usable)) / usable)

    def _read(self) -> tuple[int, float, float, float] | None:
        """Return the number of cores, seconds of all processes on them, seconds of this process, and the time."""
        try:
            allowed = os.sched_getaffinity(0)
            rows = [line.split() for line in self._stat.read_text().splitlines()]
            # user, nice, system, irq, softirq and steal; the others are idle, or parts of these.
            used = [
                sum(int(row[column]) for column in (1, 2, 3, 6, 7, 8))
                for row in rows
                if row and row[0].startswith("cpu") and row[0][3:].isdigit() and int(row[0][3:]) in allowed
            ]
            if not any(used):
                return None  # a sandbox without real figures
            return len(used), sum(used) / os.sysconf("SC_CLK_TCK"), self._own_s(), time.perf_counter()
        except (AttributeError, OSError, ValueError, IndexError):
            return None


def lower_priority() -> None:
    """Give this thread a lower priority, if the system supports priorities of threads."""
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


def lower_process_priority() -> None:
    """Give this process the lowest priority, and let it be the first to end if the system runs out of memory."""
    with suppress(OSError, AttributeError):
        os.nice(_LOWEST_NICENESS)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


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
