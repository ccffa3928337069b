"""Reading of files whose kind and size nobody has checked: the check comes before the cost.

A pipe may never have content, a device may never end, and a file may be larger than the memory.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# Read before the content is validated: enough to recognise every format.
_HEAD_BYTES = 64 * 1024
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularFileError(OSError):
    """The path is a folder, a pipe, a socket or a device."""


class FileTooLargeError(OSError):
    """The file has more bytes than the limit."""


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file; anything else is not opened, so that this never waits.

    Raises:
        NotRegularFileError: it is not a regular file.
        OSError: it cannot be opened.
    """
    try:
        _check_regular(file, file.stat())
    except FileNotFoundError as error:
        if file.is_symlink():
            raise FileNotFoundError(error.errno, "broken link: its target does not exist", str(file)) from error
        raise
    # Another kind may have replaced it meanwhile.
    opened = os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        _check_regular(file, os.fstat(opened.fileno()))
    except BaseException:
        opened.close()
        raise
    return opened


def read_regular(file: Path, max_bytes: int, validate: Callable[[bytes], object] = lambda _: None) -> bytes:
    """Return the content of a regular file.

    Args:
        file: to read.
        max_bytes: maximum size.
        validate: called with the first bytes of a large file before the others are read; may raise.

    Raises:
        NotRegularFileError: it is not a regular file.
        FileTooLargeError: it is larger than ``max_bytes``.
        OSError: it cannot be read.
    """
    with open_regular(file) as opened:
        _check_size(file, os.fstat(opened.fileno()).st_size, max_bytes)
        head = opened.read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            return head
        validate(head)
        content = head + opened.read(max_bytes + 1 - len(head))  # the file may grow meanwhile
        _check_size(file, len(content), max_bytes)
        return content


def _check_regular(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for matches, name in _KINDS if matches(status.st_mode)), "something else")
        raise NotRegularFileError(errno.EINVAL, f"not a regular file, but {kind}", str(file))


def _check_size(file: Path, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise FileTooLargeError(
            errno.EFBIG, f"the file has {size_bytes:,} bytes and the limit is {max_bytes:,}", str(file)
        )
