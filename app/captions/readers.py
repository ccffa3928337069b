"""Reads the captions of files in several formats: text, CSV, TSV, JSON, JSON lines and Parquet."""

import csv
import io
import json
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from app.captions.cleaning import Counts
from app.captions.json_array import MAX_ELEMENT_CHARS, JsonArrayReader
from app.errors import InvalidFieldError, did_you_mean
from app.runtime.compression import COMPRESSED, missing_extra, unpacked
from app.runtime.regular_files import open_regular

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

# The names that data sets give to their captions, the most likely first.
_COLUMNS = ("caption", "captions", "text", "title", "alt_text", "alttext", "alt", "description", "sentence", "raw")

_URL = re.compile(r"(https?://|www\.)\S*", re.IGNORECASE)

_NUMBER = re.compile(r"[-+]?[\d.,:]*")

_MAX_LINE_BYTES = MAX_ELEMENT_CHARS
_ROWS_PER_BATCH = 4096
# The decoder turns bytes that are not UTF-8 into these characters, which valid text never contains.
_UNDECODABLE = re.compile("[\udc80-\udcff]")


class CaptionReader:
    """Reads one source; ``form`` is the name of its format, known once it is open.

    Args:
        where: the source as messages show it.
        column: the name or index of the column with the captions; None looks for it.
        counts: lines, rows and elements that cannot be read are added to ``bad``.
    """

    def __init__(self, where: str, column: str | None, counts: Counts) -> None:
        self.form = "text"
        self._where = where
        self._column = column
        self._counts = counts

    def open(
        self, source: Path | Literal["-"], suffix: str | None, stdin: BinaryIO | None, stack: ExitStack
    ) -> Generator[str, None, None]:
        """Yield the captions; ``stack`` closes the files."""
        name = (suffix or ("" if source == "-" else source.name)).lower()
        compression = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
        form = next((ending for ending in SUFFIXES if name.removesuffix(compression).endswith(ending)), ".txt")
        self.form = form[1:].upper() if form != ".txt" else "text"
        if form == ".parquet":
            if source == "-" or compression:
                problem = f"{self._where} cannot be read as Parquet, which must be an uncompressed file"
                raise InvalidFieldError.of("source", f"{problem}; save and decompress it first")
            return self._parquet(source, stack)
        raw = (stdin or sys.stdin.buffer) if source == "-" else stack.enter_context(_open(source))
        if isinstance(raw, io.BufferedReader) and source != "-" and not compression and b"\0" in raw.peek():
            raise InvalidFieldError.of("source", f"{self._where} is not text in UTF-8; name a file of captions")
        content = unpacked(raw, compression, stack)
        match form:
            case ".csv":
                return self._csv(content)
            case ".tsv":
                return self._in_column(line.split("\t") for line in _lines(content, self._counts))
            case ".json":
                return self._json(content)
            case ".jsonl" | ".ndjson":
                return self._json_lines(content)
        return (line for line in _lines(content, self._counts) if line.strip())

    def _csv(self, content: BinaryIO) -> Generator[str, None, None]:
        text = io.TextIOWrapper(cast("Any", content), "utf-8-sig", errors="surrogateescape", newline="")
        return self._in_column(self._csv_rows(text))

    def _csv_rows(self, text: io.TextIOWrapper) -> Iterator[list[str]]:
        rows = csv.reader(text, strict=False)
        try:
            while True:
                try:
                    yield next(rows)
                except csv.Error:  # a field is too long, because a quotation mark is not closed
                    self._counts.bad += 1
                except StopIteration:
                    return
        finally:
            text.detach()  # the caller closes the file

    def _in_column(self, rows: Iterator[list[str]]) -> Generator[str, None, None]:
        with closing(cast("Any", rows)):
            first = next((row for row in rows if any(cell.strip() for cell in row)), None)
            if first is None:
                return
            index, is_header = self._column_of(first)
            if not is_header:
                yield from self._cell(first, index)
            for row in rows:
                if row:  # not an empty line
                    yield from self._cell(row, index)

    def _cell(self, row: Sequence[str], index: int) -> Iterator[str]:
        if not -len(row) <= index < len(row) or _UNDECODABLE.search(row[index]):
            self._counts.bad += 1
            return
        cell = row[index]
        if (
            self.form == "TSV"
            and len(cell) > 1
            and cell[0] == cell[-1] == '"'
            and '"' not in cell[1:-1].replace('""', "")
        ):
            # Quoted TSV is rare; in other files the quotation marks are part of the caption.
            cell = cell[1:-1].replace('""', '"')
        yield cell

    def _column_of(self, first: Sequence[str]) -> tuple[int, bool]:
        """Return the index of the column with the captions, and whether the first row is a header."""
        names = [cell.strip().strip('"').casefold() for cell in first]
        if self._column is not None:
            if self._column.casefold().strip() in names:
                return names.index(self._column.casefold().strip()), True
            if re.fullmatch(r"-?\d{1,4}", self._column):
                index = int(self._column)
                if -len(first) <= index < len(first):
                    return index, names[index] in _COLUMNS
            raise self._no_column(self._column, first)
        common_name = next((name for name in _COLUMNS if name in names), None)
        if common_name is not None:
            return names.index(common_name), True
        if len(first) == 1:
            return 0, False
        texts = [
            index
            for index, cell in enumerate(first)
            if not (_URL.fullmatch(cell.strip()) or _NUMBER.fullmatch(cell.strip()))
        ]
        if len(texts) != 1:
            listed = ", ".join(f"{index}: '{cell[:40]}'" for index, cell in enumerate(first[:10]))
            problem = f"the column of {self._where} with the captions is ambiguous; its first row has {listed}"
            raise InvalidFieldError.of("column", f"{problem}; name one by its header or its index")
        return texts[0], False

    def _json_lines(self, content: BinaryIO) -> Generator[str, None, None]:
        for line in _lines(content, self._counts):
            if line.strip():
                try:
                    element = json.loads(line)
                except (ValueError, RecursionError):
                    self._counts.bad += 1
                else:
                    yield from self._element(element)

    def _json(self, content: BinaryIO) -> Generator[str, None, None]:
        text = io.TextIOWrapper(cast("Any", content), "utf-8-sig", errors="surrogateescape")
        try:
            for element in JsonArrayReader(text).elements():
                yield from self._element(element)
        finally:
            text.detach()

    def _element(self, element: object) -> Iterator[str]:
        if isinstance(element, dict):
            names = _COLUMNS if self._column is None else (self._column,)
            element = next((element[name] for name in names if name in element), None)
        for text in element if isinstance(element, list) else [element]:
            if isinstance(text, str) and not _UNDECODABLE.search(text):
                yield text
            else:
                self._counts.bad += 1

    def _parquet(self, file: Path, stack: ExitStack) -> Generator[str, None, None]:
        try:
            import pyarrow as pa  # noqa: PLC0415 - an extra
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as error:
            raise missing_extra("Parquet", "pyarrow") from error
        try:
            table = stack.enter_context(pq.ParquetFile(stack.enter_context(open_regular(file))))
            names = table.schema_arrow.names
            known = {name.casefold(): name for name in reversed(names)}
            wanted = _COLUMNS if self._column is None else (self._column.casefold().strip(),)
            column = next((known[name] for name in wanted if name in known), None)
            if column is None:
                raise self._no_column(self._column, names)
            for group in range(table.num_row_groups):
                batches = table.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=[column], use_threads=False)
                for batch in batches:
                    for value in batch.column(0).to_pylist():
                        yield from self._element(value)
        except pa.ArrowException as error:
            raise EOFError(f"it is not Parquet, or is damaged ({' '.join(str(error).split())[:100]})") from error

    def _no_column(self, column: str | None, names: Sequence[str]) -> InvalidFieldError:
        listed = ", ".join(f"'{name.strip()[:40]}'" for name in names[:20])
        known = "caption, text or title"
        problem = (
            f"{self._where} has no column '{column}'" if column else f"{self._where} has no column such as {known}"
        )
        return InvalidFieldError.of("column", f"{problem}; name one of: {listed}{did_you_mean(column or '', names)}")


def _open(file: Path) -> BinaryIO:
    """Open a file, or the pipe of a shell's ``<(command)``, which has a writer; other pipes might wait for ever."""
    is_open_already = str(file.parent) in {"/dev/fd", "/proc/self/fd"}
    return file.open("rb") if is_open_already else open_regular(file)


def _lines(content: BinaryIO, counts: Counts) -> Iterator[str]:
    """Yield lines without their ends; a line that is too long or not UTF-8 is counted as bad."""
    first = True
    while line := content.readline(_MAX_LINE_BYTES):
        bad = False
        while not line.endswith(b"\n") and len(line) >= _MAX_LINE_BYTES:
            bad = True
            line = content.readline(_MAX_LINE_BYTES)
        try:
            text = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError:
            bad = True
        if bad:
            counts.bad += 1
        else:
            yield text.rstrip("\r\n")
        first = False
