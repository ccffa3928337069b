"""What bulk work writes: parts of a Parquet data set, each whole or not there, and a manifest that says of what.

In the folder there are

- ``part-UNIT-PART.parquet``, the last of a unit ``part-UNIT-PART-end.parquet``: their names say what is done,
- ``_manifest.json``: the sources, the question, and the size of the parts,
- ``_plan.jsonl``: the units of the sources, one a line, as they were when the run began,
- ``.lock``, held by the run that writes,
- ``.tried-UNIT-PART``, as long as the number of replicas that have begun at that part; ``.tried-start-REPLICA``, as the
  number of times that one has been started in vain.

Readers of Parquet data sets pass over names that begin with ``_`` or ``.``. Every file is written aside, synced and
renamed. Where one file is wanted, the parts are put together at the end, in their order.
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
from app.bulk.rows import METADATA, Row, metadata_of, row_of, schema, table_of
from app.bulk.sources import PARQUET, WorkUnit
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.runtime.atomic_files import atomic_file, temporary_names, write_atomically

_MANIFEST = "_manifest.json"
_PLAN = "_plan.jsonl"
_LOCK = ".lock"
_PART = re.compile(r"part-(\d{8})-(\d{6})(-end)?\.parquet")
_TEMPORARY = temporary_names(r"_manifest\.json|_plan\.jsonl|part-[\d-]+(?:-end)?\.parquet")
_TRIED = re.compile(r"\.tried-[\w-]+")
# Beside a file that is to be made, the folder of its parts.
_PARTS_SUFFIX = ".parts"
# By which somebody means one file, of a form that is not written.
_OTHER_TABLES = re.compile(
    r"\.(csv|tsv|txt|jsonl?|ndjson|xml|html|md|arrow|feather|ipc|orc|avro|xlsx?|ods|sqlite3?|db|duckdb|h5|hdf5|np[yz]|pkl"
    r"|tar|t?gz|zst|zip)",
    re.IGNORECASE,
)
_ROWS_OF_A_GROUP = 65_536


@dataclass(frozen=True, slots=True)
class PendingUnit:
    """A unit that is not finished: its number, where the plan tells of it, and how many of its parts are there.

    With ``again``, the bad images of the part behind those alone.
    """

    number: int
    offset: int
    parts_done: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """Rows of all parts, and how many of them have an error."""

    images: int = 0
    bad: int = 0


class PartStore:
    """The parts of one run, in a folder that every worker of the run can write to.

    Args:
        folder: of the parts.
        question: for the metadata of every part.
    """

    def __init__(self, folder: Path, question: Mapping[str, Any]) -> None:
        self.folder = folder
        self._question = question

    def unit(self, offset: int) -> WorkUnit:
        """Return the unit whose line of the plan begins at this byte."""
        with (self.folder / _PLAN).open("rb") as plan:
            plan.seek(offset)
            return WorkUnit.from_json(json.loads(plan.readline()))

    def pending(self) -> Iterator[PendingUnit]:
        """Yield what is not find_finished, in the order of the sources."""
        parts: dict[int, set[int]] = {}
        ends: dict[int, int] = {}
        for file in self.folder.iterdir():
            if found := _PART.fullmatch(file.name):
                number, part = int(found[1]), int(found[2])
                parts.setdefault(number, set()).add(part)
                if found[3]:
                    ends[number] = part
        for number, offset in self._offsets():
            there = parts.get(number, set())
            # After a power cut a part may be missing before one that is there.
            done = next(part for part in range(len(there) + 1) if part not in there)
            if number not in ends or done <= ends[number]:
                yield PendingUnit(number, offset, done)

    def bad(self) -> Iterator[PendingUnit]:
        """Yield the parts that have a bad image, in the order of the sources."""
        parts: dict[int, list[int]] = {}
        for file in part_files(self.folder):
            found = _PART.fullmatch(file.name)
            if found and count_images(file).bad:
                parts.setdefault(int(found[1]), []).append(int(found[2]))
        for number, offset in self._offsets():
            for part in parts.get(number, ()):
                yield PendingUnit(number, offset, part, again=True)

    def _offsets(self) -> Iterator[tuple[int, int]]:
        """Yield the number of each unit, and the byte at which its line of the plan begins."""
        offset = 0
        with (self.folder / _PLAN).open("rb") as plan:
            for number, line in enumerate(plan):
                yield number, offset
                offset += len(line)

    def rows(self, each: PendingUnit) -> tuple[list[Row], bool]:
        """Return the rows that a part has, none where it is not there, and whether it ends its unit."""
        _, pq = pyarrow()
        for ends_unit in (False, True):
            file = self._file(each.number, each.parts_done, ends_unit=ends_unit)
            if file.exists():
                return [row_of(cells) for cells in pq.read_table(file, partitioning=None).to_pylist()], ends_unit
        return [], True

    def refresh(self, each: PendingUnit) -> PendingUnit | None:
        """Return what remains of a unit now, since somebody else may have worked on it; None if nothing does."""
        if each.again:
            return each
        done = each.parts_done
        while self._file(each.number, done, ends_unit=False).exists():
            done += 1
        ended = self._file(each.number, done, ends_unit=True).exists()
        return None if ended else PendingUnit(each.number, each.offset, done)

    def begin(self, each: PendingUnit) -> int:
        """Note that a worker begins with what remains of a unit, and return how many have at the same part.

        Raises:
            StoreError: it cannot be noted.
        """
        return self._note(self._tried(each.number, each.parts_done))

    def end(self, each: PendingUnit) -> None:
        """Forget what was noted, since the unit is done."""
        for part in range(each.parts_done + 1):
            self._tried(each.number, part).unlink(missing_ok=True)

    def begin_start(self, name: str) -> int:
        """Note that a worker of this name is started, and return how many times it has been; raises as ``begin``."""
        return self._note(self.folder / f".tried-start-{name}")

    def end_start(self, name: str) -> None:
        """Forget what was noted, since it has started."""
        (self.folder / f".tried-start-{name}").unlink(missing_ok=True)

    def _note(self, file: Path) -> int:
        try:
            with file.open("ab") as opened_file:
                opened_file.write(b".")
                return opened_file.tell()
        except OSError as error:
            raise _unwritable(file, error) from error

    def _tried(self, unit: int, part: int) -> Path:
        return self.folder / f".tried-{unit:08d}-{part:06d}"

    def _file(self, unit: int, part: int, *, ends_unit: bool) -> Path:
        return self.folder / f"part-{unit:08d}-{part:06d}{'-end' if ends_unit else ''}.parquet"

    def write(self, unit: int, part: int, rows: Sequence[Row], *, ends_unit: bool) -> None:
        """Write a part.

        Raises:
            StoreError: it cannot be written.
        """
        pa, pq = pyarrow()
        sink = pa.BufferOutputStream()
        pq.write_table(table_of(rows, self._question), sink, compression="zstd")
        _write(self._file(unit, part, ends_unit=ends_unit), sink.getvalue().to_pybytes())
        if not ends_unit:  # what could not be read on when it was written the last time, now can
            self._file(unit, part, ends_unit=True).unlink(missing_ok=True)

    def totals(self) -> ImageCounts:
        """Count the rows of all parts, by their footers."""
        totals = ImageCounts()
        for file in part_files(self.folder):
            counted = count_images(file)
            totals = ImageCounts(totals.images + counted.images, totals.bad + counted.bad)
        return totals


def part_files(folder: Path) -> list[Path]:
    """Return the parts in a folder, in the order of the sources."""
    return sorted(file for file in folder.iterdir() if _PART.fullmatch(file.name))


def count_images(file: Path) -> ImageCounts:
    """Count the rows of a file of ours, by its footer."""
    _, pq = pyarrow()
    footer = pq.read_metadata(file)
    place = footer.schema.names.index("error")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    good = sum(group.column(place).statistics.null_count for group in groups if group.num_rows)
    return ImageCounts(footer.num_rows, footer.num_rows - good)


@contextmanager
def open_run(out: Path, wanted: Manifest, planned: Iterator[WorkUnit]) -> Iterator[tuple[PartStore, Manifest]]:
    """Begin a run, or take up the one that is there; nobody else can meanwhile.

    Args:
        out: a folder, or a Parquet file that will be made.
        wanted: what is asked; its ``units`` and ``images`` are not known yet.
        planned: of the sources; read if the run begins.

    Raises:
        ConflictError: another run is about something else, or goes on at the moment, or something else is there.
        StoreError: it cannot be written.
    """
    folder = parts_folder(out)
    if is_single_file(out):
        if out.is_dir():
            raise ConflictError(f"'{out}' is a folder; name a file, or a folder without the suffix {out.suffix}")
    elif folder.exists() and not folder.is_dir():
        raise ConflictError(f"'{folder}' is no folder; name another --out, or a file that ends with .parquet")
    elif folder.is_dir() and not (folder / _MANIFEST).exists() and _strangers(folder):
        raise ConflictError(f"'{folder}' has other files in it; name an empty or a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConflictError(f"another run writes to '{folder}'; wait for it, or name another --out") from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        for rest in _halves(out) if is_single_file(out) else ():
            rest.unlink(missing_ok=True)
        yield _begun(folder, wanted, planned)
    finally:
        lock.release()


def _begun(folder: Path, wanted: Manifest, planned: Iterator[WorkUnit]) -> tuple[PartStore, Manifest]:
    for rest in (*_asides(folder), *_ends_that_are_none(folder)):
        rest.unlink(missing_ok=True)
    manifest = read_manifest(folder)
    if manifest is None:
        units, images = _write_plan(folder, planned)
        manifest = replace(wanted, units=units, images=images)
        # Last, so that whoever finds it finds the plan as well.
        _write(folder / _MANIFEST, json.dumps(asdict(manifest), indent=2).encode() + b"\n")
    manifest.check(wanted, folder)
    return PartStore(folder, manifest.question), manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder of parts; None where there is none.

    Raises:
        ConflictError: it is damaged, or of another release.
    """
    file = folder / _MANIFEST
    try:
        told = json.loads(file.read_text("utf-8"))
        if told["format"] != FORMAT:
            raise ConflictError(
                f"'{file}' is of format {told['format']}, and this release writes {FORMAT}; name another --out"
            )
        return Manifest.from_json(told)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"'{file}' is damaged; name another --out, or delete the folder") from error


def _write_plan(folder: Path, planned: Iterator[WorkUnit]) -> tuple[int, int | None]:
    """Write the units of the sources one by one, and return how many there are, and how many images if it is known."""
    file = folder / _PLAN
    units, images = 0, 0
    known = True
    try:
        with atomic_file(file) as opened_file:
            for unit in planned:
                opened_file.write(json.dumps(unit.to_json()).encode() + b"\n")
                units += 1
                known &= unit.images is not None
                images += unit.images or 0
    except OSError as error:
        raise _unwritable(file, error) from error
    return units, images if known else None


def is_single_file(out: Path) -> bool:
    """Tell whether one Parquet file is wanted, and not a folder of parts."""
    return out.suffix.lower() in PARQUET


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts."""
    return out.with_name(out.name + _PARTS_SUFFIX) if is_single_file(out) else out


def is_started(out: Path) -> bool:
    """Tell whether there is a run to go on with, or a file that was made.

    Raises:
        StoreError: the system does not let us look.
    """
    try:
        return (parts_folder(out) / _MANIFEST).exists() or (is_single_file(out) and out.exists())
    except OSError as error:
        raise _unwritable(out, error) from error


def find_finished(out: Path, wanted: Manifest) -> Manifest | None:
    """Return what the Parquet file that is wanted is about, if it is there already.

    Raises:
        ConflictError: there is another in its place.
    """
    if not (is_single_file(out) and out.is_file()):
        return None
    pa, pq = pyarrow()
    try:
        metadata = pq.read_schema(out).metadata or {}
        manifest = Manifest.from_json(json.loads(metadata[f"{METADATA}run".encode()]))
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ConflictError(f"'{out}' is there, and not by this command; name another --out") from error
    manifest.check(wanted, out)
    return manifest


def merge_parts(parts: PartStore, manifest: Manifest, out: Path) -> None:
    """Write the rows of all parts into one file, in order.

    Raises:
        StoreError: it cannot be written.
    """
    _, pq = pyarrow()
    told = {**metadata_of(manifest.question), f"{METADATA}run": json.dumps(asdict(manifest))}
    try:
        with (
            atomic_file(out) as opened_file,
            pq.ParquetWriter(opened_file, schema().with_metadata(told), compression="zstd") as writer,
        ):
            for table in _in_groups(part_files(parts.folder)):
                writer.write_table(table)
    except OSError as error:
        raise _unwritable(out, error) from error


def remove_parts(out: Path, manifest: Manifest) -> None:
    """Remove the parts of a Parquet file that is made, if they are of the same run, and nothing that is not ours."""
    folder = parts_folder(out)
    with suppress(ConflictError, OSError, Timeout):
        if read_manifest(folder) != manifest:
            return
        with FileLock(folder / _LOCK, timeout=0):
            # The manifest last, so that a removal that is killed can be finished.
            for file in (*_asides(folder), *part_files(folder), folder / _PLAN, folder / _MANIFEST, folder / _LOCK):
                file.unlink(missing_ok=True)
        folder.rmdir()


def _asides(folder: Path) -> list[Path]:
    """Return what runs that were killed had not finished."""
    return [file for file in folder.iterdir() if _is_aside(file.name)]


def _is_aside(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_TEMPORARY, _TRIED))


def _halves(out: Path) -> list[Path]:
    """Return what runs that were killed had put together of a file."""
    name = temporary_names(re.escape(out.name))
    return [file for file in out.parent.iterdir() if name.fullmatch(file.name)]


def _ends_that_are_none(folder: Path) -> list[Path]:
    """Return the ends of units that were read on from there, by a run that was killed before it removed them."""
    files = part_files(folder)
    names = {file.name for file in files}
    return [file for file in files if "-end" in file.name and file.name.replace("-end", "") in names]


def _in_groups(files: Iterable[Path]) -> Iterator[Any]:
    """Yield the rows of files in tables that are large enough to be read well."""
    pa, pq = pyarrow()
    tables: list[Any] = []
    for file in files:
        tables.append(pq.read_table(file, schema=schema(), partitioning=None))
        if sum(map(len, tables)) >= _ROWS_OF_A_GROUP:
            yield pa.concat_tables(tables)
            tables = []
    if tables:
        yield pa.concat_tables(tables)


def _strangers(folder: Path) -> list[str]:
    ours = {_LOCK, _PLAN}
    names = (file.name for file in folder.iterdir())
    return [name for name in names if name not in ours and not _is_aside(name)]


def _write(file: Path, content: bytes) -> None:
    try:
        write_atomically(file, content)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> StoreError:
    return StoreError(f"'{file}' cannot be written: {error.strerror or error}; make room, or name another --out")


def validate_output(out: Path, part_images: int) -> None:
    """Refuse what could only fail later.

    Raises:
        InvalidFieldError: parts that cannot be, or a name of another form.
        NotConfiguredError: Parquet's library is missing.
    """
    pyarrow()
    if part_images < 1:
        raise InvalidFieldError.of("--part-images", f"{part_images} is less than 1")
    if not out.name:
        raise InvalidFieldError.of("--out", f"'{out}' is no name of a folder or file")
    if _OTHER_TABLES.fullmatch(out.suffix) and not is_started(out):
        raise InvalidFieldError.of(
            "--out", f"'{out}' would be a folder of Parquet; name it otherwise, or a file that ends with .parquet"
        )
    try:
        str(out.absolute()).encode()
    except UnicodeError as error:
        raise InvalidFieldError.of("--out", f"{str(out)!r} is no UTF-8, which Parquet's library needs") from error
