"""Files that appear complete or not at all, also after a crash or a power cut.

The content goes into a temporary file in the same folder, which is synced to the disk and then renamed. A process that
is killed leaves its temporary file behind; ``temporary_names`` matches such files.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# The errors of network file systems that cannot sync folders.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}


@contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``file`` when the block ends, and that is removed if the block fails.

    Raises:
        OSError: the file cannot be written; ``file`` is as it was.
    """
    temporary = file.with_name(f".{file.name}.{secrets.randbelow(10**8)}.part")
    opened = temporary.open("xb")
    try:
        with opened as content:
            yield content
            content.flush()
            os.fsync(content.fileno())
        temporary.replace(file)
        sync(file.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(file: Path, content: bytes | str) -> None:
    """Replace ``file`` by one with this content, text as UTF-8.

    Raises:
        OSError: the file cannot be written; ``file`` is as it was.
    """
    with atomic_file(file) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)


def publish(path: Path, target: Path) -> None:
    """Sync a finished file or folder, rename it to ``target``, and sync the folder that holds it.

    For a folder, the files in it must be synced already. A file at ``target`` is replaced.
    """
    sync(path)
    path.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    is_folder = path.is_dir()
    if os.name != "nt":
        flags = os.O_RDONLY
    elif is_folder:
        return  # Windows cannot open folders, and keeps their names without this
    else:
        flags = os.O_RDWR
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    except OSError as error:
        if not is_folder or error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)


def temporary_names(names: str) -> re.Pattern[str]:
    """Return the pattern of the temporary files for files whose names match the regular expression ``names``."""
    return re.compile(rf"\.(?:{names})\.\d+\.part")
