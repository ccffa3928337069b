"""Measures other servers and this one with a ViT-B-32 with random weights, one after the other.

    python -m benchmarks.peers [--seconds 10] [--output benchmarks/results] [--work-dir FOLDER]

- `deixis`: `deixis serve`, after `deixis models tune`.
- `plain`: FastAPI and open_clip, one forward pass per request, the same weights; text features are cached.
- `pipeline`: the transformers zero-shot pipeline behind FastAPI. It encodes the labels again for each request.
- `infinity`: infinity-emb, which returns embeddings without a classifier; in its own environment.

The last two have a CLIPModel of the same architecture with other random weights. Each gets requests with one photograph
from 1, 8 and 32 connections.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import LABELS, form_request, json_request, photographs
from benchmarks.models import write_open_clip, write_transformers
from benchmarks.processes import CORES, about_this_run, run_json, say, serving

CONNECTIONS = (1, 8, 32)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def process(*command: object, port: int, timeout_s: float = 180) -> Iterator[str]:
    """Start a server, yield its address when it listens, and stop it at the end."""
    # Disables usage statistics.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    running = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **quiet}
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
        yield f"http://127.0.0.1:{port}"
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


def under_load(url: str, requests: Path | None, seconds: float) -> list[dict[str, Any]]:
    """Measure each number of connections, after some seconds to fill caches."""
    extra = [] if requests is None else ["--requests", requests]
    run_json("benchmarks.load", url, "closed", "--connections", 4, "--seconds", min(seconds, 5), *extra)
    return [
        {
            "connections": connections,
            **run_json("benchmarks.load", url, "closed", "--connections", connections, "--seconds", seconds, *extra),
        }
        for connections in CONNECTIONS
    ]


def measure(work_dir: Path, seconds: float) -> dict[str, Any]:
    """Return the figures of each server, or the reason why it could not be run."""
    ours, theirs = write_open_clip(work_dir / "vit-b-32"), write_transformers(work_dir / "vit-b-32-transformers")
    photos = photographs()
    forms = [form_request("/classify", [photo], {"labels": json.dumps(LABELS)}) for photo in photos]
    embeddings = [
        json_request(
            "/embeddings",
            {
                "model": "clip",
                "modality": "image",
                "input": [f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"],
            },
        )
        for photo in photos
    ]
    form_file, embedding_file = work_dir / "forms.json", work_dir / "embeddings.json"
    form_file.write_text(json.dumps([request.decode("latin-1") for request in forms]), encoding="utf-8")
    embedding_file.write_text(json.dumps([request.decode("latin-1") for request in embeddings]), encoding="utf-8")
    found: dict[str, Any] = {}
    say("deixis")
    subprocess.run(
        [Path(sys.executable).with_name("deixis"), "models", "tune", ours, "--seconds", "30"],
        check=True,
        capture_output=True,
        env={**os.environ, "DEIXIS_DATA_DIR": str(work_dir / "data"), "HF_HUB_OFFLINE": "1"},
    )
    with serving(ours, work_dir / "data") as server:
        found["deixis"] = under_load(server.url, None, seconds)

    def their_server(name: str, requests: Path, command: Sequence[object], port: int) -> None:
        say(name)
        try:
            with process(*command, port=port) as url:
                found[name] = under_load(url, requests, seconds)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            found[name] = f"could not be run: {error}"

    modules = (sys.executable, "-W", "ignore", "-m")
    port = free_port()
    plain = (*modules, "benchmarks.peers.plain", work_dir / "vit-b-32", port)
    their_server("plain", form_file, plain, port)
    port = free_port()
    their_server("pipeline", form_file, (*modules, "benchmarks.peers.pipeline", theirs, port), port)
    try:
        command = infinity_environment(work_dir / "infinity")
    except (OSError, subprocess.SubprocessError) as error:
        found["infinity"] = f"could not be installed: {error}"
        return found
    port = free_port()
    options = ("--served-model-name", "clip", "--no-bettertransformer", "--device", "cpu", "--engine", "torch")
    their_server("infinity", embedding_file, (command, "v2", "--model-id", theirs, "--port", port, *options), port)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the report in Markdown, with the ratios of this service to each server."""
    ours = {run["connections"]: run for run in found["deixis"]}
    columns = ("server", "connections", "images/s", "p50 ms", "p99 ms", "ours: times images/s", "ours: of its p50")
    columns = (*columns, "generator CPU", "statuses")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in found.items():
        if isinstance(runs, str):
            lines.append(f"| {name} | {runs} |" + " |" * 7)
            continue
        for run in runs:
            same = ours[run["connections"]]
            lines.append(
                f"| {name} | {run['connections']} | {run['images_per_s']:.1f} | {run['p50_ms']} | {run['p99_ms']} |"
                f" {same['images_per_s'] / max(run['images_per_s'], 1e-9):.2f} |"
                f" {same['p50_ms'] / run['p50_ms']:.2f} |"
                f" {run['generator_cpu_s'] / run['seconds'] / CORES:.1%} | {run['statuses']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--output", type=Path, help="folder for JSON and table; the table is always printed")
    parser.add_argument("--work-dir", type=Path, help="folder for models and environments; temporary by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).absolute()
        work_dir.mkdir(parents=True, exist_ok=True)
        found = measure(work_dir, arguments.seconds)
    report = table(found)
    print(report)  # noqa: T201 - the output of the command
    if arguments.output:
        about = about_this_run()
        arguments.output.mkdir(parents=True, exist_ok=True)
        stem = arguments.output / f"{about['date']}-peers"
        stem.with_suffix(".json").write_text(json.dumps({**about, "servers": found}, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(f"# {about['date']}, commit {about['commit']}\n\n{report}", encoding="utf-8")


if __name__ == "__main__":
    main()
