"""Measures the time and memory of fitting methods on example images, and ZLaP's reference implementation.

    python -m benchmarks.learning [--pool 25000] [--classes 400] [--dims 512] [--output FOLDER]

Features are clusters around random class directions, near the text features, as the methods assume. Everything runs on
one core. The search for neighbours is timed separately. Memory is the peak of arrays during a second fit, without its
inputs.
"""

import argparse
import json
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

for _library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402 - after the number of threads is set

from app.adapters._base import Examples  # noqa: E402
from app.adapters._examples import ExampleAdapter  # noqa: E402
from app.classification.methods import METHODS  # noqa: E402
from app.fewshot.neighbours import NeighbourIndex, use_one_thread  # noqa: E402
from app.scoring.numerics import unit_rows  # noqa: E402

_SCALE = 100.0
_SUPPORT_PER_CLASS = 16
_QUERIES = 64
_ROUNDS = 15


def problem(pool: int, classes: int, dims: int) -> tuple[np.ndarray, Examples, np.ndarray]:
    """Return the text features (c, d), examples without neighbours, and test images."""
    rng = np.random.default_rng(0)
    centres = unit_rows(rng.standard_normal((classes, dims)))

    def around(labels: np.ndarray) -> np.ndarray:
        return unit_rows(centres[labels] + 0.06 * rng.standard_normal((len(labels), dims))).astype(np.float32)

    text = unit_rows(centres + 0.08 * rng.standard_normal((classes, dims))).astype(np.float32)
    support = np.repeat(np.arange(classes), _SUPPORT_PER_CLASS)
    examples = Examples(around(support), support, around(rng.integers(0, classes, pool)))
    return text, examples, around(rng.integers(0, classes, _QUERIES))


def _peak_mib(function: Callable[[], object]) -> float:
    """Return the peak memory of arrays that a call allocates."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 2**20


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(name: str, pool: int, classes: int, dims: int) -> dict[str, Any]:
    """Fit one method, and measure predictions for one image and for 64."""
    use_one_thread()
    text, examples, queries = problem(pool, classes, dims)
    method = METHODS[name]
    adapter: ExampleAdapter = method.example_adapter(dict(method.read_options({})))
    neighbours, near, searched_s = None, None, 0.0
    if adapter.neighbours:
        index = NeighbourIndex(examples.pool_features)
        started = time.perf_counter()
        near = index.within_pool(examples.pool_features, adapter.neighbours)
        searched_s = time.perf_counter() - started
        neighbours = index.search(queries, adapter.neighbours)
    examples_with_neighbours = Examples(
        examples.support_features, examples.support_labels, examples.pool_features, near
    )

    def fit() -> object:
        return adapter.fit(text, logit_scale=_SCALE, logit_bias=None, examples=examples_with_neighbours)

    fit_s, peak_mib = _seconds(fit), _peak_mib(fit)

    def predict_first(count: int) -> Callable[[], object]:
        subset = (
            None if neighbours is None else type(neighbours)(neighbours.indices[:count], neighbours.cosines[:count])
        )
        return lambda: adapter.predict(queries[:count], subset)

    ms = {
        count: statistics.median(_seconds(predict_first(count)) for _ in range(_ROUNDS)) * 1000 / count
        for count in (1, 64)
    }
    return {
        "method": name,
        "neighbours_s": round(searched_s, 2),
        "fit_s": round(fit_s, 2),
        "above_inputs_mib": round(peak_mib),
        "ms_alone": round(ms[1], 3),
        "ms_in_64": round(ms[64], 4),
        "warnings": list(adapter.warnings_),
    }


def oracle(pool: int, classes: int, dims: int) -> dict[str, Any]:
    """Solve the system of ZLaP with its reference implementation; its neighbour search is not timed."""
    from tests.oracles import zlap  # noqa: PLC0415 - not needed by other methods

    text, examples, _ = problem(pool, classes, dims)
    laplacian, _ = zlap.graph(examples.pool_features, text)
    right = np.eye(classes + pool, classes)

    def fit() -> object:
        return zlap.cg_block(laplacian, right)

    return {
        "method": "zlap, reference solver",
        "fit_s": round(_seconds(fit), 2),
        "above_inputs_mib": round(_peak_mib(fit)),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=25_000)
    parser.add_argument("--classes", type=int, default=400)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--methods", nargs="*", default=[name for name, method in METHODS.items() if method.learns])
    parser.add_argument(
        "--no-oracle",
        action="store_true",
        help="skip the reference implementation, whose graph is a matrix of pool x pool",
    )
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    arguments = parser.parse_args()
    size = (arguments.pool, arguments.classes, arguments.dims)
    figures = []
    context = get_context("spawn")
    for name in arguments.methods:
        with context.Pool(1) as process:
            figures.append(process.apply(measure, (name, *size)))
    if "zlap" in arguments.methods and not arguments.no_oracle:
        with context.Pool(1) as process:
            figures.append(process.apply(oracle, size))
    sys.stdout.write(
        f"{arguments.pool} unlabelled images, {_SUPPORT_PER_CLASS * arguments.classes} labelled ones,"
        f" {arguments.classes} classes, {arguments.dims} dimensions, one core\n\n"
        "| method | neighbours s | fit s | MiB above inputs | ms per image, alone | in batches of 64 |\n"
        "|---|---|---|---|---|---|\n"
    )
    for row in figures:
        cells = [row.get(key, "") for key in ("neighbours_s", "fit_s", "above_inputs_mib", "ms_alone", "ms_in_64")]
        sys.stdout.write(f"| {row['method']} | {' | '.join(str(cell) for cell in cells)} |\n")
        for warning in row.get("warnings", []):
            sys.stdout.write(f"{row['method']}: {warning}\n")
    if arguments.output is not None:
        file = arguments.output / f"{time.strftime('%Y-%m-%d')}-learning.json"
        results = {"pool": arguments.pool, "classes": arguments.classes, "dims": arguments.dims, "figures": figures}
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
