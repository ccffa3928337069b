"""Temporary folders that the next process removes if theirs is killed.

A process holds a lock on a file in its folder; the lock ends with the process. So a folder whose lock is free was left
behind.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_CONTENT = "content"


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder that only this user may read, and remove it when the block ends, unless it was renamed.

    First removes the folders of this prefix that killed processes of this user have left in ``parent``.

    Raises:
        OSError: the folder cannot be created.
    """
    _remove_abandoned(parent, prefix)
    outer, lock = _locked_folder(parent, prefix)
    try:
        content = outer / _CONTENT
        content.mkdir(0o700)
        yield content
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        lock.release()
        shutil.rmtree(outer, ignore_errors=True)  # on Windows, an open file cannot be removed


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # another process has found the folder before it was locked, and removes it
        except OSError:
            return folder, lock  # a file system without locks, on which no folder is taken for abandoned
        if folder.exists():
            return folder, lock
        lock.release()


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        # Folders of others may be in a shared parent such as /tmp, and file systems without locks protect none.
        with suppress(OSError, Timeout):
            if path.is_symlink() or not path.is_dir() or (hasattr(os, "getuid") and path.stat().st_uid != os.getuid()):
                continue
            with FileLock(path / _LOCK).acquire(timeout=0):
                shutil.rmtree(path, ignore_errors=True)
