"""Which files of a disk are images: for the commands that take paths, and for folders with one subfolder per class."""

import glob
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from app.errors import InvalidFieldError, UnknownNameError
from app.images.decode import supported_suffixes


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the images that ``paths`` name, each once, in the order given.

    A file is taken as it is, whatever its suffix, so that a refusal says what is wrong with it. A folder is searched
    to the bottom for the suffixes of supported formats, in sorted order. Anything else is a pattern such as
    ``photos/**/*.jpg``, because not every shell expands them; what it matches is treated as if it had been given.

    Raises:
        InvalidFieldError: a path that is neither and matches nothing, or no image at all.
    """
    given = list(paths)
    found = dict.fromkeys(image for path in given for image in _images_of(path))
    if not found:
        raise _no_images(given)
    return list(found)


def find_labelled_images(folder: Path) -> list[tuple[Path, str]]:
    """Return each image below ``folder`` with its class, the name of the subfolder it is in or under.

    Sorted by class, then by path. Class names are brought to composed Unicode (NFC), since some file systems hand out
    another form than keyboards type.

    Raises:
        InvalidFieldError: not a folder, or no subfolder of it holds an image.
    """
    if not folder.is_dir():
        raise InvalidFieldError.of("folder", f"'{folder}' is not a folder; give one that has a subfolder per class")
    subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry))
    found = [(image, unicodedata.normalize("NFC", entry.name)) for entry in subfolders for image in images_below(entry)]
    if not found:
        suffixes = supported_suffixes()
        loose = any(entry.suffix.lower() in suffixes for entry in folder.iterdir() if entry.is_file())
        problem = "holds its images directly" if loose else "has no subfolder with images"
        raise InvalidFieldError.of(
            "folder", f"'{folder}' {problem}; put them into one subfolder per class ({_suffixes()})"
        )
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def files_within(root: Path | None, names: Sequence[str]) -> list[Path]:
    """Return the files called so below ``root``; raises as ``folder_within``."""
    if root is None:
        raise InvalidFieldError.of("files", "no file may be read from the server; set DEIXIS_IMPORT_DIR")
    found = []
    for index, name in enumerate(names):
        file = _within(root, name)
        if file is None or not file.is_file():
            raise InvalidFieldError.of(f"files.{index}", f"'{name[:200]}' is no file below DEIXIS_IMPORT_DIR")
        found.append(file)
    return found


def folder_within(root: Path | None, name: str) -> Path:
    """Return the folder called ``name`` below ``root``, links followed, so that no name leads out of it.

    Raises:
        InvalidFieldError: there is no root, no such folder, or it is not below the root.
    """
    if root is None:
        raise InvalidFieldError.of(
            "folder", "no folder may be imported from; set DEIXIS_IMPORT_DIR, or send the images"
        )
    folder = _within(root, name)
    if folder is None or not folder.is_dir():
        raise InvalidFieldError.of("folder", f"'{name[:200]}' is no folder below DEIXIS_IMPORT_DIR")
    return folder


def _within(root: Path, name: str) -> Path | None:
    """Return what is called so below ``root``, links followed; None where there is nothing, or not below it."""
    try:
        base, place = root.resolve(), (root / name).resolve()
        return place if place.is_relative_to(base) and place.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or a loop of links
        return None


def import_images(
    folder: Path, classnames: Sequence[str], *, by_subfolder: bool, classname: str | None
) -> list[tuple[Path, str | None]]:
    """Return the images of a folder, each with its class; links that lead out of the folder are left out.

    Args:
        folder: searched to the bottom.
        classnames: of the label set.
        by_subfolder: each subfolder is called like the class of its images, underscores read as spaces.
        classname: of all images; None for unlabelled ones.

    Raises:
        InvalidFieldError: no image, or a subfolder that is called like no class.
    """
    if by_subfolder:
        found: list[tuple[Path, str | None]] = []
        for file, subfolder in find_labelled_images(folder):
            name = subfolder if subfolder in classnames else subfolder.replace("_", " ")
            if name not in classnames:
                raise UnknownNameError("class", subfolder, classnames, "subfolders must be called like classes")
            found.append((file, name))
    else:
        found = [(file, classname) for file in find_images([folder])]
    base = folder.resolve()
    return [(file, name) for file, name in found if file.resolve().is_relative_to(base)]


def _images_of(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from images_below(path)
    elif path.exists():
        yield path
    else:
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - pathlib globs no absolute path
        if not matches:
            raise InvalidFieldError.of(
                "paths", f"'{path}' is neither a file nor a folder, and as a pattern it matches nothing"
            )
        for match in matches:
            yield from images_below(match) if match.is_dir() else (match,)


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the images below ``folder``; what vanishes meanwhile, or cannot be read, is left out."""
    suffixes = supported_suffixes()
    for path in files_below(folder):
        if path.suffix.lower() in suffixes and path.is_file():
            yield path


def files_below(folder: Path, unreadable: Callable[[OSError], object] = lambda _: None) -> Iterator[Path]:
    """Yield what is below ``folder`` and no folder, links followed, each real folder visited once, however links loop.

    That may be a link that leads nowhere too. Hidden files and folders are left out.

    Args:
        folder: searched to the bottom.
        unreadable: is told why a folder, this one or one below it, cannot be searched.
    """
    seen = set()
    for place, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        try:
            status = Path(place).stat()
        except OSError as error:
            unreadable(error)
            subfolders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _suffixes() -> str:
    return ", ".join(sorted(supported_suffixes()))


def _no_images(paths: list[Path]) -> InvalidFieldError:
    where = ", ".join(f"'{path}'" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return InvalidFieldError.of("paths", f"no image in {where or 'an empty list'}; looked for {_suffixes()}")
