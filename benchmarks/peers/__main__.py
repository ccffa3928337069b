"""Measures other servers and this one in alternating rounds, with the same ViT-B-32 with random weights.

    python -m benchmarks.peers [--peers infinity plain pipeline] [--rounds 5] [--output benchmarks/results]

- `infinity`: infinity-emb, which returns embeddings without a classifier; in its own environment. It runs images with
  PyTorch in single precision on CPUs: its engines for ONNX and CTranslate2 refuse models of images, and its option for
  other precisions is for GPUs.
- `plain`: FastAPI and open_clip, one forward pass per request; text features are cached.
- `pipeline`: the transformers zero-shot pipeline behind FastAPI. It encodes the labels again for each request.

`deixis serve`, after `deixis models tune`, stays loaded beside each of them. Requests have one photograph, and come
from 1, 8 and 32 connections. Exits with 1 if other processes used the cores too often for a ratio.
"""

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import LABELS, json_request, photographs
from benchmarks.models import write_open_clip, write_transformers
from benchmarks.processes import ROOT, say, serving, working
from benchmarks.rounds import Part, Rounds, alternate, cell, end_if_busy, table, write_results
from benchmarks.service import tune

CONNECTIONS = (1, 8, 32)
PEERS = ("infinity", "plain", "pipeline")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def process(*command: object, port: int, timeout_s: float = 180) -> Iterator[tuple[str, int]]:
    """Start a server, yield its address and process when it listens, and stop it at the end."""
    # Disables usage statistics.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    running = subprocess.Popen(
        [*map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **quiet},
        cwd=ROOT,
    )
    try:
        ends = time.monotonic() + timeout_s
        while True:
            if running.poll() is not None or time.monotonic() > ends:
                msg = f"ended with status {running.poll()} before it listened"
                raise RuntimeError(msg)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", running.pid
    finally:
        running.terminate()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()


def infinity_environment(folder: Path) -> Path:
    """Create the environment of infinity unless it exists, and return its command."""
    command = folder / "bin" / "infinity_emb"
    if not command.is_file():
        say("creating the environment of infinity, which takes some minutes")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        requirements = Path(__file__).with_name("infinity.txt")
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", "--requirement", requirements], check=True)
    return command


def write_requests(work_dir: Path) -> tuple[Path, Path]:
    """Write the requests to servers that classify and to infinity, and return their files."""
    photos = photographs()
    encoded = [base64.b64encode(photo).decode() for photo in photos]
    classifying = [json_request("/classify", {"image": each, "labels": LABELS}) for each in encoded]
    urls = [f"data:image/jpeg;base64,{each}" for each in encoded]
    embeddings = [json_request("/embeddings", {"model": "clip", "modality": "image", "input": [url]}) for url in urls]
    files = work_dir / "classify.json", work_dir / "embeddings.json"
    for file, requests in zip(files, (classifying, embeddings), strict=True):
        file.write_text(json.dumps([request.decode("latin-1") for request in requests]), encoding="utf-8")
    return files


def command_of(name: str, work_dir: Path, model: Path, port: int) -> list[object]:
    """Return the command that starts a server; creates the environment of infinity."""
    if name != "infinity":
        return [sys.executable, "-W", "ignore", "-m", f"benchmarks.peers.{name}", model, port]
    options = ("--served-model-name", "clip", "--no-bettertransformer", "--device", "cpu", "--engine", "torch")
    return [infinity_environment(work_dir / "infinity"), "v2", "--model-id", model, "--port", port, *options]


def measure(work_dir: Path, peers: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Return the rounds with each server by number of connections, or the reason why it could not be run."""
    ours = work_dir / "vit-b-32"
    model, theirs = write_open_clip(ours), write_transformers(work_dir / "vit-b-32-transformers", ours)
    classifying, embeddings = write_requests(work_dir)
    tune(model, work_dir / "data")
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        load = stack.enter_context(working("benchmarks.load"))
        server = stack.enter_context(serving(model, work_dir / "data", "--tuning-seconds", "0"))

        def under_load(process: int, connections: int, url: str, *requests: object) -> Part:
            options = ("--connections", connections, "--seconds", seconds, *requests)
            return Part(lambda: answered(load.ask(url, "closed", *options)), [process, load.process.pid])

        under_load(server.process.pid, 32, server.url).measure()  # fills the caches
        server.wait_until_idle()
        for name in peers:
            say(name)
            try:
                port = free_port()
                command = command_of(name, work_dir, ours if name == "plain" else theirs, port)
                with process(*command, port=port) as (url, number):
                    requests = ("--requests", embeddings if name == "infinity" else classifying)
                    under_load(number, 4, url, *requests).measure()
                    found[name] = [
                        compared(
                            alternate(
                                {
                                    "deixis": under_load(server.process.pid, connections, server.url),
                                    "peer": under_load(number, connections, url, *requests),
                                },
                                rounds,
                            ),
                            connections,
                        )
                        for connections in CONNECTIONS
                    ]
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                found[name] = f"could not be run: {error}"
    return found


def answered(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a server that answers.

    Raises:
        RuntimeError: it has no response with 200.
    """
    if not figures["images_per_s"]:
        msg = f"no response with 200; statuses: {figures['statuses']}"
        raise RuntimeError(msg)
    return figures


def compared(rounds: Rounds, connections: int) -> dict[str, Any]:
    """Return the rounds of this server and another one, and the spreads of figures and ratios, None if it was busy."""
    names = ("images_per_s", "p50_ms", "p99_ms")
    return {
        "connections": connections,
        "is_busy": rounds.is_busy,
        "refused": rounds.refused,
        "times_images_per_s": rounds.spread("deixis", "images_per_s", over=("peer", "images_per_s")),
        "of_p50": rounds.spread("deixis", "p50_ms", over=("peer", "p50_ms")),
        **{part: {name: rounds.spread(part, name) for name in names} for part in ("deixis", "peer")},
        "rounds": rounds.accepted,
    }


def report(found: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    columns = ("server", "connections", "images/s", "p50 ms", "p99 ms", "deixis: images/s", "p50 ms", "p99 ms")
    columns = (*columns, "times the images/s", "of the p50", "refused rounds")
    rows: list[list[object]] = []
    for name, runs in found.items():
        if isinstance(runs, str):
            rows.append([name, runs, *[""] * (len(columns) - 2)])
            continue
        for run in runs:
            figures = (cell(spread, 1) for part in ("peer", "deixis") for spread in run[part].values())
            ratios = (f"**{cell(run[name])}**" for name in ("times_images_per_s", "of_p50"))
            rows.append([name, run["connections"], *figures, *ratios, run["refused"]])
    return "\n".join(table(columns, rows)) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--rounds", type=int, default=5, help="for each server and number of connections")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each server in a round")
    parser.add_argument("--output", type=Path, help="folder for JSON and table; the table is always printed")
    parser.add_argument("--work-dir", type=Path, help="folder for models and environments; temporary by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).absolute()
        work_dir.mkdir(parents=True, exist_ok=True)
        found = measure(work_dir, arguments.peers, arguments.rounds, arguments.seconds)
    text = report(found)
    print(text)  # noqa: T201 - the output of the command
    if arguments.output:
        write_results("peers", {"servers": found}, text, arguments.output)
    end_if_busy(run for runs in found.values() if not isinstance(runs, str) for run in runs)


if __name__ == "__main__":
    main()
