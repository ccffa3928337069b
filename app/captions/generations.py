"""The generations of a caption database on disk: finding, publishing, copying and removing them.

A database is a folder with one folder per generation, named by a digest of its contents, and a file ``current`` that
names the generation in use. A generation never changes, so readers that have it open are not disturbed when the next
one replaces it.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from app.captions.manifest import Manifest, check_files, read_manifest
from app.errors import ConflictError, StoreError
from app.runtime.atomic_files import atomic_file, is_temporary, sync, write_atomically
from app.runtime.regular_files import open_regular

CURRENT = "current"

_GENERATION = re.compile(r"[0-9a-f]{16}")
_LOCK = ".lock"
_REMOVED = ".removed"
_COPIED = ".copied"


def is_database(folder: Path) -> bool:
    """Return whether ``folder`` contains a published database, damaged or not."""
    try:
        return (folder / CURRENT).is_file()
    except OSError:  # the folder may not be entered
        return False


def current_generation(folder: Path) -> str:
    """Return the name of the generation in use; it only reads one small file.

    Raises:
        StoreError: there is no database, or ``current`` is damaged.
    """
    file = folder / CURRENT
    try:
        name = file.read_text("ascii", "replace").strip()
    except FileNotFoundError as error:
        raise StoreError(f"'{folder}' contains no caption database; build one, or name another folder") from error
    except OSError as error:
        problem = f"'{file}' cannot be read: {error.strerror}"
        raise StoreError(f"{problem}; make it readable for the service, or name another folder") from error
    if not _GENERATION.fullmatch(name):
        raise StoreError(f"'{file}' is damaged: it names '{name[:40]}'; build the database again")
    return name


def building_folder(folder: Path) -> Path:
    """Return the folder in which the next generation of ``folder`` is built."""
    return folder.with_name(f"{folder.name}.building")


def publish_generation(finished: Path, folder: Path, manifest: Manifest) -> None:
    """Move the folder of a finished generation into ``folder``, and make it the current one."""
    target = folder / manifest.generation
    sync(finished)
    if target.exists():
        with suppress(StoreError):
            check_files(target, read_manifest(target), verify=True)
            shutil.rmtree(finished)
    if finished.exists():
        removed = target.with_name(target.name + _REMOVED)
        if target.exists():  # and is damaged
            target.rename(removed)
        finished.rename(target)
        shutil.rmtree(removed, ignore_errors=True)
    sync(folder)
    write_atomically(folder / CURRENT, f"{manifest.generation}\n")


def install(generation_folder: Path, folder: Path) -> None:
    """Copy a finished generation into ``folder``, and make it the current one.

    Raises:
        StoreError: it is damaged, or the disk is full.
        ConflictError: a build is running.
    """
    manifest = read_manifest(generation_folder)
    check_files(generation_folder, manifest, verify=True)
    with building_lock(folder), disk_errors(folder):
        copied = folder / f"{manifest.generation}{_COPIED}"
        copied.mkdir()
        for file in generation_folder.iterdir():
            with open_regular(file) as content, atomic_file(copied / file.name) as copy:
                shutil.copyfileobj(content, copy)
        publish_generation(copied, folder, manifest)


def prune(folder: Path) -> list[str]:
    """Remove the generations that are not current, and return their names.

    Readers that have one of them open can continue to read it.

    Raises:
        ConflictError: a build is running.
        StoreError: there is no database, or a generation cannot be removed.
    """
    current_generation(folder)
    with building_lock(folder), disk_errors(folder):
        current = current_generation(folder)
        old = sorted(
            path
            for path in folder.iterdir()
            if path.is_dir() and _GENERATION.fullmatch(path.name) and path.name != current
        )
        for path in old:
            shutil.rmtree(path)
        return [path.name for path in old]


def remove(folder: Path) -> None:
    """Remove a database, and the unfinished build of its next generation.

    Readers that have it open can continue to read it.

    Raises:
        ConflictError: a build is running.
        StoreError: it cannot be removed.
    """
    if folder.is_symlink():
        problem = f"the caption database '{folder.name}' is a link to another folder"
        raise StoreError(f"{problem}; remove the link and that folder yourself")
    with building_lock(folder):
        try:
            # Without this file the database does not exist, even if a later step fails.
            (folder / CURRENT).unlink(missing_ok=True)
            sync(folder)
            shutil.rmtree(building_folder(folder), ignore_errors=True)
            # Renamed first, because the next build creates its lock in the folder.
            removed = folder.with_name(f"{folder.name}{_REMOVED}")
            folder.rename(removed)
            with suppress(FileNotFoundError):  # the next build may already remove it
                shutil.rmtree(removed)
        except OSError as error:
            problem = f"the caption database '{folder.name}' cannot be removed: {error.strerror}"
            raise StoreError(f"{problem}; remove its folder yourself") from error


@contextmanager
def building_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` that only one build at a time may have; it ends with the process at the latest.

    Raises:
        ConflictError: another build holds it.
    """
    lock = FileLock(folder / _LOCK)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConflictError(f"another build for '{folder.name}' is running; wait for it, or stop it") from error
    try:
        _remove_leftovers(folder)
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were copying or removing; call it with the lock of ``folder``."""
    for path in (*folder.parent.glob(f"*{_REMOVED}"), *folder.iterdir()):
        if path.name.endswith((_REMOVED, _COPIED)):
            shutil.rmtree(path, ignore_errors=True)
        elif is_temporary(path.name):
            with suppress(OSError):
                path.unlink()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise every ``OSError`` of the block as a ``StoreError`` that says how to solve the problem."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                problem, way_out = "its disk is full", "free some space"
            case errno.EFBIG:
                problem, way_out = "a file would exceed the limit on file sizes", "raise the limit (ulimit -f)"
            case errno.EACCES | errno.EPERM | errno.EROFS:
                problem, way_out = f"'{error.filename or folder}' cannot be written", "make it writable"
            case errno.EXDEV:
                problem, way_out = "it and its '.building' are on two disks", "choose a folder below the mounted one"
            case _:
                problem, way_out = str(error.strerror or error), "check the disk"
        way_out += ", or name another folder; finished shards are kept and are not encoded again"
        raise StoreError(f"the caption database '{folder}' cannot be built: {problem}; {way_out}") from error
