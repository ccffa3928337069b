"""Read files of NumPy from several threads at once.

NumPy parses the header of an array with ``ast.literal_eval``. In Python 3.11, threads share the recursion counter of
that parser, and an intact file may raise ``SystemError: AST constructor recursion depth mismatch``
(https://github.com/python/cpython/issues/106905). So only one thread at a time parses headers.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_parser = threading.Lock()


def map_array(file: Path) -> np.ndarray:
    """Return the array of a .npy file, mapped read-only.

    Raises:
        Exception: the file is missing or damaged; NumPy raises errors of many types.
    """
    with _parser:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        return array


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return arrays of an .npz file, after comparing their checksums.

    Raises:
        Exception: the file is missing or damaged, or lacks an array; NumPy raises errors of many types.
    """
    with _parser, file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
        return [content[name] for name in names]
