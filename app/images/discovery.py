"""Find image files: for commands that take paths, and in folders with one subfolder per class."""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from app.errors import InvalidFieldError, UnknownNameError
from app.images.formats import supported_suffixes
from app.names.text import nfc
from app.runtime.file_names import file_text

# Folders in which NAS and other systems keep thumbnails, deleted files and the like, in lower case.
_HOUSEKEEPING = re.compile(
    r"@eadir|@tmp|@recycle|@recently-snapshot|@sharebin|@sharesnap|@transcode|#recycle|#snapshot|\$recycle\.bin|\$extend"
    r"|system volume information|lost\+found|found\.\d{3}|__macosx|network trash folder|thevolumesettingsfolder"
    r"|_gsdata_",
    re.IGNORECASE,
)
# How a path that no file can have is reported by the system.
_IMPOSSIBLE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL})

OnUnreadable: TypeAlias = Callable[[OSError], object]
"""Called with the error if a folder cannot be searched."""


def is_housekeeping(name: str) -> bool:
    """Return whether a file or folder is hidden, or a folder of a NAS or another system, and not of the user."""
    return name.startswith(".") or _HOUSEKEEPING.fullmatch(name) is not None


def find_images(paths: Iterable[Path], unreadable: OnUnreadable = lambda _: None) -> list[Path]:
    """Return the images at ``paths`` without duplicates, in the order of ``paths``.

    A file is returned whatever its suffix, so that decoding it reports what is wrong with it. A folder is searched
    recursively for files with the suffix of a supported format, in sorted order. Any other path is a pattern such as
    ``photos/**/*.jpg``, which not every shell expands; its matches are treated as paths.

    Args:
        paths: files, folders and patterns.
        unreadable: called with the error of each folder that cannot be searched.

    Raises:
        InvalidFieldError: a path does not exist and matches nothing, or there are no images.
    """
    requested = list(paths)
    errors: list[OSError] = []
    found = dict.fromkeys(image for path in requested for image in _expand(path, errors.append))
    if not found:
        raise _unreadable_folder("paths", errors[0]) if errors else _no_images(requested)
    for error in errors:
        unreadable(error)
    return list(found)


def find_labelled_images(folder: Path, unreadable: OnUnreadable = lambda _: None) -> list[tuple[Path, str]]:
    """Return the images below ``folder`` with their classes, which are the names of its subfolders.

    The result is sorted by class, then by path. Class names are in composed Unicode (NFC), since some file systems
    return the decomposed form, and are text also for names that are not UTF-8.

    Args:
        folder: with a subfolder per class.
        unreadable: called with the error of each folder that cannot be searched.

    Raises:
        InvalidFieldError: ``folder`` is not a folder, or none of its subfolders contains an image.
    """
    if not _is_folder(folder):
        raise InvalidFieldError.of("folder", f"'{folder}' is not a folder; give one with a subfolder per class")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_housekeeping(entry.name))
    except OSError as error:
        raise _unreadable_folder("folder", error) from error
    found = [
        (image, nfc(file_text(entry.name)))
        for entry in entries
        if _is_folder(entry)
        for image in images_below(entry, unreadable)
    ]
    if not found:
        has_images = any(entry.suffix.lower() in supported_suffixes() for entry in entries)
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
    folder: Path, classnames: Sequence[str], *, by_subfolder: bool, classes: tuple[str, ...]
) -> list[tuple[Path, tuple[str, ...]]]:
    """Return the images of a folder with their classes, without links that lead out of the folder.

    Args:
        folder: searched recursively.
        classnames: of the label set.
        by_subfolder: the subfolders have the names of the classes, with underscores for spaces.
        classes: those of all images; none for unlabelled images.

    Raises:
        InvalidFieldError: there are no images.
        UnknownNameError: a subfolder does not have the name of a class.
    """
    if by_subfolder:
        found: list[tuple[Path, tuple[str, ...]]] = []
        known = set(classnames)
        for file, subfolder in find_labelled_images(folder):
            name = subfolder if subfolder in known else subfolder.replace("_", " ")
            if name not in known:
                raise UnknownNameError("class", subfolder, classnames, "subfolders must have the names of classes")
            found.append((file, (name,)))
    else:
        found = [(file, classes) for file in find_images([folder])]
    return [(file, given) for file, given in found if is_below(file, folder)]


def is_below(path: Path, folder: Path) -> bool:
    """Return whether a path is below a folder when all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_possible(path: Path) -> bool:
    """Return whether there is something at a path, even if it cannot be read."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in _IMPOSSIBLE
    return True


def find_matches(pattern: Path) -> list[Path]:
    """Return the paths that match a pattern, except those in folders of housekeeping that it does not name."""
    named = set(pattern.parts)
    found = map(Path, glob.glob(str(pattern), recursive=True))  # noqa: PTH207 - pathlib globs no absolute path
    return sorted(path for path in found if not any(map(_HOUSEKEEPING.fullmatch, set(path.parts) - named)))


def _expand(path: Path, unreadable: OnUnreadable) -> Iterator[Path]:
    if _is_folder(path):
        yield from images_below(path, unreadable)
    elif is_possible(path):
        yield path
    else:
        matches = find_matches(path)
        if not matches:
            raise InvalidFieldError.of(
                "paths",
                f"'{path}' is neither a file nor a folder, and it matches nothing as a pattern; correct the path",
            )
        for match in matches:
            yield from images_below(match, unreadable) if _is_folder(match) else (match,)


def images_below(folder: Path, unreadable: OnUnreadable = lambda _: None) -> Iterator[Path]:
    """Yield the files below ``folder`` with the suffix of an image, also those that cannot be read."""
    suffixes = supported_suffixes()
    return (path for path in files_below(folder, unreadable) if path.suffix.lower() in suffixes)


def files_below(folder: Path, unreadable: OnUnreadable = lambda _: None) -> Iterator[Path]:
    """Yield the files below ``folder``, including broken links; hidden files and housekeeping are skipped.

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
        subfolders[:] = sorted(name for name in subfolders if not is_housekeeping(name))
        yield from (Path(path, name) for name in sorted(names) if not name.startswith("."))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _unreadable_folder(field: str, error: OSError) -> InvalidFieldError:
    return InvalidFieldError.of(field, f"'{error.filename}' cannot be read: {error.strerror}")


def _suffixes() -> str:
    return ", ".join(sorted(supported_suffixes()))


def _no_images(paths: list[Path]) -> InvalidFieldError:
    where = ", ".join(f"'{path}'" for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
    return InvalidFieldError.of("paths", f"no image in {where or 'an empty list'}; looked for {_suffixes()}")
