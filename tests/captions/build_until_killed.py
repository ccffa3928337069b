"""Builds a small caption database and prints each step. test_build.py runs it, kills it and starts it again.

After the encoding, each further step waits for a line on standard input.
"""

import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from app.captions.build import BuildOptions, build
from app.captions.cleaning import Counts, clean_captions

COUNT = 2000
DIMS = 32
OPTIONS = BuildOptions(shard_size=128, batch_size=64, exact_up_to=500)


def features_of(texts) -> np.ndarray:
    """Return unit rows that depend only on the text; texts with the same first words are near each other."""
    rows = np.array([_row(text.split()[0]) + 0.4 * _row(text) for text in texts], np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def captions() -> Iterator[str]:
    return (f"kind{number % 40} in scene {number}" for number in range(COUNT))


def build_all(folder: Path, advance=None, encode=features_of) -> None:
    counts = Counts()
    build(
        clean_captions(captions(), counts=counts),
        folder,
        encode=encode,
        fingerprint="of these rows",
        model="rows by hash",
        name="scenes",
        options=OPTIONS,
        counts=counts,
        advance=advance,
    )


def _row(text: str) -> np.ndarray:
    seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(DIMS)


def main(folder: Path) -> None:
    def encode(texts):
        print("encoding", len(texts), flush=True)  # noqa: T201 - the parent reads it
        return features_of(texts)

    def advance(stage, done):
        print(stage, done, flush=True)  # noqa: T201
        if stage != "encode":
            sys.stdin.readline()  # these steps are so short that the parent might react too late

    build_all(folder, advance, encode)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
