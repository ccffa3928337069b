"""Measures `deixis bulk` in one process and on Ray, compared with the encoder alone, and the cost of `kill -9`.

    python -m benchmarks.bulk FOLDER [--images 10000] [--model embedded] [--replicas 1 2] [--save FOLDER]

The photographs of FOLDER are repeated, as links, up to the number of images. Each engine is measured over the whole
command, and between its first and its last part, which excludes the start of Ray and the loading of the model. The
encoder alone is measured before and after; the better run counts. In the last round the command is killed with its
children when half of the parts exist, and resumed; its rows are compared with those of one process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from app.images.discovery import images_below
from benchmarks.processes import about_this_run, run_json, say

LABELS = "dress,hat,long sleeve top,jacket,pants,shirt,shoes,shorts,skirt,t-shirt"
PART_IMAGES = 256
_TIMEOUT_S = 3600


def link_photos(source: Path, target: Path, images: int) -> None:
    """Fill a folder with this number of links to the images of another folder."""
    found = [file.resolve() for file in images_below(source)]
    if not found:
        raise SystemExit(f"there are no images in {source}")
    target.mkdir()
    for number in range(images):
        file = found[number % len(found)]
        (target / f"{number:06d}{file.suffix}").symlink_to(file)


def command(photos: Path, out: Path, *more: object) -> list[str]:
    """Return the command line of a run."""
    given = (photos, "--labels", LABELS, "--out", out, "--part-images", PART_IMAGES, *more)
    return [sys.executable, "-m", "deixis", "bulk", *map(str, given)]


def part_times(out: Path) -> list[tuple[float, int]]:
    """Return the time of each part in seconds and its number of rows, in order of time."""
    return sorted((file.stat().st_mtime, pq.read_metadata(file).num_rows) for file in out.glob("part-*.parquet"))


def measure(photos: Path, out: Path, *more: object) -> dict[str, Any]:
    """Run the command, and return its images per second."""
    started = time.perf_counter()
    done = subprocess.run(command(photos, out, *more), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the command ended with {done.returncode}: {done.stderr[-2000:]}")
    parts = part_times(out)
    images = sum(rows for _, rows in parts)
    between_s = parts[-1][0] - parts[0][0]
    return {
        "images": images,
        "wall_s": round(wall_s, 1),
        "images_per_s": round(images / wall_s, 1),
        "between_parts_images_per_s": round((images - parts[0][1]) / between_s, 1) if between_s else None,
    }


def kill_and_resume(photos: Path, out: Path, images: int, *more: object) -> dict[str, Any]:
    """Kill the command at half of the images, resume it, and return the figures."""
    process = subprocess.Popen(
        command(photos, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while len(list(out.glob("part-*.parquet"))) < images / PART_IMAGES / 2:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the command ended before it could be killed")
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}
    kept = sum(rows for _, rows in part_times(out))
    resumed = measure(photos, out, *more)
    return {
        "kept_images": kept,
        "done_again_images": sum(file.stat().st_mtime_ns != at for file, at in before.items()),
        "resumed_wall_s": resumed["wall_s"],
        "images": resumed["images"],
    }


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Return the number of rows that differ between two runs, and the largest difference of a score."""
    first, second = (pq.read_table(folder).to_pylist() for folder in (one, other))
    pairs = list(zip(first, second, strict=True))
    differences = [
        np.abs(np.subtract(a["scores"], b["scores"])).max()
        for a, b in pairs
        if a["labels"] is not None and a["labels"] == b["labels"]
    ]
    return {
        "rows": len(pairs),
        "other_key_label_or_error": sum(
            (a["key"], a["label"], a["error"]) != (b["key"], b["label"], b["error"]) for a, b in pairs
        ),
        "identical": sum(a == b for a, b in pairs),
        "largest_difference_of_a_score": float(max(differences, default=0)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or save the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--replicas",
        type=int,
        nargs="*",
        default=[1, 2],
        help="numbers of replicas on Ray; without a number, Ray is not measured",
    )
    parser.add_argument("--replica-cpus", type=float, default=2)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="folder for DATE-bulk.json")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ |= {"DEIXIS_DATA_DIR": str(place / "data"), "DEIXIS_MODELS": given.model}
        photos = place / "photos"
        link_photos(given.folder, photos, given.images)
        encoder = ("benchmarks.encoder", given.model, "--data-dir", place / "data", "--sizes", 8, 16, 32)
        say("the encoder alone")
        alone = [run_json(*encoder)]
        found: dict[str, Any] = {}
        say("in one process")
        found["one process"] = measure(photos, place / "process")
        for count in given.replicas:
            say(f"on Ray with {count} replicas")
            ray = ("--engine", "ray", "--replicas", count, "--replica-cpus", given.replica_cpus)
            found[f"ray, replicas: {count}"] = measure(photos, place / f"ray-{count}", *ray)
        say("killed and resumed")
        kill = kill_and_resume(photos, place / "killed", given.images)
        say("the encoder alone, again")
        alone.append(run_json(*encoder))
        limit = max(way["images_per_s"] for run in alone for way in run["limit"]["ways"].values())
        for figures in found.values():
            figures["of_limit"] = round(figures["images_per_s"] / limit, 3)
            if figures["between_parts_images_per_s"]:
                figures["between_parts_of_limit"] = round(figures["between_parts_images_per_s"] / limit, 3)
        results = {
            **about_this_run(),
            "model": given.model,
            "folder_images": given.images,
            "encoder": {"limit_images_per_s": limit, "runs": alone},
            "runs": found,
            "kill -9": {**kill, "against_uninterrupted": compare(place / "process", place / "killed")},
            "ray_against_one_process": {
                name: compare(place / "process", place / f"ray-{count}")
                for count in given.replicas
                for name in [f"replicas: {count}"]
            },
        }
    text = json.dumps(results, indent=2)
    sys.stdout.write(text + "\n")
    if given.save is not None:
        given.save.mkdir(parents=True, exist_ok=True)
        (given.save / f"{results['date']}-bulk.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
