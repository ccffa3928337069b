"""Returns freed memory to the operating system, which glibc keeps by default, and says how much is left."""

import asyncio
import ctypes
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")

_M_ARENA_MAX = -8
# As MALLOC_ARENA_MAX=2 in the container image: by default, each thread that decodes images gets memory of its own.
_ARENAS = 2
_MIN_GROWTH_BYTES = 64 * 2**20
# Checks that are skipped while requests run.
_BUSY_CHECKS = 5


def limit_arenas() -> None:
    """Let threads share two arenas of glibc; call it before threads start. Does nothing with another C library."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_ARENA_MAX, _ARENAS)


async def trim_when_idle(is_idle: Callable[[], bool], every_s: float = 10.0) -> None:
    """Return freed memory to the system when the process has grown; runs until it is cancelled.

    The first check returns what loading the models left. Checks every ``every_s`` seconds. Under a load without pauses
    it trims at every sixth check.

    Args:
        is_idle: returns whether no request encodes images.
        every_s: seconds between two checks.
    """
    library = _glibc()
    if library is None:
        return
    trimmed_bytes, skipped = 0, 0
    while True:
        await asyncio.sleep(every_s)
        if resident_bytes() < trimmed_bytes + _MIN_GROWTH_BYTES:
            continue
        if not is_idle() and skipped < _BUSY_CHECKS:
            skipped += 1
            continue
        # In a thread: it takes milliseconds, during which other threads may wait for memory. ctypes releases the GIL.
        await asyncio.to_thread(library.malloc_trim, 0)
        trimmed_bytes, skipped = resident_bytes(), 0


def resident_bytes() -> int:
    """Return the resident memory of this process; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fits_twice(proc: Path = _PROC, cgroup: Path = _CGROUP) -> bool:
    """Return whether memory is left for another process of the size of this one at its largest; Linux only."""
    try:
        largest = _kib(proc / "self" / "status", "VmHWM:")
        available = _kib(proc / "meminfo", "MemAvailable:")
    except (OSError, StopIteration):
        return True  # the system does not say
    with suppress(OSError, ValueError):  # without cgroup v2, or "max" for no limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, (limit - used) // 1024)
    return available > largest


def _kib(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
