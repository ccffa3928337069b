"""The output of a run: part files of a Parquet data set, and a manifest.

The folder contains

- ``part-UNIT-PART.parquet``; the last part of a unit is ``part-UNIT-PART-end.parquet``. The names show what is done.
- ``_manifest.json``: the sources, the query, and the size of the parts.
- ``_plan.jsonl``: the work units of the sources, one per line, as they were when the run started.
- ``.lock``, held by the run that writes.
- ``.attempts-UNIT-PART``, with one byte for each replica that has started this part, and ``.attempts-start-REPLICA``,
  with one byte for each start of this replica that has not ended.

Readers of Parquet data sets skip names that start with ``_`` or ``.``. Every file is written atomically. For an output
in one file, the parts are merged at the end, in their order.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from app.bulk.manifest import FORMAT, Manifest
from app.bulk.parquet import pyarrow
from app.bulk.rows import METADATA, Row, from_cells, metadata_of, schema, to_table
from app.bulk.sources import PARQUET, WorkUnit
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.runtime.atomic_files import atomic_file, is_temporary, write_atomically

_MANIFEST = "_manifest.json"
_PLAN = "_plan.jsonl"
_LOCK = ".lock"
_PART = re.compile(r"part-(\d{8})-(\d{6})(-end)?\.parquet")
_ATTEMPTS = re.compile(r"\.attempts-[\w-]+")
# Suffix of the folder of parts beside an output in one file.
_PARTS_SUFFIX = ".parts"
# Suffixes of an --out that is meant as one file of a format that is not written.
_OTHER_FORMATS = re.compile(
    r"\.(csv|tsv|txt|jsonl?|ndjson|xml|html|md|arrow|feather|ipc|orc|avro|xlsx?|ods|sqlite3?|db|duckdb|h5|hdf5|np[yz]|pkl"
    r"|tar|t?gz|zst|zip)",
    re.IGNORECASE,
)
_MIN_ROW_GROUP = 65_536


@dataclass(frozen=True, slots=True)
class PendingUnit:
    """A work unit that is not finished.

    Args:
        number: of the unit.
        offset: byte of the plan at which the line of the unit starts.
        parts_done: number of parts that exist.
        retry: classify only the bad images of the part with the number ``parts_done`` again.
    """

    number: int
    offset: int
    parts_done: int
    retry: bool = False


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """Number of images, and of those whose row has an error."""

    images: int = 0
    bad: int = 0


class PartStore:
    """The parts of one run, in a folder that every worker can write to.

    Args:
        folder: of the parts.
        query: for the metadata of every part.
    """

    def __init__(self, folder: Path, query: Mapping[str, Any]) -> None:
        self.folder = folder
        self._query = query

    def unit(self, offset: int) -> WorkUnit:
        """Return the unit whose line of the plan starts at this byte."""
        with (self.folder / _PLAN).open("rb") as plan:
            plan.seek(offset)
            return WorkUnit.from_json(json.loads(plan.readline()))

    def pending(self) -> Iterator[PendingUnit]:
        """Yield the units that are not finished, in the order of the sources."""
        parts: dict[int, set[int]] = {}
        ends: dict[int, int] = {}
        for file in self.folder.iterdir():
            if match := _PART.fullmatch(file.name):
                number, part = int(match[1]), int(match[2])
                parts.setdefault(number, set()).add(part)
                if match[3]:
                    ends[number] = part
        for number, offset in self._offsets():
            existing = parts.get(number, set())
            # After a power failure, a part may be missing although a later one exists.
            done = next(part for part in range(len(existing) + 1) if part not in existing)
            if number not in ends or done <= ends[number]:
                yield PendingUnit(number, offset, done)

    def with_bad_images(self) -> Iterator[PendingUnit]:
        """Yield the parts that contain a bad image, in the order of the sources."""
        parts: dict[int, list[int]] = {}
        for file in part_files(self.folder):
            match = _PART.fullmatch(file.name)
            if match and count_images(file).bad:
                parts.setdefault(int(match[1]), []).append(int(match[2]))
        for number, offset in self._offsets():
            for part in parts.get(number, ()):
                yield PendingUnit(number, offset, part, retry=True)

    def _offsets(self) -> Iterator[tuple[int, int]]:
        """Yield the number of each unit, and the byte at which its line of the plan starts."""
        offset = 0
        with (self.folder / _PLAN).open("rb") as plan:
            for number, line in enumerate(plan):
                yield number, offset
                offset += len(line)

    def rows(self, pending: PendingUnit) -> tuple[list[Row], bool]:
        """Return the rows of a part, and whether it is the last of its unit; ``([], True)`` if it does not exist."""
        _, pq = pyarrow()
        for ends_unit in (False, True):
            file = self._file(pending.number, pending.parts_done, ends_unit=ends_unit)
            if file.exists():
                return [from_cells(cells) for cells in pq.read_table(file, partitioning=None).to_pylist()], ends_unit
        return [], True

    def refresh(self, pending: PendingUnit) -> PendingUnit | None:
        """Return the unit without the parts that another worker has written since; None if it is finished."""
        if pending.retry:
            return pending
        done = pending.parts_done
        while self._file(pending.number, done, ends_unit=False).exists():
            done += 1
        is_finished = self._file(pending.number, done, ends_unit=True).exists()
        return None if is_finished else PendingUnit(pending.number, pending.offset, done)

    def record_attempt(self, pending: PendingUnit) -> int:
        """Record that a worker starts the next part of a unit, and return the number of attempts at this part.

        Raises:
            StoreError: the attempt cannot be recorded.
        """
        return self._record(self._attempts(pending.number, pending.parts_done))

    def clear_attempts(self, pending: PendingUnit) -> None:
        """Delete the attempts at a unit that is finished."""
        for part in range(pending.parts_done + 1):
            self._attempts(pending.number, part).unlink(missing_ok=True)

    def record_start(self, replica: str) -> int:
        """Record that a replica starts, and return the number of its starts; raises as ``record_attempt``."""
        return self._record(self.folder / f".attempts-start-{replica}")

    def clear_starts(self, replica: str) -> None:
        """Delete the record of a replica that has started."""
        (self.folder / f".attempts-start-{replica}").unlink(missing_ok=True)

    def _record(self, file: Path) -> int:
        try:
            with file.open("ab") as opened:
                opened.write(b".")
                return opened.tell()
        except OSError as error:
            raise _write_error(file, error) from error

    def _attempts(self, unit: int, part: int) -> Path:
        return self.folder / f".attempts-{unit:08d}-{part:06d}"

    def _file(self, unit: int, part: int, *, ends_unit: bool) -> Path:
        return self.folder / f"part-{unit:08d}-{part:06d}{'-end' if ends_unit else ''}.parquet"

    def write(self, unit: int, part: int, rows: Sequence[Row], *, ends_unit: bool) -> None:
        """Write a part.

        Raises:
            StoreError: it cannot be written.
        """
        pa, pq = pyarrow()
        sink = pa.BufferOutputStream()
        pq.write_table(to_table(rows, self._query), sink, compression="zstd")
        _write(self._file(unit, part, ends_unit=ends_unit), sink.getvalue().to_pybytes())
        if not ends_unit:  # the previous attempt may have ended here at a read error
            self._file(unit, part, ends_unit=True).unlink(missing_ok=True)

    def count(self) -> ImageCounts:
        """Count the rows of all parts by their footers."""
        counts = [count_images(file) for file in part_files(self.folder)]
        return ImageCounts(sum(each.images for each in counts), sum(each.bad for each in counts))


def part_files(folder: Path) -> list[Path]:
    """Return the parts in a folder, in the order of the sources."""
    return sorted(file for file in folder.iterdir() if _PART.fullmatch(file.name))


def count_images(file: Path) -> ImageCounts:
    """Count the rows of an output file by its footer."""
    _, pq = pyarrow()
    footer = pq.read_metadata(file)
    place = footer.schema.names.index("error")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    good = sum(group.column(place).statistics.null_count for group in groups if group.num_rows)
    return ImageCounts(footer.num_rows, footer.num_rows - good)


@contextmanager
def open_run(out: Path, requested: Manifest, planned: Iterator[WorkUnit]) -> Iterator[tuple[PartStore, Manifest]]:
    """Start a run or resume the existing one, and hold its lock.

    Args:
        out: a folder, or a Parquet file to create.
        requested: the manifest of the request; its ``units`` and ``images`` are not known yet.
        planned: work units of the sources; read only if a new run starts.

    Raises:
        ConflictError: the folder has a run for another request, a run that is in progress, or other files.
        StoreError: the folder cannot be written.
    """
    folder = parts_folder(out)
    if is_single_file(out):
        if out.is_dir():
            raise ConflictError(f"'{out}' is a folder; name a file, or a folder without the suffix {out.suffix}")
    elif folder.exists() and not folder.is_dir():
        raise ConflictError(f"'{folder}' is a file; name another --out, or a file that ends with .parquet")
    elif folder.is_dir() and not (folder / _MANIFEST).exists() and _has_other_files(folder):
        raise ConflictError(f"'{folder}' contains other files; name an empty or a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(folder, error) from error
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConflictError(f"another run writes to '{folder}'; wait until it ends, or name another --out") from None
    except OSError as error:
        raise _write_error(folder, error) from error
    try:
        for file in _temporary_outputs(out) if is_single_file(out) else ():
            file.unlink(missing_ok=True)
        yield _start_or_resume(folder, requested, planned)
    finally:
        lock.release()


def _start_or_resume(folder: Path, requested: Manifest, planned: Iterator[WorkUnit]) -> tuple[PartStore, Manifest]:
    for file in (*_temporary_files(folder), *_replaced_ends(folder)):
        file.unlink(missing_ok=True)
    manifest = read_manifest(folder)
    if manifest is None:
        units, images = _write_plan(folder, planned)
        manifest = replace(requested, units=units, images=images)
        # The manifest is written last: a folder with a manifest has a complete plan.
        _write(folder / _MANIFEST, json.dumps(asdict(manifest), indent=2).encode() + b"\n")
    manifest.check_matches(requested, folder)
    return PartStore(folder, manifest.query), manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder of parts; None if it has none.

    Raises:
        ConflictError: it is damaged, or has the format of another release.
    """
    file = folder / _MANIFEST
    try:
        fields = json.loads(file.read_text("utf-8"))
        if fields["format"] != FORMAT:
            raise ConflictError(
                f"'{file}' has format {fields['format']}, and this release writes format {FORMAT}; name another --out"
            )
        return Manifest.from_json(fields)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"'{file}' is damaged; name another --out, or delete the folder") from error


def _write_plan(folder: Path, planned: Iterator[WorkUnit]) -> tuple[int, int | None]:
    """Write the plan, and return the number of units, and of images if it is known."""
    file = folder / _PLAN
    units, images = 0, 0
    is_known = True
    try:
        with atomic_file(file) as opened:
            for unit in planned:
                opened.write(json.dumps(unit.to_json()).encode() + b"\n")
                units += 1
                is_known &= unit.images is not None
                images += unit.images or 0
    except OSError as error:
        raise _write_error(file, error) from error
    return units, images if is_known else None


def is_single_file(out: Path) -> bool:
    """Return whether the output is one Parquet file, and not a folder of parts."""
    return out.suffix.lower() in PARQUET


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts."""
    return out.with_name(out.name + _PARTS_SUFFIX) if is_single_file(out) else out


def is_started(out: Path) -> bool:
    """Return whether the output has a run to resume, or is finished.

    Raises:
        StoreError: the file system refuses access.
    """
    try:
        return (parts_folder(out) / _MANIFEST).exists() or (is_single_file(out) and out.exists())
    except OSError as error:
        raise _write_error(out, error) from error


def find_finished(out: Path, requested: Manifest) -> Manifest | None:
    """Return the manifest of the finished Parquet file; None if the output is a folder or not finished.

    Raises:
        ConflictError: the file is the result of another request or of another program.
    """
    if not (is_single_file(out) and out.is_file()):
        return None
    pa, pq = pyarrow()
    try:
        metadata = pq.read_schema(out).metadata or {}
        manifest = Manifest.from_json(json.loads(metadata[f"{METADATA}run".encode()]))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ConflictError(f"'{out}' exists, and `deixis bulk` did not write it; name another --out") from error
    manifest.check_matches(requested, out)
    return manifest


def merge_parts(parts: PartStore, manifest: Manifest, out: Path) -> None:
    """Write the rows of all parts into one file, in order.

    Raises:
        StoreError: it cannot be written.
    """
    _, pq = pyarrow()
    metadata = {**metadata_of(manifest.query), f"{METADATA}run": json.dumps(asdict(manifest))}
    try:
        with (
            atomic_file(out) as opened,
            pq.ParquetWriter(opened, schema().with_metadata(metadata), compression="zstd") as writer,
        ):
            for table in _row_groups(part_files(parts.folder)):
                writer.write_table(table)
    except OSError as error:
        raise _write_error(out, error) from error


def remove_parts(out: Path, manifest: Manifest) -> None:
    """Remove the parts of a finished Parquet file if they belong to the same run; other files stay."""
    folder = parts_folder(out)
    with suppress(ConflictError, OSError, Timeout):
        if read_manifest(folder) != manifest:
            return
        with FileLock(folder / _LOCK, timeout=0):
            # The manifest is removed after the parts, so that an interrupted removal can be repeated.
            for file in (
                *_temporary_files(folder),
                *part_files(folder),
                folder / _PLAN,
                folder / _MANIFEST,
                folder / _LOCK,
            ):
                file.unlink(missing_ok=True)
        folder.rmdir()


def _temporary_files(folder: Path) -> list[Path]:
    """Return the temporary files of interrupted runs, and records of attempts."""
    return [file for file in folder.iterdir() if _is_temporary(file.name)]


def _is_temporary(name: str) -> bool:
    return is_temporary(name) or _ATTEMPTS.fullmatch(name) is not None


def _temporary_outputs(out: Path) -> list[Path]:
    """Return the temporary files of interrupted merges."""
    return [file for file in out.parent.iterdir() if is_temporary(file.name, of=out.name)]


def _replaced_ends(folder: Path) -> list[Path]:
    """Return last parts of units for which a retry has written a longer unit, and was killed before it removed them."""
    files = part_files(folder)
    names = {file.name for file in files}
    return [file for file in files if "-end" in file.name and file.name.replace("-end", "") in names]


def _row_groups(files: Iterable[Path]) -> Iterator[Any]:
    """Yield the rows of files in tables that are large enough for a row group."""
    pa, pq = pyarrow()
    tables: list[Any] = []
    for file in files:
        tables.append(pq.read_table(file, schema=schema(), partitioning=None))
        if sum(map(len, tables)) >= _MIN_ROW_GROUP:
            yield pa.concat_tables(tables)
            tables = []
    if tables:
        yield pa.concat_tables(tables)


def _has_other_files(folder: Path) -> bool:
    names = (file.name for file in folder.iterdir())
    return any(name not in {_LOCK, _PLAN} and not _is_temporary(name) for name in names)


def _write(file: Path, content: bytes) -> None:
    try:
        write_atomically(file, content)
    except OSError as error:
        raise _write_error(file, error) from error


def _write_error(file: Path, error: OSError) -> StoreError:
    return StoreError(f"'{file}' cannot be written: {error.strerror or error}; free disk space, or name another --out")


def validate_output(out: Path, part_images: int) -> None:
    """Check an output before a model is loaded.

    Raises:
        InvalidFieldError: an invalid size of parts, or the name of a file of another format.
        NotConfiguredError: pyarrow is not installed.
    """
    pyarrow()
    if part_images < 1:
        raise InvalidFieldError.of("--part-images", f"{part_images} is less than 1")
    if not out.name:
        raise InvalidFieldError.of("--out", f"'{out}' is not the name of a folder or file")
    if _OTHER_FORMATS.fullmatch(out.suffix) and not is_started(out):
        raise InvalidFieldError.of(
            "--out",
            f"'{out}' would be a folder of Parquet files; name a file that ends with .parquet, or a folder without the"
            f" suffix {out.suffix}",
        )
    try:
        str(out.absolute()).encode()
    except UnicodeError as error:
        raise InvalidFieldError.of("--out", f"{str(out)!r} is not valid UTF-8, which pyarrow needs") from error
