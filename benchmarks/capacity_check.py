"""What is simulated against what is measured: one server on loopback, its stages and its load in one run.

    python -m benchmarks.capacity_check embedded [--engine ray] [--seconds 20] [--output benchmarks/results]
    python -m benchmarks.capacity_check --again benchmarks/results/DATE-capacity-ray.json

The stages are measured first (``benchmarks/capacity_stages.py``), one request at a time. From them comes the rate at
which the simulation saturates, and an open loop then asks a server at shares of that rate. The simulation gets the same
times of arrival and the same batches, and nothing of what was measured under load. Each rate is measured until others
on the machine have left three rounds alone, or at most ``--rounds`` times, and the medians of those count, since near
saturation one hiccup is in every latency after it; where others never left off, the round counts that they disturbed
least. ``others_cpu`` tells which share of the cores they had. With ``--again`` nothing is measured: what an earlier run
measured is simulated anew, which tells what a change of the simulator is worth.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.capacity import Load, Outcome, Plan, Stages, simulate
from benchmarks.capacity_stages import QUIET_ENOUGH, ROUNDS, SIZES, OthersCpu, measure, wait_for_quiet
from benchmarks.load import poisson_times
from benchmarks.models import write_open_clip
from benchmarks.service import CORES, Server, about_this_run, say, serving, under_load

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9)
OVERLOAD = 1.6
WITHIN = 0.2
# Of an edge on Ray, as in app/cluster/application.py.
DECODE_THREADS = 2
# Rounds of a rate that count, of those that others left alone.
COUNTED = 3


def single_process(stages: Mapping[str, Any], max_queued: int) -> Plan:
    """Return the plan that a server on this machine is."""
    batch = stages["encoder"]["batch"]
    return Plan(edge_cores=CORES, max_queued=max_queued, on_edge=True, batch_size=batch, max_ongoing=None)


def on_ray(stages: Mapping[str, Any], max_queued: int) -> Plan:
    """Return the plan that a Ray on this machine is, with one edge and one encoder."""
    return Plan(
        edge_cores=DECODE_THREADS,
        max_queued=max_queued,
        proxies=1,
        shared_cores=CORES,
        batch_size=stages["encoder"]["batch"],
        max_ongoing=None,
    )


def loaded(server: Server, rate: float, seconds: float, most_rounds: int) -> dict[str, Any]:
    """Return the medians of an open loop's figures in the rounds that others left alone."""
    rounds: list[dict[str, Any]] = []
    for _ in range(most_rounds):
        if most_rounds > 1:
            wait_for_quiet()
        others = OthersCpu(server.cpu_s, time.process_time)
        figures = under_load(server, "open", "--rate", rate, "--seconds", seconds)
        rounds.append(figures | {"others_cpu": others.share(figures["generator_cpu_s"])})
        if sum(each["others_cpu"] <= QUIET_ENOUGH for each in rounds) == COUNTED:
            break
    told = ("images_per_s", "p50_ms", "p95_ms", "p99_ms", "others_cpu")
    return medians(rounds) | {"rounds": [{name: each[name] for name in told} for each in rounds]}


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over the quiet rounds, or the least disturbed one's; what else it tells."""
    least = min(rounds, key=lambda each: each["others_cpu"])
    counted = [each for each in rounds if each["others_cpu"] <= QUIET_ENOUGH] or [least]
    figures = {
        name: statistics.median(each[name] for each in counted)
        for name, value in least.items()
        if isinstance(value, (int, float))
    }
    return {**least, **figures}


def compared(figures: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Return what was measured beside what was simulated, and the ratio of each to that."""
    simulated = {
        "images_per_s": round(outcome.images_per_s, 2),
        "p50_ms": round(1000 * outcome.p50_s, 2),
        "p95_ms": round(1000 * outcome.p95_s, 2),
        "p99_ms": round(1000 * outcome.p99_s, 2),
        "mean_batch": round(outcome.mean_batch, 2),
        "refused_share": round(outcome.refused_share, 3),
    }
    ratios = {
        name: round(simulated[name] / figures[name], 3) for name in ("images_per_s", "p50_ms", "p95_ms", "p99_ms")
    }
    return {"measured": dict(figures), "simulated": simulated, "ratios": ratios}


def saturation(stages: Stages, plan: Plan) -> float:
    """Return the images a second that are answered when three times as many come."""
    few = simulate(stages, plan, Load(20, 20)).images_per_s
    rate = 3 * few
    while True:
        done = simulate(stages, plan, Load(rate, 20)).images_per_s
        if done < 0.7 * rate:
            return simulate(stages, plan, Load(OVERLOAD * done, 20)).images_per_s
        rate *= 2


def simulated(stages: Stages, plan: Plan, rate: float, seconds: float) -> Outcome:
    """Return what comes of the load of ``benchmarks/load.py``: the same times of arrival."""
    arrivals = tuple(float(each) for each in poisson_times(rate, seconds))
    return simulate(stages, plan, Load(rate, seconds, arrivals_s=arrivals))


def again(found: Mapping[str, Any], seconds: float, max_queued: int) -> dict[str, Any]:
    """Return what ``check`` did, simulated anew from the same stages, at the same rates."""
    told = found["stages"]
    # Only Ray has proxies.
    stages, plan = Stages.from_json(told), (on_ray if "proxy_s" in told else single_process)(told, max_queued)
    points = [
        {name: each[name] for name in ("share", "rate")}
        | compared(each["measured"], simulated(stages, plan, each["rate"], seconds))
        for each in found["points"]
    ]
    return {**found, "points": points}


def check(
    model: str,
    data_dir: Path,
    sizes: Sequence[int],
    seconds: float,
    max_queued: int,
    rounds: int,
    engine: str = "process",
) -> dict[str, Any]:
    """Measure stages and service, simulate, and return both."""
    told = measure(model, data_dir, sizes, 0.5, rounds, engine)
    stages, plan = Stages.from_json(told), (on_ray if engine == "ray" else single_process)(told, max_queued)
    limit = saturation(stages, plan)
    say(f"{model}: the simulation saturates at {limit:.1f} images/s")
    points = []
    with serving(model, data_dir, "--engine", engine, "--max-queued-images", str(max_queued)) as server:
        under_load(server, "closed", "--connections", 4, "--seconds", 3)
        for share in (*SHARES, OVERLOAD):
            rate = round(share * limit, 2)
            say(f"{model}: open loop at {rate:g} images/s")
            figures = loaded(server, rate, seconds, rounds)
            points.append({"share": share, "rate": rate} | compared(figures, simulated(stages, plan, rate, seconds)))
    return {"model": model, "saturation_images_per_s": round(limit, 1), "points": points, "stages": told}


def verdict(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is not within ``WITHIN``: p50 and p95 below saturation, and the rate of answers above it."""
    misses = []
    for point in points:
        names = ("images_per_s",) if point["share"] > 1 else ("p50_ms", "p95_ms")
        misses += [
            f"{name} at {point['rate']:g}/s is {point['ratios'][name]:.2f} times what was measured"
            for name in names
            if abs(point["ratios"][name] - 1) > WITHIN
        ]
    return misses


def table(found: Mapping[str, Any]) -> str:
    """Return the points in Markdown."""
    columns = (
        "images/s offered",
        "answered: measured",
        "simulated",
        "p50 ms: measured",
        "simulated",
        "p95 ms: measured",
    )
    columns += ("simulated", "p99 ms: measured", "simulated", "batch: measured", "simulated", "others' CPU")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for point in found["points"]:
        measured, simulated = point["measured"], point["simulated"]
        cells = [point["rate"]]
        for name in ("images_per_s", "p50_ms", "p95_ms", "p99_ms"):
            cells += [measured[name], f"{simulated[name]} ({point['ratios'][name]:.2f})"]
        cells += [measured["mean_batch"], simulated["mean_batch"], f"{measured['others_cpu']:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    misses = verdict(found["points"])
    said = "; ".join(misses) if misses else "nothing"
    return "\n".join([*lines, "", f"Off by more than {WITHIN:.0%}: {said}.", ""])


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="as in DEIXIS_MODELS; vit-b-32 is one with random weights")
    parser.add_argument("--engine", choices=["process", "ray"], default="process", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load at each rate (%(default)s)")
    parser.add_argument("--max-queued", type=int, default=256, help="images that the server admits (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of batches that are measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most, of each measurement (%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="with what was measured of the model; else a new one")
    parser.add_argument("--output", type=Path, help="a folder for JSON and table")
    parser.add_argument("--again", type=Path, help="JSON of an earlier run, of the same seconds and images admitted")
    given = parser.parse_args()
    if bool(given.models) == bool(given.again):
        parser.error("give models to measure, or --again with what was measured")
    if given.again:
        about = json.loads(given.again.read_text("utf-8"))
        found = [again(each, given.seconds, given.max_queued) for each in about.pop("models")]
        tell(about, found, given.output and given.output / given.again.stem)
        return
    os.environ["DEIXIS_BUILD_WORDNET"] = "false"  # which takes the cores for minutes
    about, found = about_this_run(), []
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = (given.data_dir or Path(temporary) / "data").absolute()
        for name in given.models:
            model = write_open_clip(Path(temporary) / name) if name == "vit-b-32" else name
            found.append(
                check(model, data_dir, given.sizes, given.seconds, given.max_queued, given.rounds, given.engine)
                | {"model": name if given.engine == "process" else f"{name} on Ray"}
            )
    stem = f"{about['date']}-capacity" + ("-ray" if given.engine == "ray" else "")
    tell(about, found, given.output and given.output / stem)


def tell(about: Mapping[str, Any], found: Sequence[Mapping[str, Any]], stem: Path | None) -> None:
    """Print the tables, and write them and everything as JSON into files whose names begin so."""
    machine = about["machine"]
    head = f"# {about['date']}, commit {about['commit']}, {machine['processor']}, {machine['cores']} cores\n\n"
    report = head + "\n".join(f"## {each['model']}\n\n{table(each)}" for each in found)
    sys.stdout.write(report)
    if stem:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps({**about, "models": found}, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
