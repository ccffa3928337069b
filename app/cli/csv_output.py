"""CSV that is safe to open in a spreadsheet, which would run a cell that begins like a formula.

Other programs can undo the changes: a path gets ``./`` in front, which names the same file, and another text an
apostrophe. Numbers stay as they are.
"""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TextIO, TypeAlias

from app.runtime.file_names import file_text

Cell: TypeAlias = str | PurePath

# As OWASP lists them, also in full width. After apostrophes, so that those of the text are not taken for ours.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def write_rows(file: TextIO, rows: Iterable[Iterable[Cell]]) -> None:
    """Write rows of texts and paths."""
    csv.writer(file).writerows([_safe(cell) for cell in row] for row in rows)


def read_rows(file: TextIO) -> Iterator[list[str]]:
    """Yield the rows that ``write_rows`` has written, with the texts as they were; paths keep their ``./``."""
    for row in csv.reader(file):
        yield [cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell for cell in row]


def _safe(cell: Cell) -> str:
    if isinstance(cell, PurePath):
        text = file_text(cell)
        return f".{os.sep}{text}" if _FORMULA.match(text) else text
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell
