"""`deixis classify --to-folder`: files go into a folder for each label; nothing is overwritten or half there."""

import csv
import filecmp
import os
import re
import shutil
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

from app.api.schemas.classification import ResultBody
from app.errors import InvalidFieldError

NONE_OF_THESE = "_none of these"
MANIFEST = "deixis.csv"
_COLUMNS = ("file", "sorted to", "label", "score")
# What no file system of the three likes, and names that Windows keeps for devices.
_UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]+')
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_MAX_FOLDER_BYTES = 200


class How(StrEnum):
    """What becomes of a file."""

    COPY = "copy"
    MOVE = "move"
    LINK = "link"


@dataclass(slots=True)
class Sorter:
    """Puts files into folders.

    Args:
        target: where the folders of labels are made.
        how: what becomes of a file.
        dry_run: only tell.
    """

    target: Path
    how: How
    dry_run: bool
    done: int = 0

    def check(self) -> None:
        """Refuse a target that is none.

        Raises:
            InvalidFieldError: it is a file, or cannot be made.
        """
        if self.target.exists() and not self.target.is_dir():
            raise InvalidFieldError.of("--to-folder", f"'{self.target}' is no folder")
        if not self.dry_run:
            try:
                self.target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidFieldError.of(
                    "--to-folder", f"'{self.target}' cannot be made: {error.strerror}"
                ) from error

    def take(self, file: Path, result: ResultBody) -> Path:
        """Put a file where its label says, and return where it is; it stays where it is when it is there already.

        Raises:
            OSError: it cannot be put there; it is where it was.
        """
        best = next(iter(result.predictions), None)  # for some images no names are found
        folder = self.target / (NONE_OF_THESE if result.rejected or best is None else folder_name(best.label))
        if not self.dry_run:
            folder.mkdir(exist_ok=True)
        place = self._place(file, folder)
        if place is None:
            return folder / file.name
        self.done += 1
        if self.dry_run:
            return place
        with suppress(FileExistsError):
            self._put(file, place)
            self._tell(file, place, *(("", 0.0) if best is None else (best.label, best.score)))
            return place
        return self.take(file, result)  # somebody else was faster: another number

    def _place(self, file: Path, folder: Path) -> Path | None:
        """Return a name that is free; None where the same content has it."""
        for number in count(1):
            place = folder / (file.name if number == 1 else f"{file.stem} ({number}){file.suffix}")
            if not place.exists():
                return place
            if place.samefile(file) or filecmp.cmp(place, file, shallow=False):
                return None
        raise AssertionError

    def _put(self, file: Path, place: Path) -> None:
        if self.how is How.LINK:
            os.link(file, place)
        elif self.how is How.MOVE and file.stat().st_dev == place.parent.stat().st_dev:
            _without_overwriting(file, place)
        else:
            aside = place.with_name(f".{place.name}.{os.getpid()}.part")
            try:
                shutil.copy2(file, aside)
                _without_overwriting(aside, place)
            finally:
                aside.unlink(missing_ok=True)
            if self.how is How.MOVE:
                file.unlink()

    def _tell(self, file: Path, place: Path, label: str, score: float) -> None:
        """Append a row to the manifest, in one write."""
        manifest = self.target / MANIFEST
        with manifest.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            if opened.tell() == 0:
                writer.writerow(_COLUMNS)
            writer.writerow((str(file), str(place.relative_to(self.target)), label, f"{score:.4f}"))


def _without_overwriting(file: Path, place: Path) -> None:
    """Give a file another name; raises FileExistsError where that is taken."""
    try:
        os.link(file, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if place.exists():
            raise FileExistsError(place) from None
        file.rename(place)
    else:
        file.unlink()


def folder_name(label: str) -> str:
    """Return a label as the name of a folder that every system takes, and that is no other folder of ours."""
    name = _UNSAFE.sub("-", unicodedata.normalize("NFC", label)).strip(" .")
    if name.startswith("_") or _DEVICES.fullmatch(name) or not name:
        name = f"-{name}"
    while len(name.encode()) > _MAX_FOLDER_BYTES:
        name = name[:-1].rstrip(" .")
    return name
