"""Plans a run: divides its sources into work units, in a fixed order.

A worker reads a unit from its start to its end: files of a folder, a tar file, or row groups of a Parquet file. The
order of the units is the same in every run of the same sources, so a run can be resumed.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.bulk.parquet import pyarrow
from app.errors import InvalidFieldError, did_you_mean
from app.images.discovery import files_below, find_matches, is_possible
from app.images.formats import supported_suffixes
from app.runtime.regular_files import open_regular

PARQUET = (".parquet", ".pq")
# The compression of each suffix, as `app.captions.sources` names it.
TARS: Mapping[str, str] = {".tar": "", ".tar.gz": ".gz", ".tgz": ".gz", ".tar.zst": ".zst"}
# Archives and compressed files of formats that are not read.
_UNSUPPORTED_ARCHIVE = re.compile(
    r".*\.(tar\.\w+|tbz2?|txz|tlz|zip|7z|rar|cpio|gz|bz2|xz|lz4|zst)", re.IGNORECASE | re.DOTALL
)

# Common names of the image column in data sets, the most common first.
_COMMON_BYTE_COLUMNS = ("image", "image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "img", "content", "data")
_COMMON_PATH_COLUMNS = (
    "path",
    "image_path",
    "file",
    "file_name",
    "filename",
    "filepath",
    "image",
    "url",
    "image_url",
    "uri",
)


_ACCEPTED_COLUMNS = (
    "name a column of bytes or paths, or of structures with the field 'bytes' (bytes, or base64 as text) or 'path'"
    " (text)"
)


class SourceKind(StrEnum):
    """The kind of files that a unit is read from."""

    FILES = "files"
    TAR = "tar"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Images that one worker reads from the first to the last.

    Args:
        kind: of the files.
        source: the folder or file as given, for the rows; None for image files that were named themselves.
        path: absolute path of the source; for image files that were named themselves, the folder of relative names.
        names: of the files; for a subfolder that cannot be read, its name.
        images: their number, if it is known without reading them.
        stamp: size in bytes and time of the last change in ns of a tar or Parquet file.
        first_row: number of the first row of a Parquet file, from 0.
        groups: the row groups to read.
        column: that contains the images.
        key: the column that names them.
        problem: why the unit cannot be read.
    """

    kind: SourceKind
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
        """Return the fields that have a value, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), 0)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "WorkUnit":
        """Return the unit with the fields of ``to_json``."""
        tuples = {name: tuple(fields[name]) for name in ("names", "stamp", "groups") if name in fields}
        return cls(**{"source": None, **fields, **tuples, "kind": SourceKind(fields["kind"])})


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """The columns of Parquet files to read; None selects them by their names and types."""

    image: str | None = None
    key: str | None = None


def plan_units(
    sources: Iterable[Path],
    columns: ParquetColumns,
    *,
    unit_images: int,
    warn: Callable[[str], object] = lambda _: None,
) -> Iterator[WorkUnit]:
    """Yield the work units of sources, in the order of the sources.

    Args:
        sources: folders, which are searched recursively; ``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.zst`` and ``.parquet``
            files; other files, which are read as images; or patterns for any of these.
        columns: of Parquet files.
        unit_images: number of files in a unit; minimum number of rows in a unit of Parquet, except the last of a file.
        warn: called with a message for files that are skipped.

    Raises:
        InvalidFieldError: a source does not exist, a pattern matches nothing, a folder has no images, a Parquet file
            has no such column, the file system refuses access, or there are no sources.
    """
    with _access_errors():
        yield from _units(sources, columns, unit_images, warn)


def validate_sources(sources: Iterable[Path]) -> None:
    """Check that sources exist, without searching folders.

    Raises:
        InvalidFieldError: a source does not exist, a pattern matches nothing, or a source is inside another one.
    """
    with _access_errors():
        _expand(sources)


@contextmanager
def _access_errors() -> Iterator[None]:
    """Turn ``OSError`` into ``InvalidFieldError``."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or "")[:200]
        raise InvalidFieldError.of("sources", f"'{place}' cannot be read: {error.strerror or error}") from error


def _units(
    sources: Iterable[Path], columns: ParquetColumns, unit_images: int, warn: Callable[[str], object]
) -> Iterator[WorkUnit]:
    paths = _expand(sources)
    if not paths:
        raise InvalidFieldError.of("sources", "there are none; name folders, tar files, Parquet files or images")
    files: list[str] = []

    def file_units(*, min_files: int) -> Iterator[WorkUnit]:
        """Yield units of the collected image files while at least ``min_files`` of them remain."""
        while len(files) >= min_files:
            yield _unit_of_files(None, Path.cwd(), files[:unit_images])
            del files[:unit_images]

    archives = {os.path.realpath(path) for path in paths if _archive_suffix(path) is not None}
    for path in paths:
        if not (path.is_dir() or tar_suffix(path) is not None or path.suffix.lower() in PARQUET):
            files.append(str(path))
            yield from file_units(min_files=unit_images)
            continue
        yield from file_units(min_files=1)
        if path.is_dir():
            yield from _folder_units(path, unit_images, archives, warn)
        elif tar_suffix(path) is not None:
            yield WorkUnit(SourceKind.TAR, str(path), str(path.absolute()), stamp=file_stamp(path))
        else:
            yield from _parquet_units(path, columns, unit_images)
    yield from file_units(min_files=1)


def _expand(sources: Iterable[Path]) -> list[Path]:
    """Return the paths that sources name or match, without duplicates.

    Raises:
        InvalidFieldError: a source does not exist, a pattern matches nothing, a path is inside a folder that is also
            named, or an archive has a format that is not read.
    """
    paths = list({path.absolute(): path for source in sources for path in _matches(source)}.values())
    folders = {Path(os.path.realpath(path)) for path in paths if path.is_dir()}
    for path in paths:
        if _is_unsupported_archive(path) and not path.is_dir():
            raise InvalidFieldError.of(
                "sources",
                f"'{path}' is an archive of a format that is not supported; unpack it, or convert it to one of:"
                f" {', '.join(TARS)}",
            )
    for path in paths if folders else ():
        if path.is_dir() or path.suffix.lower() in supported_suffixes():
            outer = next((folder for folder in Path(os.path.realpath(path)).parents if folder in folders), None)
            if outer is not None:
                raise InvalidFieldError.of(
                    "sources", f"'{path}' is inside '{outer}', which is searched recursively; name only one of them"
                )
    return paths


def _matches(path: Path) -> Sequence[Path]:
    if is_possible(path):
        return [path]
    matches = find_matches(path)
    if not matches:
        raise InvalidFieldError.of(
            "sources", f"'{path}' is neither a file nor a folder, and does not match anything as a pattern"
        )
    return matches


def tar_suffix(path: Path) -> str | None:
    """Return the suffix of a tar file in lower case; None for other files."""
    return next((suffix for suffix in TARS if path.name.lower().endswith(suffix)), None)


def _archive_suffix(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in PARQUET else tar_suffix(path)


def _is_unsupported_archive(path: Path) -> bool:
    return _archive_suffix(path) is None and _UNSUPPORTED_ARCHIVE.fullmatch(path.name) is not None


def file_stamp(path: Path) -> tuple[int, int]:
    """Return a value that differs when a file has changed; see ``WorkUnit.stamp``."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unit_of_files(source: str | None, folder: Path, names: Sequence[str]) -> WorkUnit:
    return WorkUnit(SourceKind.FILES, source, str(folder.absolute()), names=tuple(names), images=len(names))


def _folder_units(
    folder: Path, unit_images: int, named: Container[str], warn: Callable[[str], object]
) -> Iterator[WorkUnit]:
    """Yield the units of a folder.

    Args:
        folder: to search.
        unit_images: number of files in a unit.
        named: real paths of the archives that are sources themselves.
        warn: called with a message for archives that are skipped.
    """
    suffixes = supported_suffixes()
    names: list[str] = []
    unreadable: list[OSError] = []
    skipped: Counter[str] = Counter()
    first_unsupported, unsupported = None, 0
    has_images = False
    for path in files_below(folder, unreadable.append):
        if path.suffix.lower() not in suffixes and not _may_link_to_images(path):
            archive = _archive_suffix(path)
            if archive is not None and os.path.realpath(path) not in named:
                skipped[path.name[-len(archive) :]] += 1
            elif _is_unsupported_archive(path):
                first_unsupported, unsupported = first_unsupported or path, unsupported + 1
            continue
        has_images = True
        names.append(path.relative_to(folder).as_posix())
        if len(names) == unit_images:
            yield _unit_of_files(str(folder), folder, names)
            names = []
    if names:
        yield _unit_of_files(str(folder), folder, names)
    patterns = ", ".join(f"'{Path(glob.escape(str(folder)), '**', '*' + suffix)}'" for suffix in sorted(skipped))
    if not has_images:
        if unreadable:
            raise unreadable[0]
        way_out = (
            f"it has {skipped.total():,} archives; to read them, name them: {patterns}"
            if skipped
            else f"'{first_unsupported}' is an archive of a format that is not supported"
            if first_unsupported
            else f"the suffixes of images are {', '.join(sorted(suffixes))}"
        )
        raise InvalidFieldError.of("sources", f"there are no images in '{folder}'; {way_out}")
    for error in unreadable:
        name = Path(error.filename).relative_to(folder).as_posix()
        problem = f"the folder cannot be read: {error.strerror or error}"
        yield replace(_unit_of_files(str(folder), folder, [name]), problem=problem)
    if skipped:
        warn(
            f"{skipped.total():,} archives in '{folder}' are skipped; to read them, name them in a run with another"
            f" --out: {patterns}"
        )
    if first_unsupported:
        warn(
            f"{unsupported:,} archives in '{folder}' have a format that is not supported and are skipped, for example"
            f" '{first_unsupported}'"
        )


def _may_link_to_images(path: Path) -> bool:
    """Return whether a path without a suffix is a broken link, whose target may be a folder of images."""
    try:
        return not path.suffix and path.is_symlink() and not path.exists()
    except OSError:
        return True


def damage_message(file_format: str, error: Exception) -> str:
    """Return the message for a file that is damaged at the start or at a later place."""
    return f"cannot be read as {file_format} from here on: {damage_reason(error)}"


def damage_reason(error: Exception) -> str:
    """Return the beginning of the message of an error on one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:200]


def _parquet_units(path: Path, columns: ParquetColumns, unit_images: int) -> Iterator[WorkUnit]:
    pa, pq = pyarrow()
    stamp, absolute = file_stamp(path), str(path.absolute())
    try:
        with open_regular(path) as opened, pq.ParquetFile(opened) as file:
            schema, sizes = file.schema_arrow, [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        problem = damage_message("Parquet", error)
        yield WorkUnit(SourceKind.PARQUET, str(path), absolute, images=1, problem=problem)
        return
    if not sum(sizes):
        yield WorkUnit(SourceKind.PARQUET, str(path), absolute, images=1, problem="the file has no rows")
        return
    column, key = _select_columns(path, schema, columns)
    first, groups, rows = 0, [], 0
    for number, size in enumerate(sizes):
        groups.append(number)
        rows += size
        if rows >= unit_images or number == len(sizes) - 1:
            yield WorkUnit(
                SourceKind.PARQUET,
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


def _select_columns(path: Path, schema: Any, requested: ParquetColumns) -> tuple[str, str | None]:
    """Return the column of the images, and the requested column of their names."""
    names = [name for name, count in Counter(schema.names).items() if count == 1]
    duplicates = [name for name in dict.fromkeys(schema.names) if name not in names]
    if duplicates and (not names or {requested.image, requested.key}.intersection(duplicates)):
        raise InvalidFieldError.of("column", f"'{path}' has several columns named {_listed(duplicates)}; rename them")
    for name in (requested.image, requested.key):
        if name is not None and name not in names:
            problem = f"'{path}' has no column '{name}'; its columns are {_listed(names)}{did_you_mean(name, names)}"
            raise InvalidFieldError.of("column", problem)
    if requested.key is not None and pyarrow()[0].types.is_nested(_stored_type(schema.field(requested.key).type)):
        kind = _shown(schema.field(requested.key).type)
        problem = f"'{requested.key}' of '{path}' has the type {kind}; name a column of text or numbers"
        raise InvalidFieldError.of("key", problem)
    if requested.image is not None:
        if not (_holds_bytes(schema, requested.image) or _holds_text(schema, requested.image)):
            kind = schema.field(requested.image).type
            raise InvalidFieldError.of(
                "column", f"'{requested.image}' of '{path}' has the type {_shown(kind)}; {_ACCEPTED_COLUMNS}"
            )
        return requested.image, requested.key
    binary = [name for name in names if _holds_bytes(schema, name)]
    texts = [name for name in names if _holds_text(schema, name)]
    column = next((name for name in _COMMON_BYTE_COLUMNS if name in binary), None)
    column = column or (binary[0] if len(binary) == 1 else None)
    if column is None and not binary:
        column = next((name for name in _COMMON_PATH_COLUMNS if name in texts), None)
    if column is None and not (binary or texts):
        types = ", ".join(f"'{name[:40]}' ({_shown(schema.field(name).type)})" for name in names[:20])
        raise InvalidFieldError.of(
            "column", f"it is unclear which column of '{path}' contains the images; {_ACCEPTED_COLUMNS}; it has {types}"
        )
    if column is None:
        raise InvalidFieldError.of(
            "column",
            f"it is unclear which column of '{path}' contains the images; name one of: {_listed(binary or texts)}",
        )
    return column, requested.key


def _shown(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name[:40]}'" for name in names[:20])


def _holds_bytes(schema: Any, name: str) -> bool:
    """Return whether a column has bytes, or structures of ``bytes`` and ``path`` as in data sets of Hugging Face."""
    pa, _ = pyarrow()
    kind = _stored_type(schema.field(name).type)
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    fields = [kind.field(place) for place in range(kind.num_fields)]
    stored = {field.name: _stored_type(field.type) for field in fields}
    if len(stored) < len(fields):
        return False
    content, path = (stored.get(field, pa.null()) for field in ("bytes", "path"))
    # Text is base64; of any other type, such as the size of the file, only the path is of use.
    return _is_binary(content) or _is_text(content) or _is_list_of_bytes(content) or _is_text(path)


def _holds_text(schema: Any, name: str) -> bool:
    return _is_text(_stored_type(schema.field(name).type))


def _stored_type(kind: Any) -> Any:
    """Return the type of the values of a column that is encoded by a dictionary, or has an extension type."""
    pa, _ = pyarrow()
    while pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    return kind


def _is_binary(kind: Any) -> bool:
    types = pyarrow()[0].types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_text(kind: Any) -> bool:
    types = pyarrow()[0].types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list_of_bytes(kind: Any) -> bool:
    types = pyarrow()[0].types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_uint8(kind.value_type))
