"""Find image files: for commands that take paths, and in folders with one subfolder per class."""

import glob
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from app.errors import InvalidFieldError, UnknownNameError
from app.images.decode import supported_suffixes


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the images at ``paths`` without duplicates, in the order of ``paths``.

    A file is returned whatever its suffix, so that decoding it reports what is wrong with it. A folder is searched
    recursively for files with the suffix of a supported format, in sorted order. Any other path is a pattern such as
    ``photos/**/*.jpg``, which not every shell expands; its matches are treated as paths.

    Raises:
        InvalidFieldError: a path does not exist and matches nothing, or there are no images.
    """
    requested = list(paths)
    found = dict.fromkeys(image for path in requested for image in _expand(path))
    if not found:
        raise _no_images(requested)
    return list(found)


def find_labelled_images(folder: Path) -> list[tuple[Path, str]]:
    """Return the images below ``folder`` with their classes, which are the names of its subfolders.

    The result is sorted by class, then by path. Class names are in composed Unicode (NFC), since some file systems
    return the decomposed form.

    Raises:
        InvalidFieldError: ``folder`` is not a folder, or none of its subfolders contains an image.
    """
    if not folder.is_dir():
        raise InvalidFieldError.of("folder", f"'{folder}' is not a folder; give one with a subfolder per class")
    subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry))
    found = [(image, unicodedata.normalize("NFC", entry.name)) for entry in subfolders for image in images_below(entry)]
    if not found:
        suffixes = supported_suffixes()
        has_images = any(entry.suffix.lower() in suffixes for entry in folder.iterdir() if entry.is_file())
        problem = "contains its images directly" if has_images else "has no subfolder with images"
        raise InvalidFieldError.of(
            "folder", f"'{folder}' {problem}; put them into one subfolder per class ({_suffixes()})"
        )
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def files_within(root: Path | None, names: Sequence[str]) -> list[Path]:
    """Return the files with these names below ``root``; raises as ``folder_within``."""
    if root is None:
        raise InvalidFieldError.of("files", "files on the server cannot be read; set DEIXIS_IMPORT_DIR")
    found = []
    for index, name in enumerate(names):
        file = _within(root, name)
        if file is None or not file.is_file():
            raise InvalidFieldError.of(f"files.{index}", f"'{name[:200]}' is not a file below DEIXIS_IMPORT_DIR")
        found.append(file)
    return found


def folder_within(root: Path | None, name: str) -> Path:
    """Return the folder ``name`` below ``root``; links are resolved first, so that no name leads outside.

    Raises:
        InvalidFieldError: ``root`` is None, or the folder does not exist below it.
    """
    if root is None:
        raise InvalidFieldError.of(
            "folder", "folders on the server cannot be imported; set DEIXIS_IMPORT_DIR, or send the images"
        )
    folder = _within(root, name)
    if folder is None or not folder.is_dir():
        raise InvalidFieldError.of("folder", f"'{name[:200]}' is not a folder below DEIXIS_IMPORT_DIR")
    return folder


def _within(root: Path, name: str) -> Path | None:
    """Return the resolved path of ``name`` below ``root``; None if it does not exist or is outside."""
    try:
        base, path = root.resolve(), (root / name).resolve()
        return path if path.is_relative_to(base) and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, contains NUL, or a loop of links
        return None


def import_images(
    folder: Path, classnames: Sequence[str], *, by_subfolder: bool, classname: str | None
) -> list[tuple[Path, str | None]]:
    """Return the images of a folder with their classes, without links that lead out of the folder.

    Args:
        folder: searched recursively.
        classnames: of the label set.
        by_subfolder: the subfolders have the names of the classes, with underscores for spaces.
        classname: of all images; None for unlabelled images.

    Raises:
        InvalidFieldError: there are no images.
        UnknownNameError: a subfolder does not have the name of a class.
    """
    if by_subfolder:
        found: list[tuple[Path, str | None]] = []
        known = set(classnames)
        for file, subfolder in find_labelled_images(folder):
            name = subfolder if subfolder in known else subfolder.replace("_", " ")
            if name not in known:
                raise UnknownNameError("class", subfolder, classnames, "subfolders must have the names of classes")
            found.append((file, name))
    else:
        found = [(file, classname) for file in find_images([folder])]
    base = folder.resolve()
    return [(file, name) for file, name in found if file.resolve().is_relative_to(base)]


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from images_below(path)
    elif path.exists():
        yield path
    else:
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - pathlib globs no absolute path
        if not matches:
            raise InvalidFieldError.of(
                "paths",
                f"'{path}' is neither a file nor a folder, and it matches nothing as a pattern; correct the path",
            )
        for match in matches:
            yield from images_below(match) if match.is_dir() else (match,)


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the images below ``folder``; files that disappear or cannot be read are skipped."""
    suffixes = supported_suffixes()
    for path in files_below(folder):
        if path.suffix.lower() in suffixes and path.is_file():
            yield path


def files_below(folder: Path, unreadable: Callable[[OSError], object] = lambda _: None) -> Iterator[Path]:
    """Yield the files below ``folder``, including broken links; hidden files and folders are skipped.

    Links are followed. Each folder is visited once, even if links form a loop.

    Args:
        folder: searched recursively.
        unreadable: called with the error if this folder or one below it cannot be searched.
    """
    seen = set()
    for path, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        try:
            status = Path(path).stat()
        except OSError as error:
            unreadable(error)
            subfolders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(path, name) for name in sorted(names) if not name.startswith("."))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _suffixes() -> str:
    return ", ".join(sorted(supported_suffixes()))


def _no_images(paths: list[Path]) -> InvalidFieldError:
    where = ", ".join(f"'{path}'" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return InvalidFieldError.of("paths", f"no image in {where or 'an empty list'}; looked for {_suffixes()}")
