"""Metadata does not decide whether an image is decoded, and neither does a missing end marker."""

import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from app.errors import NotAnImageError
from app.images.containers import without_metadata
from app.images.decode import decode_image
from tests.images.test_decode import PILLOW_FORMATS, chunk, noise, png, profile_with_swapped_channels, saved

IMAGE = noise(3, (64, 48))
TEXT_BOMB = zlib.compress(bytes(50_000_000), 9)


def decoded(data, **options):
    return decode_image(data, **{"max_bytes": 10**8, "max_pixels": 10**7, **options})


def pixels(data, **options):
    return np.asarray(decoded(data, **options))


def with_chunk(data, kind, content, *, intact=True, before=b"IDAT"):
    """Return a PNG with one more chunk."""
    added = chunk(kind, content)
    place = data.index(before) - 4
    return data[:place] + (added if intact else added[:-1] + bytes([added[-1] ^ 1])) + data[place:]


def with_segment(data, marker, content, *, after=2):
    """Return a JPEG with one more segment behind its first bytes."""
    return data[:after] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[after:]


def with_riff_chunk(data, name, content, size=None):
    """Return a WebP of the extended form with one more chunk at its end."""
    flags, (width, height) = 0x0C, IMAGE.size
    extended = struct.pack("<4sIB3x", b"VP8X", 10, flags)
    extended += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + extended + data[12:] + struct.pack("<4sI", name, len(content) if size is None else size) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


PNG, JPEG, GIF = saved(IMAGE, "PNG"), saved(IMAGE, "JPEG"), saved(IMAGE, "GIF")
WEBP = saved(IMAGE, "WEBP") if "WEBP" in PILLOW_FORMATS else b""


def with_comments(data):
    """Return a GIF with a long comment, an application block and text before its image."""
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    blocks = b"".join(b"\x21" + bytes([label]) + (b"\xff" + b"x" * 255) * 9 + b"\0" for label in (0xFE, 0xFF, 0x01))
    return data[:at] + blocks + data[at:]


def tiff_with(**tags):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[int(name[1:])] = value
    return saved(IMAGE, "TIFF", tiffinfo=directory)


def tiff_of_type(tag, kind, count, value):
    """Return a TIFF whose directory has an entry of any type, in place of the resolution."""
    data = bytearray(saved(IMAGE, "TIFF", dpi=(72, 72)))
    start = struct.unpack_from("<I", data, 4)[0] + 2
    for at in range(start, start + 12 * struct.unpack_from("<H", data, start - 2)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == 282:
            struct.pack_into("<HHI4s", data, at, tag, kind, count, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("damaged", "intact"),
    [
        *(
            (with_chunk(PNG, kind, b"a\0b", intact=False), PNG)
            for kind in (b"tEXt", b"iTXt", b"pHYs", b"tIME", b"prVt")
        ),
        *(
            (with_chunk(PNG, kind, b""), PNG)
            for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"iCCP")
        ),
        (with_chunk(PNG, b"iCCP", b"p\0\0" + TEXT_BOMB), PNG),
        (with_chunk(PNG, b"iCCP", b"p\0\1" + zlib.compress(b"x")), PNG),
        (with_chunk(PNG, b"iCCP", b"p\0\0no zlib"), PNG),
        (with_chunk(PNG, b"zTXt", b"k\0\0" + TEXT_BOMB), PNG),
        (with_chunk(PNG, b"iTXt", b"k\0\1\0\0\0" + TEXT_BOMB), PNG),
        (with_chunk(PNG, b"tEXt", b"k\0" + bytes(2_000_000)), PNG),
        (with_chunk(PNG, b"tEXt", b"k\0v", intact=False, before=b"IEND"), PNG),
        (with_chunk(PNG, b"tRNS", b"\0", intact=True), PNG),
        (with_chunk(PNG, b"eXIf", b"MM\0*", intact=False), PNG),
        *((with_segment(JPEG, marker, b"JFIF\0"), JPEG) for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE)),
        *((with_segment(JPEG, 0xE2, b"ICC_PROFILE\0" + end), JPEG) for end in (b"", b"\1", b"\7\1xx")),
        (with_segment(JPEG, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), JPEG),
        (with_segment(JPEG, 0xED, b"Photoshop 3.0\x008BIM\x03\xed\xff\xff"), JPEG),
        (with_segment(JPEG, 0xEE, b"Adobe"), JPEG),
        (JPEG[:20] + b"\0\0junk" + JPEG[20:], JPEG),
        (with_comments(GIF), GIF),
        (tiff_with(t270="a" * 100_000, t65000=b"x" * 50, t700=b"<xmp", t33432="é"), saved(IMAGE, "TIFF")),
        *((tiff_of_type(282, kind, 1, b"\xff" * 4), saved(IMAGE, "TIFF")) for kind in (0, 2, 5, 7, 13, 99)),
        (tiff_of_type(34665, 4, 1, b"\xff" * 4), saved(IMAGE, "TIFF")),
        (tiff_of_type(270, 2, 2**31, b"\xff" * 4), saved(IMAGE, "TIFF")),
        *(
            (with_riff_chunk(WEBP, name, content, size), WEBP)
            for name, content, size in (
                (b"EXIF", b"rubbish!", None),
                (b"XMP ", b"<x", None),
                (b"ICCP", b"no profile", None),
                (b"EXIF", b"cut", 4000),
                (b"abcd", b"", None),
            )
            if WEBP
        ),
    ],
)
def test_damaged_metadata_changes_no_pixel(damaged, intact):
    np.testing.assert_array_equal(pixels(damaged), pixels(intact))


def test_the_profile_the_orientation_and_the_transparent_colour_stay():
    profile, exif = profile_with_swapped_channels(), Image.Exif()
    exif[0x0112] = 6
    for name in ("PNG", "JPEG", *(["WEBP"] if WEBP else [])):
        with_both = saved(IMAGE, name, icc_profile=profile, exif=exif)
        image = Image.open(BytesIO(without_metadata({"WEBP": "WebP"}.get(name, name), with_both)))
        assert image.info["icc_profile"] == profile, name
        assert image.getexif()[0x0112] == 6, name
    tagged = saved(IMAGE, "TIFF", icc_profile=profile, exif=exif)
    image = Image.open(BytesIO(without_metadata("TIFF", tagged)))
    assert image.info["icc_profile"] == profile
    assert image.getexif()[0x0112] == 6
    palette = IMAGE.quantize(8)
    for name in ("PNG", "GIF"):
        image = Image.open(BytesIO(without_metadata(name, saved(palette, name, transparency=3))))
        assert image.has_transparency_data, name


def test_a_damaged_chunk_that_the_pixels_need_is_still_an_error():
    for kind, content in ((b"PLTE", b"abc"), (b"IDAT", b"x")):
        with pytest.raises(NotAnImageError):
            decoded(with_chunk(png(1, 1, 8, 3, b"\0\0"), kind, content, intact=kind != b"PLTE"))


def test_texts_and_profiles_of_a_png_take_no_memory():
    bombs = png(1, 1, 8, 0, b"\0\0", (chunk(b"zTXt", b"k\0\0" + TEXT_BOMB) + chunk(b"iCCP", b"p\0\0" + TEXT_BOMB)) * 20)
    tracemalloc.start()
    decoded(bombs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(bombs) * 4 + 2**22


def jpeg(name):
    wide = noise(5, (97, 65))
    flat = Image.new("RGB", (97, 65), (200, 30, 30))
    return {
        "noise": lambda: saved(wide, "JPEG"),
        "without subsampling": lambda: saved(wide, "JPEG", subsampling=0),
        "flat": lambda: saved(flat, "JPEG"),
        "grey": lambda: saved(wide.convert("L"), "JPEG"),
        "CMYK": lambda: saved(wide.convert("CMYK"), "JPEG"),
        "restart markers": lambda: saved(wide, "JPEG", restart_marker_blocks=2),
        "progressive": lambda: saved(wide, "JPEG", progressive=True),
        "flat and progressive": lambda: saved(flat, "JPEG", progressive=True),
    }[name]()


@pytest.mark.parametrize("target_px", [None, 4])
@pytest.mark.parametrize(
    "name",
    [
        "noise",
        "without subsampling",
        "flat",
        "grey",
        "CMYK",
        "restart markers",
        "progressive",
        "flat and progressive",
    ],
)
def test_a_jpeg_without_its_end_is_decoded_only_if_no_pixel_is_missing(name, target_px):
    data = jpeg(name)
    complete = pixels(data, target_px=target_px)
    for end in (b"", b"\xff", bytes(100)):
        np.testing.assert_array_equal(pixels(data[:-2] + end, target_px=target_px), complete)
    accepted = 0
    for length in [*range(len(data) - 60, len(data) - 2), *range(0, len(data) - 60, max(1, len(data) // 40))]:
        for end in (b"", bytes(100)):
            try:
                found = pixels(data[:length] + end, target_px=target_px)
            except NotAnImageError:
                continue
            accepted += 1
            np.testing.assert_array_equal(found, complete)
    assert target_px is not None or accepted < 12  # at a smaller size, fewer bytes decide


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_an_image_without_its_end_marker_is_decoded(name):
    data = saved(IMAGE, name)
    end = data.rindex(b"IEND") - 4 if name == "PNG" else len(data) - 1
    np.testing.assert_array_equal(pixels(data[:end]), pixels(data))


def test_the_profile_of_a_file_is_applied_next_to_damaged_metadata():
    data = with_chunk(saved(IMAGE, "PNG", icc_profile=profile_with_swapped_channels()), b"tEXt", b"a\0b", intact=False)
    assert ImageCms.ImageCmsProfile(BytesIO(profile_with_swapped_channels()))
    assert (pixels(data) != pixels(PNG)).any()
