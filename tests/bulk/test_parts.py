"""Parts and their manifest: what is done, what is refused, and what is put together."""

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
from app.bulk.rows import Row, schema
from app.bulk.sources import SourceKind, WorkUnit
from app.errors import ConflictError, InvalidFieldError, StoreError
from app.types import ImageResult, Prediction

WANTED = Manifest(
    sources=("/photos",),
    columns={"image": None, "key": None},
    question={"model": "m", "label_set": "pets@1", "top_k": 5},
    part_images=2,
    units=0,
    images=None,
    began_at="2026-01-01T00:00:00+00:00",
    version="1",
)
UNITS = [
    WorkUnit(SourceKind.FILES, "photos", "/photos", names=("1.jpg", "2.jpg"), images=2),
    WorkUnit(SourceKind.TAR, "a.tar", "/a.tar", stamp=(1, 2)),
    WorkUnit(SourceKind.FILES, "photos", "/photos", names=("3.jpg",), images=1),
]


def begin(out, wanted=WANTED, units=UNITS):
    return open_run(out, wanted, iter(units))


def good(key):
    return Row(key, "photos", ImageResult((Prediction("cat", 0.75, 0.5), Prediction("dog", 0.25, 0.125))))


def bad(key):
    return Row(key, None, error="no image")


def test_a_run_is_planned_once_and_taken_up_with_its_plan(tmp_path):
    with begin(tmp_path / "out") as (parts, manifest):
        assert [parts.unit(each.offset) for each in parts.pending()] == UNITS
        assert (manifest.units, manifest.images, manifest.part_images) == (3, None, 2)
    # What came since, another size of parts, another time and release change nothing.
    other = replace(WANTED, part_images=7, began_at="2027", version="2")
    with begin(tmp_path / "out", other, []) as (parts, manifest):
        assert [parts.unit(each.offset) for each in parts.pending()] == UNITS
        assert (manifest.part_images, manifest.began_at) == (2, WANTED.began_at)
    with begin(tmp_path / "known", units=UNITS[::2]) as (_, manifest):
        assert manifest.images == 3


def test_what_is_done_is_told_by_the_parts_that_are_there(tmp_path):
    with begin(tmp_path) as (parts, _):
        first, second, third = parts.pending()
        assert [each.parts_done for each in (first, second, third)] == [0, 0, 0]
        parts.write(2, 0, [good("3.jpg")], ends_unit=True)
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=False)
        parts.write(1, 1, [good("c"), good("d")], ends_unit=False)
        assert list(parts.pending()) == [first, PendingUnit(1, second.offset, 2)]
        parts.write(1, 2, [], ends_unit=True)
        assert list(parts.pending()) == [first]
        # A disk may have kept the later of two files.
        (tmp_path / "part-00000001-000001.parquet").unlink()
        assert list(parts.pending()) == [first, PendingUnit(1, second.offset, 1)]


def test_what_others_have_done_of_a_unit_meanwhile_is_seen(tmp_path):
    with begin(tmp_path) as (parts, _):
        _, unit, _ = parts.pending()
        assert parts.refresh(unit) == unit
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=False)
        assert parts.refresh(unit) == PendingUnit(1, unit.offset, 1)
        parts.write(1, 1, [good("c")], ends_unit=True)
        assert parts.refresh(unit) is None


def test_parts_with_bad_images_are_told_with_their_rows(tmp_path):
    with begin(tmp_path) as (parts, _):
        first, second, _ = parts.pending()
        rows = [
            [good("1"), good("2")],
            [good("a"), bad("b")],
            [bad("c"), Row("d", "x", ImageResult(rejected=True, prediction_set=()))],
        ]
        parts.write(0, 0, rows[0], ends_unit=True)
        parts.write(1, 0, rows[1], ends_unit=False)
        parts.write(1, 1, rows[2], ends_unit=True)
        again = list(parts.bad())
        assert again == [replace(second, parts_done=part, again=True) for part in (0, 1)]
        assert [parts.rows(each) for each in again] == [(rows[1], False), (rows[2], True)]
        assert [parts.refresh(each) for each in again] == again
        assert parts.rows(first) == (rows[0], True)
        # It was not read on, and now is.
        parts.write(1, 1, [good("c"), good("d")], ends_unit=False)
        assert next(parts.pending()) == replace(second, parts_done=2)
        assert parts.rows(replace(second, parts_done=2, again=True)) == ([], True)


def test_a_part_that_is_read_on_is_never_missing(tmp_path, monkeypatch):
    """Whoever is killed while it takes the place of the end has the old rows, or both, of which the new ones count."""
    with begin(tmp_path) as (parts, _):
        parts.write(1, 0, [good("a"), bad("b")], ends_unit=True)
        (end,) = part_files(tmp_path)

        def killed(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as before_it_is_there:
            before_it_is_there.setattr("app.bulk.parts._write", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.write(1, 0, [good("a"), good("b")], ends_unit=False)
        assert part_files(tmp_path) == [end]
        with monkeypatch.context() as before_the_end_is_gone:
            before_the_end_is_gone.setattr("pathlib.Path.unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                parts.write(1, 0, [good("a"), good("b")], ends_unit=False)
        assert len(part_files(tmp_path)) == 2
    with begin(tmp_path) as (parts, _):
        assert [file.name for file in part_files(tmp_path)] == ["part-00000001-000000.parquet"]
        assert parts.totals() == ImageCounts(2, 0)
        assert next(each for each in parts.pending() if each.number == 1).parts_done == 1


def test_rows_are_counted_and_read_by_others(tmp_path):
    with begin(tmp_path) as (parts, _):
        parts.write(1, 0, [good("x"), bad("y")], ends_unit=True)
        parts.write(0, 0, [good("1.jpg"), Row("2.jpg", "photos", ImageResult(rejected=True))], ends_unit=True)
        parts.write(2, 0, [], ends_unit=True)
        assert parts.totals() == ImageCounts(images=4, bad=1)
    table = pq.read_table(tmp_path)  # the manifest, the plan and the lock are passed over
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
        "error": None,
    }
    assert (rows["2.jpg"]["label"], rows["2.jpg"]["labels"], rows["2.jpg"]["rejected"]) == (None, [], True)
    assert rows["y"] == {**dict.fromkeys(rows["y"]), "error": "no image"}


def test_names_that_are_no_unicode_are_written(tmp_path):
    with begin(tmp_path) as (parts, _):
        parts.write(0, 0, [bad("caf\udce9.jpg"), bad("caf\udce8.jpg"), bad("caf\u00e9.jpg")], ends_unit=True)
    # Each has a name of its own.
    assert pq.read_table(tmp_path)["key"].to_pylist() == ["caf\\xe9.jpg", "caf\\xe8.jpg", "caf\u00e9.jpg"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sources": ("/others",)}, r'sources \["/photos"\], and this is about \["/others"\]'),
        ({"question": {**WANTED.question, "label_set": "pets@2"}}, 'label_set "pets@1", and this is about "pets@2"'),
        ({"question": {"model": "m", "top_k": 5}}, 'label_set "pets@1", and this is about null'),
        ({"columns": {"image": "jpg", "key": None}}, "columns"),
    ],
)
def test_a_run_about_something_else_is_refused(tmp_path, change, told):
    with begin(tmp_path / "out"):
        pass
    with pytest.raises(ConflictError, match=told), begin(tmp_path / "out", replace(WANTED, **change)):
        pass
    file = tmp_path / "out.parquet"
    with begin(file) as (parts, manifest):
        merge_parts(parts, manifest, file)
    with pytest.raises(ConflictError, match=told):
        find_finished(file, replace(WANTED, **change))


LABELS = [f"label {number}" for number in range(1000)]


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (
            LABELS,
            [*LABELS[:900], "new"],
            'x of which only it has "label 900", "label 901", "label 902" and 97 more, and only this has "new"; ask',
        ),
        (LABELS[1:], LABELS, 'x of which only this has "label 0"; ask'),
        (LABELS, LABELS[:500] + LABELS[:499:-1], 'x ..."label 499", "label 500", "label 501"'),
        (LABELS, LABELS[:500] + LABELS[:499:-1], 'this is about ..."label 499", "label 999", "label 998"'),
        (LABELS, None, "..., and this is about null"),
        ("a" * 900 + "b", "a" * 900 + "c", 'aab", and this is about ...aaaaa'),
    ],
)
def test_of_what_is_long_only_the_difference_is_told(tmp_path, there, here, told):
    with begin(tmp_path, replace(WANTED, question={"x": there})):
        pass
    with pytest.raises(ConflictError) as caught, begin(tmp_path, replace(WANTED, question={"x": here})):
        pass
    assert told in caught.value.message
    assert len(caught.value.message) < 600


def test_two_runs_at_a_time_are_refused(tmp_path):
    with begin(tmp_path), pytest.raises(ConflictError, match="another run writes"), begin(tmp_path):
        pass


def test_a_plan_that_fails_leaves_nothing_to_go_on_with(tmp_path):
    def failing():
        yield UNITS[0]
        raise InvalidFieldError.of("sources", "no image")

    with pytest.raises(InvalidFieldError), open_run(tmp_path, WANTED, failing()):
        pass
    assert read_manifest(tmp_path) is None
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    with begin(tmp_path) as (parts, _):
        assert len(list(parts.pending())) == 3


def test_what_a_killed_run_left_aside_is_removed(tmp_path):
    with begin(tmp_path):
        pass
    (tmp_path / ".part-00000000-000000-end.parquet.77.part").write_bytes(b"half")
    with begin(tmp_path) as (parts, _):
        assert len(list(parts.pending())) == 3
    assert not list(tmp_path.glob(".*.part"))


def test_what_a_killed_run_had_put_together_is_removed(tmp_path):
    ours = tmp_path / ".a[1].parquet.77.part"
    others = {".b.parquet.77.part", ".a[1].parquet.new.part", ".a1.parquet.77.part"}
    for file in (ours, *(tmp_path / name for name in others)):
        file.write_bytes(b"half")
    with begin(tmp_path / "a[1].parquet"):
        assert not ours.exists()
    assert {file.name for file in tmp_path.glob(".*")} == others


def test_folders_and_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConflictError, match="has other files in it"), begin(tmp_path):
        pass
    with pytest.raises(ConflictError, match="is no folder"), begin(tmp_path / "mine.txt"):
        pass
    (tmp_path / "mine.parquet").write_text("mine")
    with pytest.raises(ConflictError, match="not by this command"):
        find_finished(tmp_path / "mine.parquet", WANTED)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConflictError, match="is a folder"), begin(tmp_path / "folder.parquet"):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.parquet", "mine.parquet", "mine.txt"]


@pytest.mark.parametrize(
    ("content", "told"), [("{", "damaged"), ("{}", "damaged"), ('{"format": 9}', "is of format 9")]
)
def test_a_manifest_that_cannot_be_read_is_told(tmp_path, content, told):
    (tmp_path / "_manifest.json").write_text(content)
    with pytest.raises(ConflictError, match=told), begin(tmp_path):
        pass


def test_a_disk_that_takes_nothing_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"), begin(tmp_path / "file" / "out"):
        pass
    missing = PartStore(tmp_path / "gone", WANTED.question)
    with pytest.raises(StoreError, match="make room"):
        missing.write(0, 0, [], ends_unit=True)


def test_a_folder_that_takes_no_lock_is_told(tmp_path, monkeypatch):
    def read_only(_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("app.bulk.parts.FileLock.acquire", read_only)
    with pytest.raises(StoreError, match="Read-only file system"), begin(tmp_path):
        pass


def test_a_name_that_is_no_unicode_is_refused():
    with pytest.raises(InvalidFieldError, match="is no UTF-8"):
        validate_output(Path("\udcff.parquet"), 1)


def test_parts_are_put_together_in_the_order_of_the_sources(tmp_path):
    out = tmp_path / "labels.parquet"
    assert find_finished(out, WANTED) is None
    with begin(out) as (parts, manifest):
        parts.write(2, 0, [good("3.jpg")], ends_unit=True)
        parts.write(1, 1, [], ends_unit=True)
        parts.write(1, 0, [bad("a"), good("b")], ends_unit=False)
        parts.write(0, 0, [good("1.jpg"), good("2.jpg")], ends_unit=True)
        assert parts.folder == parts_folder(out)
        merge_parts(parts, manifest, out)
        assert find_finished(out, WANTED) == manifest
    (parts.folder / "mine.txt").write_text("mine")
    remove_parts(out, replace(manifest, began_at="2027"))
    assert len(list(parts.folder.glob("part-*"))) == 4
    remove_parts(out, manifest)
    assert [file.name for file in parts.folder.iterdir()] == ["mine.txt"]
    (parts.folder / "mine.txt").unlink()
    parts.folder.rmdir()
    assert [file.name for file in tmp_path.iterdir()] == ["labels.parquet"]
    assert pq.read_table(out)["key"].to_pylist() == ["1.jpg", "2.jpg", "a", "b", "3.jpg"]
    assert pq.read_schema(out).metadata[b"deixis.label_set"] == b"pets@1"
    assert count_images(out) == ImageCounts(images=5, bad=1)
