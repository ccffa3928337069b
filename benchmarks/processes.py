"""The processes of the benchmarks: `deixis serve` on a free port, and programs of this folder."""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from app.runtime.cpu import usable_cores
from benchmarks.load import classify_requests

ROOT = Path(__file__).parents[1]
CORES = usable_cores()
# In a second, of a server without background work.
_IDLE_CPU_S = 0.03


def cpu_s(processes: Collection[int]) -> float:
    """Return the CPU time of processes, and of all below them; Linux only."""
    return sum(_cpu_s_below(processes).values())


def _cpu_s_below(processes: Collection[int]) -> dict[int, float]:
    """Return the CPU time of each process, and of those below it, with that of children which have ended."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended
            fields = _stat(place)
            parents[int(place.name)] = int(fields[1])
            used[int(place.name)] = _seconds(fields[11:15])
    found = {}
    for number, seconds in used.items():
        above = number
        while above not in processes and above in parents:
            above = parents[above]
        if above in processes:
            found[number] = seconds
    return found


def cpu_s_by_thread(process: int) -> Counter[str]:
    """Return the CPU time of a process by kind of thread, by the names of threads without their numbers; Linux only.

    Threads with the name of the process are those that libraries started. Threads that have ended are not included.
    """
    found: Counter[str] = Counter()
    own_name = Path(f"/proc/{process}/comm").read_text().strip()
    for place in Path(f"/proc/{process}/task").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended
            name, seconds = (place / "comm").read_text().strip(), _seconds(_stat(place)[11:13])
            kind = "libraries" if name == own_name else name.rstrip("-_0123456789")
            found["event loop" if int(place.name) == process else kind] += seconds
    return found


def _stat(place: Path) -> list[str]:
    return (place / "stat").read_text().rpartition(")")[2].split()


def _seconds(ticks: Collection[str]) -> float:
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def run_json(*arguments: object) -> dict[str, Any]:
    """Run a module of this folder in a separate process and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Worker:
    """A program of this folder that stays loaded, and is idle while it has nothing to answer."""

    def __init__(self, process: subprocess.Popen[str], module: str) -> None:
        self.process = process
        self._module = module

    def ask(self, *arguments: object) -> dict[str, Any]:
        """Send a line with arguments, as a JSON list, and return the object in the line that it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self._module} ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def working(module: str, *arguments: object) -> Iterator[Worker]:
    """Start a program of this folder with the option ``--commands``, and end it."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments), "--commands"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Worker(process, module)
        finally:
            process.terminate()


class Server:
    """A running `deixis serve`, on a free port."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def cpu_s(self) -> float:
        """Return the CPU time of the server and its child processes."""
        return cpu_s([self.process.pid])

    def cpu_s_by_kind(self) -> dict[str, float]:
        """Return the CPU time by kind of process: those of Ray, and the rest, which includes a single process."""
        found: Counter[str] = Counter()
        for number, seconds in _cpu_s_below([self.process.pid]).items():
            with suppress(OSError):
                title = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ").strip()
                kinds = {"ServeReplica": "replicas of ", "ProxyActor": "proxies", "ServeController": "controller"}
                kind = next((name for word, name in kinds.items() if word in title), "the rest")
                if kind == "replicas of ":
                    kind += title.split("deixis:")[1].split(".")[0].split()[0]
                found[kind] += seconds
        return found

    def wait_until_idle(self, seconds: float = 120.0) -> None:
        """Wait until the server has no background work; ends the program if it still has after ``seconds``."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            before = self.cpu_s()
            time.sleep(1)
            if self.cpu_s() - before < _IDLE_CPU_S:
                return
        sys.exit(f"the server still has background work after {seconds:.0f} s without requests")

    def rss_mib(self) -> float:
        """Return the resident memory of the server."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)

    def batches(self, tower: str = "images") -> tuple[float, float]:
        """Return the number of encoded images and of batches, by the label ``tower`` of the metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        images = [line for line in lines if line.startswith("deixis_batch_size_") and f'tower="{tower}"' in line]
        total = sum(float(line.rsplit(" ", 1)[1]) for line in images if "_sum{" in line)
        return total, sum(float(line.rsplit(" ", 1)[1]) for line in images if "_count{" in line)

    def ready_within_s(self, seconds: float = 30.0) -> float | None:
        """Return the time until a response with 200; None if it takes longer than ``seconds``."""
        began, request = time.perf_counter(), classify_requests(1)[0]
        body = request.partition(b"\r\n\r\n")[2]
        content_type = request.partition(b"Content-Type: ")[2].partition(b"\r\n")[0].decode()
        while time.perf_counter() - began < seconds:
            response = httpx.post(
                f"{self.url}/v1/classify", content=body, headers={"Content-Type": content_type}, timeout=seconds
            )
            if response.status_code == 200:
                return round(time.perf_counter() - began, 3)
            time.sleep(0.05)
        return None


@contextmanager
def serving(model: str, data_dir: Path, *flags: str) -> Iterator[Server]:
    """Start a server that does not build the default caption database, and stop it with SIGTERM."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.named_threads", "serve", "--port", "0", "--models", model),
            *("--data-dir", str(data_dir.absolute()), "--log-level", "warning", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={"DEIXIS_BUILD_DEFAULT_DATABASE": "false", **os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if "listens on" in line), None)
        if line is None:
            sys.exit(f"the server ended with status {process.wait()}")
        yield Server(process, line.split("listens on ")[1].split()[0])
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def about_this_run() -> dict[str, Any]:
    """Return the date, the commit, marked if files differ from it, and the machine."""
    described = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    machine = {"processor": processor, "cores": CORES, "python": platform.python_version()}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit or "unknown", "machine": machine}


def say(text: str) -> None:
    """Print the progress on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a command
