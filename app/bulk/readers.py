"""Reads the images of a work unit, in a fixed order; an image that cannot be read gives the reason."""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from app.bulk.parquet import pyarrow
from app.bulk.sources import TARS, SourceKind, WorkUnit, damage_message, damage_reason, file_stamp, tar_suffix
from app.errors import InvalidFieldError, NotAnImageError
from app.images.data_urls import is_data_url, read_image_text
from app.images.discovery import is_housekeeping
from app.images.formats import supported_suffixes
from app.runtime.compression import read_errors, unpacked
from app.runtime.file_names import file_text
from app.runtime.regular_files import open_regular

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class UnreadableImage:
    """The reason why an image cannot be read."""

    reason: str


def too_large(size_bytes: int, max_bytes: int) -> UnreadableImage:
    """Return the reason for an image above the size limit."""
    return UnreadableImage(
        f"the image has {size_bytes:,} bytes and the limit is {max_bytes:,}; raise DEIXIS_MAX_IMAGE_BYTES"
    )


Content: TypeAlias = bytes | Path | UnreadableImage
"""The bytes of an image, its file, or the reason why it cannot be read."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image and its name in the source."""

    key: str
    content: Content


class SourceFolder:
    """The folder of a unit's files, as it was when a worker started the unit.

    For image files that were named themselves, each file has its own folder, which only has to exist and not be empty.

    Raises:
        InvalidFieldError: the folder does not exist, or is empty, as where a disk is not mounted.
    """

    def __init__(self, unit: WorkUnit) -> None:
        path = Path(unit.path)
        self._folder = path if unit.kind is SourceKind.FILES else path.parent
        self._has_named_files = unit.kind is SourceKind.FILES and unit.source is None
        self._identity = None if self._has_named_files else _identity(self._folder)

    def verify(self, file: Path) -> None:
        """Check, for a file that cannot be read, that its folder still exists.

        Raises:
            InvalidFieldError: the folder has disappeared, is empty, or has been replaced.
        """
        if self._has_named_files:
            _identity(file.parent)
        elif _identity(self._folder) != self._identity:
            raise _disappeared(self._folder, "another folder has replaced it")


def _identity(folder: Path) -> tuple[int, int]:
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is None:
                raise _disappeared(folder, "it is now empty")
        status = folder.stat()
    except OSError as error:
        raise _disappeared(folder, str(error.strerror)) from error
    return status.st_dev, status.st_ino


def _disappeared(place: Path, reason: str) -> InvalidFieldError:
    return InvalidFieldError.of(
        "sources", f"'{place}' can no longer be read: {reason}; restore it, and repeat the command to resume"
    )


def read_unit(unit: WorkUnit, *, skip: int, max_image_bytes: int) -> Iterator[SourceImage]:
    """Yield the images of a unit; a file that is damaged yields one more image, with the reason.

    Args:
        unit: of the plan.
        skip: number of images at the start that are already classified.
        max_image_bytes: larger images in a tar file are not read.

    Raises:
        InvalidFieldError: the file has disappeared or changed, so that the order of its images is unknown.
    """
    path = Path(unit.path)
    if unit.problem is not None:
        images = iter([SourceImage(next(iter(unit.names), path.name), UnreadableImage(unit.problem))][skip:])
    elif unit.kind is SourceKind.FILES:
        images = (SourceImage(file_text(name), path / name) for name in unit.names[skip:])
    else:
        _check_stamp(unit)
        is_tar = unit.kind is SourceKind.TAR
        reader = _tar_images(path, max_image_bytes, skip) if is_tar else _parquet_images(unit, skip)
        images = _until_damage(unit, "a tar file" if is_tar else "Parquet", reader)
    yield from images


def _check_stamp(unit: WorkUnit) -> None:
    try:
        stamp = file_stamp(Path(unit.path))
    except OSError as error:
        raise _disappeared(Path(unit.path), str(error.strerror)) from error
    if stamp != unit.stamp:
        raise InvalidFieldError.of(
            "sources", f"'{unit.path}' has changed since the run started; start again with another --out"
        )


def _until_damage(unit: WorkUnit, file_format: str, images: Iterator[SourceImage]) -> Iterator[SourceImage]:
    pa, _ = pyarrow()
    try:
        yield from images
    except (*read_errors(), tarfile.TarError, pa.ArrowException) as error:
        _check_stamp(unit)  # a file that has disappeared is not damaged
        yield SourceImage(Path(unit.path).name, UnreadableImage(damage_message(file_format, error)))


class _TarMember(tarfile.TarInfo):
    """A member of a tar file; unlike the library's, it does not take an invalid header for the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0") or len(buf) not in (0, tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the next header is invalid") from error
            raise


def _tar_images(path: Path, max_image_bytes: int, skip: int) -> Iterator[SourceImage]:
    compression = TARS[tar_suffix(path) or ".tar"]
    suffixes = supported_suffixes()
    with ExitStack() as stack:
        content = unpacked(stack.enter_context(open_regular(path)), compression, stack)
        # A reader can seek in an uncompressed tar file; a compressed one is a stream.
        mode: Literal["r|", "r:"] = "r|" if compression else "r:"
        archive = stack.enter_context(tarfile.open(fileobj=content, mode=mode, tarinfo=_TarMember))
        links = None if compression else _HardLinks(path, stack)
        seen = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] # the library keeps every member in memory
            *folders, name = member.name.split("/")
            if (
                name.startswith(".")
                or any(map(is_housekeeping, {*folders} - {".", ".."}))
                or Path(name).suffix.lower() not in suffixes
            ):
                continue
            if not (member.isreg() or member.islnk() or member.issym()):
                continue
            seen += 1
            if seen > skip:
                yield SourceImage(file_text(member.name), _member(archive, member, links, max_image_bytes))
        if not compression:
            content.seek(archive.offset)
        # The library has read ahead in the stream of a compressed file. Its checksum is verified at the end.
        rest = content if archive.fileobj is None or not compression else archive.fileobj
        while block := rest.read(_BUFFER_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError("there is data after its end; if this is another tar file, split the file")
        if not seen and not skip:
            reason = f"the file has no images; the suffixes of images are {', '.join(sorted(suffixes))}"
            yield SourceImage(path.name, UnreadableImage(reason))


class _HardLinks:
    """The targets of hard links in an uncompressed tar file; the first link starts a second pass over the headers.

    Args:
        path: of the tar file.
        stack: closes the second reader.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        self._stack = stack
        self._archive: tarfile.TarFile | None = None
        self._read_to = -1
        self._members: dict[str, tarfile.TarInfo] = {}

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Return the file that a link refers to; None if no earlier member has this name."""
        if self._archive is None:
            archive = tarfile.open(self._path, "r:", tarinfo=_TarMember)  # noqa: SIM115 - the stack closes it
            self._archive = self._stack.enter_context(archive)
        while self._read_to < link.offset and (member := self._archive.next()) is not None:
            self._archive.members.clear()  # type: ignore[attr-defined]
            self._read_to = member.offset
            file = member if member.isreg() else self._find(member.linkname) if member.islnk() else None
            if file is not None:
                self._members[posixpath.normpath(member.name)] = file
        return self._find(link.linkname)

    def _find(self, name: str) -> tarfile.TarInfo | None:
        return self._members.get(posixpath.normpath(name))


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, links: _HardLinks | None, max_image_bytes: int
) -> bytes | UnreadableImage:
    target: tarfile.TarInfo | None = member
    if not member.isreg():
        name = f"'{member.linkname[:200]}'"
        if member.issym():
            return UnreadableImage(f"a symbolic link to {name}, which is not followed; unpack the tar file")
        if links is None:
            return UnreadableImage(
                f"a hard link to {name}, which cannot be read in a compressed tar file; unpack the tar file"
            )
        target = links.target(member)
        if target is None:
            return UnreadableImage(f"a hard link to {name}, which is not an earlier file of the tar file")
    assert target is not None
    if target.size > max_image_bytes:
        return too_large(target.size, max_image_bytes)
    file = archive.extractfile(target)
    assert file is not None  # a regular file
    return file.read()


def _parquet_images(unit: WorkUnit, skip: int) -> Iterator[SourceImage]:
    pa, pq = pyarrow()
    row, first = unit.first_row, unit.first_row + skip
    # Without pre-buffering, pages are read one by one; the default reads a whole row group, gigabytes of images.
    with pq.ParquetFile(unit.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for group in unit.groups:
            end = row + file.metadata.row_group(group).num_rows
            try:
                for image, key in _cells(file, unit, group) if end > first else ():
                    if row >= first:
                        yield _parquet_image(image, key, row, Path(unit.path).parent)
                    row += 1
            except (pa.ArrowException, OSError) as error:
                _check_stamp(unit)
                # The number of lost rows is known, and the next row group may be intact.
                for lost in range(max(row, first), end):
                    yield SourceImage(str(lost), UnreadableImage(damage_message("Parquet", error)))
            row = end


def _cells(file: Any, unit: WorkUnit, group: int) -> Iterator[tuple[Any, Any]]:
    """Yield the image and the name of each row of a group as Arrow scalars; None without a column of names."""
    columns = [name for name in (unit.column, unit.key) if name is not None]
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
        images, names = batch.column(unit.column), batch.column(unit.key) if unit.key else None
        yield from ((images[row], None if names is None else names[row]) for row in range(len(images)))


def _parquet_image(image: Any, key: Any, row: int, folder: Path) -> SourceImage:
    """Return the image of a row; a row that cannot be read is only an error of this row."""
    try:
        name = None if key is None else _name(_value(key))
        path, content = _cell_image(_value(image), folder)
    except Exception as error:  # noqa: BLE001 - Arrow raises errors of many types for values that Python cannot hold
        return SourceImage(str(row), UnreadableImage(f"the row cannot be read: {damage_reason(error)}"))
    return SourceImage(next((found for found in (name, path) if found is not None), str(row)), content)


def _value(cell: Any) -> Any:
    """Return the Python value of an Arrow scalar; one of an extension type as it is stored."""
    pa, _ = pyarrow()
    while isinstance(cell, pa.ExtensionScalar):
        cell = cell.value
    return None if cell is None else cell.as_py()


def _name(key: Any) -> str | None:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else None if key is None else str(key)


def _cell_image(image: Any, folder: Path) -> tuple[str | None, Content]:
    """Return the path and the image of a cell that contains bytes, a path, or a structure of both."""
    path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (None, image)
    if isinstance(image, str):
        path, content = image, None
    path = path if isinstance(path, str) else None
    if path is not None and is_data_url(path):
        path, content = None, content or path
    if isinstance(content, list):
        with suppress(TypeError, ValueError):  # not a list of bytes
            content = bytes(content)
    if isinstance(content, bytes) and content:
        return path, content
    if isinstance(content, str) and content:
        try:
            return path, read_image_text(content)
        except NotAnImageError as error:
            return path, UnreadableImage(error.message)
    if not path:
        return path, UnreadableImage("the cell is empty" if not content else "the cell does not contain bytes")
    return path, _file(path, folder)


def _file(path: str, folder: Path) -> Path | UnreadableImage:
    """Return the file of a path or a ``file://`` URL; relative paths start at the folder of the Parquet file."""
    if path.startswith("file://"):
        return Path(url2pathname(urlsplit(path).path))
    if _URL.match(path):
        return UnreadableImage(f"'{path[:200]}' is a URL, and images are not downloaded; name a downloaded file")
    if "\0" in path:
        return UnreadableImage("the path contains a NUL character")
    return folder / path
