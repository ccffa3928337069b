"""Readers of work units: tar files, Parquet files, links and damage."""

import base64
import gzip
import io
import struct
import tarfile
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from app.bulk.readers import SourceFolder, SourceImage, UnreadableImage, read_unit
from app.bulk.sources import ParquetColumns, SourceKind
from app.errors import InvalidFieldError
from tests.bulk.source_files import BLUE, RED, SAMPLES, keys, parquet_file, planned, read, reason_of, tar_of
from tests.conftest import picture


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("s.tar", bytes),
        ("s.tar.gz", gzip.compress),
        ("S.TGZ", gzip.compress),
        ("s.tar.zst", lambda content: zstandard.ZstdCompressor().compress(content)),
    ],
)
def test_a_tar_file_is_read_in_its_order_compressed_or_not(tmp_path, name, compress):
    samples = {**SAMPLES, "dir/._000.jpg": b"resource fork", "dir/003.JPEG": BLUE}
    (tmp_path / name).write_bytes(compress(tar_of(samples)))

    units = planned(tmp_path / name)

    expected = [SourceImage(key, samples[key]) for key in ("000.jpg", "001.jpg", "002.png", "dir/003.JPEG")]
    assert read(units) == expected
    assert read(units, skip=3) == expected[3:]
    assert (len(units), units[0].kind, units[0].images) == (1, SourceKind.TAR, None)


COMPRESSIONS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_images_before_the_damage_of_a_tar_file_are_kept(tmp_path, suffix):
    complete = tar_of(SAMPLES)
    second = complete.index(BLUE)
    damaged = {
        "cut in an image": complete[: second + 20],
        "cut in a header": complete[: second - 300],
        "another header": complete[: second - 512] + b"\1" * 512 + complete[second:],
    }
    for name, content in damaged.items():
        (tmp_path / f"s{suffix}").write_bytes(COMPRESSIONS[suffix](content))
        images = read(planned(tmp_path / f"s{suffix}"))
        assert images[0] == SourceImage("000.jpg", RED), name
        assert len(images) == 2, name
        assert images[1].key == f"s{suffix}", name
        assert "cannot be read as a tar file from here on" in reason_of(images[1])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_data_after_the_end_of_a_tar_file_is_reported(tmp_path, suffix):
    (tmp_path / f"s{suffix}").write_bytes(COMPRESSIONS[suffix](tar_of(SAMPLES) + tar_of(SAMPLES)))
    images = read(planned(tmp_path / f"s{suffix}"))
    assert keys(images) == ["000.jpg", "001.jpg", "002.png", f"s{suffix}"]
    assert "there is data after its end" in reason_of(images[-1])


def test_a_compressed_tar_file_with_a_wrong_checksum_is_reported(tmp_path):
    compressed = bytearray(gzip.compress(tar_of(SAMPLES)))
    compressed[-8] ^= 1
    (tmp_path / "s.tgz").write_bytes(compressed)
    images = read(planned(tmp_path / "s.tgz"))
    assert keys(images) == ["000.jpg", "001.jpg", "002.png", "s.tgz"]
    assert "CRC check failed" in reason_of(images[-1])


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100])
def test_a_file_that_is_not_a_tar_file_is_one_bad_image(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    (image,) = read(planned(tmp_path / "s.tar"))
    assert "cannot be read as a tar file" in reason_of(image)


def test_a_truncated_compressed_tar_file_is_reported(tmp_path):
    compressed = gzip.compress(tar_of({**SAMPLES, "noise.jpg": bytes(range(256)) * 4000}), compresslevel=0)
    (tmp_path / "s.tar.gz").write_bytes(compressed[:-100_000])
    images = read(planned(tmp_path / "s.tar.gz"), max_image_bytes=10**7)
    assert keys(images)[:3] == ["000.jpg", "001.jpg", "002.png"]
    assert "cannot be read as a tar file" in reason_of(images[-1])


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("members", [{}, {"0.txt": b"words", ".1.png": RED}])
def test_a_tar_file_without_images_is_one_bad_image(tmp_path, suffix, members):
    (tmp_path / f"s{suffix}").write_bytes(COMPRESSIONS[suffix](tar_of(members)))
    (image,) = read(planned(tmp_path / f"s{suffix}"))
    assert image.key == f"s{suffix}"
    assert "the file has no images; the suffixes of images are" in reason_of(image)


def tar_with_links(*links):
    """Return a tar file with images and links; a link is its type, name and target."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("./a.png", RED), ("b.png", BLUE), ("words", RED)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for kind, name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return file.getvalue()


def test_hard_links_are_followed_in_an_uncompressed_tar_file_only(tmp_path):
    content = tar_with_links(
        (tarfile.LNKTYPE, "c.png", "a.png"),
        (tarfile.LNKTYPE, "d.png", "c.png"),
        (tarfile.LNKTYPE, "e.png", "words"),
        (tarfile.LNKTYPE, "f.png", "nowhere.png"),
        (tarfile.LNKTYPE, "g.png", "b.png"),
    )
    (tmp_path / "s.tar").write_bytes(content)
    images = read(planned(tmp_path / "s.tar"))
    assert keys(images) == ["./a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png"]
    assert [image.content for image in images if image.key != "f.png"] == [RED, BLUE, RED, RED, RED, BLUE]
    assert reason_of(images[5]) == "a hard link to 'nowhere.png', which is not an earlier file of the tar file"
    assert read(planned(tmp_path / "s.tar"), skip=6) == images[6:]
    assert "the limit is 9" in reason_of(read(planned(tmp_path / "s.tar"), max_image_bytes=9)[2])
    (tmp_path / "s.tgz").write_bytes(gzip.compress(content))
    compressed = read(planned(tmp_path / "s.tgz"))
    assert compressed[:2] == images[:2]
    assert "a hard link to 'a.png'" in reason_of(compressed[2])
    assert "unpack the tar file" in reason_of(compressed[2])


def test_symbolic_links_in_a_tar_file_are_bad_images(tmp_path):
    (tmp_path / "s.tar").write_bytes(
        tar_with_links((tarfile.SYMTYPE, "c.png", "a.png"), (tarfile.DIRTYPE, "d.png", ""))
    )
    images = read(planned(tmp_path / "s.tar"))
    assert keys(images) == ["./a.png", "b.png", "c.png"]
    assert "a symbolic link to 'a.png'" in reason_of(images[2])


def test_a_tar_file_without_closing_zeros_is_complete(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES, end=False))
    assert keys(read(planned(tmp_path / "s.tar"))) == ["000.jpg", "001.jpg", "002.png"]


def test_a_member_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of({"0.jpg": b"x" * 5000, "1.jpg": RED}))
    large, good = read(planned(tmp_path / "s.tar"), max_image_bytes=4999)
    assert "5,000 bytes and the limit is 4,999" in reason_of(large)
    assert good.content == RED


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES))
    units = planned(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(tar_of({**SAMPLES, "003.jpg": RED}))
    with pytest.raises(InvalidFieldError, match="has changed since the run started"):
        read(units)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(InvalidFieldError, match="can no longer be read"):
        read(units)


def test_a_tar_file_that_disappears_while_it_is_read_is_not_damaged(tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_of(SAMPLES)[:1200])
    images = read_unit(planned(tmp_path / "s.tar")[0], skip=0, max_image_bytes=10**6)
    next(images)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(InvalidFieldError, match="can no longer be read"):
        list(images)


def test_the_folder_of_a_file_that_is_a_source_must_exist(tmp_path):
    file = tmp_path / "a" / "1.png"
    file.parent.mkdir()
    file.write_bytes(RED)
    folder = SourceFolder(planned(file)[0])
    (tmp_path / "a" / "2.png").write_bytes(RED)
    file.unlink()
    folder.verify(file)
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(InvalidFieldError, match="it is now empty"):
        folder.verify(file)
    file.parent.rmdir()
    with pytest.raises(InvalidFieldError, match="No such file"):
        folder.verify(file)


def test_a_parquet_file_is_read_by_row_groups(tmp_path):
    contents = [picture("red", (8, 8 + number)) for number in range(50)]
    file = parquet_file(tmp_path, {"id": list(range(50)), "jpg": contents}, row_group_size=10)

    units = planned(file, unit_images=15)

    assert [(unit.first_row, unit.groups, unit.images) for unit in units] == [
        (0, (0, 1), 20),
        (20, (2, 3), 20),
        (40, (4,), 10),
    ]
    assert [image.content for image in read(units)] == contents
    assert keys(read(units)) == [str(number) for number in range(50)]
    assert keys(read_unit(units[1], skip=17, max_image_bytes=10**6)) == ["37", "38", "39"]


def test_structures_of_bytes_and_path_as_in_hugging_face_data_sets_are_read(tmp_path):
    (tmp_path / "there.png").write_bytes(RED)
    images = [
        {"bytes": BLUE, "path": "b.png"},
        {"bytes": None, "path": "there.png"},
        {"bytes": RED, "path": None},
        None,
    ]
    images = read(planned(parquet_file(tmp_path, {"label": [0, 1, 2, 3], "image": images})))
    assert keys(images) == ["b.png", "there.png", "2", "3"]
    assert [image.content for image in images[:3]] == [BLUE, tmp_path / "there.png", RED]
    assert reason_of(images[3]) == "the cell is empty"


def test_paths_and_file_urls_are_read_and_other_urls_are_not_downloaded(tmp_path):
    paths = [
        "a/1.png",
        str(tmp_path / "2.png"),
        (tmp_path / "my 3.png").as_uri(),
        "https://example.com/4.png",
        None,
        "",
    ]
    file = parquet_file(tmp_path, {"url": pa.array(paths).dictionary_encode(), "caption": ["a cat"] * 6})
    images = read(planned(file))
    assert keys(images) == [*paths[:4], "4", ""]
    places = [image.content for image in images[:3]]
    assert places == [tmp_path / "a" / "1.png", tmp_path / "2.png", tmp_path / "my 3.png"]
    assert "images are not downloaded" in reason_of(images[3])
    assert [reason_of(image) for image in images[4:]] == ["the cell is empty"] * 2


def test_a_damaged_parquet_file_is_one_bad_image_and_others_are_read(tmp_path):
    good = parquet_file(tmp_path, {"image": [RED]}).rename(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").write_bytes(good.read_bytes()[:-9])
    bad, image = read(planned(tmp_path / "*.parquet"))
    assert bad.key == "a.parquet"
    assert "cannot be read as Parquet" in reason_of(bad)
    assert image.content == RED


def test_a_parquet_file_without_rows_is_one_bad_image(tmp_path):
    (image,) = read(planned(parquet_file(tmp_path, {"image": pa.array([], pa.binary())})))
    assert (image.key, reason_of(image)) == ("p.parquet", "the file has no rows")


def test_each_image_of_a_damaged_row_group_is_bad_and_the_next_group_is_read(tmp_path):
    contents = [picture("red", (8, 8 + number)) for number in range(9)]
    file = parquet_file(tmp_path, {"image": contents}, row_group_size=3, use_dictionary=False, compression="zstd")
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    file.write_bytes(content)

    units = planned(file, unit_images=100)
    images = read(units)

    assert keys(images) == [str(number) for number in range(9)]
    assert [image.content for image in images if isinstance(image.content, bytes)] == [*contents[:3], *contents[6:]]
    assert all("cannot be read as Parquet" in reason_of(image) for image in images[3:6])
    assert [read(units, skip=skip) for skip in range(10)] == [images[skip:] for skip in range(10)]


class _Photo(pa.ExtensionType):
    """A type that other programs may have given to a column."""

    def __init__(self, storage):
        super().__init__(storage, "test.photo")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, _):
        return cls(storage)


@pytest.fixture
def _photo_type():
    pa.register_extension_type(_Photo(pa.binary()))
    yield
    pa.unregister_extension_type("test.photo")


def structs(content_type, *contents):
    return pa.array(
        [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)],
        pa.struct([("bytes", content_type), ("path", pa.string())]),
    )


RED_TEXT = base64.b64encode(RED).decode()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([RED], pa.binary()),
        pa.array([RED], pa.large_binary()),
        pa.array([RED], pa.binary_view()),
        pa.array([RED], pa.binary(len(RED))),
        pa.array([RED]).dictionary_encode(),
        pa.ExtensionArray.from_storage(_Photo(pa.binary()), pa.array([RED])),
        pa.array([f"DATA:image/png;base64,{RED_TEXT}"]),
        pa.array([f"DATA:image/png;base64,{RED_TEXT}"], pa.string_view()),
        structs(pa.large_binary(), RED),
        structs(pa.binary(len(RED)), RED),
        structs(pa.string(), RED_TEXT),
        structs(pa.large_string(), f" data:image/png;base64,{RED_TEXT}"),
        structs(pa.list_(pa.uint8()), list(RED)),
    ],
    ids=lambda column: str(column.type)[:60],
)
@pytest.mark.usefixtures("_photo_type")
def test_an_image_is_read_from_a_column_of_any_type_that_can_contain_it(tmp_path, column):
    (image,) = read(planned(parquet_file(tmp_path, {"image": column})))
    assert image.content == RED


@pytest.mark.parametrize(
    "column",
    [
        structs(pa.int64(), 8, 2**62),
        structs(pa.float64(), 0.5, None),
        structs(pa.bool_(), True, False),
        structs(pa.null(), None, None),
        structs(pa.list_(pa.string()), ["a"], None),
        structs(pa.timestamp("ns"), 1, 2),
        structs(pa.struct([("a", pa.int8())]), {"a": 1}, None),
    ],
    ids=lambda column: str(column.type)[:60],
)
def test_of_structures_whose_bytes_are_something_else_the_path_is_read(tmp_path, column):
    images = read(planned(parquet_file(tmp_path, {"image": column})))
    assert images == [SourceImage(f"{row}.png", tmp_path / f"{row}.png") for row in range(2)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[{"bytes": RED, "path": "a"}]]),
        pa.array([[RED]]),
        pa.array([3]),
        pa.array([True]),
        pa.array([Decimal("1.5")]),
        pa.array([1], pa.timestamp("ns")),
        pa.array([[("a", RED)]], pa.map_(pa.string(), pa.binary())),
        pa.array([{"bytes": 3}]),
        pa.array([{"bytes": [3.5], "path": 3}]),
        pa.array([None], pa.null()),
    ],
    ids=lambda column: str(column.type)[:60],
)
def test_a_column_that_cannot_contain_images_is_refused_before_the_run(tmp_path, column):
    file = parquet_file(tmp_path, {"image": column})
    for columns in (ParquetColumns(), ParquetColumns(image="image")):
        with pytest.raises(InvalidFieldError, match=r"structures with the field 'bytes'.*'image'|'image'.*structures"):
            planned(file, columns=columns)


def test_a_row_that_cannot_be_read_is_an_error_of_this_row(tmp_path):
    invalid = pa.StringArray.from_buffers(4, pa.py_buffer(struct.pack("<5i", 0, 1, 2, 3, 4)), pa.py_buffer(b"a\xffbc"))
    numbers = pa.array([[1, None], list(RED), [], None], pa.list_(pa.uint8()))
    columns = {
        "invalid text": (invalid, [1]),
        "base64": (structs(pa.string(), RED_TEXT, "no base64!", "_-_-", RED_TEXT), [1, 2]),
        "numbers": (pa.StructArray.from_arrays([numbers], ["bytes"]), [0, 2, 3]),
        "nothing": (pa.array([RED, b"", None, RED]), [1, 2]),
    }
    for what, (column, bad) in columns.items():
        images = read(planned(parquet_file(tmp_path, {"image": column})))
        assert [row for row, image in enumerate(images) if isinstance(image.content, UnreadableImage)] == bad, what
        assert all(reason_of(images[row]) for row in bad), what


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (pa.array([b"a", b"\xff"]), ["a", "\\xff"]),
        (pa.array([7, None]), ["7", "1"]),
        (pa.array([Decimal("1.5"), Decimal("2.5")]), ["1.5", "2.5"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([0, 2**55], pa.timestamp("ms")), ["1970-01-01 00:00:00", "1"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_rows_are_named_by_a_column_of_any_simple_type(tmp_path, names, expected):
    file = parquet_file(tmp_path, {"image": [RED, RED], "name": names})
    assert keys(read(planned(file, columns=ParquetColumns(key="name")))) == expected


def test_a_column_of_lists_does_not_name_rows(tmp_path):
    file = parquet_file(tmp_path, {"image": [RED], "name": pa.array([["a"]])})
    with pytest.raises(InvalidFieldError, match=r"'name' .* list<.*; name a column of text or numbers"):
        planned(file, columns=ParquetColumns(key="name"))
