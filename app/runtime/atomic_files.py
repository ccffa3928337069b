"""Files that appear complete or not at all, also after a crash or a power cut.

The content goes into a temporary file in the same folder, which is synced to the disk and then renamed. A process that
is killed leaves its temporary file behind; ``is_temporary`` recognises such files. Their names have a fixed length,
because the name of the file itself may have the maximum length already.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# The errors of network file systems that cannot sync folders.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}
_TEMPORARY = re.compile(r"\.deixis-[0-9a-f]{32}\.part")


@contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``file`` when the block ends, and that is removed if the block fails.

    Raises:
        OSError: the file cannot be written; ``file`` is as it was.
    """
    temporary = temporary_for(file)
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


def replace_content(file: Path, content: bytes | str) -> None:
    """Replace the content of a user's file, which may be a link; its mode, owner and attributes stay.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    target = Path(os.path.realpath(file))
    with atomic_file(target) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)
        with suppress(FileNotFoundError):
            status = target.stat()
            with suppress(OSError, AttributeError):  # only root may change the owner, and Windows has none
                os.chown(opened.name, status.st_uid, status.st_gid)
            with suppress(OSError):  # some file systems have no modes
                shutil.copystat(target, opened.name)
                os.utime(opened.name)


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


def temporary_for(file: Path) -> Path:
    """Return an unused path in the folder of ``file``, for content that will be renamed to it."""
    return file.with_name(f".deixis-{_digest(file.name)}{secrets.token_hex(8)}.part")


def is_temporary(name: str, of: str | None = None) -> bool:
    """Return whether ``name`` is that of a temporary file: of any file, or of the file with the name ``of``."""
    return _TEMPORARY.fullmatch(name) is not None and (of is None or name.startswith(f".deixis-{_digest(of)}"))


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
