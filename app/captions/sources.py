"""Captions as others publish them, read one after the other, whatever the size of the file.

By its suffix a file is text (one caption a line), CSV, TSV, JSON (COCO's captions, or an array), JSON lines or Parquet,
the first five also compressed, ``.gz`` or ``.zst``. Anything else is taken for text. Parquet and Zstandard need the
extra ``captions``.

What cannot be read is counted, not fatal, as long as anything can be read.
"""

import csv
import gzip
import io
import json
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, UInt64

from app.errors import InvalidFieldError

Source: TypeAlias = Path | Literal["-"]
"""A file, or standard input."""

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")

# The names by which data sets call their captions, the likeliest first.
_COLUMNS = ("caption", "captions", "text", "title", "alt_text", "alttext", "alt", "description", "sentence", "raw")
_ADDRESS = re.compile(r"\s*(https?://|www\.)\S*\s*$", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[-+]?[\d.,:]*\s*$")
# Of one line, one field or one element of JSON; what is longer is no caption.
_LONGEST = 2**20
_CHUNK = 2**18
_PACKED_AT_ONCE = 2**13
_ROWS_AT_ONCE = 4096
# Bytes that are no UTF-8 become these, so that the row they are in can be told; they are in no proper text.
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_JSON_FORMS = 'give {"annotations": [{"caption": ...}]} as COCO does, or an array of captions or of objects'

# Controls that are not white space, halves of surrogate pairs, and the byte order mark.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")
_LATIN_SHARE = 0.8


@dataclass(slots=True)
class Counts:
    """What became of the captions of a source, in captions or, for ``bad``, lines, rows or elements.

    ``read`` = ``kept`` + ``duplicates`` + ``too_short`` + ``other_script``. ``cut`` are among the kept ones. Where a
    file ends too early, one is added to ``bad`` for all that is lost.
    """

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    too_short: int = 0
    other_script: int = 0
    cut: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """Which captions are kept.

    Shorter ones than ``min_chars`` are dropped, longer ones than ``max_chars`` cut. ``latin_only`` drops those of
    whose letters fewer than 80 % are Latin, or that have no letter. ``distinct`` drops those that were there before.
    """

    min_chars: int = 3
    max_chars: int = 500
    latin_only: bool = False
    distinct: bool = True


def captions_of(
    sources: Iterable[Source],
    *,
    column: str | None = None,
    rules: CaptionRules = CaptionRules(),
    counts: Counts | None = None,
) -> Iterator[str]:
    """Yield the captions of all ``sources``, cleaned; a caption that two of them have comes once.

    Args:
        sources: as for ``read_captions``, which see for what is raised.
        column: as there.
        rules: as for ``clean_captions``.
        counts: is added to.
    """
    told = Counts() if counts is None else counts
    every = (caption for source in sources for caption in read_captions(source, column=column, counts=told))
    return clean_captions(every, rules=rules, counts=told)


def read_captions(
    source: Source,
    *,
    column: str | None = None,
    suffix: str | None = None,
    counts: Counts | None = None,
    stdin: BinaryIO | None = None,
) -> Iterator[str]:
    """Yield the captions of one source as they are.

    Args:
        source: a file, or ``-`` for standard input, which is text unless ``suffix`` says otherwise.
        column: the name of the column or key that holds the caption; for CSV and TSV also its place, from 0, or from
            the end when negative. None looks for a usual name in the header; without a header it takes the one column
            that is neither an address nor a number.
        suffix: read the source as if it had this one, such as ``.tsv.gz``.
        counts: its ``read`` and ``bad`` are added to.
        stdin: in the place of standard input.

    Raises:
        InvalidFieldError: there is no such file or column, the column cannot be told, nothing in the file can be read,
            or the extra is missing that it needs.
    """
    told = Counts() if counts is None else counts
    where = "standard input" if source == "-" else f"'{source}'"
    bad_before, read = told.bad, 0
    reader = _Reader(where, column, told)
    with ExitStack() as stack:
        try:
            # Closed before the file is, in case that nobody wants the rest.
            for caption in stack.enter_context(closing(reader.open(source, suffix, stdin, stack))):
                told.read += 1
                read += 1
                yield caption
        except read_errors() as error:
            if not read:
                problem = f"{where} cannot be read as {reader.form}: {getattr(error, 'strerror', None) or error}"
                way_out = _JSON_FORMS if isinstance(error, _BrokenJsonError) else "name a readable file of captions"
                raise InvalidFieldError.of("source", f"{problem}; {way_out}") from error
            told.bad += 1  # what was read before it broke off is good
    if not read and told.bad > bad_before:
        problem = f"nothing in {where} can be read as {reader.form}, {told.bad - bad_before} lines or elements are bad"
        way_out = "name the column that holds the captions, or give the file the suffix of what it is"
        raise InvalidFieldError.of("source", f"{problem}; {way_out}: {', '.join(SUFFIXES)}")


def clean_captions(
    captions: Iterable[str],
    *,
    rules: CaptionRules = CaptionRules(),
    counts: Counts | None = None,
) -> Iterator[str]:
    """Yield captions in composed Unicode (NFC), with single spaces, without control characters, by the rules.

    Duplicates are known by hashes of 64 bits, which take 8 bytes per caption, or 16 for a moment; among ten million
    captions, one of two different ones is lost with a probability of 3 in a million.

    Raises:
        InvalidFieldError: rules that no caption can meet.
    """
    if not 1 <= rules.min_chars <= rules.max_chars:
        problem = f"captions of {rules.min_chars} to {rules.max_chars} characters cannot be; write 1 <= min <= max"
        raise InvalidFieldError.of("min_chars", problem)
    told = Counts() if counts is None else counts
    return _distinct(_fitting(captions, rules, told), told, distinct=rules.distinct)


def _fitting(captions: Iterable[str], rules: CaptionRules, counts: Counts) -> Iterator[tuple[str, bool]]:
    """Yield each caption that is long enough, and whether it was cut."""
    for caption in captions:
        text = " ".join(unicodedata.normalize("NFC", _DROPPED.sub("", caption)).split())
        if len(text) < rules.min_chars:
            counts.too_short += 1
        elif rules.latin_only and not _is_latin(text):
            counts.other_script += 1
        else:
            yield text[: rules.max_chars].rstrip(), len(text) > rules.max_chars


def _distinct(fitting: Iterable[tuple[str, bool]], counts: Counts, *, distinct: bool) -> Iterator[str]:
    seen = _Hashes()
    remaining = iter(fitting)
    # Many at once, because one look-up in arrays takes as long as thousands do.
    while some := list(islice(remaining, _ROWS_AT_ONCE)):
        new = seen.add([text for text, _ in some]) if distinct else np.ones(len(some), bool)
        for (text, cut), is_new in zip(some, new, strict=True):
            if is_new:
                counts.kept += 1
                counts.cut += cut
                yield text
            else:
                counts.duplicates += 1


class _Hashes:
    """The hashes of texts, in sorted arrays of which each is more than twice as long as the next one."""

    def __init__(self) -> None:
        self._arrays: list[UInt64[np.ndarray, " h"]] = []

    def add(self, texts: Sequence[str]) -> Bool[np.ndarray, " n"]:
        """Take in ``texts`` and return which of them are neither there nor repeat one before them."""
        digests = b"".join(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in texts)
        hashes = np.frombuffer(digests, np.uint64)
        new = np.zeros(len(hashes), bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for array in self._arrays:
            places = np.searchsorted(array, hashes)
            new &= array[np.minimum(places, len(array) - 1)] != hashes
        fresh = np.sort(hashes[new])
        while self._arrays and len(self._arrays[-1]) <= 2 * len(fresh):
            fresh = np.concatenate([self._arrays.pop(), fresh])
            fresh.sort()
        if len(fresh):
            self._arrays.append(fresh)
        return new


def _is_latin(text: str) -> bool:
    letters = [_is_latin_letter(character) for character in text if character.isalpha()]
    return bool(letters) and sum(letters) >= _LATIN_SHARE * len(letters)


@lru_cache(maxsize=65_536)
def _is_latin_letter(character: str) -> bool:
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "FULLWIDTH LATIN"))


class _Reader:
    """Reads one source; ``form`` is what it turned out to be."""

    def __init__(self, where: str, column: str | None, counts: Counts) -> None:
        self.form = "text"
        self._where = where
        self._column = column
        self._counts = counts

    def open(
        self, source: Source, suffix: str | None, stdin: BinaryIO | None, stack: ExitStack
    ) -> Generator[str, None, None]:
        """Yield the captions; what is opened is closed with ``stack``."""
        name = (suffix or ("" if source == "-" else source.name)).lower()
        compression = next((each for each in COMPRESSED if name.endswith(each)), "")
        form = next((each for each in SUFFIXES if name.removesuffix(compression).endswith(each)), ".txt")
        self.form = form[1:].upper() if form != ".txt" else "text"
        if form == ".parquet":
            if source == "-" or compression:
                problem = f"{self._where} cannot be read as Parquet, which must be a file and is compressed in itself"
                raise InvalidFieldError.of("source", f"{problem}; save it, and unpack it, first")
            return self._parquet(source, stack)
        raw = (stdin or sys.stdin.buffer) if source == "-" else stack.enter_context(source.open("rb"))
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
                except csv.Error:  # a quotation mark that is never closed runs on to the longest field there may be
                    self._counts.bad += 1
                except StopIteration:
                    return
        finally:
            text.detach()  # whoever opened the file closes it

    def _in_column(self, rows: Iterator[list[str]]) -> Generator[str, None, None]:
        with closing(cast("Any", rows)):
            first = next((row for row in rows if any(cell.strip() for cell in row)), None)
            if first is None:
                return
            place, is_header = self._column_of(first)
            if not is_header:
                yield from self._cell(first, place)
            for row in rows:
                if row:  # not an empty line
                    yield from self._cell(row, place)

    def _cell(self, row: Sequence[str], place: int) -> Iterator[str]:
        if not -len(row) <= place < len(row) or _UNDECODABLE.search(row[place]):
            self._counts.bad += 1
            return
        cell = row[place]
        if (
            self.form == "TSV"
            and len(cell) > 1
            and cell[0] == cell[-1] == '"'
            and '"' not in cell[1:-1].replace('""', "")
        ):
            # Most TSV is not quoted, and then a quotation mark is part of the caption.
            cell = cell[1:-1].replace('""', '"')
        yield cell

    def _column_of(self, first: Sequence[str]) -> tuple[int, bool]:
        """Return the place of the caption, and whether the first row is a header."""
        names = [cell.strip().strip('"').casefold() for cell in first]
        usual = next((name for name in _COLUMNS if name in names), None)
        if self._column is not None:
            if self._column.casefold().strip() in names:
                return names.index(self._column.casefold().strip()), True
            if re.fullmatch(r"-?\d{1,4}", self._column):
                place = int(self._column)
                if -len(first) <= place < len(first):
                    return place, names[place] in _COLUMNS
            raise self._no_column(self._column, first)
        if usual is not None:
            return names.index(usual), True
        spoken = [place for place, cell in enumerate(first) if not (_ADDRESS.match(cell) or _NUMBER.match(cell))]
        if len(first) == 1:
            return 0, False
        if len(spoken) != 1:
            listed = ", ".join(f"{place}: '{cell[:40]}'" for place, cell in enumerate(first[:10]))
            problem = f"it cannot be told which column of {self._where} holds the captions; its first row has {listed}"
            raise InvalidFieldError.of("column", f"{problem}; name one by its header or its place")
        return spoken[0], False

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
            for element in _JsonScanner(text).elements():
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
            raise _missing_extra("Parquet", "pyarrow") from error
        try:
            table = stack.enter_context(pq.ParquetFile(stack.enter_context(file.open("rb"))))
            names = table.schema_arrow.names
            known = {name.casefold(): name for name in reversed(names)}
            wanted = _COLUMNS if self._column is None else (self._column.casefold().strip(),)
            column = next((known[name] for name in wanted if name in known), None)
            if column is None:
                raise self._no_column(self._column, names)
            for group in range(table.num_row_groups):
                batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False)
                for batch in batches:
                    for value in batch.column(0).to_pylist():
                        yield from self._element(value)
        except pa.ArrowException as error:
            raise EOFError(f"no Parquet, or damaged ({' '.join(str(error).split())[:100]})") from error

    def _no_column(self, column: str | None, names: Sequence[str]) -> InvalidFieldError:
        listed = ", ".join(f"'{name.strip()[:40]}'" for name in names[:20])
        problem = (
            f"{self._where} has no column '{column}'" if column else f"no column of {self._where} has a usual name"
        )
        return InvalidFieldError.of("column", f"{problem}; name one of: {listed}")


class _BrokenJsonError(Exception):
    """The file is no JSON of a form that holds captions, or breaks off."""


class _JsonScanner:
    """Yields the elements of the array of captions, and holds one of them at a time.

    The array is the file's outermost value, or that of its key ``annotations``; what other keys hold is passed over
    piece by piece.
    """

    def __init__(self, text: io.TextIOBase) -> None:
        self._text = text
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0

    def elements(self) -> Iterator[object]:
        match self._next_character():
            case "[":
                yield from self._array()
            case "{":
                found = False
                for key in self._keys():
                    if key == "annotations" and self._next_character(take=False) == "[":
                        found = True
                        self._next_character()
                        yield from self._array()
                    else:
                        self._pass_over()
                if not found:
                    raise _BrokenJsonError("its outermost object has no array 'annotations'")
            case "":
                return
            case _:
                raise _BrokenJsonError("it begins with neither an array nor an object")

    def _array(self) -> Iterator[object]:
        """Yield the elements of an array whose bracket has been read."""
        if self._next_character(take=False) == "]":
            self._next_character()
            return
        while True:
            yield self._value()
            if self._expect(",]") == "]":
                return

    def _keys(self) -> Iterator[str]:
        """Yield the keys of an object whose brace has been read; the value is read by whoever gets the key."""
        if self._next_character(take=False) == "}":
            self._next_character()
            return
        while True:
            key = self._value()
            self._expect(":")
            yield str(key)
            if self._expect(",}") == "}":
                return

    def _pass_over(self) -> None:
        # One level down is enough for the long lists that such files have beside their captions.
        if self._next_character(take=False) == "[":
            self._next_character()
            for _ in self._array():
                pass
        else:
            self._value()

    def _value(self) -> object:
        self._next_character(take=False)
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if not (len(self._buffer) - self._at <= _LONGEST and self._more()):
                    raise _BrokenJsonError(f"an element is not closed, or longer than {_LONGEST} characters") from error
                continue
            # A number may go on in what has not been read yet.
            if end < len(self._buffer) or not self._more():
                self._at = end
                return value

    def _expect(self, characters: str) -> str:
        found = self._next_character()
        if not found or found not in characters:
            what = f"'{found}'" if found else "the end"
            raise _BrokenJsonError(f"{what} comes where one of '{characters}' should")
        return found

    def _next_character(self, *, take: bool = True) -> str:
        """Return the next character that is no white space, or nothing at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer):
                break
            if not self._more():
                return ""
        character = self._buffer[self._at]
        self._at += take
        return character

    def _more(self) -> bool:
        piece = self._text.read(_CHUNK)
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0
        return bool(piece)


def _lines(content: BinaryIO, counts: Counts) -> Iterator[str]:
    """Yield lines without their ends; those that are no UTF-8, or too long, are counted as bad."""
    first = True
    while line := content.readline(_LONGEST):
        bad = False
        while not line.endswith(b"\n") and len(line) >= _LONGEST:
            bad = True
            line = content.readline(_LONGEST)
        try:
            text = line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError:
            bad = True
        if bad:
            counts.bad += 1
        else:
            yield text.rstrip("\r\n")
        first = False


class _ZstandardFrames(io.RawIOBase):
    """What Zstandard frames hold, one after the other; a frame that breaks off is an error, as it is with gzip.

    The library's own reader ends there without a word.
    """

    def __init__(self, raw: BinaryIO, frame: Callable[[], Any]) -> None:
        super().__init__()
        self._raw = raw
        self._new_frame = frame
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as one piece goes."""
        while not self._ready:
            unused = b"" if self._frame is None or not self._frame.eof else self._frame.unused_data
            packed = unused or self._raw.read(_PACKED_AT_ONCE)
            ended = self._frame is None or self._frame.eof
            if not packed:
                if ended:
                    return 0
                raise EOFError("the compressed file ends too early")
            if ended:
                self._frame = self._new_frame()
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def unpacked(raw: BinaryIO, compression: str, stack: ExitStack) -> BinaryIO:
    """Return what a file holds, read as a stream; what is opened for that is closed with ``stack``.

    Args:
        raw: the file.
        compression: one of ``COMPRESSED``; anything else is none.
        stack: of the caller.

    Raises:
        InvalidFieldError: the package for it is missing.
    """
    match compression:
        case ".gz":
            return cast("BinaryIO", stack.enter_context(gzip.open(raw, "rb")))
        case ".zst":
            try:
                import zstandard  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise _missing_extra("Zstandard", "zstandard") from error
            frames = _ZstandardFrames(raw, zstandard.ZstdDecompressor().decompressobj)
            return cast("BinaryIO", stack.enter_context(io.BufferedReader(frames)))
    return raw


def read_errors() -> tuple[type[Exception], ...]:
    """Return what reading an unpacked file raises, of the compressions that have been imported."""
    zstandard = sys.modules.get("zstandard")
    return (OSError, EOFError, zlib.error, _BrokenJsonError, *(() if zstandard is None else (zstandard.ZstdError,)))


def _missing_extra(form: str, package: str) -> InvalidFieldError:
    return InvalidFieldError.of(
        "source", f"{form} needs {package}, which is missing; run: pip install 'deixis[captions]'"
    )
