"""A lone request over HTTP on the embedded model: latency, and what share of it is the forward pass.

Starts a server of its own on loopback and sends one photograph at a time. Each request's server-side stage times come
from its own answer, so that the shares belong to the same requests as the latencies.

    python benchmarks/service.py [--requests 200] [--url http://127.0.0.1:8000]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import httpx
import skimage.data
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end.server import serving

LABELS = ["cat", "dog", "coffee cup", "rocket", "astronaut", "temple", "flower", "car", "pizza", "laptop"]
STAGES = ("text", "decode", "queue", "encode", "adapt")


def measure(url: str, requests: int) -> dict[str, object]:
    """Send ``requests`` photographs one after another and return the figures, times in milliseconds."""
    file = BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(file, "JPEG", quality=90)
    photo = file.getvalue()
    latencies, stages = [], {stage: [] for stage in STAGES}
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(requests + 10):
            began = time.perf_counter()
            answer = client.post("/v1/classify", files={"image": photo}, data={"labels": json.dumps(LABELS)})
            latency_ms = (time.perf_counter() - began) * 1000
            answer.raise_for_status()
            if number >= 10:  # the first ones encode the texts and warm caches
                latencies.append(latency_ms)
                for stage in STAGES:
                    stages[stage].append(answer.json()["timing_ms"][stage])
    shares = [encode / latency for encode, latency in zip(stages["encode"], latencies, strict=True)]
    return {
        "requests": requests,
        "photo": {"bytes": len(photo), "pixels": "451x300"},
        "p50_ms": percentile(latencies, 50),
        "p95_ms": percentile(latencies, 95),
        "stages_p50_ms": {stage: percentile(values, 50) for stage, values in stages.items()},
        "forward_share_p50": round(statistics.median(shares), 3),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile, rounded to a microsecond."""
    ordered = sorted(values)
    return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)


def processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Return the commit that is measured, marked where the files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return told.stdout.strip() or "unknown"


def main() -> None:
    """Measure and write JSON to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--url", help="a server that runs already; by default one is started")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.url:
        figures = measure(arguments.url, arguments.requests)
    else:
        with tempfile.TemporaryDirectory() as folder, serving(data_dir=Path(folder)) as server:
            ready_s = time.perf_counter() - began
            figures = {"start_to_ready_s": round(ready_s, 2), **measure(server.url, arguments.requests)}
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    report = {"date": today, "commit": commit(), "machine": machine, **figures}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
