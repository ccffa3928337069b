"""A test during which an event loop is blocked fails, unless it says why it must block."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A lower limit than that of the suite, so that the planted tests are short.
HOOKS = """
from tests import event_loop_watchdog
from tests.event_loop_watchdog import *

event_loop_watchdog.MAX_CPU_S = 0.05
"""

TESTS = """
import asyncio, threading, time
import pytest

def use_the_processor(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass

async def blocked():
    use_the_processor(0.25)

async def fine():
    await asyncio.to_thread(use_the_processor, 0.25)
    await asyncio.sleep(0)

def test_blocked():
    asyncio.run(blocked())

def test_blocked_in_another_thread():
    thread = threading.Thread(target=asyncio.run, args=(blocked(),))
    thread.start()
    thread.join()

@pytest.fixture
def blocking():
    yield
    asyncio.run(blocked())

def test_blocked_after_the_test(blocking):
    pass

@pytest.mark.blocks_event_loop("to be tested")
def test_excepted():
    asyncio.run(blocked())

def test_fine():
    asyncio.run(fine())

def test_of_a_page():
    def resume():
        use_the_processor(0.25)

    resume.__module__ = "playwright._impl._sync_base"

    async def run():
        asyncio.get_running_loop().call_soon(resume)
        await asyncio.sleep(0)

    asyncio.run(run())

def test_failed_anyway():
    asyncio.run(blocked())
    raise ValueError("of the test itself")
"""


def test_tests_that_block_a_loop_fail_and_the_slowest_callbacks_are_listed(tmp_path):
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = blocks_event_loop(reason): as in pyproject.toml\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--slowest-callbacks", "1", "-p", "no:cacheprovider"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    outcomes = {
        tuple(line.split(" - ")[0].split(" test_planted.py::"))
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED test_", "FAILED test_", "ERROR test_"))
    }
    assert outcomes == {
        ("FAILED", "test_blocked"),
        ("FAILED", "test_blocked_in_another_thread"),
        ("PASSED", "test_blocked_after_the_test"),
        ("ERROR", "test_blocked_after_the_test"),
        ("PASSED", "test_excepted"),
        ("PASSED", "test_fine"),
        ("PASSED", "test_of_a_page"),
        ("FAILED", "test_failed_anyway"),
    }, done.stdout
    assert re.search(r"the event loop was blocked for \d{2,3} ms of processor time in \d+ ms: .*> blocked", done.stdout)
    assert "ValueError: of the test itself" in done.stdout
    assert done.stdout.count("ms of processor time") >= 4
