"""What a method costs per image once its texts are there: 1,000 classes, 80 templates, one core, one image and many.

    python -m benchmarks.adapters [--classes 1000] [--prompts 80] [--dims 512] [--output FOLDER]

Features are random: the arithmetic does not depend on them. Methods take turns within each round, so that a machine
that is slower for a while is so for all of them; the median of the rounds counts.
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


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a folder for the figures as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = random_rows(rng, arguments.classes, arguments.prompts, arguments.dims)
    classes = unit_rows(prompts.mean(axis=1))
    cosine = Cosine().fit(classes, logit_scale=100.0, logit_bias=None)
    weighing = AutoCLIP().fit(prompts, logit_scale=100.0, logit_bias=None)
    flat = prompts.reshape(-1, arguments.dims)
    figures = []
    for count in IMAGES:
        images = random_rows(rng, count, arguments.dims)
        cosines = (images @ flat.T).reshape(count, arguments.classes, arguments.prompts)
        ways: dict[str, Callable[[], object]] = {
            "cosine (zero-shot, cupl, dclip, waffle)": lambda images=images: cosine.predict(images),
            "autoclip": lambda images=images: weighing.predict(images),
            "of that, the cosines": lambda images=images: images @ flat.T,
            "of that, the weighing": lambda cosines=cosines: auto_clip(cosines, 0.85),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, work in ways.items():
                taken[name].append(seconds(work) / count)
        figures += [
            {"method": name, "images": count, "ms_per_image": round(1000 * statistics.median(each), 3)}
            for name, each in taken.items()
        ]
    sys.stdout.write(
        f"{arguments.classes} classes x {arguments.prompts} prompts x {arguments.dims} dimensions:"
        f" {prompts.nbytes / 2**20:.0f} MiB\n\n| method | images | ms per image |\n|---|---|---|\n"
    )
    for each in figures:
        sys.stdout.write(f"| {each['method']} | {each['images']} | {each['ms_per_image']} |\n")
    if arguments.output is not None:
        file = arguments.output / f"{time.strftime('%Y-%m-%d')}-adapters.json"
        file.write_text(json.dumps({"bytes": prompts.nbytes, "figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
