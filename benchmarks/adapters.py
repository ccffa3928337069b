"""Measures the time of methods per image with cached texts: 1,000 classes, 80 templates, one core.

    python -m benchmarks.adapters [--classes 1000] [--prompts 80] [--dims 512] [--output FOLDER]

Features are random, because the time does not depend on them. The methods take turns in each round, so a temporary
slowdown of the machine affects all of them. The result is the median of the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for _library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402 - after the number of threads is set

from app.adapters.auto_clip import AutoCLIP, auto_clip  # noqa: E402
from app.adapters.cosine import Cosine  # noqa: E402
from app.scoring.numerics import unit_rows  # noqa: E402

IMAGES = (1, 8, 64)


def random_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random unit vectors along the last axis, float32."""
    return unit_rows(rng.standard_normal(shape, dtype=np.float32))


def seconds(function: Callable[[], object]) -> float:
    """Return the duration of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = random_rows(rng, arguments.classes, arguments.prompts, arguments.dims)
    classes = unit_rows(prompts.mean(axis=1))
    cosine = Cosine().fit(classes, logit_scale=100.0, logit_bias=None)
    weighted = AutoCLIP().fit(prompts, logit_scale=100.0, logit_bias=None)
    flat = prompts.reshape(-1, arguments.dims)
    figures = []
    for count in IMAGES:
        images = random_rows(rng, count, arguments.dims)
        cosines = (images @ flat.T).reshape(count, arguments.classes, arguments.prompts)
        functions: dict[str, Callable[[], object]] = {
            "cosine (zero-shot, cupl, dclip, waffle)": lambda images=images: cosine.predict(images),
            "autoclip": lambda images=images: weighted.predict(images),
            "of which cosines": lambda images=images: images @ flat.T,
            "of which weights": lambda cosines=cosines: auto_clip(cosines, 0.85),
        }
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(arguments.rounds):
            for name, function in functions.items():
                times[name].append(seconds(function) / count)
        figures += [
            {"method": name, "images": count, "ms_per_image": round(1000 * statistics.median(samples), 3)}
            for name, samples in times.items()
        ]
    sys.stdout.write(
        f"{arguments.classes} classes x {arguments.prompts} prompts x {arguments.dims} dimensions:"
        f" {prompts.nbytes / 2**20:.0f} MiB\n\n| method | images | ms per image |\n|---|---|---|\n"
    )
    for row in figures:
        sys.stdout.write(f"| {row['method']} | {row['images']} | {row['ms_per_image']} |\n")
    if arguments.output is not None:
        file = arguments.output / f"{time.strftime('%Y-%m-%d')}-adapters.json"
        file.write_text(json.dumps({"bytes": prompts.nbytes, "figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
