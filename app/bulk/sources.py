"""Where images in great numbers come from: folders, files, tars as WebDataset makes them, and Parquet.

A source is planned once, in *units* that are read from beginning to end: some files of a folder, one tar, or some row
groups of a Parquet file. The order of the units, and of the images in each, never changes, so that a run can be
continued. What cannot be read becomes an item that says why.
"""

import glob
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from app.bulk.parquet import pyarrow
from app.captions.sources import read_errors, unpacked
from app.errors import InvalidFieldError
from app.files import files_below
from app.images import supported_suffixes

PARQUET = (".parquet", ".pq")
# By suffix, the compression as `app.captions.sources` calls it.
TARS: Mapping[str, str] = {".tar": "", ".tar.gz": ".gz", ".tgz": ".gz", ".tar.zst": ".zst"}
# Archives of other forms, and whatever is packed by itself.
_OTHER_ARCHIVE = re.compile(
    r".*\.(tar\.\w+|tbz2?|txz|tlz|zip|7z|rar|cpio|gz|bz2|xz|lz4|zst)", re.IGNORECASE | re.DOTALL
)

# The names by which data sets call their images, the likeliest first.
_USUAL_BYTES = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "img", "content", "data")
_USUAL_PATHS = ("path", "image_path", "file", "file_name", "filename", "filepath", "image", "url", "image_url", "uri")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 2**20


class Kind(StrEnum):
    """What a unit is read from."""

    FILES = "files"
    TAR = "tar"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read from its beginning to its end by one worker.

    Args:
        kind: of it.
        source: the folder or file as it was given, which answers tell; None for files that were named themselves.
        path: the same, absolute; of files that were named themselves, the folder that their names are relative to.
        names: of the files; with a problem, of a folder below the source.
        images: how many, where that is known without reading them.
        stamp: bytes and ns of the last change of a tar or a Parquet file.
        first_row: of a Parquet file, from 0.
        groups: the row groups to read.
        column: that holds the images.
        key: the column that names them.
        problem: why nothing of it can be read.
    """

    kind: Kind
    source: str | None
    path: str
    names: tuple[str, ...] = ()
    images: int | None = None
    stamp: tuple[int, int] | None = None
    first_row: int = 0
    groups: tuple[int, ...] = ()
    column: str | None = None
    key: str | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it, without what is not set."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), 0)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Unit":
        """Return what ``to_json`` told."""
        lists = {name: tuple(told[name]) for name in ("names", "stamp", "groups") if name in told}
        return cls(**{"source": None, **told, **lists, "kind": Kind(told["kind"])})


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why an image is not there."""

    reason: str


def too_large(size_bytes: int, most_bytes: int) -> Unreadable:
    """Return why a larger image than may be is not even read."""
    return Unreadable(
        f"the image has {size_bytes:,} bytes and the limit is {most_bytes:,}; raise DEIXIS_MAX_IMAGE_BYTES"
    )


Content: TypeAlias = bytes | Path | Unreadable
"""An image's bytes, the file that has them, or why there are none."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image and what it is called in its source."""

    key: str
    content: Content


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of Parquet to read; None looks for usual names."""

    image: str | None = None
    key: str | None = None


class Root:
    """The folder that the files of a unit are below, as it was when the unit was begun.

    Files that were named themselves may be anywhere, and only have to have a folder that is not empty.

    Raises:
        InvalidFieldError: it is not there, or empty, as a folder is where nothing is mounted.
    """

    def __init__(self, unit: Unit) -> None:
        path = Path(unit.path)
        self._folder = path if unit.kind is Kind.FILES else path.parent
        self._named = unit.kind is Kind.FILES and unit.source is None
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


# --- planning --------------------------------------------------------------------------------------------------------


def plan(
    sources: Iterable[Path], columns: Columns, *, images: int, tell: Callable[[str], object] = lambda _: None
) -> Iterator[Unit]:
    """Yield the units of sources, in the order of the sources.

    Args:
        sources: folders, which are searched whole; ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.zst`` and ``.parquet``
            files; other files, which are taken for images; or patterns for any of these.
        columns: of Parquet.
        images: in a unit of files; least number in one of Parquet that is not the last of its file.
        tell: is told what is passed over.

    Raises:
        InvalidFieldError: a path that is neither and matches nothing, a folder without an image, a Parquet file without
            such a column, nothing at all, or what the system does not let us look at.
    """
    with _system_told():
        yield from _planned(sources, columns, images, tell)


def check_sources(sources: Iterable[Path]) -> None:
    """Refuse, without a look into folders, what ``plan`` would.

    Raises:
        InvalidFieldError: a path that is neither and matches nothing, or one whose images a folder has already.
    """
    with _system_told():
        _expanded(sources)


@contextmanager
def _system_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = str(error.filename or "")[:200]
        raise InvalidFieldError.of("sources", f"'{place}' cannot be read: {error.strerror or error}") from error


def _planned(sources: Iterable[Path], columns: Columns, images: int, tell: Callable[[str], object]) -> Iterator[Unit]:
    found = False
    loose: list[str] = []

    def named(*, least: int) -> Iterator[Unit]:
        """Yield the files that were named themselves, once there are enough."""
        while len(loose) >= max(1, least):
            yield _files(None, Path.cwd(), loose[:images])
            del loose[:images]

    paths = _expanded(sources)
    archives = {os.path.realpath(path) for path in paths if _archive_suffix(path) is not None}
    for path in paths:
        found = True
        if not (path.is_dir() or _tar_suffix(path) is not None or path.suffix.lower() in PARQUET):
            loose.append(str(path))
            yield from named(least=images)
            continue
        yield from named(least=1)
        if path.is_dir():
            yield from _of_folder(path, images, archives, tell)
        elif _tar_suffix(path) is not None:
            yield Unit(Kind.TAR, str(path), str(path.absolute()), stamp=_stamp(path))
        else:
            yield from _of_parquet(path, columns, images)
    yield from named(least=1)
    if not found:
        raise InvalidFieldError.of("sources", "none is given; name folders, tars or Parquet files")


def _expanded(sources: Iterable[Path]) -> list[Path]:
    """Return what sources name, each path once.

    Raises:
        InvalidFieldError: a path that is neither and matches nothing, one whose images a folder has already, or an
            archive of another form.
    """
    paths = list({path.absolute(): path for source in sources for path in _matches(source)}.values())
    folders = {path.resolve() for path in paths if path.is_dir()}
    for path in paths:
        if _is_other_archive(path) and not path.is_dir():
            raise InvalidFieldError.of(
                "sources",
                f"'{path}' is packed in a form that is not read; unpack it, or make it one of: {', '.join(TARS)}",
            )
    for path in paths if folders else ():
        if path.is_dir() or path.suffix.lower() in supported_suffixes():
            around = next((folder for folder in path.resolve().parents if folder in folders), None)
            if around is not None:
                raise InvalidFieldError.of(
                    "sources", f"'{path}' is in '{around}', which is searched whole; name only one of them"
                )
    return paths


def _matches(path: Path) -> Sequence[Path]:
    if path.exists():
        return [path]
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - pathlib globs no absolute path
    if not matches:
        raise InvalidFieldError.of(
            "sources", f"'{path}' is neither a file nor a folder, and as a pattern it matches nothing"
        )
    return matches


def _tar_suffix(path: Path) -> str | None:
    return next((suffix for suffix in TARS if path.name.lower().endswith(suffix)), None)


def _archive_suffix(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in PARQUET else _tar_suffix(path)


def _is_other_archive(path: Path) -> bool:
    return _archive_suffix(path) is None and _OTHER_ARCHIVE.fullmatch(path.name) is not None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _files(source: str | None, root: Path, names: Sequence[str]) -> Unit:
    return Unit(Kind.FILES, source, str(root.absolute()), names=tuple(names), images=len(names))


def _of_folder(folder: Path, images: int, named: Container[str], tell: Callable[[str], object]) -> Iterator[Unit]:
    suffixes = supported_suffixes()
    names: list[str] = []
    unreadable: list[OSError] = []
    unopened: Counter[str] = Counter()
    packed, others = None, 0
    found = False
    for path in files_below(folder, unreadable.append):
        if path.suffix.lower() not in suffixes and not _may_lead_to_images(path):
            archive = _archive_suffix(path)
            if archive is not None and os.path.realpath(path) not in named:
                unopened[path.name[-len(archive) :]] += 1
            elif _is_other_archive(path):
                packed, others = packed or path, others + 1
            continue
        found = True
        names.append(path.relative_to(folder).as_posix())
        if len(names) == images:
            yield _files(str(folder), folder, names)
            names = []
    if names:
        yield _files(str(folder), folder, names)
    patterns = ", ".join(f"'{Path(glob.escape(str(folder)), '**', '*' + suffix)}'" for suffix in sorted(unopened))
    if not found:
        if unreadable:
            raise unreadable[0]
        way_out = (
            f"it has {unopened.total():,} archives; name them, as {patterns}"
            if unopened
            else f"'{packed}' is packed in a form that is not read"
            if packed
            else f"looked for {', '.join(sorted(suffixes))}"
        )
        raise InvalidFieldError.of("sources", f"no image in '{folder}'; {way_out}")
    for error in unreadable:
        name = Path(error.filename).relative_to(folder).as_posix()
        yield replace(
            _files(str(folder), folder, [name]), problem=f"the folder cannot be read: {error.strerror or error}"
        )
    if unopened:
        tell(
            f"{unopened.total():,} archives below '{folder}' are not opened; to have them read, name them, in a run"
            f" with another --out: {patterns}"
        )
    if packed:
        tell(f"{others:,} files below '{folder}' are packed in a form that is not read, as '{packed}'")


def _may_lead_to_images(path: Path) -> bool:
    """Tell whether it is a link that leads nowhere, or that cannot be followed, and so may be one to a folder."""
    try:
        return not path.suffix and path.is_symlink() and not path.exists()
    except OSError:
        return True


def _of_parquet(path: Path, columns: Columns, images: int) -> Iterator[Unit]:
    pa, pq = pyarrow()
    stamp, absolute = _stamp(path), str(path.absolute())
    try:
        with pq.ParquetFile(path) as file:
            schema, sizes = file.schema_arrow, [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        yield Unit(Kind.PARQUET, str(path), absolute, images=1, problem=_told("Parquet", error))
        return
    if not sum(sizes):
        yield Unit(Kind.PARQUET, str(path), absolute, images=1, problem="there is no row in it")
        return
    column, key = _columns_of(path, schema, columns)
    first, groups, rows = 0, [], 0
    for number, size in enumerate(sizes):
        groups.append(number)
        rows += size
        if rows >= images or number == len(sizes) - 1:
            yield Unit(
                Kind.PARQUET,
                str(path),
                absolute,
                images=rows,
                stamp=stamp,
                first_row=first,
                groups=tuple(groups),
                column=column,
                key=key,
            )
            first, groups, rows = first + rows, [], 0


def _columns_of(path: Path, schema: Any, wanted: Columns) -> tuple[str, str | None]:
    """Return the column of the images, and that of their names if there is one."""
    names = [name for name, times in Counter(schema.names).items() if times == 1]
    doubled = [name for name in dict.fromkeys(schema.names) if name not in names]
    if doubled and (not names or {wanted.image, wanted.key}.intersection(doubled)):
        raise InvalidFieldError.of("column", f"'{path}' has several columns called {_listed(doubled)}; rename them")
    for given in (wanted.image, wanted.key):
        if given is not None and given not in names:
            raise InvalidFieldError.of("column", f"'{path}' has no column '{given}'; name one of: {_listed(names)}")
    if wanted.image is not None:
        if not (_holds_bytes(schema, wanted.image) or _holds_text(schema, wanted.image)):
            kind = schema.field(wanted.image).type
            raise InvalidFieldError.of("column", f"'{wanted.image}' of '{path}' holds {kind}, and not bytes or paths")
        return wanted.image, wanted.key
    binary = [name for name in names if _holds_bytes(schema, name)]
    texts = [name for name in names if _holds_text(schema, name)]
    column = next((name for name in _USUAL_BYTES if name in binary), None)
    column = column or (binary[0] if len(binary) == 1 else None)
    if column is None and not binary:
        column = next((name for name in _USUAL_PATHS if name in texts), None)
    if column is None:
        raise InvalidFieldError.of(
            "column",
            f"it cannot be told which column of '{path}' holds the images; name one of: {_listed(binary or names)}",
        )
    return column, wanted.key


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name[:40]}'" for name in names[:20])


def _holds_bytes(schema: Any, name: str) -> bool:
    """Tell whether it is of bytes, or of structures with a field ``bytes``, as Hugging Face's data sets have."""
    pa, _ = pyarrow()
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(place).name for place in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_text(schema: Any, name: str) -> bool:
    pa, _ = pyarrow()
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_unit(unit: Unit, *, skip: int, max_image_bytes: int) -> Iterator[Item]:
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
        items = iter([Item(next(iter(unit.names), path.name), Unreadable(unit.problem))][skip:])
    elif unit.kind is Kind.FILES:
        items = (Item(name, path / name) for name in unit.names[skip:])
    else:
        _check_stamp(unit)
        reader = _tar_items(path, max_image_bytes, skip) if unit.kind is Kind.TAR else _parquet_items(unit, skip)
        items = _until_it_breaks(unit, "a tar" if unit.kind is Kind.TAR else "Parquet", reader)
    yield from items


def _check_stamp(unit: Unit) -> None:
    try:
        there = _stamp(Path(unit.path))
    except OSError as error:
        raise _gone(Path(unit.path), str(error.strerror)) from error
    if there != unit.stamp:
        raise InvalidFieldError.of(
            "sources", f"'{unit.path}' has changed since the run began; begin anew with another --out"
        )


def _until_it_breaks(unit: Unit, form: str, items: Iterator[Item]) -> Iterator[Item]:
    pa, _ = pyarrow()
    try:
        yield from items
    except (*read_errors(), tarfile.TarError, pa.ArrowException) as error:
        _check_stamp(unit)  # what is damaged is still there
        yield Item(Path(unit.path).name, Unreadable(_told(form, error)))


def _told(form: str, error: Exception) -> str:
    """Return why a file, or the rest of it, is lost."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be read as {form}, here or from here on: {' '.join(reason.split())[:200]}"


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


def _tar_items(path: Path, max_image_bytes: int, skip: int) -> Iterator[Item]:
    compression = TARS[_tar_suffix(path) or ".tar"]
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
                yield Item(member.name, _member(archive, member, links, max_image_bytes))
        if not compression:
            content.seek(archive.offset)
        # The stream of a packed one is the library's, which has read ahead. Checksums are told at its end.
        rest = content if archive.fileobj is None or not compression else archive.fileobj
        while block := rest.read(_BUFFER_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError("something follows its end; if it is another tar, unpack each by itself")
        if not seen and not skip:
            yield Item(path.name, Unreadable(f"there is no image in it; looked for {', '.join(sorted(suffixes))}"))


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
) -> bytes | Unreadable:
    target: tarfile.TarInfo | None = member
    if not member.isreg():
        place = f"'{member.linkname[:200]}'"
        if member.issym():
            return Unreadable(f"is a link to {place}, and in a tar none is followed; unpack the tar")
        if links is None:
            return Unreadable(f"is a hard link to {place}, which a packed tar cannot be read back to; unpack the tar")
        target = links.target(member)
        if target is None:
            return Unreadable(f"is a hard link to {place}, which is not before it in the tar")
    assert target is not None
    if target.size > max_image_bytes:
        return too_large(target.size, max_image_bytes)
    file = archive.extractfile(target)
    assert file is not None  # regular
    return file.read()


def _parquet_items(unit: Unit, skip: int) -> Iterator[Item]:
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
                    yield Item(str(lost), Unreadable(_told("Parquet", error)))
            row = end


def _cells_of(file: Any, unit: Unit, group: int) -> Iterator[tuple[Any, Any]]:
    """Yield the image and the name of each row of a group; None where no column has names."""
    columns = [name for name in (unit.column, unit.key) if name is not None]
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
        images = batch.column(unit.column).to_pylist()
        yield from zip(images, batch.column(unit.key).to_pylist() if unit.key else [None] * len(images), strict=True)


def _cell(image: Any, key: Any, row: int, folder: Path) -> Item:
    """Return the image of a cell: bytes, a path, or a structure of both."""
    path: str | None = None
    if isinstance(image, dict):
        path, image = image.get("path"), image.get("bytes")
    elif isinstance(image, str):
        path, image = image, None
    named = str(row) if key is None and path is None else str(path if key is None else key)
    if image:
        return Item(named, bytes(image))
    return Item(named, Unreadable("the cell is empty") if not path else _place(path, folder))


def _place(path: str, folder: Path) -> Path | Unreadable:
    """Return the file that a path or a URL of a file names; relative ones are so to the Parquet file's folder."""
    if path.startswith("file://"):
        return Path(url2pathname(urlsplit(path).path))
    if _URL.match(path):
        return Unreadable(f"'{path[:200]}' is an address, and nothing is fetched; download it, and name the file")
    if "\0" in path:
        return Unreadable("the path has a NUL, which none can have")
    return folder / path
