"""Parts and their manifest: progress, conflicts, and merged files."""

import errno
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.bulk.manifest import Manifest
from app.bulk.parts import (
    ImageCounts,
    PartStore,
    PendingUnit,
    count_images,
    find_finished,
    merge_parts,
    open_run,
    part_files,
    parts_folder,
    read_manifest,
    remove_parts,
    validate_output,
)
from app.bulk.rows import Row, schema, to_table
from app.bulk.sources import SourceKind, WorkUnit
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.runtime.atomic_files import temporary_for
from app.types import ImageResult, OutOfVocabulary, PathStep, Prediction

REQUESTED = Manifest(
    sources=("/photos",),
    columns={"image": None, "key": None},
    query={"model": "m", "label_set": "pets@1", "top_k": 5},
    part_images=2,
    units=0,
    images=None,
    started_at="2026-01-01T00:00:00+00:00",
    version="1",
)
UNITS = [
    WorkUnit(SourceKind.FILES, "photos", "/photos", names=("1.jpg", "2.jpg"), images=2),
    WorkUnit(SourceKind.TAR, "a.tar", "/a.tar", stamp=(1, 2)),
    WorkUnit(SourceKind.FILES, "photos", "/photos", names=("3.jpg",), images=1),
]


def start(out, requested=REQUESTED, units=UNITS):
    return open_run(out, requested, iter(units))


# A result with a value in every column.
COMPLETE = ImageResult(
    (Prediction("cat", 0.75, 0.5),),
    out_of_vocabulary=OutOfVocabulary(mcm=0.1, energy=-1.0, score=0.625),
    rejected=False,
    prediction_set=(),
    weak_match=True,
    labels=("cat",),
    path=(PathStep("animal", 1.0), PathStep("cat", 0.75)),
)


def good(key):
    return Row(key, "photos", ImageResult((Prediction("cat", 0.75, 0.5), Prediction("dog", 0.25, 0.125))))


def bad(key):
    return Row(key, None, error="no image")


def test_a_run_is_planned_once_and_resumed_with_its_plan(tmp_path):
    with start(tmp_path / "out") as (parts, manifest):
        assert [parts.unit(each.offset) for each in parts.pending()] == UNITS
        assert (manifest.units, manifest.images, manifest.part_images) == (3, None, 2)
    # New files, another size of parts, another time and another release do not matter.
    other = replace(REQUESTED, part_images=7, started_at="2027", version="2")
    with start(tmp_path / "out", other, []) as (parts, manifest):
        assert [parts.unit(each.offset) for each in parts.pending()] == UNITS
        assert (manifest.part_images, manifest.started_at) == (2, REQUESTED.started_at)
    with start(tmp_path / "known", units=UNITS[::2]) as (_, manifest):
        assert manifest.images == 3


def test_the_files_of_the_parts_show_what_is_done(tmp_path):
    with start(tmp_path) as (parts, _):
        first, second, third = parts.pending()
        assert [each.parts_done for each in (first, second, third)] == [0, 0, 0]
        parts.write(2, 0, [good("3.jpg")], ends_unit=True)
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=False)
        parts.write(1, 1, [good("c"), good("d")], ends_unit=False)
        assert list(parts.pending()) == [first, PendingUnit(1, second.offset, 2)]
        parts.write(1, 2, [], ends_unit=True)
        assert list(parts.pending()) == [first]
        # After a power failure, the later of two files may have survived.
        (tmp_path / "part-00000001-000001.parquet").unlink()
        assert list(parts.pending()) == [first, PendingUnit(1, second.offset, 1)]


def test_parts_that_another_worker_wrote_are_skipped(tmp_path):
    with start(tmp_path) as (parts, _):
        _, unit, _ = parts.pending()
        assert parts.refresh(unit) == unit
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=False)
        assert parts.refresh(unit) == PendingUnit(1, unit.offset, 1)
        parts.write(1, 1, [good("c")], ends_unit=True)
        assert parts.refresh(unit) is None


def test_parts_with_bad_images_are_listed_with_their_rows(tmp_path):
    with start(tmp_path) as (parts, _):
        first, second, _ = parts.pending()
        rows = [
            [good("1"), good("2")],
            [good("a"), bad("b")],
            [bad("c"), Row("d", "x", COMPLETE)],
        ]
        parts.write(0, 0, rows[0], ends_unit=True)
        parts.write(1, 0, rows[1], ends_unit=False)
        parts.write(1, 1, rows[2], ends_unit=True)
        retries = list(parts.with_bad_images())
        assert retries == [replace(second, parts_done=part, retry=True) for part in (0, 1)]
        for retry, written, ends_unit in zip((first, *retries), rows, (True, False, True), strict=True):
            kept, is_last = parts.rows(retry)
            assert (to_table(kept, REQUESTED.query), is_last) == (to_table(written, REQUESTED.query), ends_unit)
            assert [row.error for row in kept] == [row.error for row in written]
        assert [parts.refresh(each) for each in retries] == retries
        # A unit that ended at a read error can be read further.
        parts.write(1, 1, [good("c"), good("d")], ends_unit=False)
        assert next(parts.pending()) == replace(second, parts_done=2)
        assert parts.rows(replace(second, parts_done=2, retry=True)) == ([], True)


def test_a_part_that_replaces_the_end_of_a_unit_is_never_missing(tmp_path, monkeypatch):
    """After a kill during the replacement, the old part exists, or both, and then the new one counts."""
    with start(tmp_path) as (parts, _):
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=True)
        (end,) = part_files(tmp_path)

        def killed(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as before_the_write:
            before_the_write.setattr("app.bulk.parts._write", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.write(1, 0, [good("a"), good("b")], ends_unit=False)
        assert part_files(tmp_path) == [end]
        with monkeypatch.context() as before_the_removal:
            before_the_removal.setattr("pathlib.Path.unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.write(1, 0, [good("a"), good("b")], ends_unit=False)
        assert len(part_files(tmp_path)) == 2
    with start(tmp_path) as (parts, _):
        assert [file.name for file in part_files(tmp_path)] == ["part-00000001-000000.parquet"]
        assert parts.count() == ImageCounts(2, 0)
        assert next(each for each in parts.pending() if each.number == 1).parts_done == 1


def test_other_programs_can_read_the_rows(tmp_path):
    with start(tmp_path) as (parts, _):
        parts.write(1, 0, [good("x"), bad("y")], ends_unit=True)
        parts.write(0, 0, [good("1.jpg"), Row("2.jpg", "photos", ImageResult(rejected=True))], ends_unit=True)
        parts.write(2, 0, [], ends_unit=True)
        assert parts.count() == ImageCounts(images=4, bad=1)
    table = pq.read_table(tmp_path)  # skips the manifest, the plan and the lock
    assert table.schema.equals(schema())
    assert table.schema.metadata[b"deixis.model"] == b"m"
    assert table.schema.metadata[b"deixis.label_set"] == b"pets@1"
    rows = {row.pop("key"): row for row in table.to_pylist()}
    assert list(rows) == ["1.jpg", "2.jpg", "x", "y"]
    assert rows["1.jpg"] == {
        "source": "photos",
        "label": "cat",
        "score": 0.75,
        "similarity": 0.5,
        "labels": ["cat", "dog"],
        "scores": [0.75, 0.25],
        "similarities": [0.5, 0.125],
        "rejected": None,
        "prediction_set": None,
        "labels_above": None,
        "label_path": None,
        "label_path_scores": None,
        "out_of_vocabulary": None,
        "weak_match": None,
        "error": None,
    }
    assert (rows["2.jpg"]["label"], rows["2.jpg"]["labels"], rows["2.jpg"]["rejected"]) == (None, [], True)
    assert rows["y"] == {**dict.fromkeys(rows["y"]), "error": "no image"}


def test_names_that_are_not_valid_utf_8_stay_distinct(tmp_path):
    with start(tmp_path) as (parts, _):
        parts.write(0, 0, [bad("caf\udce9.jpg"), bad("caf\udce8.jpg"), bad("caf\u00e9.jpg")], ends_unit=True)
    assert pq.read_table(tmp_path)["key"].to_pylist() == ["caf\\xe9.jpg", "caf\\xe8.jpg", "caf\u00e9.jpg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ("/others",)}, r'sources \["/photos"\], and this command has \["/others"\]'),
        ({"query": {**REQUESTED.query, "label_set": "pets@2"}}, 'label_set "pets@1", and this command has "pets@2"'),
        ({"query": {"model": "m", "top_k": 5}}, 'label_set "pets@1", and this command has null'),
        ({"columns": {"image": "jpg", "key": None}}, "columns"),
    ],
)
def test_a_request_that_differs_from_the_run_is_refused(tmp_path, change, message):
    with start(tmp_path / "out"):
        pass
    with pytest.raises(ConflictError, match=message), start(tmp_path / "out", replace(REQUESTED, **change)):
        pass
    file = tmp_path / "out.parquet"
    with start(file) as (parts, manifest):
        merge_parts(parts, manifest, file)
    with pytest.raises(ConflictError, match=message):
        find_finished(file, replace(REQUESTED, **change))


LABELS = [f"label {number}" for number in range(1000)]


@pytest.mark.parametrize(
    ("stored", "given", "message"),
    [
        (
            LABELS,
            [*LABELS[:900], "new"],
            'only the run has "label 900", "label 901", "label 902" and 97 more, and only this command has "new"; rep',
        ),
        (LABELS[1:], LABELS, 'x of which only this command has "label 0"; repeat'),
        (LABELS, LABELS[:500] + LABELS[:499:-1], 'x ..."label 499", "label 500", "label 501"'),
        (LABELS, LABELS[:500] + LABELS[:499:-1], 'this command has ..."label 499", "label 999", "label 998"'),
        (LABELS, None, "..., and this command has null"),
        ("a" * 900 + "b", "a" * 900 + "c", 'aab", and this command has ...aaaaa'),
    ],
)
def test_the_message_shows_only_the_difference_of_long_values(tmp_path, stored, given, message):
    with start(tmp_path, replace(REQUESTED, query={"x": stored})):
        pass
    with pytest.raises(ConflictError) as caught, start(tmp_path, replace(REQUESTED, query={"x": given})):
        pass
    assert message in caught.value.message
    assert len(caught.value.message) < 600


def test_two_runs_with_one_output_at_a_time_are_refused(tmp_path):
    with start(tmp_path), pytest.raises(ConflictError, match="another run writes"), start(tmp_path):
        pass


def test_a_plan_that_fails_leaves_no_run(tmp_path):
    def failing():
        yield UNITS[0]
        raise InvalidFieldError.of("sources", "no image")

    with pytest.raises(InvalidFieldError), open_run(tmp_path, REQUESTED, failing()):
        pass
    assert read_manifest(tmp_path) is None
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    with start(tmp_path) as (parts, _):
        assert len(list(parts.pending())) == 3


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    with start(tmp_path):
        pass
    temporary_for(tmp_path / "part-00000000-000000-end.parquet").write_bytes(b"half")
    with start(tmp_path) as (parts, _):
        assert len(list(parts.pending())) == 3
    assert not list(tmp_path.glob(".*.part"))


def test_temporary_files_of_a_killed_merge_are_removed(tmp_path):
    ours = temporary_for(tmp_path / "a[1].parquet")
    others = {temporary_for(tmp_path / name).name for name in ("b.parquet", "a1.parquet")} | {".new.part"}
    for file in (ours, *(tmp_path / name for name in others)):
        file.write_bytes(b"half")
    with start(tmp_path / "a[1].parquet"):
        assert not ours.exists()
    assert {file.name for file in tmp_path.glob(".*")} == others


def test_other_files_and_folders_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConflictError, match="contains other files"), start(tmp_path):
        pass
    with pytest.raises(ConflictError, match="is a file"), start(tmp_path / "mine.txt"):
        pass
    (tmp_path / "mine.parquet").write_text("mine")
    with pytest.raises(ConflictError, match="did not write it"):
        find_finished(tmp_path / "mine.parquet", REQUESTED)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConflictError, match="is a folder"), start(tmp_path / "folder.parquet"):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.parquet", "mine.parquet", "mine.txt"]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "damaged"), ("{}", "damaged"), ('{"format": 9}', "has format 9")]
)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "_manifest.json").write_text(content)
    with pytest.raises(ConflictError, match=message), start(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"), start(tmp_path / "file" / "out"):
        pass
    missing = PartStore(tmp_path / "gone", REQUESTED.query)
    with pytest.raises(StoreError, match="free disk space"):
        missing.write(0, 0, [], ends_unit=True)


def test_a_folder_that_cannot_be_locked_is_reported(tmp_path, monkeypatch):
    def read_only(_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("app.bulk.parts.FileLock.acquire", read_only)
    with pytest.raises(StoreError, match="Read-only file system"), start(tmp_path):
        pass


def test_an_output_name_that_is_not_valid_utf_8_is_refused():
    with pytest.raises(InvalidFieldError, match="is not valid UTF-8"):
        validate_output(Path("\udcff.parquet"), 1)


def test_parts_are_merged_in_the_order_of_the_sources(tmp_path):
    out = tmp_path / "labels.parquet"
    assert find_finished(out, REQUESTED) is None
    with start(out) as (parts, manifest):
        parts.write(2, 0, [good("3.jpg")], ends_unit=True)
        parts.write(1, 1, [], ends_unit=True)
        parts.write(1, 0, [bad("a"), good("b")], ends_unit=False)
        parts.write(0, 0, [good("1.jpg"), good("2.jpg")], ends_unit=True)
        assert parts.folder == parts_folder(out)
        merge_parts(parts, manifest, out)
        assert find_finished(out, REQUESTED) == manifest
    (parts.folder / "mine.txt").write_text("mine")
    remove_parts(out, replace(manifest, started_at="2027"))
    assert len(list(parts.folder.glob("part-*"))) == 4
    remove_parts(out, manifest)
    assert [file.name for file in parts.folder.iterdir()] == ["mine.txt"]
    (parts.folder / "mine.txt").unlink()
    parts.folder.rmdir()
    assert [file.name for file in tmp_path.iterdir()] == ["labels.parquet"]
    assert pq.read_table(out)["key"].to_pylist() == ["1.jpg", "2.jpg", "a", "b", "3.jpg"]
    assert pq.read_schema(out).metadata[b"deixis.label_set"] == b"pets@1"
    assert count_images(out) == ImageCounts(images=5, bad=1)
