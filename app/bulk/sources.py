"""Where images in great numbers come from: folders, files, tars as WebDataset makes them, and Parquet.

A source is planned once, in *units* that are read from beginning to end: some files of a folder, one tar, or some row
groups of a Parquet file. The order of the units never changes, so that a run can be continued.
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
from app.errors import InvalidFieldError
from app.images.decode import supported_suffixes
from app.images.discovery import files_below

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


class SourceKind(StrEnum):
    """What a unit is read from."""

    FILES = "files"
    TAR = "tar"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class WorkUnit:
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
        """Return it as JSON holds it, without what is not set."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), 0)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "WorkUnit":
        """Return what ``to_json`` told."""
        lists = {name: tuple(told[name]) for name in ("names", "stamp", "groups") if name in told}
        return cls(**{"source": None, **told, **lists, "kind": SourceKind(told["kind"])})


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """Which columns of Parquet to read; None looks for usual names."""

    image: str | None = None
    key: str | None = None


def plan(
    sources: Iterable[Path], columns: ParquetColumns, *, images: int, tell: Callable[[str], object] = lambda _: None
) -> Iterator[WorkUnit]:
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


def validate_sources(sources: Iterable[Path]) -> None:
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


def _planned(
    sources: Iterable[Path], columns: ParquetColumns, images: int, tell: Callable[[str], object]
) -> Iterator[WorkUnit]:
    found = False
    loose: list[str] = []

    def named(*, least: int) -> Iterator[WorkUnit]:
        """Yield the files that were named themselves, once there are enough."""
        while len(loose) >= max(1, least):
            yield _files(None, Path.cwd(), loose[:images])
            del loose[:images]

    paths = _expanded(sources)
    archives = {os.path.realpath(path) for path in paths if _archive_suffix(path) is not None}
    for path in paths:
        found = True
        if not (path.is_dir() or tar_suffix(path) is not None or path.suffix.lower() in PARQUET):
            loose.append(str(path))
            yield from named(least=images)
            continue
        yield from named(least=1)
        if path.is_dir():
            yield from _of_folder(path, images, archives, tell)
        elif tar_suffix(path) is not None:
            yield WorkUnit(SourceKind.TAR, str(path), str(path.absolute()), stamp=file_stamp(path))
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


def tar_suffix(path: Path) -> str | None:
    """Return the suffix of a tar in small letters; None of anything else."""
    return next((suffix for suffix in TARS if path.name.lower().endswith(suffix)), None)


def _archive_suffix(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix if suffix in PARQUET else tar_suffix(path)


def _is_other_archive(path: Path) -> bool:
    return _archive_suffix(path) is None and _OTHER_ARCHIVE.fullmatch(path.name) is not None


def file_stamp(path: Path) -> tuple[int, int]:
    """Return by what a file that has changed is told; see ``WorkUnit``."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _files(source: str | None, root: Path, names: Sequence[str]) -> WorkUnit:
    return WorkUnit(SourceKind.FILES, source, str(root.absolute()), names=tuple(names), images=len(names))


def _of_folder(folder: Path, images: int, named: Container[str], tell: Callable[[str], object]) -> Iterator[WorkUnit]:
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


def reason_of(form: str, error: Exception) -> str:
    """Return why a file, or the rest of it, is lost."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be read as {form}, here or from here on: {' '.join(reason.split())[:200]}"


def _of_parquet(path: Path, columns: ParquetColumns, images: int) -> Iterator[WorkUnit]:
    pa, pq = pyarrow()
    stamp, absolute = file_stamp(path), str(path.absolute())
    try:
        with pq.ParquetFile(path) as file:
            schema, sizes = file.schema_arrow, [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        yield WorkUnit(SourceKind.PARQUET, str(path), absolute, images=1, problem=reason_of("Parquet", error))
        return
    if not sum(sizes):
        yield WorkUnit(SourceKind.PARQUET, str(path), absolute, images=1, problem="there is no row in it")
        return
    column, key = _columns_of(path, schema, columns)
    first, groups, rows = 0, [], 0
    for number, size in enumerate(sizes):
        groups.append(number)
        rows += size
        if rows >= images or number == len(sizes) - 1:
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


def _columns_of(path: Path, schema: Any, wanted: ParquetColumns) -> tuple[str, str | None]:
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
