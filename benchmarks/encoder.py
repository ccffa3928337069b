"""Measures the encoder alone in a separate process; it limits the throughput of the service.

    python -m benchmarks.encoder MODEL [--data-dir FOLDER] [--seconds 2] [--precision fp32 --backend torch]

Prints one JSON object: images per second for each batch size, and the milliseconds of decoding, the transform and a
forward pass for one photograph.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import photographs

SIZES = (1, 2, 4, 8, 16, 32)


def load(model: str, data_dir: Path | None, precision: str, backend: str) -> Any:
    """Load a model as `deixis serve` does, with the measurements in ``data_dir``."""
    from app.encoders._base import LoadOptions  # noqa: PLC0415 - imports torch
    from app.encoders.loading import load_encoder  # noqa: PLC0415

    return load_encoder(model, LoadOptions(precision=precision, backend=backend, data_dir=data_dir))


def curve(encoder: Any, pixels: Sequence[Any], sizes: Sequence[int], seconds: float) -> dict[int, float]:
    """Return images per second by batch size, each measured for ``seconds`` with two concurrent batches."""
    rates = {}
    for size in sizes:
        batch = [pixels[index % len(pixels)] for index in range(size)]
        encoder.encode_images(batch)
        done, started = 0, time.perf_counter()
        waiting = encoder.begin_images(batch)
        while time.perf_counter() - started < seconds:
            next_batch = encoder.begin_images(batch)
            waiting()
            waiting, done = next_batch, done + size
        waiting()
        rates[size] = round((done + size) / (time.perf_counter() - started), 2)
    return rates


def median_ms(function: Callable[[], object], seconds: float) -> float:
    """Return the median duration of a call."""
    function()
    times, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 5:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 3)


def measure(encoder: Any, sizes: Sequence[int], seconds: float) -> dict[str, object]:
    """Return the results."""
    from app.images.decode import decode_image  # noqa: PLC0415

    files = photographs()

    def decode() -> Any:
        return decode_image(files[0], max_bytes=10**8, max_pixels=10**8, target_px=encoder.image_size_px)

    image = decode()
    pixels = [
        encoder.transform(decode_image(file, max_bytes=10**8, max_pixels=10**8, target_px=encoder.image_size_px))
        for file in files
    ]
    rates = curve(encoder, pixels, sizes, seconds)
    best = max(rates, key=lambda size: rates[size])
    path = encoder.image_path
    return {
        "path": {"backend": path.backend, "device": path.device, "precision": path.precision, "batch": path.batch_size},
        "images_per_s": rates,
        "best": {"batch": best, "images_per_s": rates[best]},
        "lone_ms": {
            "decode": median_ms(decode, seconds / 2),
            "transform": median_ms(lambda: encoder.transform(image), seconds / 2),
            "forward": median_ms(lambda: encoder.encode_images(pixels[:1]), seconds),
        },
    }


def main() -> None:
    """Measure one model and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    arguments = parser.parse_args()
    encoder = load(arguments.model, arguments.data_dir, arguments.precision, arguments.backend)
    json.dump(measure(encoder, arguments.sizes, arguments.seconds), sys.stdout)


if __name__ == "__main__":
    main()
