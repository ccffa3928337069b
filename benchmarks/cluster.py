"""Measures the service on Ray: against a single process, and while processes are killed or replaced.

    python -m benchmarks.cluster compare [--photographs FOLDER] [--seconds 8]
    python -m benchmarks.cluster scale [--seconds 60]
    python -m benchmarks.cluster kill [--photographs FOLDER] [--seconds 20]

``compare`` classifies the same photographs with a single process and on Ray with one and two encoder replicas, on this
machine, and puts the same load on each. ``scale`` overloads one encoder and measures when a second one starts. ``kill``
starts a cluster of three nodes on this machine with a PostgreSQL server, and compares its responses with those of a
single process. Then it kills an encoder replica, an edge, a caption shard and a node, and makes a rolling update, under
load and while label sets are written. Prints one JSON object, and progress on standard error. Compare only the ratios
of one run.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import LABELS, photographs
from benchmarks.processes import run_json, serving
from tests.postgres import postgres_binaries, running_postgres

# The server's limit is 30 s; a request that takes much longer hangs.
_HUNG_AFTER_S = 40.0
_START_TIMEOUT_S = 180.0
_CAPTIONS = [f"a {colour} {thing} on a table" for colour in ("red", "blue", "old", "small") for thing in LABELS]


def say(text: str) -> None:
    """Print the progress on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


# --- against a single process ----------------------------------------------------------------------------------------


def compare(folder: Path | None, seconds: float) -> dict[str, Any]:
    """Return the figures of a single process and of Ray with one and two encoder replicas."""
    files = _files(folder)
    configurations = {
        "single process": (),
        "ray, 1 encoder": ("--engine", "ray"),
        "ray, 2 encoders": ("--engine", "ray", "--ray-layout", "encoders=2"),
        "ray, 2 edges, 2 encoders": ("--engine", "ray", "--ray-layout", "edges=2,encoders=2"),
    }
    found: dict[str, Any] = {}
    predictions: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        for name, flags in configurations.items():
            say(name)
            with serving("embedded", Path(made), *flags) as server:
                predictions[name] = _predictions(server.url, files)
                run_json("benchmarks.load", server.url, "closed", "--connections", 4, "--seconds", 3)
                one = run_json("benchmarks.load", server.url, "closed", "--connections", 1, "--seconds", seconds)
                before = server.cpu_s_by_kind()
                many = run_json("benchmarks.load", server.url, "closed", "--connections", 32, "--seconds", seconds)
                images = many["images_per_s"] * many["seconds"]
                used = {part: 1000 * (now - before.get(part, 0.0)) for part, now in server.cpu_s_by_kind().items()}
                cpu_ms = {part: round(spent / images, 2) for part, spent in used.items() if spent / images >= 0.05}
                found[name] = {"one": one, "many": many, "cpu_ms_per_image": cpu_ms}
    alone, reference = found["single process"], predictions["single process"]
    for name, figures in found.items():
        figures["images_per_s_of_single"] = round(figures["many"]["images_per_s"] / alone["many"]["images_per_s"], 3)
        figures["p50_ms_of_single"] = round(figures["one"]["p50_ms"] / alone["one"]["p50_ms"], 3)
        figures.update(_differences(predictions[name], reference))
        say(
            f"{name:26} {figures['many']['images_per_s']:7.1f} images/s ({figures['images_per_s_of_single']:.2f})"
            f"  p50 alone {figures['one']['p50_ms']:6.1f} ms ({figures['p50_ms_of_single']:.2f})"
            f"  same labels {figures['same_labels']} of {len(files)}"
            f"  scores differ by {figures['largest_difference_of_scores']:.1e}"
            f"  ms of a core per image: {figures['cpu_ms_per_image']}"
        )
    return {"images": len(files), "configurations": found}


def _files(folder: Path | None) -> list[bytes]:
    return photographs() if folder is None else [file.read_bytes() for file in sorted(folder.rglob("*.jp*g"))]


def _differences(predictions: Sequence[Any], reference: Sequence[Any]) -> dict[str, float]:
    """Return the number of results with the same order of labels, and the largest difference of a score."""
    pairs = list(zip(predictions, reference, strict=True))
    return {
        "same_labels": sum(
            [prediction[0] for prediction in mine] == [prediction[0] for prediction in theirs] for mine, theirs in pairs
        ),
        "largest_difference_of_scores": max(
            abs(dict(mine)[label] - score) for mine, theirs in pairs for label, score in theirs if label in dict(mine)
        ),
    }


def _predictions(url: str, files: Sequence[bytes]) -> list[list[tuple[str, float]]]:
    predictions: list[list[tuple[str, float]]] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for first in range(0, len(files), 8):
            images = [("image", file) for file in files[first : first + 8]]
            response = client.post("/v1/classify", files=images, data={"labels": json.dumps(LABELS), "top_k": "10"})
            response.raise_for_status()
            predictions += [
                [(prediction["label"], prediction["score"]) for prediction in result["predictions"]]
                for result in response.json()["results"]
            ]
    return predictions


# --- autoscaling -----------------------------------------------------------------------------------------------------


def scale(seconds: float) -> dict[str, Any]:
    """Return the time until a second encoder replica starts under overload, from the metrics of the service."""
    with (
        tempfile.TemporaryDirectory() as made,
        serving("embedded", Path(made), "--engine", "ray", "--ray-layout", "encoders=1-2") as server,
    ):
        run_json("benchmarks.load", server.url, "closed", "--connections", 4, "--seconds", 3)
        load = ["benchmarks.load", server.url, "closed", "--connections", "64", "--seconds", str(seconds)]
        began = time.perf_counter()
        running = subprocess.Popen([sys.executable, "-m", *load], stdout=subprocess.PIPE, text=True)
        seen: list[tuple[float, int]] = []
        while running.poll() is None:
            seen.append((round(time.perf_counter() - began, 1), _encoders_of(server.url)))
            time.sleep(0.5)
        assert running.stdout is not None
        figures = json.loads(running.stdout.read().strip().splitlines()[-1])
    second = next((at for at, count in seen if count == 2), None)
    say(f"a second encoder after {second} s of load; {figures}")
    return {"second_encoder_after_s": second, "load": figures}


def _encoders_of(url: str) -> int:
    """Return the number of encoder replicas in the metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(line.startswith("deixis_build_info") and 'replica="encoder-' in line for line in lines)


# --- failures --------------------------------------------------------------------------------------------------------


@dataclass
class Observations:
    """Responses to clients: the time, the status and the duration of each."""

    responses: list[tuple[float, str, float]] = field(default_factory=list)
    degraded: int = 0
    error_texts: Counter[str] = field(default_factory=Counter)
    acknowledged: list[int] = field(default_factory=list)
    writes_refused: Counter[str] = field(default_factory=Counter)

    def between(self, began: float, ended: float) -> Counter[str]:
        """Return the number of responses of each status in a period."""
        return Counter(status for at, status, _ in self.responses if began <= at < ended)


class Load:
    """Clients that send requests continuously, and one that writes, in a separate thread."""

    def __init__(self, url: str, callers: int) -> None:
        self.seen = Observations()
        self._url = url
        self._callers = callers
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Observations:
        self._thread.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    async def _run(self) -> None:
        image = photographs(1)[0]
        questions = [{"labels": json.dumps(LABELS)}, {"database": "things"}]
        async with httpx.AsyncClient(base_url=self._url, timeout=_HUNG_AFTER_S) as client:
            callers = [self._ask(client, image, questions[number % 2]) for number in range(self._callers)]
            await asyncio.gather(*callers, self._write(client))

    async def _ask(self, client: httpx.AsyncClient, image: bytes, question: dict[str, str]) -> None:
        while not self._ending.is_set():
            began = time.perf_counter()
            try:
                response = await client.post("/v1/classify", files={"image": image}, data=question)
                status = str(response.status_code)
                self.seen.degraded += "could not be searched" in response.text
                if status != "200":
                    self.seen.error_texts[response.text[:300]] += 1
            except httpx.TimeoutException:
                status = "hung"
            except httpx.TransportError:
                status = "connection lost"
            ended = time.perf_counter()
            self.seen.responses.append((ended, status, ended - began))
            if status != "200":
                await asyncio.sleep(0.05)

    async def _write(self, client: httpx.AsyncClient) -> None:
        number = 0
        while not self._ending.is_set():
            number += 1
            try:
                response = await client.put("/v1/label-sets/written", json={"classes": [f"class {number}"]})
            except httpx.TransportError as error:
                self.seen.writes_refused[type(error).__name__] += 1
                continue
            if response.is_success:
                self.seen.acknowledged.append(response.json()["version"])
            else:
                self.seen.writes_refused[str(response.status_code)] += 1
            await asyncio.sleep(0.05)


@contextmanager
def cluster_of_nodes(nodes: int) -> Iterator[Any]:
    """Start a head without room for replicas and nodes with room, and stop them at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # As in docs/ray.md: a failed node is detected within about five seconds instead of thirty.
    os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
                   "RAY_health_check_failure_threshold": "3"}  # fmt: skip
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "app.cluster.proxy:middlewares"
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - an extra

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.workers = [cluster.add_node(num_cpus=6) for _ in range(nodes)]
        yield cluster
    finally:
        cluster.shutdown()


def kill(folder: Path | None, seconds: float, only: str | None) -> dict[str, Any]:
    """Return the observations of each failure, and the differences from a single process."""
    binaries = postgres_binaries()
    if binaries is None:
        sys.exit("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory() as made, running_postgres(binaries) as url:
        environment = {
            "DEIXIS_DATABASE_URL": url,
            "DEIXIS_DATA_DIR": made,
            "DEIXIS_BUILD_DEFAULT_DATABASE": "false",
            "DEIXIS_TUNING_SECONDS": "0",
            "DEIXIS_LOG_LEVEL": "warning",
            "DEIXIS_ENGINE": "ray",
            "DEIXIS_KEYS": "off",
            "DEIXIS_PORT": "8731",
            "DEIXIS_RAY_LAYOUT": "edges=2,encoders=2,shards=2",
        }
        files = _files(folder)
        with serving("embedded", Path(made)) as server:
            reference = _predictions(server.url, files)
        os.environ.update(environment)
        deixis = str(Path(sys.executable).with_name("deixis"))
        build = [deixis, "captions", "build", "-", "--name", "things"]
        subprocess.run(build, input="\n".join(_CAPTIONS), text=True, check=True, capture_output=True)
        with cluster_of_nodes(2) as cluster:
            say("three nodes; deploying")
            os.environ["RAY_ADDRESS"] = cluster.address
            subprocess.run([deixis, "serve"], check=True, stdout=subprocess.DEVNULL)
            url_on_ray = "http://127.0.0.1:8731"
            differences = {"images": len(files), **_differences(_predictions(url_on_ray, files), reference)}
            say(f"differences from a single process: {differences}")
            return {"responses": differences, **_failures(cluster, url_on_ray, seconds, only)}


def _failures(cluster: Any, url: str, seconds: float, only: str | None) -> dict[str, Any]:
    import ray  # noqa: PLC0415 - an extra
    from ray import serve  # noqa: PLC0415

    from app.cluster.application import APPLICATION  # noqa: PLC0415

    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)

    def running() -> set[str]:
        deployments = serve.status().applications[APPLICATION].deployments
        return {
            f"{name}:{deployment.status.value}:{sorted(deployment.replica_states.items())}"
            for name, deployment in deployments.items()
        }

    def is_healthy() -> bool:
        deployments = serve.status().applications[APPLICATION].deployments.values()
        return all(
            deployment.status.value == "HEALTHY" and set(deployment.replica_states) == {"RUNNING"}
            for deployment in deployments
        )

    def update() -> None:
        # The same command with another setting.
        deixis = str(Path(sys.executable).with_name("deixis"))
        again = [deixis, "serve", "--log-format", "json"]
        subprocess.run(again, check=True, stdout=subprocess.DEVNULL)

    def lose_node() -> None:
        # This node has replicas of every deployment; the head has none.
        cluster.remove_node(cluster.workers[-1], allow_graceful=False)

    failures: dict[str, Callable[[], object]] = {
        "an encoder replica": lambda: os.kill(_replicas("encoder-embedded")[0], signal.SIGKILL),
        "an edge": lambda: os.kill(_replicas("edge")[0], signal.SIGKILL),
        "a caption shard": lambda: os.kill(_replicas("captions-1")[0], signal.SIGKILL),
        "a node": lose_node,
        "rolling update": update,
    }
    _until(is_healthy)
    table: dict[str, Any] = {}
    for name, lose in failures.items():
        if only is not None and only not in name:
            continue
        if name == "rolling update" and len(cluster.workers) == 2:
            cluster.add_node(num_cpus=6)
        before = running()
        with Load(url, callers=8) as seen:
            time.sleep(seconds / 4)
            lost_at = time.perf_counter()
            concurrent_requests = 8
            lose()
            if name != "rolling update":
                _until(lambda before=before: not is_healthy() or running() != before, within_s=10.0, strictly=False)
            _until(is_healthy)
            healthy_at = time.perf_counter()
            time.sleep(seconds / 4)
        lost = _lost_writes(url, seen)
        statuses = seen.between(0, float("inf"))
        waits = [took for at, status, took in seen.responses if status == "200" and at >= lost_at]
        table[name] = {
            "concurrent_requests": concurrent_requests,
            "responses": dict(statuses),
            "degraded": seen.degraded,
            "longest_s": round(max(took for _, _, took in seen.responses), 2),
            "p50_ms_before": round(1000 * statistics.median(t for at, _, t in seen.responses if at < lost_at), 1),
            "p50_ms_after": round(1000 * statistics.median(waits), 1) if waits else None,
            "recovered_after_s": round(healthy_at - lost_at, 1),
            "acknowledged_writes": len(seen.acknowledged),
            "lost_writes": lost,
            "refused_writes": dict(seen.writes_refused),
            "hung": statuses["hung"],
            "error_texts": dict(seen.error_texts),
        }
        say(f"{name:28} {json.dumps(table[name])}")
    serve.shutdown()
    ray.shutdown()
    return table


def _lost_writes(url: str, seen: Observations) -> int:
    """Return the number of acknowledged versions that are missing."""
    with httpx.Client(base_url=url, timeout=30) as client:
        return sum(
            not client.get("/v1/label-sets/written", params={"version": version}).is_success
            for version in seen.acknowledged
        )


def _replicas(deployment: str) -> list[int]:
    """Return the process ids of a deployment's replicas."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            title = (place / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if f"ServeReplica:deixis:{deployment}" in title:
            found.append(int(place.name))
    return sorted(found)


def _until(condition: Callable[[], bool], *, within_s: float = _START_TIMEOUT_S, strictly: bool = True) -> None:
    deadline = time.perf_counter() + within_s
    while not condition():
        if time.perf_counter() > deadline:
            if strictly:
                sys.exit(f"the condition was not met within {within_s:g} s")
            return
        time.sleep(0.1)


def main() -> None:
    """Run one measurement and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["compare", "scale", "kill"])
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files to compare predictions on")
    parser.add_argument("--only", help="only failures whose name contains this text")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="file for the figures; Ray also writes to standard output")
    arguments = parser.parse_args()
    if arguments.measurement == "compare":
        figures = compare(arguments.photographs, arguments.seconds)
    elif arguments.measurement == "scale":
        figures = scale(arguments.seconds)
    else:
        figures = kill(arguments.photographs, arguments.seconds, arguments.only)
    if arguments.output is None:
        json.dump(figures, sys.stdout, indent=1)
    else:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
