"""The processes of the benchmarks: `deixis serve` on a free port, and programs of this folder."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import classify_requests

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class Server:
    """A running `deixis serve`, on a free port."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def cpu_s(self) -> float:
        """Return the CPU time of the server and its child processes."""
        return sum(self.cpu_s_by_kind().values())

    def cpu_s_by_kind(self) -> dict[str, float]:
        """Return the CPU time by kind of process: those of Ray, and the rest, which includes a single process."""
        parents: dict[int, int] = {}
        used: dict[int, tuple[str, float]] = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                title = (place / "cmdline").read_text().replace("\0", " ").strip()
            except (OSError, ValueError):
                continue
            number = int(place.name)
            parents[number] = int(fields[1])
            used[number] = title, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        found: dict[str, float] = {}
        for number, (title, seconds) in used.items():
            above = number
            while above not in {self.process.pid, 0, 1} and above in parents:
                above = parents[above]
            if above == self.process.pid:
                kinds = {"ServeReplica": "replicas of ", "ProxyActor": "proxies", "ServeController": "controller"}
                kind = next((name for word, name in kinds.items() if word in title), "the rest")
                if kind == "replicas of ":
                    kind += title.split("deixis:")[1].split(".")[0].split()[0]
                found[kind] = found.get(kind, 0.0) + seconds
        return found

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
    """Start a server, and stop it with SIGTERM."""
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("deixis")), "serve", "--port", "0", "--models", model),
            *("--data-dir", str(data_dir), "--log-level", "warning", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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
