"""The captions of files as data sets publish them, read one after another, whatever the size of the file.

The suffix of a file gives its format: text (one caption per line), CSV, TSV, JSON (COCO captions, or an array), JSON
lines or Parquet; the first five may be compressed (``.gz`` or ``.zst``). A file with any other suffix is read as text.
Parquet and Zstandard need the extra ``captions``.

Lines, rows and elements that cannot be read are counted. They are an error only if nothing can be read.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from app.captions.cleaning import DEFAULT_RULES, CaptionRules, Counts, clean_captions
from app.captions.json_array import BrokenJsonError
from app.captions.readers import SUFFIXES, CaptionReader
from app.errors import InvalidFieldError
from app.runtime.compression import read_errors

Source: TypeAlias = Path | Literal["-"]
"""A file, or standard input."""

_JSON_FORMS = 'write {"annotations": [{"caption": ...}]} as COCO does, or an array of captions or of objects'


def captions_of(
    sources: Iterable[Source],
    *,
    column: str | None = None,
    rules: CaptionRules = DEFAULT_RULES,
    counts: Counts | None = None,
) -> Iterator[str]:
    """Yield the cleaned captions of all ``sources``; a caption that is in two of them is yielded once.

    Args:
        sources: as for ``read_captions``, whose errors are raised.
        column: as for ``read_captions``.
        rules: as for ``clean_captions``.
        counts: is added to.
    """
    counted = Counts() if counts is None else counts
    captions = (caption for source in sources for caption in read_captions(source, column=column, counts=counted))
    return clean_captions(captions, rules=rules, counts=counted)


def read_captions(
    source: Source,
    *,
    column: str | None = None,
    suffix: str | None = None,
    counts: Counts | None = None,
    stdin: BinaryIO | None = None,
) -> Iterator[str]:
    """Yield the captions of one source unchanged.

    Args:
        source: a file, or ``-`` for standard input, which is read as text unless ``suffix`` is given.
        column: the name of the column or key that contains the captions. For CSV and TSV it may be an index, from 0,
            or negative from the end. None looks for a common name in the header; without a header it takes the only
            column that contains neither URLs nor numbers.
        suffix: replaces the suffix of the source, as in ``.tsv.gz``.
        counts: its ``read`` and ``bad`` are added to.
        stdin: replaces standard input.

    Raises:
        InvalidFieldError: there is no such file or column, the column is ambiguous, nothing in the file can be read, or
            the extra that reads this format is not installed.
    """
    counted = Counts() if counts is None else counts
    where = "standard input" if source == "-" else f"'{source}'"
    bad_before, read = counted.bad, 0
    reader = CaptionReader(where, column, counted)
    with ExitStack() as stack:
        try:
            # The reader must be closed before its file, also when the caller stops early.
            for caption in stack.enter_context(closing(reader.open(source, suffix, stdin, stack))):
                counted.read += 1
                read += 1
                yield caption
        except read_errors(BrokenJsonError) as error:
            if not read:
                problem = f"{where} cannot be read as {reader.form}: {getattr(error, 'strerror', None) or error}"
                way_out = _JSON_FORMS if isinstance(error, BrokenJsonError) else "name a readable file of captions"
                raise InvalidFieldError.of("source", f"{problem}; {way_out}") from error
            counted.bad += 1  # the captions before the error are good
    if not read and counted.bad > bad_before:
        bad = counted.bad - bad_before
        problem = f"nothing in {where} can be read as {reader.form}: {bad} lines or elements are bad"
        way_out = "name the column that contains the captions, or give the file the suffix of its format"
        raise InvalidFieldError.of("source", f"{problem}; {way_out}: {', '.join(SUFFIXES)}")
