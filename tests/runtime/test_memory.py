"""Freed memory is returned to the system."""

import asyncio
import subprocess
import sys

import pytest

from app.runtime import memory

pytestmark = pytest.mark.skipif(memory._glibc() is None, reason="needs glibc")

# Leaves 200 MB free in the heap below a small block at its end.
PROGRAM = """
import asyncio
from app.runtime import memory

async def main():
    memory.limit_arenas()
    trimming = asyncio.create_task(memory.trim_when_idle(lambda: IDLE, every_s=0.01))
    await asyncio.sleep(0)
    before = memory.resident_bytes()
    blocks = [bytearray(100_000) for _ in range(2_000)]
    last = bytearray(100_000)
    blocks.clear()
    grown = memory.resident_bytes()
    async with asyncio.timeout(20):
        while memory.resident_bytes() > before + 20e6:
            await asyncio.sleep(0.01)
    print(grown - before > 100e6, trimming.done())

asyncio.run(main())
"""


@pytest.mark.parametrize("idle", [True, False])
def test_freed_memory_is_returned_while_the_process_runs(idle):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("IDLE", str(idle))], check=False, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_memory_is_trimmed_once_while_the_process_does_not_grow(monkeypatch):
    trims = []

    class Library:
        def malloc_trim(self, _):
            trims.append(1)

    async def run():
        checked = asyncio.Event()
        monkeypatch.setattr(memory, "resident_bytes", lambda: checked.set() or 10**9)
        trimming = asyncio.create_task(memory.trim_when_idle(lambda: True, every_s=0.001))
        for _ in range(10):
            checked.clear()
            await checked.wait()
        trimming.cancel()
        await asyncio.wait([trimming])
        return trimming.cancelled()

    monkeypatch.setattr(memory, "_glibc", Library)
    assert asyncio.run(run())
    assert trims == [1]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.limit_arenas()
    asyncio.run(asyncio.wait_for(memory.trim_when_idle(lambda: True), 5))


@pytest.mark.parametrize(
    ("available", "limit", "used", "fits"),
    [
        (900, None, None, True),
        (700, None, None, False),
        (900, "max", 5, True),
        (900, 2000 * 1024, 1000 * 1024, True),
        (900, 2000 * 1024, 1900 * 1024, False),
        (None, None, None, True),
    ],
)
def test_the_memory_for_a_second_process_is_that_of_the_machine_or_of_the_container(
    tmp_path, available, limit, used, fits
):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tx\nVmHWM:\t     800 kB\n")
    if available is not None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9000 kB\nMemAvailable: {available} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    assert memory.fits_twice(tmp_path, tmp_path) is fits
