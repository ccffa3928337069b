"""Measures the build, the search time and the recall of large caption databases.

    python -m benchmarks.captions [--captions 100000 1000000 5000000] [--dims 512] [--folder DIR] [--output FOLDER]

Captions and features are synthetic, so the time of an encoder is excluded. The features imitate those of a contrastive
model: captions around topics of different sizes, few directions with most of the variance, and images far from all
captions, with a common offset. Half of the images choose the share of the index that a search reads; the other half is
measured. Every step runs in its own process with one thread, except the 16 callers. The round with the smallest median
counts; the JSON has all rounds, and the share of the cores that other processes used.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

for _library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402 - after the number of threads is set

from app.captions.build import BuildOptions, build  # noqa: E402
from app.captions.database import CaptionDatabase  # noqa: E402
from app.captions.manifest import INDEX  # noqa: E402
from app.runtime.cpu import usable_cores  # noqa: E402
from app.scoring.numerics import unit_rows  # noqa: E402

GOALS = {"captions": 1_000_000, "p50_ms": 5, "recall": 0.95, "index_bytes_per_caption": 200}
FINGERPRINT = "synthetic features"
NEAREST = 10
CALLERS = 16
_IMAGES = 1000
_ROUNDS = 5
_PER_TOPIC = 250
_BATCH = 16_384
# Shares of the squared length. Caption: the part common to all captions, its topic, and its own part. Image: the part
# common to all images, its topic and its own part in the directions of captions, and a part outside them. The last
# number is the cosine between the two common parts.
_CAPTION = (0.5, 0.3, 0.2)
_IMAGE = (0.5, 0.12, 0.08, 0.3)
_BETWEEN = 0.3


class Scenes:
    """Synthetic captions with topics, and features of captions and images.

    Args:
        captions: their number.
        dims: dimensions of the features.
    """

    def __init__(self, captions: int, dims: int) -> None:
        rng = np.random.default_rng(0)
        self.captions = captions
        self._dims = dims
        self._topics = max(1, captions // _PER_TOPIC)
        # The variance of the directions decreases as 1/j; a rotation distributes it evenly over the dimensions.
        variance = 1 / (4 + np.arange(dims))
        rotation = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
        self._directions = (np.sqrt(variance / variance.sum())[:, None] * rotation).astype(np.float32)
        self._text, other = unit_rows(rng.standard_normal((2, dims))).astype(np.float32)
        self._image = unit_rows(_BETWEEN * self._text + (1 - _BETWEEN**2) ** 0.5 * other)
        self._centres = self._directed(rng, self._topics)

    def texts(self) -> Iterator[str]:
        """Yield the captions."""
        for number in range(self.captions):
            topic = int(self._topics * (number * 0.618033988749895 % 1) ** 2)  # some topics have more captions
            yield f"a picture of topic {topic} with a few things beside it, number {number}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit rows (n, d) that depend on the topics; the first text seeds the random part."""
        topics = [int(text.split(maxsplit=5)[4]) for text in texts]
        common, topic, own = np.sqrt(_CAPTION, dtype=np.float32)
        rng = np.random.default_rng(crc32(texts[0].encode()))
        return unit_rows(common * self._text + topic * self._centres[topics] + own * self._directed(rng, len(texts)))

    def images(self, count: int) -> np.ndarray:
        """Return unit rows (n, d) of images, with the same distribution of topics as the captions."""
        rng = np.random.default_rng(1)
        topics = (self._topics * rng.random(count) ** 2).astype(np.int64)
        common, topic, own, outside = np.sqrt(_IMAGE, dtype=np.float32)
        seen = topic * self._centres[topics] + own * self._directed(rng, count)
        unseen = unit_rows(rng.standard_normal((count, self._dims))).astype(np.float32)
        return unit_rows(common * self._image + seen + outside * unseen)

    def _directed(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return random rows of length about one in the directions of captions."""
        rows: np.ndarray = rng.standard_normal((count, self._dims), dtype=np.float32) @ self._directions
        return rows


def say(text: str) -> None:
    """Print the progress on standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a command


def build_one(folder: Path, captions: int, dims: int) -> dict[str, Any]:
    """Build a database, and return the duration of each step and the size of each file."""
    scenes = Scenes(captions, dims)
    encoding_s, steps, printed_at = 0.0, {"encode": time.perf_counter()}, time.perf_counter()

    def encode(texts: Sequence[str]) -> np.ndarray:
        nonlocal encoding_s
        started = time.perf_counter()
        rows = scenes.encode(texts)
        encoding_s += time.perf_counter() - started
        return rows

    def advance(stage: str, done: int) -> None:
        nonlocal printed_at
        now = time.perf_counter()
        if stage not in steps or now - printed_at > 10:
            say(f"{captions} captions: {stage} {done}")
            printed_at = now
        steps.setdefault(stage, now)

    manifest = build(
        scenes.texts(),
        folder,
        encode=encode,
        fingerprint=FINGERPRINT,
        name="scenes",
        options=BuildOptions(threads=usable_cores()),
        queries=scenes.images(2 * _IMAGES)[:_IMAGES],
        advance=advance,
    )
    times = [*steps.values(), time.perf_counter()]
    files = {name: file["bytes"] for name, file in manifest.files.items()}
    return {
        "captions": captions,
        "dims": dims,
        "threads": usable_cores(),
        "build_s": round(times[-1] - times[0], 1),
        "steps_s": {step: round(times[place + 1] - times[place], 1) for place, step in enumerate(steps)},
        "synthetic_encoder_s": round(encoding_s, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_rss_with_mapped_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "index": manifest.to_json()["index"],
        "recall_while_tuning": dict(manifest.recall),
        "bytes": files,
        "index_bytes_per_caption": round(files[INDEX] / captions, 1),
        "bytes_per_caption": round(sum(files.values()) / captions, 1),
    }


def resident_mib() -> dict[str, float]:
    """Return the resident memory of this process, anonymous and file-backed (Linux only)."""
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()[1:]
    kib = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return {
        "anonymous": round(kib["Anonymous"] / 1024, 1),
        "file_backed": round((kib["Rss"] - kib["Anonymous"]) / 1024, 1),
    }


def serve(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Open a database that is not in the page cache, search for single images, and return the figures.

    The process keeps the pages it has read, so its memory is that of a service after the same number of requests.
    """
    import faiss  # noqa: F401, PLC0415 - its libraries are part of the memory before

    for file in folder.glob("*/*"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_mib()
    started = time.perf_counter()
    database = CaptionDatabase.open(folder, fingerprint=FINGERPRINT)
    open_ms = 1000 * (time.perf_counter() - started)
    resident_opened = resident_mib()
    cold = _times(lambda image: database.search(image, NEAREST), images[:, None])
    return {
        "open_cold_ms": round(open_ms, 1),
        "cold": _quantiles(cold[:100]),
        "resident_mib": {"before": before, "opened": resident_opened, f"after_{len(images)}_searches": resident_mib()},
        "nbytes_resident_mib": round(database.nbytes_resident / 2**20, 1),
    }


def search(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Return the duration of searches for one caller, for 16 callers, and in batches."""
    started = time.perf_counter()
    database = CaptionDatabase.open(folder, fingerprint=FINGERPRINT)
    open_ms = 1000 * (time.perf_counter() - started)
    apart = images[:, None]

    def search_one(image: np.ndarray) -> object:
        return database.search(image, NEAREST)

    def alone() -> list[float]:
        return _times(search_one, apart)

    def together() -> list[float]:
        with ThreadPoolExecutor(CALLERS) as callers:
            shares = [apart[first::CALLERS] for first in range(CALLERS)]
            return [
                duration for times in callers.map(lambda share: _times(search_one, share), shares) for duration in times
            ]

    def batches() -> list[float]:
        whole = len(images) // CALLERS * CALLERS
        return _times(search_one, images[:whole].reshape(-1, CALLERS, images.shape[1]))

    loads = {"one_caller": alone, "callers": together, "batches": batches}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    alone()  # fills the page cache
    for _ in range(_ROUNDS):
        for name, load in loads.items():
            others, started = _others_cpu_s(), time.perf_counter()
            times = load()
            seconds = time.perf_counter() - started
            shared = (_others_cpu_s() - others) / seconds / usable_cores()
            figures = _quantiles(times) | {"images_per_s": round(len(images) / seconds), "others_cpu": round(shared, 2)}
            rounds[name].append(figures)
    best = {name: min(runs, key=lambda run: run["p50_ms"]) for name, runs in rounds.items()}
    return {"open_warm_ms": round(open_ms, 1), **best, "rounds": rounds}


def recall(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Return the recall of a search, and the cosines of the nearest captions."""
    import faiss  # noqa: PLC0415 - imported in the measured process only

    database = CaptionDatabase.open(folder, fingerprint=FINGERPRINT)
    faiss.omp_set_num_threads(1)
    cosines = np.full((len(images), NEAREST), -np.inf, np.float32)
    indices = np.full((len(images), NEAREST), -1)
    for first in range(0, len(database), _BATCH):
        rows = database.features(np.arange(first, min(first + _BATCH, len(database))))
        near, where = faiss.knn(images, rows, NEAREST, metric=faiss.METRIC_INNER_PRODUCT)
        cosines, indices = np.concatenate([cosines, near], axis=1), np.concatenate([indices, first + where], axis=1)
        kept = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
        cosines, indices = (np.take_along_axis(array, kept, axis=1) for array in (cosines, indices))
    found = database.search(images, NEAREST)[0]
    hits = [len(set(some) & set(right)) for some, right in zip(found.tolist(), indices.tolist(), strict=True)]
    return {
        "recall": round(float(np.mean(hits)) / NEAREST, 4),
        "first_found": round(float((found[:, 0] == indices[:, 0]).mean()), 4),
        "nearest_cosine": [round(float(cosine), 3) for cosine in np.quantile(cosines[:, 0], [0.05, 0.5, 0.95])],
    }


def _times(function: Callable[[np.ndarray], object], queries: np.ndarray) -> list[float]:
    durations = []
    for query in queries:
        started = time.perf_counter()
        function(query)
        durations.append(time.perf_counter() - started)
    return durations


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = 1000 * np.quantile(seconds, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def _others_cpu_s() -> float:
    """Return the CPU time of all other processes, including those of the host (Linux only)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text("ascii").split(maxsplit=9)[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle time and disk waits
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def measure(folder: Path, captions: int, dims: int) -> dict[str, Any]:
    """Build a database in ``folder`` unless it exists, and return all its figures."""
    context = get_context("spawn")

    def apart(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        say(f"{captions} captions: {step.__name__}")
        with context.Pool(1) as process:
            return process.apply(step, (folder, *arguments))

    cached = folder.with_name(f"{folder.name}.json")
    if cached.exists():
        built = json.loads(cached.read_text("utf-8"))
    else:
        built = apart(build_one, captions, dims)
        cached.write_text(json.dumps(built), "utf-8")
    images = Scenes(captions, dims).images(2 * _IMAGES)[_IMAGES:]
    return built | apart(serve, images) | apart(search, images) | apart(recall, images)


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    rows: dict[str, Callable[[dict[str, Any]], object]] = {
        "build, s": lambda row: row["build_s"],
        "- encode (of which the synthetic encoder)": lambda row: (
            f"{row['steps_s']['encode']} ({row['synthetic_encoder_s']})"
        ),
        "- assemble": lambda row: row["steps_s"]["assemble"],
        "- index": lambda row: row["steps_s"]["index"],
        "- measure and publish": lambda row: row["steps_s"]["measure"],
        "lists, lists read": lambda row: f"{row['index']['lists']}, {row['index']['probes']}",
        "bytes per caption: index": lambda row: row["index_bytes_per_caption"],
        "bytes per caption: all files": lambda row: row["bytes_per_caption"],
        f"recall@{NEAREST}": lambda row: row["recall"],
        "cosine of the nearest, median": lambda row: row["nearest_cosine"][1],
        "1 caller: p50 / p99, ms": lambda row: _both(row["one_caller"]),
        f"{CALLERS} callers: p50 / p99, ms": lambda row: _both(row["callers"]),
        f"{CALLERS} callers: images/s": lambda row: row["callers"]["images_per_s"],
        f"batches of {CALLERS}: p50 / p99 of a batch, ms": lambda row: _both(row["batches"]),
        "cold, first 100: p50 / p99, ms": lambda row: _both(row["cold"]),
        "open, ms: cold / warm": lambda row: f"{row['open_cold_ms']} / {row['open_warm_ms']}",
        f"anonymous MiB: before, opened, after {_IMAGES} searches": lambda row: _resident(row, "anonymous"),
        f"file-backed MiB: before, opened, after {_IMAGES} searches": lambda row: _resident(row, "file_backed"),
    }
    lines = [f"| captions | {' | '.join(format(row['captions'], ',') for row in figures)} |", "|---" * len(figures)]
    lines[1] += "|---|"
    lines += [f"| {name} | {' | '.join(str(cell(row)) for row in figures)} |" for name, cell in rows.items()]
    return "\n".join(lines) + "\n"


def _both(quantiles: dict[str, float]) -> str:
    return f"{quantiles['p50_ms']} / {quantiles['p99_ms']}"


def _resident(figures: dict[str, Any], kind: str) -> str:
    return ", ".join(f"{row[kind]:.0f}" for row in figures["resident_mib"].values())


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, nargs="+", default=[100_000, 1_000_000, 5_000_000])
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument(
        "--folder", type=Path, help="folder that keeps the databases for the next run; temporary by default"
    )
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    arguments = parser.parse_args()
    from benchmarks.processes import about_this_run  # noqa: PLC0415 - not imported in the measured processes

    about = about_this_run()
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        for captions in arguments.captions:
            folder: Path = arguments.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            figures.append(measure(folder / f"{captions}-{arguments.dims}", captions, arguments.dims))
            if arguments.output is not None:
                arguments.output.mkdir(parents=True, exist_ok=True)
                results = {**about, "goals": GOALS, "figures": figures}
                file = arguments.output / f"{about['date']}-captions.json"
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(figures))


if __name__ == "__main__":
    main()
