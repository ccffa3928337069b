"""The captions of a database on disk.

``texts.bin`` contains their UTF-8 bytes one after another; ``offsets.npy`` contains n + 1 ascending uint64, where each
caption begins and the last one ends. Both files are mapped into memory, so a caption is read from the disk when it is
needed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Int, UInt64

from app.errors import StoreError
from app.runtime.arrays import map_array

TEXTS = "texts.bin"
OFFSETS = "offsets.npy"


class CaptionTexts:
    """A sequence of n captions on the disk; several threads may read it.

    Args:
        texts: the bytes of all captions.
        offsets: the start of each caption, and the end of the last one.
    """

    def __init__(self, texts: np.ndarray, offsets: UInt64[np.ndarray, " n+1"]) -> None:
        self._texts = texts
        self._offsets = offsets

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map the two files of ``folder``.

        Raises:
            StoreError: a file is missing or cannot be read, or the two files do not match.
        """
        try:
            offsets = map_array(folder / OFFSETS)
            texts = _mapped(folder / TEXTS)
        except Exception as error:  # NumPy raises many kinds of errors for a damaged header
            raise StoreError(f"the captions in '{folder}' cannot be read: {error}; build the database again") from error
        if offsets.ndim != 1 or offsets.dtype != np.uint64 or not len(offsets):
            problem = f"'{folder / OFFSETS}' is damaged: it has shape {offsets.shape} and type {offsets.dtype}"
            raise StoreError(f"{problem}; build the database again")
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != len(texts):
            problem = f"the offsets in '{folder}' go from {first} to {last}, but the captions have {len(texts)} bytes"
            raise StoreError(f"{problem}; build the database again")
        return cls(np.asarray(texts), np.asarray(offsets))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"caption {index} of {len(self)}")
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._texts[first:last].tobytes().decode("utf-8", "replace")

    @property
    def lengths(self) -> UInt64[np.ndarray, " n"]:
        """The number of bytes of each caption."""
        return np.diff(self._offsets)

    def packed(self, indices: Int[np.ndarray, " m"]) -> bytes:
        """Return the bytes of the captions at ``indices``, in that order, one after another."""
        first = self._offsets[indices].astype(np.int64)
        lengths = self._offsets[indices + 1].astype(np.int64) - first
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        content: bytes = self._texts[np.repeat(first, lengths) + within].tobytes()
        return content

    def many(self, indices: Iterable[int] | Int[np.ndarray, " m"]) -> list[str]:
        """Return the captions at ``indices``, in that order."""
        return [self[int(index)] for index in indices]


def pack(captions: Sequence[str]) -> tuple[bytes, UInt64[np.ndarray, " n"]]:
    """Return the captions' bytes one after another, and the length of each; lone surrogates become question marks."""
    encoded = [caption.encode("utf-8", "replace") for caption in captions]
    return b"".join(encoded), np.array([len(content) for content in encoded], np.uint64)


def offsets_of(lengths: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n+1"]:
    """Return the start of each caption, and the end of the last one."""
    offsets = np.zeros(len(lengths) + 1, np.uint64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _mapped(file: Path) -> np.ndarray:
    if not file.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, np.uint8)
    return np.memmap(file, np.uint8, mode="r")
