"""Measures the service against its limit, the encoder alone, with closed and open loops from another process.

    python -m benchmarks.service [--models embedded vit-b-32] [--seconds 10] [--output benchmarks/results]

For each model it tunes the image tower, measures the encoder alone before and after the service, and puts load on a
server over loopback: closed loops of 1, 8, 32 and 128 connections with 1 and 8 images per request, then open loops at
0.5, 1 and 3 times the rate of 32 connections. Compare only the ratios of one run. Writes a table, JSON and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import write_open_clip
from benchmarks.processes import CORES, Server, about_this_run, run_json, say, serving

CONNECTIONS = (1, 8, 32, 128)
IMAGES = (1, 8)
LOADS = (0.5, 1.0, 3.0)


def under_load(server: Server, *arguments: object) -> dict[str, Any]:
    """Run the load generator, and return its figures with those of the server."""
    cpu_s, (images, batches) = server.cpu_s(), server.batches()
    figures = run_json("benchmarks.load", server.url, *arguments)
    used_s, (images_after, batches_after) = server.cpu_s() - cpu_s, server.batches()
    seconds = figures["seconds"]
    return {
        **figures,
        "mean_batch": round((images_after - images) / max(batches_after - batches, 1), 2),
        "server_cpu": round(used_s / seconds / CORES, 3),
        "generator_cpu": round(figures["generator_cpu_s"] / seconds / CORES, 3),
        "rss_mib": server.rss_mib(),
    }


def tune(model: str, data_dir: Path, seconds: float) -> None:
    """Tune the image tower; everything that loads the model with this folder uses the result."""
    say(f"{model}: tuning the image tower")
    subprocess.run(
        [str(Path(sys.executable).with_name("deixis")), "models", "tune", model, "--seconds", str(seconds)],
        check=True,
        capture_output=True,
        env={**os.environ, "DEIXIS_DATA_DIR": str(data_dir), "HF_HUB_OFFLINE": "1"},
    )


def measure(model: str, data_dir: Path, seconds: float) -> dict[str, Any]:
    """Return the figures of one model."""
    tune(model, data_dir, max(5, 3 * seconds))
    alone = ("benchmarks.encoder", model, "--data-dir", data_dir, "--seconds", min(seconds, 3))
    say(f"{model}: the encoder alone")
    before = run_json(*alone)
    reference = run_json(*alone, "--backend", "torch", "--precision", "fp32", "--sizes", 32)
    closed = []
    with serving(model, data_dir, "--max-queued-images", str(max(CONNECTIONS) * max(IMAGES))) as server:
        under_load(server, "closed", "--connections", 4, "--seconds", min(seconds, 3))  # fills the caches
        for images in IMAGES:
            for connections in CONNECTIONS:
                say(f"{model}: {connections} connections, {images} images per request")
                shape = {"connections": connections, "images": images}
                options = ("--connections", connections, "--images", images, "--seconds", seconds)
                closed.append(shape | under_load(server, "closed", *options))
    closed_loop_rate = next(run["images_per_s"] for run in closed if (run["connections"], run["images"]) == (32, 1))
    opened = []
    with serving(model, data_dir) as server:
        under_load(server, "closed", "--connections", 32, "--seconds", min(seconds, 3))
        for load in LOADS:
            say(f"{model}: open loop at {load} times {closed_loop_rate:.0f} images/s")
            figures = under_load(server, "open", "--rate", load * closed_loop_rate, "--seconds", seconds)
            opened.append({"load": load, **figures, "ready_again_s": server.ready_within_s()})
    say(f"{model}: the encoder alone, again")
    after = run_json(*alone)
    return {"model": model, "before": before, "after": after, "fp32": reference, "closed": closed, "open": opened}


def with_ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with their ratios."""
    limit = max(figures["before"]["best"]["images_per_s"], figures["after"]["best"]["images_per_s"])
    lone = figures["before"]["lone_ms"]
    # The same cores also decode: time per image over all cores.
    reading_s = (lone["decode"] + lone["transform"]) / 1000 / CORES
    with_reading = 1 / (1 / limit + reading_s)
    for run in figures["closed"]:
        run["of_limit"] = round(run["images_per_s"] / limit, 3)
        run["of_limit_without_generator"] = round(run["of_limit"] / (1 - run["generator_cpu"]), 3)
        run["of_limit_with_reading"] = round(run["images_per_s"] / with_reading, 3)
    one = next(run for run in figures["closed"] if (run["connections"], run["images"]) == (1, 1))
    at_one, at_three = (next(run for run in figures["open"] if run["load"] == load) for load in (1.0, 3.0))
    return {
        **figures,
        "limit_images_per_s": limit,
        "limit_with_reading_images_per_s": round(with_reading, 2),
        "lone_p50_ratio": round(one["p50_ms"] / sum(lone.values()), 3),
        "of_fp32_at_32": round(limit / figures["fp32"]["images_per_s"]["32"], 3),
        "goodput_at_3x_of_1x": round(at_three["images_per_s"] / at_one["images_per_s"], 3),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the report in Markdown."""
    lines = []
    for model in found:
        path, lone = model["before"]["path"], model["before"]["lone_ms"]
        alone = (
            f"Image tower: {path['backend']}, {path['precision']}, batches of {path['batch']}. The encoder alone:"
            f" **{model['limit_images_per_s']:.1f} images/s** ({model['before']['best']['images_per_s']:.1f} before,"
            f" {model['after']['best']['images_per_s']:.1f} after), {model['of_fp32_at_32']:.2f} times torch in fp32 at"
            f" 32 ({model['fp32']['images_per_s']['32']:.1f}). With decoding and transform on the same cores:"
            f" {model['limit_with_reading_images_per_s']:.1f} images/s."
        )
        lone_image = (
            f"Alone: decode {lone['decode']:.2f} + transform {lone['transform']:.2f} + forward {lone['forward']:.2f} ="
            f" {sum(lone.values()):.2f} ms; one connection's p50 is **{model['lone_p50_ratio']:.2f}** times that."
        )
        columns = (
            *("connections", "images", "images/s", "of limit", "without generator", "with reading", "p50 ms", "p95"),
            *("p99", "mean batch", "server CPU", "generator CPU", "MiB", "statuses"),
        )
        lines += [f"## {model['model']}", "", alone, "", lone_image, ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {run['connections']} | {run['images']} | {run['images_per_s']:.1f} | **{run['of_limit']:.2f}** |"
            f" {run['of_limit_without_generator']:.2f} | {run['of_limit_with_reading']:.2f} | {run['p50_ms']} |"
            f" {run['p95_ms']} | {run['p99_ms']} | {run['mean_batch']} | {run['server_cpu']:.0%} |"
            f" {run['generator_cpu']:.1%} | {run['rss_mib']:.0f} | {run['statuses']} |"
            for run in model["closed"]
        ]
        lines += [
            "",
            f"Open loop; goodput at 3x is **{model['goodput_at_3x_of_1x']:.2f}** of that at 1x:",
            "",
            "| load | images/s | p50 ms | p95 | p99 | mean batch | ready again after s | statuses |",
            "|---" * 8 + "|",
        ]
        lines += [
            f"| {run['load']}x | {run['images_per_s']:.1f} | {run['p50_ms']} | {run['p95_ms']} | {run['p99_ms']} |"
            f" {run['mean_batch']} | {run['ready_again_s']} | {run['statuses']} |"
            for run in model["open"]
        ]
        lines.append("")
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot latency against load."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra, for the plot only

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for axis, each in zip(axes[0], found, strict=True):
        runs = [run for run in each["closed"] if run["images"] == 1]
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            axis.plot([run["images_per_s"] for run in runs], [run[name] for run in runs], "o-", label=name[:3])
        for run in runs:
            axis.annotate(
                run["connections"], (run["images_per_s"], run["p50_ms"]), (4, -10), textcoords="offset points"
            )
        axis.axvline(each["limit_images_per_s"], color="grey", linestyle=":", label="encoder alone")
        axis.set(title=each["model"], xlabel="images/s", ylabel="latency, ms", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "vit-b-32"])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--output", type=Path, help="folder for JSON, table and plot; the table is always printed")
    parser.add_argument("--work-dir", type=Path, help="folder for models and measurements; temporary by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).absolute()
        names = [write_open_clip(work_dir / name) if name == "vit-b-32" else name for name in arguments.models]
        found = [with_ratios(measure(name, work_dir / "data", arguments.seconds)) for name in names]
    for each in found:
        each["model"] = each["model"].rpartition("/")[2]
    report = table(found)
    print(report)  # noqa: T201 - the output of the command
    if arguments.output:
        about = about_this_run()
        arguments.output.mkdir(parents=True, exist_ok=True)
        stem = arguments.output / f"{about['date']}-service"
        stem.with_suffix(".json").write_text(json.dumps({**about, "models": found}, indent=1) + "\n", encoding="utf-8")
        machine = about["machine"]
        head = f"# {about['date']}, commit {about['commit']}, {machine['processor']}, {machine['cores']} cores\n\n"
        stem.with_suffix(".md").write_text(head + report, encoding="utf-8")
        draw(found, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
