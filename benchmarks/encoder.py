"""The encoder alone, which is the limit of a service in front of it, in a process of its own.

    python -m benchmarks.encoder MODEL [--data-dir FOLDER] [--seconds 2] [--precision fp32 --backend torch]

Prints one JSON object: images per second for each size of batch, and for one photograph the milliseconds of decoding,
of the transform, and of a forward pass.
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
    """Load a model as `deixis serve` does, by what was measured of it in ``data_dir``."""
    from app.encoders._base import LoadOptions  # noqa: PLC0415 - imports torch
    from app.encoders.loading import load_encoder  # noqa: PLC0415

    return load_encoder(model, LoadOptions(precision=precision, backend=backend, data_dir=data_dir))


def curve(encoder: Any, pixels: Sequence[Any], sizes: Sequence[int], seconds: float) -> dict[int, float]:
    """Return images per second by size of batch, each over about ``seconds``, two batches under way at a time."""
    rates = {}
    for size in sizes:
        batch = [pixels[index % len(pixels)] for index in range(size)]
        encoder.encode_images(batch)
        done, began = 0, time.perf_counter()
        waiting = encoder.begin_images(batch)
        while time.perf_counter() - began < seconds:
            ahead = encoder.begin_images(batch)
            waiting()
            waiting, done = ahead, done + size
        waiting()
        rates[size] = round((done + size) / (time.perf_counter() - began), 2)
    return rates


def median_ms(work: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call."""
    work()
    times, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 5:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times), 3)


def measure(encoder: Any, sizes: Sequence[int], seconds: float) -> dict[str, object]:
    """Return the figures."""
    from app.images.decode import decode_image  # noqa: PLC0415

    files = photographs()

    def decode() -> Any:
        return decode_image(files[0], max_bytes=10**8, max_pixels=10**8, target_px=encoder.image_size_px)

    picture = decode()
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
            "transform": median_ms(lambda: encoder.transform(picture), seconds / 2),
            "forward": median_ms(lambda: encoder.encode_images(pixels[:1]), seconds),
        },
    }


def main() -> None:
    """Measure one model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each point")
    arguments = parser.parse_args()
    encoder = load(arguments.model, arguments.data_dir, arguments.precision, arguments.backend)
    json.dump(measure(encoder, arguments.sizes, arguments.seconds), sys.stdout)


if __name__ == "__main__":
    main()
