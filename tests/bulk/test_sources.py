"""Sources of images in great numbers: what is in them, in which order, and what becomes of damage."""

import errno
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from app.bulk.readers import SourceFolder, SourceImage, UnreadableImage, read_unit
from app.bulk.sources import ParquetColumns, SourceKind, WorkUnit, plan
from app.errors import InvalidFieldError
from tests.conftest import picture

RED, BLUE = picture("red"), picture("blue")


def planned(*sources, images=4, columns=None):
    return list(plan(sources, columns or ParquetColumns(), images=images))


def read(units, *, skip=0, max_image_bytes=10**6):
    return [item for unit in units for item in read_unit(unit, skip=skip, max_image_bytes=max_image_bytes)]


def keys(items):
    return [item.key for item in items]


def reason_of(item):
    assert isinstance(item.content, UnreadableImage), item
    return item.content.reason


def tar_of(members, *, end=True):
    """Return a tar with these files, as WebDataset writes it."""
    file = io.BytesIO()
    archive = tarfile.open(fileobj=file, mode="w")  # noqa: SIM115 - closing writes the end
    for name, content in members.items():
        told = tarfile.TarInfo(name)
        told.size = len(content)
        archive.addfile(told, io.BytesIO(content))
    if end:
        archive.close()
    return file.getvalue()


SAMPLES = {"000.jpg": RED, "000.json": b"{}", "001.jpg": BLUE, "001.cls": b"3", "002.png": RED}


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_folder_is_cut_into_units_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/2.png", "b/10.png", "a/x.jpg", "z.webp", ".hidden/1.png", "b/.1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED)

    units = planned(tmp_path, images=3)

    assert [unit.names for unit in units] == [("z.webp", "a/x.jpg", "b/10.png"), ("b/2.png",)]
    assert {unit.source for unit in units} == {str(tmp_path)}
    assert [item.content for item in read(units)] == [tmp_path / item.key for item in read(units)]


def test_files_that_are_named_keep_their_order_and_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1.png", "2.png", "3.dat"):
        (tmp_path / name).write_bytes(RED)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "4.png").write_bytes(RED)

    units = planned(*map(type(tmp_path), ("3.dat", "[12].png", "more")), images=2)

    assert [(unit.source, unit.names) for unit in units] == [
        (None, ("3.dat", "1.png")),
        (None, ("2.png",)),
        ("more", ("4.png",)),
    ]
    monkeypatch.chdir("/")
    assert all(item.content.exists() for item in read(units))


def test_a_folder_without_images_says_what_it_has(tmp_path):
    with pytest.raises(InvalidFieldError, match=r"no image in .*looked for .*\.jpg"):
        planned(tmp_path)
    (tmp_path / "0.tar").write_bytes(tar_of({}))
    with pytest.raises(InvalidFieldError, match=r"it has 1 archives; name them, as '.*/\*\*/\*\.tar'"):
        planned(tmp_path)


def locked(monkeypatch, folder):
    """Let a folder be searched by nobody, not even by root."""
    scandir = os.scandir

    def refusing(place):
        if Path(place) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_subfolder_that_cannot_be_searched_is_a_bad_item(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/c/2.png", "d/3.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(RED)
    locked(monkeypatch, tmp_path / "b" / "c")

    units = planned(tmp_path)

    assert keys(read(units)) == ["a/1.png", "d/3.png", "b/c"]
    assert reason_of(read(units)[-1]) == "the folder cannot be read: Permission denied"
    assert sum(unit.images for unit in units) == 3
    assert WorkUnit.from_json(json.loads(json.dumps(units[-1].to_json()))) == units[-1]
    with pytest.raises(InvalidFieldError, match="b/c' cannot be read: Permission denied"):
        planned(tmp_path / "b")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_that_lead_nowhere_are_items_where_they_may_lead_to_images(tmp_path):
    (tmp_path / "1.png").write_bytes(RED)
    for name in ("2.png", "on another disk", "notes.txt"):
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / "read me").symlink_to("1.png")
    assert keys(read(planned(tmp_path))) == ["1.png", "2.png", "on another disk"]


def test_archives_in_a_folder_that_are_not_named_are_told(tmp_path):
    for name in ("1.png", "a/0.tar", "a/1.TAR", "b.tar.gz", "p.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(RED)
    notes = []
    list(plan([tmp_path], ParquetColumns(), images=4, tell=notes.append))
    (note,) = notes
    assert note.startswith(f"4 archives below '{tmp_path}' are not opened; to have them read, name them")
    assert all(f"'{tmp_path}/**/*{suffix}'" in note for suffix in (".tar", ".TAR", ".tar.gz", ".parquet"))
    notes.clear()
    list(
        plan(
            [tmp_path, tmp_path / "**" / "*.[tT]*", tmp_path / "p.parquet"],
            ParquetColumns(),
            images=4,
            tell=notes.append,
        )
    )
    assert notes == []


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidFieldError, match="neither a file nor a folder"):
        planned(tmp_path / "*.tar")
    with pytest.raises(InvalidFieldError, match="none is given"):
        planned()


@pytest.mark.parametrize("name", ["s.tar.bz2", "s.TAR.XZ", "s.tbz2", "s.txz", "s.zip", "1.png.gz"])
def test_archives_of_other_forms_are_refused_and_in_a_folder_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"packed")
    (tmp_path / "1.png").write_bytes(RED)
    with pytest.raises(InvalidFieldError, match=r"not read; unpack it, or make it one of: \.tar, \.tar\.gz, \.tgz, "):
        planned(tmp_path / "1.png", tmp_path / "s*" if name[0] == "s" else tmp_path / name)
    notes = []
    list(plan([tmp_path], ParquetColumns(), images=4, tell=notes.append))
    assert notes == [f"1 files below '{tmp_path}' are packed in a form that is not read, as '{tmp_path / name}'"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(InvalidFieldError, match=f"no image in .*{name}' is packed in a form that is not read"):
        planned(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "folder.zip" / "2.png").write_bytes(RED)
    assert keys(read(planned(tmp_path / "folder.zip"))) == ["2.png"]


def test_a_source_that_is_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(RED)
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES))
    paths = map(type(tmp_path), ("1.png", "./1.png", "*.tar", "s.tar", str(tmp_path / "1.png")))
    assert len(planned(*paths, images=1)) == 2


@pytest.mark.parametrize("inner", ["photos/a", "photos/a/1.png", "link"])
def test_what_a_folder_has_already_is_refused(tmp_path, inner):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(RED)
    (tmp_path / "link").symlink_to(tmp_path / "photos" / "a")
    with pytest.raises(InvalidFieldError, match="which is searched whole; name only one of them"):
        planned(tmp_path / inner, tmp_path / "photos")


def test_what_the_system_does_not_let_us_look_at_is_told(tmp_path):
    (tmp_path / "x.tar").symlink_to("nowhere")
    with pytest.raises(InvalidFieldError, match=r"x\.tar' cannot be read: No such file"):
        planned(tmp_path / "*.tar")
    with pytest.raises(InvalidFieldError, match="File name too long"):
        planned(tmp_path / ("x" * 300))


def test_columns_of_one_name_are_told(tmp_path):
    pq.write_table(pa.table([pa.array([RED])] * 2, names=["image"] * 2), tmp_path / "p.parquet")
    with pytest.raises(InvalidFieldError, match="has several columns called 'image'; rename them"):
        planned(tmp_path / "p.parquet")
    pq.write_table(pa.table([pa.array([RED])] * 3, names=["mask", "mask", "image"]), tmp_path / "p.parquet")
    assert read(planned(tmp_path / "p.parquet")) == [SourceImage("0", RED)]


def test_a_unit_is_the_same_after_its_way_through_json(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(RED)
    (tmp_path / "t.tar").write_bytes(tar_of(SAMPLES))
    pq.write_table(pa.table({"image": [RED] * 5}), tmp_path / "p.parquet", row_group_size=2)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.dat").write_bytes(RED)
    units = planned(tmp_path, *(tmp_path / name for name in ("t.tar", "p.parquet", "x.dat", "bad.parquet")))
    assert len(units) == 6
    assert {unit.kind for unit in units} == set(SourceKind)
    assert [WorkUnit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units] == units


# --- tars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("s.tar", bytes),
        ("s.tar.gz", gzip.compress),
        ("S.TGZ", gzip.compress),
        ("s.tar.zst", lambda content: zstandard.ZstdCompressor().compress(content)),
    ],
)
def test_a_tar_is_read_in_its_order_packed_or_not(tmp_path, name, pack):
    samples = {**SAMPLES, "dir/._000.jpg": b"resource fork", "dir/003.JPEG": BLUE}
    (tmp_path / name).write_bytes(pack(tar_of(samples)))

    units = planned(tmp_path / name)

    expected = [SourceImage(key, samples[key]) for key in ("000.jpg", "001.jpg", "002.png", "dir/003.JPEG")]
    assert read(units) == expected
    assert read(units, skip=3) == expected[3:]
    assert (len(units), units[0].kind, units[0].images) == (1, SourceKind.TAR, None)


def test_shards_come_in_the_order_of_their_names(tmp_path):
    for name in ("b-2.tar", "b-10.tar", "a.tar"):
        (tmp_path / name).write_bytes(tar_of({f"{name}.png": RED}))
    assert keys(read(planned(tmp_path / "*.tar"))) == ["a.tar.png", "b-10.tar.png", "b-2.tar.png"]


PACKED = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", PACKED)
def test_what_comes_before_the_damage_of_a_tar_is_kept(tmp_path, suffix):
    whole = tar_of(SAMPLES)
    second = whole.index(BLUE)
    damaged = {
        "cut in an image": whole[: second + 20],
        "cut in a header": whole[: second - 300],
        "another header": whole[: second - 512] + b"\1" * 512 + whole[second:],
    }
    for name, content in damaged.items():
        (tmp_path / f"s{suffix}").write_bytes(PACKED[suffix](content))
        items = read(planned(tmp_path / f"s{suffix}"))
        assert items[0] == SourceImage("000.jpg", RED), name
        assert len(items) == 2, name
        assert items[1].key == f"s{suffix}", name
        assert "cannot be read as a tar, here or from here on" in reason_of(items[1])


@pytest.mark.parametrize("suffix", PACKED)
def test_a_tar_behind_a_tar_is_told(tmp_path, suffix):
    (tmp_path / f"s{suffix}").write_bytes(PACKED[suffix](tar_of(SAMPLES) + tar_of(SAMPLES)))
    items = read(planned(tmp_path / f"s{suffix}"))
    assert keys(items) == ["000.jpg", "001.jpg", "002.png", f"s{suffix}"]
    assert "something follows its end" in reason_of(items[-1])


def test_a_packed_tar_with_another_checksum_is_told(tmp_path):
    packed = bytearray(gzip.compress(tar_of(SAMPLES)))
    packed[-8] ^= 1
    (tmp_path / "s.tgz").write_bytes(packed)
    items = read(planned(tmp_path / "s.tgz"))
    assert keys(items) == ["000.jpg", "001.jpg", "002.png", "s.tgz"]
    assert "CRC check failed" in reason_of(items[-1])


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_one_bad_item(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    (item,) = read(planned(tmp_path / "s.tar"))
    assert "cannot be read as a tar" in reason_of(item)


def test_a_packed_tar_that_breaks_off_says_so(tmp_path):
    packed = gzip.compress(tar_of({**SAMPLES, "noise.jpg": bytes(range(256)) * 4000}), compresslevel=0)
    (tmp_path / "s.tar.gz").write_bytes(packed[:-100_000])
    items = read(planned(tmp_path / "s.tar.gz"), max_image_bytes=10**7)
    assert keys(items)[:3] == ["000.jpg", "001.jpg", "002.png"]
    assert "cannot be read as a tar" in reason_of(items[-1])


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("members", [{}, {"0.txt": b"words", ".1.png": RED}])
def test_a_tar_without_an_image_says_so(tmp_path, suffix, members):
    (tmp_path / f"s{suffix}").write_bytes(PACKED[suffix](tar_of(members)))
    (item,) = read(planned(tmp_path / f"s{suffix}"))
    assert item.key == f"s{suffix}"
    assert "there is no image in it; looked for" in reason_of(item)


def with_links(*links):
    """Return a tar whose images are followed by links: type, name, and what it is to."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("./a.png", RED), ("b.png", BLUE), ("words", RED)):
            told = tarfile.TarInfo(name)
            told.size = len(content)
            archive.addfile(told, io.BytesIO(content))
        for kind, name, place in links:
            told = tarfile.TarInfo(name)
            told.type, told.linkname = kind, place
            archive.addfile(told)
    return file.getvalue()


def test_hard_links_of_a_plain_tar_are_read_and_those_of_a_packed_one_told(tmp_path):
    content = with_links(
        (tarfile.LNKTYPE, "c.png", "a.png"),
        (tarfile.LNKTYPE, "d.png", "c.png"),
        (tarfile.LNKTYPE, "e.png", "words"),
        (tarfile.LNKTYPE, "f.png", "nowhere.png"),
        (tarfile.LNKTYPE, "g.png", "b.png"),
    )
    (tmp_path / "s.tar").write_bytes(content)
    items = read(planned(tmp_path / "s.tar"))
    assert keys(items) == ["./a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png"]
    assert [item.content for item in items if item.key != "f.png"] == [RED, BLUE, RED, RED, RED, BLUE]
    assert reason_of(items[5]) == "is a hard link to 'nowhere.png', which is not before it in the tar"
    assert read(planned(tmp_path / "s.tar"), skip=6) == items[6:]
    assert "the limit is 9" in reason_of(read(planned(tmp_path / "s.tar"), max_image_bytes=9)[2])
    (tmp_path / "s.tgz").write_bytes(gzip.compress(content))
    packed = read(planned(tmp_path / "s.tgz"))
    assert packed[:2] == items[:2]
    assert "is a hard link to 'a.png'" in reason_of(packed[2])
    assert "unpack the tar" in reason_of(packed[2])


def test_other_links_of_a_tar_are_told(tmp_path):
    (tmp_path / "s.tar").write_bytes(with_links((tarfile.SYMTYPE, "c.png", "a.png"), (tarfile.DIRTYPE, "d.png", "")))
    items = read(planned(tmp_path / "s.tar"))
    assert keys(items) == ["./a.png", "b.png", "c.png"]
    assert "is a link to 'a.png'" in reason_of(items[2])


def test_a_tar_without_an_end_is_whole(tmp_path):
    # Some writers leave the closing zeros out, and a tar that was appended to may end with any number of them.
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES, end=False))
    assert keys(read(planned(tmp_path / "s.tar"))) == ["000.jpg", "001.jpg", "002.png"]


def test_a_member_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of({"0.jpg": b"x" * 5000, "1.jpg": RED}))
    large, good = read(planned(tmp_path / "s.tar"), max_image_bytes=4999)
    assert "5,000 bytes and the limit is 4,999" in reason_of(large)
    assert good.content == RED


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES))
    units = planned(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(tar_of({**SAMPLES, "003.jpg": RED}))
    with pytest.raises(InvalidFieldError, match="has changed since the run began"):
        read(units)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(InvalidFieldError, match="cannot be read any more"):
        read(units)


def test_a_tar_that_goes_away_while_it_is_read_is_not_taken_for_a_damaged_one(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES)[:1200])
    items = read_unit(planned(tmp_path / "s.tar")[0], skip=0, max_image_bytes=10**6)
    next(items)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(InvalidFieldError, match="cannot be read any more"):
        list(items)


def test_of_files_that_were_named_the_folder_must_be_there(tmp_path):
    file = tmp_path / "a" / "1.png"
    file.parent.mkdir()
    file.write_bytes(RED)
    root = SourceFolder(planned(file)[0])
    (tmp_path / "a" / "2.png").write_bytes(RED)
    file.unlink()
    root.check(file)
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(InvalidFieldError, match="it is empty now"):
        root.check(file)
    file.parent.rmdir()
    with pytest.raises(InvalidFieldError, match="No such file"):
        root.check(file)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def parquet(tmp_path, columns, **options):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet", **options)
    return tmp_path / "p.parquet"


def test_bytes_of_parquet_are_read_by_row_groups(tmp_path):
    contents = [picture("red", (8, 8 + number)) for number in range(50)]
    file = parquet(tmp_path, {"id": list(range(50)), "jpg": contents}, row_group_size=10)

    units = planned(file, images=15)

    assert [(unit.first_row, unit.groups, unit.images) for unit in units] == [
        (0, (0, 1), 20),
        (20, (2, 3), 20),
        (40, (4,), 10),
    ]
    assert [item.content for item in read(units)] == contents
    assert keys(read(units)) == [str(number) for number in range(50)]
    assert keys(read_unit(units[1], skip=17, max_image_bytes=10**6)) == ["37", "38", "39"]


def test_images_as_hugging_face_keeps_them_are_read(tmp_path):
    (tmp_path / "there.png").write_bytes(RED)
    images = [
        {"bytes": BLUE, "path": "b.png"},
        {"bytes": None, "path": "there.png"},
        {"bytes": RED, "path": None},
        None,
    ]
    items = read(planned(parquet(tmp_path, {"label": [0, 1, 2, 3], "image": images})))
    assert keys(items) == ["b.png", "there.png", "2", "3"]
    assert [item.content for item in items[:3]] == [BLUE, tmp_path / "there.png", RED]
    assert reason_of(items[3]) == "the cell is empty"


def test_paths_and_urls_of_files_are_read_and_other_addresses_are_not_fetched(tmp_path):
    paths = [
        "a/1.png",
        str(tmp_path / "2.png"),
        (tmp_path / "my 3.png").as_uri(),
        "https://example.com/4.png",
        None,
        "",
    ]
    file = parquet(tmp_path, {"url": pa.array(paths).dictionary_encode(), "caption": ["a cat"] * 6})
    items = read(planned(file))
    assert keys(items) == [*paths[:4], "4", ""]
    places = [item.content for item in items[:3]]
    assert places == [tmp_path / "a" / "1.png", tmp_path / "2.png", tmp_path / "my 3.png"]
    assert "nothing is fetched" in reason_of(items[3])
    assert [reason_of(item) for item in items[4:]] == ["the cell is empty"] * 2


def test_columns_can_be_named(tmp_path):
    file = parquet(tmp_path, {"image": [RED], "mask": [BLUE], "name": ["x"], "number": [7]})
    assert read(planned(file)) == [SourceImage("0", RED)]
    assert read(planned(file, columns=ParquetColumns("mask", "name"))) == [SourceImage("x", BLUE)]
    assert keys(read(planned(file, columns=ParquetColumns(key="number")))) == ["7"]
    with pytest.raises(InvalidFieldError, match="has no column 'img'; name one of: 'image', 'mask', 'name', 'number'"):
        planned(file, columns=ParquetColumns("img"))
    with pytest.raises(InvalidFieldError, match=r"'number' of .* holds int64, and not bytes or paths"):
        planned(file, columns=ParquetColumns("number"))


@pytest.mark.parametrize("columns", [{"left": [RED], "right": [BLUE]}, {"number": [1]}, {"words": ["a"]}])
def test_a_column_that_cannot_be_told_is_asked_for(tmp_path, columns):
    with pytest.raises(InvalidFieldError, match="it cannot be told which column"):
        planned(parquet(tmp_path, columns))


def test_damaged_parquet_is_one_bad_item_and_others_go_on(tmp_path):
    good = parquet(tmp_path, {"image": [RED]}).rename(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").write_bytes(good.read_bytes()[:-9])
    bad, item = read(planned(tmp_path / "*.parquet"))
    assert bad.key == "a.parquet"
    assert "cannot be read as Parquet" in reason_of(bad)
    assert item.content == RED


def test_parquet_without_a_row_is_one_bad_item(tmp_path):
    (item,) = read(planned(parquet(tmp_path, {"image": pa.array([], pa.binary())})))
    assert (item.key, reason_of(item)) == ("p.parquet", "there is no row in it")


def test_each_image_of_a_damaged_row_group_is_bad_and_the_next_group_is_read(tmp_path):
    contents = [picture("red", (8, 8 + number)) for number in range(9)]
    file = parquet(tmp_path, {"image": contents}, row_group_size=3, use_dictionary=False, compression="zstd")
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    file.write_bytes(content)

    units = planned(file, images=100)
    items = read(units)

    assert keys(items) == [str(number) for number in range(9)]
    assert [item.content for item in items if isinstance(item.content, bytes)] == [*contents[:3], *contents[6:]]
    assert all("cannot be read as Parquet" in reason_of(item) for item in items[3:6])
    assert [read(units, skip=skip) for skip in range(10)] == [items[skip:] for skip in range(10)]
