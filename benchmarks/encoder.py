"""Measures the encoder alone in a separate process; it limits the throughput of the service.

    python -m benchmarks.encoder MODEL [--data-dir FOLDER] [--seconds 2] [--precision fp32 --backend torch]

It runs the fastest few ways to put images into batches, and prints one JSON object:

- limit: images per second of forward passes, and milliseconds of a core per image;
- reading: the same when the process also decodes and transforms the photographs, with a thread per core;
- lone: the milliseconds of decoding, the transform and a forward pass for one photograph.

With ``--commands``, it stays loaded and reads commands such as ``["limit", "2"]`` from each line: what, and seconds.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, cycle, pairwise
from statistics import median
from typing import Any

from app.encoders.loading import load_encoder
from app.images.decode import decode_image
from app.main import load_options
from app.observability.logs import configure_logs
from app.runtime.cpu import usable_cores
from app.settings import load_settings
from benchmarks.load import photographs

SIZES = (1, 2, 4, 8, 16, 32)
CORES = usable_cores()
# Number of ways that are measured each time, the fastest of a short trial.
WAYS = 2
_TRIAL_S = 0.4
_IMAGES_IN_TURNS = 16


class Usage:
    """The duration of a block, and the CPU time of this process."""

    wall_s = 0.0
    cpu_s = 0.0

    def figures(self, images: int) -> dict[str, float]:
        """Return the rate, and the time of the cores per image."""
        return {
            "images_per_s": round(images / self.wall_s, 2),
            "cpu_ms": round(1000 * self.cpu_s / images, 3),
        }


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure a block."""
    usage, began, used = Usage(), time.perf_counter(), time.process_time()
    yield usage
    usage.wall_s, usage.cpu_s = time.perf_counter() - began, time.process_time() - used


class Encoder:
    """An encoder, loaded as `deixis serve` does, and photographs.

    Args:
        encoder: the loaded model.
        sizes: batch sizes to try.
    """

    def __init__(self, encoder: Any, sizes: Sequence[int]) -> None:
        self._encoder = encoder
        self._files = photographs()
        self._threads = ThreadPoolExecutor(CORES)
        self._passes = ThreadPoolExecutor(encoder.image_streams)
        self._pixels = [self._read(file) for file in self._files]
        for size in sizes:  # the first batch of a size takes longer
            self._forward(size, 1, 0)
        trials = {
            (size, at_once): self._forward(size, at_once, _TRIAL_S)["images_per_s"]
            for size in sizes
            for at_once in ((2,) if encoder.image_streams == 1 else (1, encoder.image_streams + 1))
        }
        self._ways = sorted(trials, key=trials.__getitem__, reverse=True)[:WAYS]

    def path(self, _: float = 0) -> dict[str, Any]:
        """Return how the image tower runs."""
        path = self._encoder.image_path
        return {
            "backend": path.backend,
            "device": path.device,
            "precision": path.precision,
            "batch": path.batch_size,
        }

    def limit(self, seconds: float) -> dict[str, Any]:
        """Measure forward passes alone."""
        return {
            "ways": {
                f"batches of {size}, {at_once} at once": self._forward(size, at_once, seconds / len(self._ways))
                for size, at_once in self._ways
            }
        }

    def reading(self, seconds: float) -> dict[str, Any]:
        """Measure decoding, the transform and forward passes on the same cores: ahead of the batches, and in turns."""
        size, at_once = self._ways[0]
        in_turns = max(size, _IMAGES_IN_TURNS)
        return {
            "ways": {
                f"ahead of batches of {size}, {at_once} at once": self._read_and_forward(
                    size, at_once, size * at_once + CORES, seconds / 2
                ),
                f"in turns with a batch of {in_turns}": self._read_and_forward(in_turns, 1, 0, seconds / 2),
            }
        }

    def lone(self, seconds: float) -> dict[str, Any]:
        """Measure one photograph after the other, with nothing else in this process."""
        encoder, rows = self._encoder, []
        ends = time.perf_counter() + seconds
        with measured() as usage:
            for file in cycle(self._files):
                times = [time.perf_counter()]
                image = self._decode(file)
                times.append(time.perf_counter())
                pixels = encoder.transform(image)
                times.append(time.perf_counter())
                encoder.begin_images([pixels])()
                times.append(time.perf_counter())
                rows.append([times[3] - times[0], *(after - before for before, after in pairwise(times))])
                if times[-1] > ends:
                    break
        total, decode, transform, forward = (round(1000 * median(column), 3) for column in zip(*rows, strict=True))
        parts = {"decode": decode, "transform": transform, "forward": forward}
        return {"p50_ms": total, "parts_ms": parts, "cpu_ms": usage.figures(len(rows))["cpu_ms"]}

    def _decode(self, file: bytes) -> Any:
        return decode_image(file, max_bytes=10**8, max_pixels=10**8, target_px=self._encoder.image_size_px)

    def _read(self, file: bytes) -> Any:
        return self._encoder.transform(self._decode(file))

    def _begin(self, batch: Sequence[Any], at_once: int) -> Callable[[], object]:
        """Start a pass, and return a function that waits for it: on all cores, or beside those of other threads."""
        if self._encoder.image_streams == 1:
            return self._encoder.begin_images(batch)  # type: ignore[no-any-return]
        return self._passes.submit(self._pass, batch, alone=at_once == 1).result

    def _pass(self, batch: Sequence[Any], *, alone: bool) -> object:
        return self._encoder.begin_images(batch, alone=alone)()

    def _forward(self, size: int, at_once: int, seconds: float) -> dict[str, float]:
        batch = [self._pixels[index % len(self._pixels)] for index in range(size)]
        running: deque[Callable[[], object]] = deque()
        images, ends = 0, time.perf_counter() + seconds
        with measured() as usage:
            while not images or time.perf_counter() < ends:
                running.append(self._begin(batch, at_once))
                images += size
                if len(running) == at_once:
                    running.popleft()()
            while running:
                running.popleft()()
        return usage.figures(images)

    def _read_and_forward(self, size: int, at_once: int, ahead: int, seconds: float) -> dict[str, float]:
        """Encode while threads read up to ``ahead`` further photographs; with 0, read a batch, then encode it."""
        reading: deque[Future[Any]] = deque()
        running: deque[Callable[[], object]] = deque()
        images, numbers, ends = 0, count(), time.perf_counter() + seconds
        with measured() as usage:
            while True:
                while len(reading) < max(ahead, size) and time.perf_counter() < ends:
                    reading.append(self._threads.submit(self._read, self._files[next(numbers) % len(self._files)]))
                if not reading:
                    break
                batch = [reading.popleft().result() for _ in range(min(size, len(reading)))]
                running.append(self._begin(batch, at_once))
                images += len(batch)
                if len(running) == at_once:
                    running.popleft()()
            while running:
                running.popleft()()
        return usage.figures(images)


def main() -> None:
    """Measure one model, once or for each command, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", help="folder with the measurements of `deixis models tune`")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--commands", action="store_true", help="read commands from standard input")
    arguments = parser.parse_args()
    configure_logs("console", "warning")
    settings = load_settings(
        data_dir=arguments.data_dir,
        precision=arguments.precision,
        image_backend=arguments.backend,
        tuning_seconds="0",
    )
    encoder = Encoder(load_encoder(arguments.model, load_options(settings)), arguments.sizes)
    measures = {"path": encoder.path, "limit": encoder.limit, "reading": encoder.reading, "lone": encoder.lone}
    if not arguments.commands:
        json.dump({name: measure(arguments.seconds) for name, measure in measures.items()}, sys.stdout)
        return
    for line in sys.stdin:
        name, *seconds = json.loads(line)
        print(json.dumps(measures[name](*map(float, seconds))), flush=True)  # noqa: T201 - the output of the command


if __name__ == "__main__":
    main()
