"""Reads files compressed with gzip or Zstandard as streams. Zstandard needs the extra ``captions``."""

import gzip
import io
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, BinaryIO, cast

from app.errors import InvalidFieldError
from deixis.extras import needs_extra

COMPRESSED = (".gz", ".zst")

_PACKED_CHUNK = 2**13


class _ZstandardFrames(io.RawIOBase):
    """The content of a file of Zstandard frames; unlike the package's own reader it reports a file that is cut off."""

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]) -> None:
        super().__init__()
        self._raw = raw
        self._new_frame = new_frame
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with at most one decompressed piece."""
        while not self._ready:
            unused = b"" if self._frame is None or not self._frame.eof else self._frame.unused_data
            packed = unused or self._raw.read(_PACKED_CHUNK)
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
    """Return the decompressed content of a file as a stream, which ``stack`` closes.

    Args:
        raw: the file.
        compression: one of ``COMPRESSED``; any other value means that the file is not compressed.
        stack: of the caller.

    Raises:
        InvalidFieldError: the extra that reads this compression is not installed.
    """
    match compression:
        case ".gz":
            return cast("BinaryIO", stack.enter_context(gzip.open(raw, "rb")))
        case ".zst":
            try:
                import zstandard  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise InvalidFieldError.of("source", needs_extra("Zstandard", "captions")) from error
            frames = _ZstandardFrames(raw, zstandard.ZstdDecompressor().decompressobj)
            return cast("BinaryIO", stack.enter_context(io.BufferedReader(frames)))
    return raw


def read_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors that reading an unpacked file can raise, and ``more`` of the caller."""
    zstandard = sys.modules.get("zstandard")
    return (OSError, EOFError, zlib.error, *more, *(() if zstandard is None else (zstandard.ZstdError,)))
