"""`deixis classify --to-folder`: sorts files into a folder per label, without overwriting or truncating any file."""

import csv
import errno
import filecmp
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.csv_output import read_rows, write_rows
from app.errors import InvalidFieldError
from app.names.text import nfc
from app.runtime.atomic_files import sync, temporary_for

if TYPE_CHECKING:
    from deixis import ImageResult, Prediction
    from deixis.answers import PathStep

NONE_OF_THESE = "_none of these"
NOT_SURE = "_not sure"
MANIFEST = "deixis.csv"
_COLUMNS = ("file", "sorted to", "label", "score")
# Characters that Linux, macOS or Windows does not allow, and the names that Windows reserves for devices.
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]+')
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_MAX_FOLDER_BYTES = 200
_MAX_NAME_BYTES = 255
# The errors of file systems without hard links, and of files that have too many.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})


class FileAction(StrEnum):
    """How a file is sorted."""

    COPY = "copy"
    MOVE = "move"
    LINK = "link"


@dataclass(slots=True)
class Sorter:
    """Sorts files into a folder per label.

    Args:
        target: the folder in which the folders of labels are created.
        action: how files are sorted.
        dry_run: change nothing.
    """

    target: Path
    action: FileAction
    dry_run: bool
    done: int = 0
    _folders: dict[str, str] = field(default_factory=dict)
    _owners: dict[str, str] | None = None

    def validate(self) -> None:
        """Create the target folder.

        Raises:
            InvalidFieldError: the target is a file, or cannot be created.
        """
        if self.target.exists() and not self.target.is_dir():
            raise InvalidFieldError.of("--to-folder", f"'{self.target}' is not a folder")
        if not self.dry_run:
            try:
                self.target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidFieldError.of(
                    "--to-folder", f"'{self.target}' cannot be created: {error.strerror}"
                ) from error

    def _folder_of(self, label: str) -> str:
        """Return the folder of a label; no two labels have the same one, also where upper and lower case are the same.

        Labels keep the folders of earlier runs, which the manifest lists.
        """
        if self._owners is None:
            self._owners = self._recorded_owners()
        if label not in self._folders:
            name = folder_name(label)
            names = (name if number == 1 else f"{name} ({number})" for number in count(1))
            self._folders[label] = next(name for name in names if self._owners.setdefault(_key(name), label) == label)
        return self._folders[label]

    def _recorded_owners(self) -> dict[str, str]:
        """Return the labels of earlier runs by the keys of their folders."""
        owners = {}
        with (
            suppress(OSError, UnicodeError, csv.Error),
            (self.target / MANIFEST).open(newline="", encoding="utf-8") as manifest,
        ):
            for row in read_rows(manifest):
                folder = Path(row[1]).parent.name if len(row) == len(_COLUMNS) else ""
                if folder not in {"", NONE_OF_THESE, NOT_SURE}:
                    owners[_key(folder)] = row[2]
        return owners

    def sort(self, file: Path, result: "ImageResult") -> Path:
        """Sort a file by its label, and return its new path; a file that is already there is left as it is.

        The label is the best one, or with a hierarchy that at the end of the path.

        Raises:
            OSError: the file cannot be sorted; it is unchanged.
        """
        label, score, other = _answer(result)
        folder = self.target / (self._folder_of(label) if other is None else other)
        if not self.dry_run:
            folder.mkdir(exist_ok=True)
        while (destination := self._free_path(file, folder)) is not None:
            if not self.dry_run:
                try:
                    self._put(file, destination, (label, score))
                except FileExistsError:  # another process created it; use the next number
                    continue
            self.done += 1
            return destination
        return folder / file.name

    def _free_path(self, file: Path, folder: Path) -> Path | None:
        """Return an unused path in the folder; None if a file with the same content is in it."""
        for number in count(1):
            path = folder / (file.name if number == 1 else _numbered(file, number))
            if not os.path.lexists(path):
                return path
            with suppress(FileNotFoundError):  # a broken link
                if path.samefile(file) or filecmp.cmp(path, file, shallow=False):
                    return None
        raise AssertionError

    def _put(self, file: Path, destination: Path, row: Sequence[str]) -> None:
        """Create the destination, record it, and only then remove the file, so that no failure loses one of them."""
        is_moved = self.action is FileAction.MOVE
        if self.action is FileAction.LINK:
            os.link(os.path.realpath(file), destination)
        elif is_moved and not file.is_symlink() and file.stat().st_dev == destination.parent.stat().st_dev:
            if not _link(file, destination):
                self._record(file, destination, row)
                file.rename(destination)
                return
        else:
            partial = temporary_for(destination)
            try:
                shutil.copy2(file, partial)
                sync(partial)
                _rename_without_overwriting(partial, destination)
            finally:
                partial.unlink(missing_ok=True)
        try:
            self._record(file, destination, row)
        except BaseException:
            destination.unlink()
            raise
        if is_moved:
            sync(destination.parent)
            file.unlink()

    def _record(self, file: Path, destination: Path, row: Sequence[str]) -> None:
        """Append a row to the manifest, in one write, and wait until it is on the disk."""
        with (self.target / MANIFEST).open("a", newline="", encoding="utf-8") as manifest:
            header = [_COLUMNS] if manifest.tell() == 0 else []
            write_rows(manifest, [*header, (file, destination.relative_to(self.target), *row)])
            manifest.flush()
            os.fsync(manifest.fileno())


def _answer(result: "ImageResult") -> tuple[str, str, str | None]:
    """Return the label of a file, its score, and the name of the folder unless it is that of the label."""
    scored: Sequence[Prediction | PathStep] = result.predictions
    folder = NONE_OF_THESE if result.label is None else None
    if folder is None and result.labels is not None:  # the best prediction may be below its threshold
        scored = [each for each in scored if each.label == result.label]
    elif folder is None and result.path is not None:
        scored = result.path[-1:] or scored
        folder = None if result.path else NOT_SURE
    # There may be no discovered label.
    return (scored[0].label, f"{scored[0].score:.4f}", folder) if scored else ("", "", folder)


def _key(folder: str) -> str:
    return nfc(folder).casefold()


def _numbered(file: Path, number: int) -> str:
    """Return the name of a file with a number, not longer than a name may be."""
    stem, ending = file.stem, f" ({number}){file.suffix}"
    while len(os.fsencode(stem + ending)) > _MAX_NAME_BYTES:
        stem = stem[:-1]
    return stem + ending


def _rename_without_overwriting(file: Path, destination: Path) -> None:
    """Rename a file.

    Raises:
        FileExistsError: the destination exists.
    """
    if _link(file, destination):
        file.unlink()
    else:
        file.rename(destination)


def _link(file: Path, destination: Path) -> bool:
    """Create a hard link; return whether the file system has them.

    Raises:
        FileExistsError: the destination exists.
    """
    try:
        os.link(file, destination)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(destination):
            raise FileExistsError(destination) from None
        return False
    return True


def folder_name(label: str) -> str:
    """Return a folder name for a label that is valid on every system and differs from ``NONE_OF_THESE``."""
    name = _UNSAFE.sub("-", nfc(label)).strip(" .")
    if name.startswith("_") or _DEVICES.fullmatch(name) or not name:
        name = f"-{name}"
    while len(name.encode()) > _MAX_FOLDER_BYTES:
        name = name[:-1].rstrip(" .")
    return name
