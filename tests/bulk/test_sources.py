"""The plan of a run: the order of images in folders, files and archives, and refused sources."""

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.bulk.readers import SourceImage
from app.bulk.sources import ParquetColumns, SourceKind, WorkUnit, plan_units
from app.errors import InvalidFieldError
from tests.bulk.source_files import BLUE, RED, SAMPLES, keys, parquet_file, planned, read, reason_of, tar_of


def test_a_folder_is_divided_into_units_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.jpg", "z.webp", ".hidden/1.png", "b/.1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED)

    units = planned(tmp_path, unit_images=3)

    assert [unit.names for unit in units] == [("z.webp", "a/x.jpg", "b/10.png"), ("b/2.png",)]
    assert {unit.source for unit in units} == {str(tmp_path)}
    assert [image.content for image in read(units)] == [tmp_path / image.key for image in read(units)]


def test_files_that_are_sources_keep_their_order_and_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1.png", "2.png", "3.dat"):
        (tmp_path / name).write_bytes(RED)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "4.png").write_bytes(RED)

    units = planned(*map(type(tmp_path), ("3.dat", "[12].png", "more")), unit_images=2)

    assert [(unit.source, unit.names) for unit in units] == [
        (None, ("3.dat", "1.png")),
        (None, ("2.png",)),
        ("more", ("4.png",)),
    ]
    monkeypatch.chdir("/")
    assert all(image.content.exists() for image in read(units))


def test_a_folder_without_images_is_refused_with_the_archives_in_it(tmp_path):
    with pytest.raises(InvalidFieldError, match=r"there are no images in .*the suffixes of images are .*\.jpg"):
        planned(tmp_path)
    (tmp_path / "0.tar").write_bytes(tar_of({}))
    with pytest.raises(InvalidFieldError, match=r"it has 1 archives; to read them, name them: '.*/\*\*/\*\.tar'"):
        planned(tmp_path)


def deny_access(monkeypatch, folder):
    """Refuse to list a folder, also for root."""
    scandir = os.scandir

    def scandir_or_refuse(place):
        if Path(place) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scandir_or_refuse)


def test_a_subfolder_that_cannot_be_searched_is_a_bad_image(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/c/2.png", "d/3.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(RED)
    deny_access(monkeypatch, tmp_path / "b" / "c")

    units = planned(tmp_path)

    assert keys(read(units)) == ["a/1.png", "d/3.png", "b/c"]
    assert reason_of(read(units)[-1]) == "the folder cannot be read: Permission denied"
    assert sum(unit.images for unit in units) == 3
    assert WorkUnit.from_json(json.loads(json.dumps(units[-1].to_json()))) == units[-1]
    with pytest.raises(InvalidFieldError, match="b/c' cannot be read: Permission denied"):
        planned(tmp_path / "b")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_broken_links_are_bad_images_if_their_target_may_have_images(tmp_path):
    (tmp_path / "1.png").write_bytes(RED)
    for name in ("2.png", "on another disk", "notes.txt"):
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / "read me").symlink_to("1.png")
    assert keys(read(planned(tmp_path))) == ["1.png", "2.png", "on another disk"]


def test_archives_in_a_folder_are_reported_unless_they_are_sources(tmp_path):
    for name in ("1.png", "a/0.tar", "a/1.TAR", "b.tar.gz", "p.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED)
    warnings = []
    list(plan_units([tmp_path], ParquetColumns(), unit_images=4, warn=warnings.append))
    (warning,) = warnings
    assert warning.startswith(f"4 archives in '{tmp_path}' are skipped; to read them, name them")
    assert all(f"'{tmp_path}/**/*{suffix}'" in warning for suffix in (".tar", ".TAR", ".tar.gz", ".parquet"))
    warnings.clear()
    list(
        plan_units(
            [tmp_path, tmp_path / "**" / "*.[tT]*", tmp_path / "p.parquet"],
            ParquetColumns(),
            unit_images=4,
            warn=warnings.append,
        )
    )
    assert warnings == []


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InvalidFieldError, match="neither a file nor a folder"):
        planned(tmp_path / "*.tar")
    with pytest.raises(InvalidFieldError, match="there are none"):
        planned()


@pytest.mark.parametrize("name", ["s.tar.bz2", "s.TAR.XZ", "s.tbz2", "s.txz", "s.zip", "1.png.gz"])
def test_unsupported_archives_are_refused_and_in_a_folder_reported(tmp_path, name):
    (tmp_path / name).write_bytes(b"compressed")
    (tmp_path / "1.png").write_bytes(RED)
    with pytest.raises(
        InvalidFieldError, match=r"not supported; unpack it, or convert it to one of: \.tar, \.tar\.gz, \.tgz, "
    ):
        planned(tmp_path / "1.png", tmp_path / "s*" if name[0] == "s" else tmp_path / name)
    warnings = []
    list(plan_units([tmp_path], ParquetColumns(), unit_images=4, warn=warnings.append))
    (warning,) = warnings
    assert warning.startswith(f"1 archives in '{tmp_path}' have a format that is not supported and are skipped")
    assert warning.endswith(f"'{tmp_path / name}'")
    (tmp_path / "1.png").unlink()
    with pytest.raises(
        InvalidFieldError, match=f"there are no images in .*{name}' is an archive of a format that is not supported"
    ):
        planned(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "folder.zip" / "2.png").write_bytes(RED)
    assert keys(read(planned(tmp_path / "folder.zip"))) == ["2.png"]


def test_a_source_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(RED)
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES))
    paths = map(type(tmp_path), ("1.png", "./1.png", "*.tar", "s.tar", str(tmp_path / "1.png")))
    assert len(planned(*paths, unit_images=1)) == 2


@pytest.mark.parametrize("inner", ["photos/a", "photos/a/1.png", "link"])
def test_a_source_inside_another_source_is_refused(tmp_path, inner):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(RED)
    (tmp_path / "link").symlink_to(tmp_path / "photos" / "a")
    with pytest.raises(InvalidFieldError, match="which is searched recursively; name only one of them"):
        planned(tmp_path / inner, tmp_path / "photos")


def test_a_source_that_cannot_be_accessed_is_refused_with_the_reason(tmp_path):
    (tmp_path / "x.tar").symlink_to("nowhere")
    with pytest.raises(InvalidFieldError, match=r"x\.tar' cannot be read: No such file"):
        planned(tmp_path / "*.tar")
    with pytest.raises(InvalidFieldError, match="is neither a file nor a folder"):
        planned(tmp_path / ("x" * 300))


def test_columns_with_the_same_name_are_refused_if_they_are_needed(tmp_path):
    pq.write_table(pa.table([pa.array([RED])] * 2, names=["image"] * 2), tmp_path / "p.parquet")
    with pytest.raises(InvalidFieldError, match="has several columns named 'image'; rename them"):
        planned(tmp_path / "p.parquet")
    pq.write_table(pa.table([pa.array([RED])] * 3, names=["mask", "mask", "image"]), tmp_path / "p.parquet")
    assert read(planned(tmp_path / "p.parquet")) == [SourceImage("0", RED)]


def test_a_unit_survives_a_round_trip_through_json(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(RED)
    (tmp_path / "t.tar").write_bytes(tar_of(SAMPLES))
    pq.write_table(pa.table({"image": [RED] * 5}), tmp_path / "p.parquet", row_group_size=2)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.dat").write_bytes(RED)
    units = planned(tmp_path, *(tmp_path / name for name in ("t.tar", "p.parquet", "x.dat", "bad.parquet")))
    assert len(units) == 6
    assert {unit.kind for unit in units} == set(SourceKind)
    assert [WorkUnit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units] == units


def test_the_files_of_a_pattern_come_in_the_order_of_their_names(tmp_path):
    for name in ("b-2.tar", "b-10.tar", "a.tar"):
        (tmp_path / name).write_bytes(tar_of({f"{name}.png": RED}))
    assert keys(read(planned(tmp_path / "*.tar"))) == ["a.tar.png", "b-10.tar.png", "b-2.tar.png"]


def test_the_columns_can_be_named(tmp_path):
    file = parquet_file(tmp_path, {"image": [RED], "mask": [BLUE], "name": ["x"], "number": [7]})
    assert read(planned(file)) == [SourceImage("0", RED)]
    assert read(planned(file, columns=ParquetColumns("mask", "name"))) == [SourceImage("x", BLUE)]
    assert keys(read(planned(file, columns=ParquetColumns(key="number")))) == ["7"]
    with pytest.raises(
        InvalidFieldError, match="has no column 'img'; its columns are 'image', 'mask', 'name', 'number'"
    ):
        planned(file, columns=ParquetColumns("img"))
    with pytest.raises(InvalidFieldError, match=r"'number' of .* has the type int64; name a column of bytes or paths"):
        planned(file, columns=ParquetColumns("number"))


@pytest.mark.parametrize("columns", [{"left": [RED], "right": [BLUE]}, {"number": [1]}, {"words": ["a"]}])
def test_without_a_clear_column_of_images_its_name_is_required(tmp_path, columns):
    with pytest.raises(InvalidFieldError, match="it is unclear which column"):
        planned(parquet_file(tmp_path, columns))
