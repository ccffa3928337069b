"""Reads the images of a unit in their order, which never changes; what cannot be read becomes an item that says why."""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from app.bulk.parquet import pyarrow
from app.bulk.sources import TARS, SourceKind, WorkUnit, file_stamp, reason_of, tar_suffix
from app.captions.sources import read_errors, unpacked
from app.errors import InvalidFieldError
from app.images.decode import supported_suffixes

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class UnreadableImage:
    """Why an image is not there."""

    reason: str


def too_large(size_bytes: int, most_bytes: int) -> UnreadableImage:
    """Return why a larger image than may be is not even read."""
    return UnreadableImage(
        f"the image has {size_bytes:,} bytes and the limit is {most_bytes:,}; raise DEIXIS_MAX_IMAGE_BYTES"
    )


Content: TypeAlias = bytes | Path | UnreadableImage
"""An image's bytes, the file that has them, or why there are none."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image and what it is called in its source."""

    key: str
    content: Content


class SourceFolder:
    """The folder that the files of a unit are below, as it was when the unit was begun.

    Files that were named themselves may be anywhere, and only have to have a folder that is not empty.

    Raises:
        InvalidFieldError: it is not there, or empty, as a folder is where nothing is mounted.
    """

    def __init__(self, unit: WorkUnit) -> None:
        path = Path(unit.path)
        self._folder = path if unit.kind is SourceKind.FILES else path.parent
        self._named = unit.kind is SourceKind.FILES and unit.source is None
        self._identity = None if self._named else _identity(self._folder)

    def check(self, file: Path) -> None:
        """See that a file that cannot be read is missing alone, and not with all others.

        Raises:
            InvalidFieldError: the folder is gone, empty, or another one.
        """
        if self._named:
            _identity(file.parent)
        elif _identity(self._folder) != self._identity:
            raise _gone(self._folder, "it is another folder now")


def _identity(folder: Path) -> tuple[int, int]:
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is None:
                raise _gone(folder, "it is empty now")
        status = folder.stat()
    except OSError as error:
        raise _gone(folder, str(error.strerror)) from error
    return status.st_dev, status.st_ino


def _gone(place: Path, reason: str) -> InvalidFieldError:
    return InvalidFieldError.of(
        "sources", f"'{place}' cannot be read any more: {reason}; bring it back, and the same command goes on"
    )


def read_unit(unit: WorkUnit, *, skip: int, max_image_bytes: int) -> Iterator[SourceImage]:
    """Yield the images of a unit behind the first ``skip``; at the end, if it breaks off, one item that says so.

    Args:
        unit: as it was planned.
        skip: items that are done already.
        max_image_bytes: larger ones of a tar are not read.

    Raises:
        InvalidFieldError: the file has gone, or is another one than was planned, so that items cannot be told by
            their places.
    """
    path = Path(unit.path)
    if unit.problem is not None:
        items = iter([SourceImage(next(iter(unit.names), path.name), UnreadableImage(unit.problem))][skip:])
    elif unit.kind is SourceKind.FILES:
        items = (SourceImage(name, path / name) for name in unit.names[skip:])
    else:
        _check_stamp(unit)
        reader = _tar_items(path, max_image_bytes, skip) if unit.kind is SourceKind.TAR else _parquet_items(unit, skip)
        items = _until_it_breaks(unit, "a tar" if unit.kind is SourceKind.TAR else "Parquet", reader)
    yield from items


def _check_stamp(unit: WorkUnit) -> None:
    try:
        there = file_stamp(Path(unit.path))
    except OSError as error:
        raise _gone(Path(unit.path), str(error.strerror)) from error
    if there != unit.stamp:
        raise InvalidFieldError.of(
            "sources", f"'{unit.path}' has changed since the run began; begin anew with another --out"
        )


def _until_it_breaks(unit: WorkUnit, form: str, items: Iterator[SourceImage]) -> Iterator[SourceImage]:
    pa, _ = pyarrow()
    try:
        yield from items
    except (*read_errors(), tarfile.TarError, pa.ArrowException) as error:
        _check_stamp(unit)  # what is damaged is still there
        yield SourceImage(Path(unit.path).name, UnreadableImage(reason_of(form, error)))


class _Header(tarfile.TarInfo):
    """A member of a tar; the library takes whatever is no header for the end, and this only what is one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0") or len(buf) not in (0, tarfile.BLOCKSIZE):
                raise tarfile.ReadError("what should be the next header is none") from error
            raise


def _tar_items(path: Path, max_image_bytes: int, skip: int) -> Iterator[SourceImage]:
    compression = TARS[tar_suffix(path) or ".tar"]
    suffixes = supported_suffixes()
    with ExitStack() as stack:
        content = unpacked(stack.enter_context(path.open("rb")), compression, stack)
        # Of a plain tar what is not wanted is passed over, a packed one can only be read through.
        mode: Literal["r|", "r:"] = "r|" if compression else "r:"
        archive = stack.enter_context(tarfile.open(fileobj=content, mode=mode, tarinfo=_Header))
        links = None if compression else _HardLinks(path, stack)
        seen = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] # it keeps every one, of millions too
            name = member.name.rpartition("/")[2]
            if name.startswith(".") or Path(name).suffix.lower() not in suffixes:
                continue
            if not (member.isreg() or member.islnk() or member.issym()):
                continue
            seen += 1
            if seen > skip:
                yield SourceImage(member.name, _member(archive, member, links, max_image_bytes))
        if not compression:
            content.seek(archive.offset)
        # The stream of a packed one is the library's, which has read ahead. Checksums are told at its end.
        rest = content if archive.fileobj is None or not compression else archive.fileobj
        while block := rest.read(_BUFFER_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError("something follows its end; if it is another tar, unpack each by itself")
        if not seen and not skip:
            yield SourceImage(
                path.name, UnreadableImage(f"there is no image in it; looked for {', '.join(sorted(suffixes))}")
            )


class _HardLinks:
    """What the hard links of a plain tar are of; as soon as there is one, its headers are read once more.

    Args:
        path: of the tar.
        stack: of the caller, who closes what is opened here.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        self._stack = stack
        self._archive: tarfile.TarFile | None = None
        self._read_to = -1
        self._members: dict[str, tarfile.TarInfo] = {}

    def target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Return the file that a link is of, which must be before it."""
        if self._archive is None:
            archive = tarfile.open(self._path, "r:", tarinfo=_Header)  # noqa: SIM115 - the stack closes it
            self._archive = self._stack.enter_context(archive)
        while self._read_to < link.offset and (member := self._archive.next()) is not None:
            self._archive.members.clear()  # type: ignore[attr-defined]
            self._read_to = member.offset
            same = member if member.isreg() else self._named(member.linkname) if member.islnk() else None
            if same is not None:
                self._members[posixpath.normpath(member.name)] = same
        return self._named(link.linkname)

    def _named(self, name: str) -> tarfile.TarInfo | None:
        return self._members.get(posixpath.normpath(name))


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, links: _HardLinks | None, max_image_bytes: int
) -> bytes | UnreadableImage:
    target: tarfile.TarInfo | None = member
    if not member.isreg():
        place = f"'{member.linkname[:200]}'"
        if member.issym():
            return UnreadableImage(f"is a link to {place}, and in a tar none is followed; unpack the tar")
        if links is None:
            return UnreadableImage(
                f"is a hard link to {place}, which a packed tar cannot be read back to; unpack the tar"
            )
        target = links.target(member)
        if target is None:
            return UnreadableImage(f"is a hard link to {place}, which is not before it in the tar")
    assert target is not None
    if target.size > max_image_bytes:
        return too_large(target.size, max_image_bytes)
    file = archive.extractfile(target)
    assert file is not None  # regular
    return file.read()


def _parquet_items(unit: WorkUnit, skip: int) -> Iterator[SourceImage]:
    pa, pq = pyarrow()
    row, first = unit.first_row, unit.first_row + skip
    # Page by page: by default a row group's column is read whole, which with images takes gigabytes.
    with pq.ParquetFile(unit.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for group in unit.groups:
            end = row + file.metadata.row_group(group).num_rows
            try:
                for cells in _cells_of(file, unit, group) if end > first else ():
                    if row >= first:
                        yield _cell(*cells, row, Path(unit.path).parent)
                    row += 1
            except (pa.ArrowException, OSError) as error:
                _check_stamp(unit)
                # How many images are lost is known, and the next row group may be whole.
                for lost in range(max(row, first), end):
                    yield SourceImage(str(lost), UnreadableImage(reason_of("Parquet", error)))
            row = end


def _cells_of(file: Any, unit: WorkUnit, group: int) -> Iterator[tuple[Any, Any]]:
    """Yield the image and the name of each row of a group; None where no column has names."""
    columns = [name for name in (unit.column, unit.key) if name is not None]
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
        images = batch.column(unit.column).to_pylist()
        yield from zip(images, batch.column(unit.key).to_pylist() if unit.key else [None] * len(images), strict=True)


def _cell(image: Any, key: Any, row: int, folder: Path) -> SourceImage:
    """Return the image of a cell: bytes, a path, or a structure of both."""
    path: str | None = None
    if isinstance(image, dict):
        path, image = image.get("path"), image.get("bytes")
    elif isinstance(image, str):
        path, image = image, None
    named = str(row) if key is None and path is None else str(path if key is None else key)
    if image:
        return SourceImage(named, bytes(image))
    return SourceImage(named, UnreadableImage("the cell is empty") if not path else _place(path, folder))


def _place(path: str, folder: Path) -> Path | UnreadableImage:
    """Return the file that a path or a URL of a file names; relative ones are so to the Parquet file's folder."""
    if path.startswith("file://"):
        return Path(url2pathname(urlsplit(path).path))
    if _URL.match(path):
        return UnreadableImage(f"'{path[:200]}' is an address, and nothing is fetched; download it, and name the file")
    if "\0" in path:
        return UnreadableImage("the path has a NUL, which none can have")
    return folder / path
