"""`deixis classify --to-folder`: sorts files into a folder per label, without overwriting or truncating any file."""

import csv
import filecmp
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

from app.errors import InvalidFieldError
from app.names.text import nfc
from deixis import ImageResult

NONE_OF_THESE = "_none of these"
MANIFEST = "deixis.csv"
_COLUMNS = ("file", "sorted to", "label", "score")
# Characters that Linux, macOS or Windows does not allow, and the names that Windows reserves for devices.
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]+')
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_MAX_FOLDER_BYTES = 200


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

    def sort(self, file: Path, result: ImageResult) -> Path:
        """Sort a file by its best label, and return its new path; a file that is already there is left as it is.

        Raises:
            OSError: the file cannot be sorted; it is unchanged.
        """
        best = next(iter(result.predictions), None)  # there may be no discovered label
        folder = self.target / (NONE_OF_THESE if result.rejected or best is None else folder_name(best.label))
        if not self.dry_run:
            folder.mkdir(exist_ok=True)
        destination = self._free_path(file, folder)
        if destination is None:
            return folder / file.name
        if self.dry_run:
            self.done += 1
            return destination
        with suppress(FileExistsError):
            self._put(file, destination)
            self.done += 1
            self._record(file, destination, *(("", 0.0) if best is None else (best.label, best.score)))
            return destination
        return self.sort(file, result)  # another process created the destination; use the next number

    def _free_path(self, file: Path, folder: Path) -> Path | None:
        """Return an unused path in the folder; None if a file with the same content is in it."""
        for number in count(1):
            path = folder / (file.name if number == 1 else f"{file.stem} ({number}){file.suffix}")
            if not path.exists():
                return path
            if path.samefile(file) or filecmp.cmp(path, file, shallow=False):
                return None
        raise AssertionError

    def _put(self, file: Path, destination: Path) -> None:
        if self.action is FileAction.LINK:
            os.link(file, destination)
        elif self.action is FileAction.MOVE and file.stat().st_dev == destination.parent.stat().st_dev:
            _rename_without_overwriting(file, destination)
        else:
            partial = destination.with_name(f".{destination.name}.{os.getpid()}.part")
            try:
                shutil.copy2(file, partial)
                _rename_without_overwriting(partial, destination)
            finally:
                partial.unlink(missing_ok=True)
            if self.action is FileAction.MOVE:
                file.unlink()

    def _record(self, file: Path, destination: Path, label: str, score: float) -> None:
        """Append a row to the manifest, in one write."""
        manifest = self.target / MANIFEST
        with manifest.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            if opened.tell() == 0:
                writer.writerow(_COLUMNS)
            writer.writerow((str(file), str(destination.relative_to(self.target)), label, f"{score:.4f}"))


def _rename_without_overwriting(file: Path, destination: Path) -> None:
    """Rename a file.

    Raises:
        FileExistsError: the destination exists.
    """
    try:
        os.link(file, destination)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if destination.exists():
            raise FileExistsError(destination) from None
        file.rename(destination)
    else:
        file.unlink()


def folder_name(label: str) -> str:
    """Return a folder name for a label that is valid on every system and differs from ``NONE_OF_THESE``."""
    name = _UNSAFE.sub("-", nfc(label)).strip(" .")
    if name.startswith("_") or _DEVICES.fullmatch(name) or not name:
        name = f"-{name}"
    while len(name.encode()) > _MAX_FOLDER_BYTES:
        name = name[:-1].rstrip(" .")
    return name
