"""Measures the service against its limit, the encoder alone, in alternating rounds.

    python -m benchmarks.service [--models embedded vit-b-32] [--rounds 5] [--seconds 2] [--output benchmarks/results]

For each model it tunes the image tower, and keeps a server, an encoder and a load generator loaded. Closed loops of
some connections, with 1 or 8 images per request, take turns with the encoder alone, and with an encoder that reads
photographs on the same cores. One connection takes turns with its parts, one after the other. Open loops of 0.5, 1 and
3 times the rate of 32 connections take turns with each other. Compare only the ratios of one run.

Writes a table, JSON and a plot. Exits with 1 if other processes used the cores too often for a ratio.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.models import write_open_clip
from benchmarks.processes import CORES, ROOT, Server, Worker, cpu_s_by_thread, say, serving, working
from benchmarks.rounds import Part, Rounds, alternate, cell, end_if_busy, table, write_results

SHAPES = ("1x1", "8x1", "32x1", "128x1", "1x8", "8x8", "32x8")
"""Connections x images per request."""

LOADS = (0.5, 1.0, 3.0)
THREADS = ("event loop", "decode", "libraries", "rest")
_CPU_MS = ("cpu_ms/all", *(f"cpu_ms/{kind}" for kind in THREADS))
_LATENCIES = ("p50_ms", "p95_ms", "p99_ms")
_OF_SERVICE = ("images_per_s", *_LATENCIES, *_CPU_MS, "mean_batch", "generator_share", "server_share", "rss_mib")
_OF_LONE = ("p50_ms", "parts_ms/decode", "parts_ms/transform", "parts_ms/forward", "cpu_ms")
_OPEN_ROUNDS, _OPEN_S = 3, 5.0
_TUNINGS = 3


def tune(model: str, data_dir: Path) -> None:
    """Tune the image tower; everything that loads the model with this folder uses the result."""
    command = [sys.executable, "-m", "deixis", "models", "tune", model, "--seconds", "30"]
    variables = {**os.environ, "DEIXIS_DATA_DIR": str(data_dir), "HF_HUB_OFFLINE": "1"}
    for _ in range(_TUNINGS):
        say(f"{model}: tuning the image tower")
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=variables)
        if "provisional" not in done.stdout:
            return
    sys.exit(f"other processes used the cores while {model} was tuned; run this again on an idle machine")


def under_load(server: Server, load: Worker, images: int, *arguments: object) -> dict[str, Any]:
    """Run the load generator, and return its figures with those of the server."""
    (encoded, batches), used_s = server.batches(), server.cpu_s()
    by_thread = cpu_s_by_thread(server.process.pid)
    figures = load.ask(server.url, *arguments, "--images", images)
    by_thread = cpu_s_by_thread(server.process.pid) - by_thread
    used_s, (encoded_after, batches_after) = server.cpu_s() - used_s, server.batches()
    seconds, rate = figures["seconds"], figures["images_per_s"]
    if not rate:
        sys.exit(f"the server has no response with 200; statuses: {figures['statuses']}")
    generator_share = figures["generator_cpu_s"] / seconds / CORES
    ms_per_image = 1000 / (rate * seconds)
    cpu_ms = {kind: by_thread[kind] * ms_per_image for kind in THREADS[:-1]}
    cpu_ms |= {"all": used_s * ms_per_image, "rest": used_s * ms_per_image - sum(cpu_ms.values())}
    return {
        **figures,
        "without_generator": round(rate / (1 - generator_share), 2),
        "generator_share": round(generator_share, 4),
        "server_share": round(used_s / seconds / CORES, 3),
        "cpu_ms": {kind: round(value, 3) for kind, value in cpu_ms.items()},
        "threads_cpu_s": {kind: round(used_s, 2) for kind, used_s in by_thread.items()},
        "mean_batch": round((encoded_after - encoded) / max(batches_after - batches, 1), 2),
        "rss_mib": server.rss_mib(),
    }


def measure(model: str, data_dir: Path, shapes: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Return the figures of one model."""
    tune(model, data_dir)
    with ExitStack() as stack:
        encoder = stack.enter_context(working("benchmarks.encoder", model, "--data-dir", data_dir))
        load = stack.enter_context(working("benchmarks.load"))
        server = stack.enter_context(serving(model, data_dir, "--tuning-seconds", "0"))
        path = encoder.ask("path")
        under_load(server, load, 1, "closed", "--connections", 32, "--seconds", 3)  # fills the caches
        server.wait_until_idle()

        def of_encoder(command: str) -> Part:
            return Part(lambda: encoder.ask(command, seconds), [encoder.process.pid])

        def of_server(images: int, *arguments: object) -> Part:
            processes = [server.process.pid, load.process.pid]
            return Part(lambda: under_load(server, load, images, *arguments), processes)

        def of_overload(rate: float) -> Part:
            part = of_server(1, "open", "--rate", rate, "--seconds", _OPEN_S)
            return Part(lambda: {**part.measure(), "ready_again_s": server.ready_within_s()}, part.processes)

        closed = {}
        for shape in shapes:
            say(f"{model}: {shape} (connections x images per request)")
            connections, images = map(int, shape.split("x"))
            alone = ["lone"] if connections * images == 1 else ["limit", "reading"]
            service = of_server(images, "closed", "--connections", connections, "--seconds", seconds)
            found = alternate({**{name: of_encoder(name) for name in alone}, "service": service}, rounds)
            closed[shape] = closed_loop(found, alone)
        rate = closed["32x1"]["service"]["images_per_s"] if "32x1" in closed else None
        opened = {}
        if rate is not None:
            say(f"{model}: open loops at {', '.join(map(str, LOADS))} times {rate.median:.0f} images/s")
            opened = open_loop(alternate({f"{load}x": of_overload(load * rate.median) for load in LOADS}, _OPEN_ROUNDS))
    return {"model": model.rpartition("/")[2], "path": path, "closed": closed, "open": opened}


# --- from rounds to ratios -------------------------------------------------------------------------------------------


def closed_loop(rounds: Rounds, alone: Sequence[str]) -> dict[str, Any]:
    """Return the rounds of a closed loop, and the spreads of figures and ratios, which are None if it was busy.

    Args:
        rounds: of the service, and of the parts of the encoder in ``alone``.
        alone: ``lone``, or ``limit`` and ``reading``; the last one does the same work as the service.
    """
    bare = alone[-1]
    if bare == "lone":
        ratios = {"of_p50": rounds.spread("service", "p50_ms", over=("lone", "p50_ms"))}
    else:
        for part in alone:
            rounds = rounds.with_best_way(part)
        ratios = {
            f"of_{part}": rounds.spread("service", "without_generator", over=(part, "images_per_s")) for part in alone
        }
    ratios["of_cpu_ms"] = rounds.spread("service", "cpu_ms/all", over=(bare, "cpu_ms"))
    figures = _OF_LONE if bare == "lone" else ("images_per_s", "cpu_ms")
    return {
        "is_busy": rounds.is_busy,
        "refused": rounds.refused,
        "statuses": dict(sum((Counter(each["service"]["statuses"]) for each in rounds.accepted), Counter())),
        **ratios,
        "service": {name: rounds.spread("service", name) for name in _OF_SERVICE},
        **{part: {name: rounds.spread(part, name) for name in figures} for part in alone},
        "rounds": rounds.accepted,
    }


def open_loop(rounds: Rounds) -> dict[str, Any]:
    """Return the rounds of the open loops, the spreads of their figures, and that of the goodput under overload."""
    names = ("images_per_s", *_LATENCIES, "mean_batch")
    return {
        "is_busy": rounds.is_busy,
        "refused": rounds.refused,
        "goodput_at_3x_of_1x": rounds.spread("3.0x", "images_per_s", over=("1.0x", "images_per_s")),
        **{f"{load}x": {name: rounds.spread(f"{load}x", name) for name in names} for load in LOADS},
        "rounds": rounds.accepted,
    }


# --- the report ------------------------------------------------------------------------------------------------------


def report(figures: dict[str, Any]) -> str:
    """Return the report of a model in Markdown."""
    path, closed, opened = figures["path"], figures["closed"], figures["open"]
    lines = [f"## {figures['model']}", ""]
    lines += [f"Image tower: {path['backend']}, {path['precision']}, batches of {path['batch']}.", ""]
    ways = [
        f"{shape}: {found['rounds'][0]['limit']['way']}; with reading: {found['rounds'][0]['reading']['way']}"
        for shape, found in closed.items()
        if "limit" in found and not found["is_busy"]
    ]
    lines += ["The encoder's fastest ways:", "", *(f"- {way}" for way in ways), ""]
    rates, times = [], []
    for shape, found in closed.items():
        service = found["service"]
        if "lone" in found:
            whole, decode, transform, forward = (cell(found["lone"][name], 1) for name in _OF_LONE[:4])
            parts = f"decode {decode}, transform {transform}, forward {forward}"
            lines.append(
                f"One connection: p50 {cell(service['p50_ms'], 1)} ms, **{cell(found['of_p50'])}** of {whole} ms for"
                f" the parts alone: {parts}. Refused rounds: {found['refused']}.\n"
            )
        else:
            row = [shape, cell(service["images_per_s"], 1)]
            for part in ("limit", "reading"):
                row += [cell(found[part]["images_per_s"], 1), f"**{cell(found[f'of_{part}'])}**"]
            row += [cell(service["mean_batch"], 1), cell(service["generator_share"], 3)]
            rates.append([*row, found["statuses"], found["refused"]])
        bare = found.get("lone") or found["reading"]
        times.append(
            [
                *(shape, *(cell(service[name], 1) for name in _LATENCIES), cell(bare["cpu_ms"], 1)),
                *(cell(service["cpu_ms/all"], 1), f"**{cell(found['of_cpu_ms'])}**"),
                *(cell(service[name], 1) for name in _CPU_MS[1:]),
                *(cell(service["server_share"]), cell(service["rss_mib"], 0)),
            ]
        )
    columns = ("shape", "images/s", "encoder alone", "of it", "with reading", "of it", "mean batch", "generator")
    lines += [*table((*columns, "statuses", "refused rounds"), rates), ""]
    columns = ("shape", "p50 ms", "p95", "p99", "bare parts: ms of a core per image", "service", "of bare", *THREADS)
    lines += [*table((*columns, "server: share of the cores", "MiB"), times), ""]
    if opened:
        lines += [f"Open loops; goodput at 3x is **{cell(opened['goodput_at_3x_of_1x'])}** of that at 1x:", ""]
        loads = [[f"{load}x", *(cell(spread, 1) for spread in opened[f"{load}x"].values())] for load in LOADS]
        lines += [*table(("load", "images/s", "p50 ms", "p95", "p99", "mean batch"), loads), ""]
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot latency against load."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra, for the plot only

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for axis, each in zip(axes[0], found, strict=True):
        runs = {shape: run for shape, run in each["closed"].items() if shape.endswith("x1") and not run["is_busy"]}
        rates = [run["service"]["images_per_s"].median for run in runs.values()]
        for name in _LATENCIES:
            axis.plot(rates, [run["service"][name].median for run in runs.values()], "o-", label=name[:3])
        for shape, run in runs.items():
            at = (run["service"]["images_per_s"].median, run["service"]["p50_ms"].median)
            axis.annotate(shape, at, (4, -10), textcoords="offset points")
        if "32x1" in runs:
            limit = runs["32x1"]["limit"]["images_per_s"].median
            axis.axvline(limit, color="grey", linestyle=":", label="encoder alone")
        axis.set(title=each["model"], xlabel="images/s", ylabel="latency, ms", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "vit-b-32"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="connections x images per request, as 32x1")
    parser.add_argument("--rounds", type=int, default=5, help="for each shape")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each part of a round")
    parser.add_argument("--output", type=Path, help="folder for JSON, table and plot; the table is always printed")
    parser.add_argument("--work-dir", type=Path, help="folder for models and measurements; temporary by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).absolute()
        names = [write_open_clip(work_dir / name) if name == "vit-b-32" else name for name in arguments.models]
        found = [
            measure(name, work_dir / "data", arguments.shapes, arguments.rounds, arguments.seconds) for name in names
        ]
    text = "\n".join(map(report, found))
    print(text)  # noqa: T201 - the output of the command
    if arguments.output:
        stem = write_results("service", {"models": found}, text, arguments.output)
        if find_spec("matplotlib"):
            draw(found, stem.with_suffix(".png"))
        else:
            say("there is no plot, because the extra plots is not installed")
    end_if_busy(loop for each in found for loop in (*each["closed"].values(), each["open"]) if loop)


if __name__ == "__main__":
    main()
