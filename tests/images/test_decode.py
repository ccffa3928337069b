"""Valid images are decoded upright, in RGB and with correct colours; other files raise one of two errors."""

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, features

import app.images.decode
import app.images.formats
from app.errors import ImageTooLargeError, NotAnImageError
from app.images.decode import decode_image
from app.images.formats import supported_formats, supported_suffixes

LIMITS = {"max_bytes": 10_000_000, "max_pixels": 20_000_000}
ORANGE = (204, 102, 51)  # one of the palette colours that Pillow converts to
HAS_HEIF = find_spec("pillow_heif") is not None
needs_heif = pytest.mark.skipif(not HAS_HEIF, reason="pillow-heif is an extra")

PILLOW_FORMATS = [
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    *(name for name, feature in (("WEBP", "webp"), ("AVIF", "avif")) if features.check(feature)),
]


def saved(image, name, **options):
    file = BytesIO()
    if name == "HEIF":
        import pillow_heif

        pillow_heif.from_pillow(image).save(file, **options)
    else:
        image.save(file, name, **options)
    return file.getvalue()


def decoded(data, **options):
    return decode_image(data, **{**LIMITS, **options})


def plain(colour=ORANGE, size=(40, 30)):
    return Image.new("RGB", size, colour)


def noise(seed=0, size=(32, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def assert_colour(image, colour, tolerance=0):
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - colour).max()
    assert difference <= tolerance, f"{image.getpixel((0, 0))} is not {colour}"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour_type, rows=b"", extra=b""):
    """Return a PNG whose header Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def gif(screen, frame):
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def profile_with_swapped_channels():
    """Return an sRGB profile with red and blue swapped."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")


def profile_by_hand(space, connection, tag, content):
    header = struct.pack(">II4s", 0, 0, bytes.fromhex("02400000")) + b"prtr" + space + connection + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    white = b"XYZ \0\0\0\0" + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    start = 128 + 4 + 2 * 12
    table = struct.pack(">I4sII4sII", 2, b"wtpt", start, len(white), tag, start + len(white), len(content))
    profile = header + table + white + content
    return struct.pack(">I", len(profile)) + profile[4:]


def linear_grey_profile():
    """Return a grey profile with gamma 1, in which the middle value is much lighter than in sRGB."""
    return profile_by_hand(b"GRAY", b"XYZ ", b"kTRC", b"curv\0\0\0\0\0\0\0\0")


def cyan_only_profile():
    """Return a CMYK profile in which full cyan is black and the other inks are white."""
    identity = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000)
    ramp = bytes(range(256))
    corners = b"".join(bytes((0 if cyan else 255, 128, 128)) for cyan in (0, 1) for _ in range(8))
    content = b"mft1\0\0\0\0\4\3\2\0" + identity + ramp * 4 + corners + ramp * 3
    return profile_by_hand(b"CMYK", b"Lab ", b"A2B0", content)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# --- formats and modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PILLOW_FORMATS, pytest.param("HEIF", marks=needs_heif)])
def test_every_format_is_decoded_without_metadata(name):
    image = decoded(saved(plain(), name))
    assert image.size == (40, 30)
    assert_colour(image, ORANGE, tolerance=4)
    assert type(image) is Image.Image
    assert image.info == {}
    assert not image.getexif()


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("1", 0),
        ("L", 1),
        ("LA", 1),
        ("P", 0),
        ("PA", 0),
        ("RGBA", 0),
        ("RGBX", 0),
        ("CMYK", 0),
        ("YCbCr", 2),
        ("LAB", 3),
    ],
)
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_every_mode_of_a_tiff_becomes_rgb(mode, tolerance, compression):
    source = plain((255, 255, 255) if mode == "1" else ORANGE)
    expected = source.convert("L").convert("RGB").getpixel((0, 0)) if mode in {"L", "LA"} else source.getpixel((0, 0))
    assert_colour(decoded(saved(source.convert(mode), "TIFF", compression=compression)), expected, tolerance)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode):
    expected = plain().convert(mode).convert("RGB").getpixel((0, 0))
    assert_colour(decoded(saved(plain().convert(mode), "JPEG", quality=95)), expected, tolerance=4)


def test_an_adobe_cmyk_jpeg_is_not_inverted():
    data = saved(plain().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert_colour(decoded(data), ORANGE, tolerance=6)


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(byte_order, compression):
    values = np.array([[0, 0x0100, 0x8000, 0xFFFF]], dtype=byte_order)
    source = Image.frombytes("I;16" if byte_order == "<u2" else "I;16B", (4, 1), values.tobytes())
    for data in (
        saved(source, "TIFF", compression=compression),
        png(4, 1, 16, 0, b"\0" + values.astype(">u2").tobytes()),
    ):
        assert np.asarray(decoded(data))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_pgm_is_scaled():
    assert_colour(decoded(b"P5 1 1 65535 \x80\x00"), (128, 128, 128))


def test_sixteen_bit_colour_keeps_its_high_bytes():
    assert_colour(decoded(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x1234, 0x8000, 0xFFFF))), (0x12, 0x80, 0xFF))
    assert_colour(decoded(png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", 0x1234, 0x8000, 0, 0xFFFF))), (0x12, 0x80, 0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 100, 255], np.int32), [0, 100, 255]),
        (np.array([0, 0x8000, 0xFFFF], np.int32), [0, 128, 255]),
        (np.array([-1000, 0, 1000], np.int32), [0, 128, 255]),
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 100, 255], np.float32), [0, 100, 255]),
        (np.array([-2, 0, 2], np.float32), [0, 128, 255]),
        (np.array([1e30, 1e30, 1e30], np.float32), [0, 0, 0]),
        (np.array([np.nan, np.inf, 200], np.float32), [200, 200, 200]),
        (np.array([np.nan, np.nan, np.nan], np.float32), [0, 0, 0]),
    ],
)
def test_thirty_two_bit_grey_is_scaled(values, expected):
    image = decoded(saved(Image.fromarray(values[None]), "TIFF"))
    np.testing.assert_allclose(np.asarray(image)[0, :, 1], expected, atol=1)


# --- transparency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PNG", "TIFF", *(["WEBP"] if "WEBP" in PILLOW_FORMATS else [])])
@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (200, 100, 0)), (51, (244, 224, 204))])
def test_transparency_becomes_white(name, alpha, expected):
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    data = saved(Image.new("RGBA", (8, 8), (200, 100, 0, alpha)), name, **options)
    assert_colour(decoded(data), expected, tolerance=1)


@needs_heif
def test_transparency_in_heif_becomes_white():
    assert_colour(decoded(saved(Image.new("RGBA", (64, 64), (200, 100, 0, 0)), "HEIF")), (255, 255, 255), tolerance=2)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "transparent"),
    [
        (8, 2, bytes((1, 2, 3)), struct.pack(">HHH", 1, 2, 3)),
        (8, 0, b"\x07", struct.pack(">H", 7)),
        (16, 0, b"\x12\x34", struct.pack(">H", 0x1234)),
        (1, 0, b"\x00", struct.pack(">H", 0)),
    ],
)
def test_the_transparent_colour_of_a_png_without_alpha_becomes_white(depth, colour_type, row, transparent):
    data = png(1, 1, depth, colour_type, b"\0" + row, chunk(b"tRNS", transparent))
    assert_colour(decoded(data), (255, 255, 255))


@pytest.mark.parametrize(("name", "transparency"), [("PNG", 0), ("PNG", b"\x00\x80\xff"), ("GIF", 0)])
def test_transparent_palette_entries_become_white(name, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 100, 100, 100, 10, 20, 30])
    image.putdata([0, 1, 2])
    half = (177, 177, 177) if isinstance(transparency, bytes) else (100, 100, 100)
    result = decoded(saved(image, name, transparency=transparency))
    assert [result.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), half, (10, 20, 30)]


def test_premultiplied_alpha_is_undone_before_compositing(monkeypatch):
    class Premultiplied(ImageFile.ImageFile):
        def _open(self):
            self._size, self._mode = (4, 4), "RGBa"
            self.im = Image.new("RGBA", (4, 4), (200, 100, 0, 51)).convert("RGBa").im

    monkeypatch.setattr(app.images.decode, "_OPEN", {"GIF": Premultiplied})
    assert_colour(decoded(b"GIF89a"), (244, 224, 204), tolerance=4)


# --- orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", *sorted({"WEBP", "AVIF"} & set(PILLOW_FORMATS))])
@pytest.mark.parametrize("target_px", [None, 8])
def test_images_are_turned_upright(name, orientation, target_px):
    upright = np.zeros((96, 160, 3), dtype=np.uint8)
    upright[:48, :80], upright[:48, 80:], upright[48:, :80] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turned = Image.fromarray(upright)
    if orientation != 1:
        turned = turned.transpose(app.images.decode._TURN_BY_ORIENTATION[undo[orientation]])
    image = decoded(saved(turned, name, exif=with_orientation(orientation)), target_px=target_px)
    assert image.width * 96 == image.height * 160
    corners = [
        image.getpixel((image.width * x // 4, image.height * y // 4)) for x, y in ((1, 1), (3, 1), (1, 3), (3, 3))
    ]
    np.testing.assert_allclose(corners, [(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)], atol=12)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0rubbish that is no TIFF header",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff" * 3,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x2a\0\0\0\0\0\0",
    ],
)
@pytest.mark.parametrize("name", ["JPEG", "PNG", *(["WEBP"] if "WEBP" in PILLOW_FORMATS else [])])
def test_an_image_with_broken_exif_is_not_turned(name, exif):
    assert_colour(decoded(saved(plain(), name, exif=exif)), ORANGE, tolerance=4)


# --- colour profiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF"])
def test_a_colour_profile_is_applied(name):
    data = saved(plain(), name, icc_profile=profile_with_swapped_channels())
    assert_colour(decoded(data), ORANGE[::-1], tolerance=4)


def test_a_profile_is_applied_to_a_transparent_image():
    data = saved(Image.new("RGBA", (4, 4), (*ORANGE, 255)), "PNG", icc_profile=profile_with_swapped_channels())
    assert_colour(decoded(data), ORANGE[::-1], tolerance=4)


def test_a_grey_profile_is_applied():
    for mode in ("L", "LA"):
        data = saved(Image.new("L", (4, 4), 128).convert(mode), "PNG", icc_profile=linear_grey_profile())
        assert_colour(decoded(data), (188, 188, 188), tolerance=3)


@pytest.mark.parametrize(("ink", "expected"), [((255, 0, 0, 0), (0, 0, 0)), ((0, 255, 255, 0), (255, 255, 255))])
@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_a_cmyk_profile_is_applied(name, ink, expected):
    data = saved(Image.new("CMYK", (8, 8), ink), name, icc_profile=cyan_only_profile())
    assert_colour(decoded(data), expected, tolerance=4)


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (30, 20)), ((61, 95), (21, 32)), ((39, 60), (39, 60))])
def test_a_large_image_is_reduced_before_its_profile_is_applied(size, expected):
    image = decoded(saved(plain(size=size), "PNG", icc_profile=profile_with_swapped_channels()), target_px=10)
    assert image.size == expected
    assert_colour(image, ORANGE[::-1], tolerance=4)


def test_an_srgb_profile_changes_nothing():
    image = noise()
    np.testing.assert_array_equal(
        np.asarray(decoded(saved(image, "PNG", icc_profile=srgb_profile()))), np.asarray(image)
    )


@pytest.mark.parametrize("size", [0, 20, 127, 128, 300])
def test_a_broken_profile_is_ignored(size):
    profile = srgb_profile()[:size] or b"rubbish"
    assert_colour(decoded(saved(plain(), "PNG", icc_profile=profile)), ORANGE)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_for_other_channels_is_ignored(mode):
    expected = plain().convert(mode).convert("RGB").getpixel((0, 0))
    data = saved(plain().convert(mode), "TIFF", icc_profile=profile_with_swapped_channels())
    assert_colour(decoded(data), expected)


# --- animation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GIF", "PNG", "TIFF", "MPO", *sorted({"WEBP", "AVIF"} & set(PILLOW_FORMATS))])
def test_the_first_of_several_frames_is_decoded(name):
    frames = [plain(), plain((0, 0, 255)), plain((0, 255, 0))]
    data = saved(frames[0], name, save_all=True, append_images=frames[1:])
    assert_colour(decoded(data), ORANGE, tolerance=4)


# --- large JPEGs and extreme shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("size", "target_px", "expected"),
    [
        ((1000, 800), 100, (250, 200)),
        ((800, 1000), 100, (200, 250)),
        ((1000, 799), 100, (500, 400)),
        ((801, 1603), 50, (101, 201)),
        ((399, 900), 100, (399, 900)),
        ((1000, 800), None, (1000, 800)),
    ],
)
def test_a_large_jpeg_is_decoded_smaller_but_never_below_twice_the_target(size, target_px, expected, progressive):
    image = decoded(saved(plain(size=size), "JPEG", progressive=progressive), target_px=target_px)
    assert image.size == expected
    assert_colour(image, ORANGE, tolerance=4)


def test_a_jpeg_decoded_smaller_looks_the_same_after_the_resize():
    y, x = np.mgrid[0:900, 0:1200]
    waves = np.stack(
        [128 + 100 * np.sin(x / 37), 128 + 100 * np.cos(y / 29), 128 + 100 * np.sin((x + y) / 53)], axis=-1
    )
    data = saved(Image.fromarray(waves.astype(np.uint8)), "JPEG", quality=95)
    full, smaller = (
        np.asarray(decoded(data, target_px=target_px).resize((149, 112), Image.Resampling.BICUBIC)).astype(int)
        for target_px in (None, 112)
    )
    assert np.abs(full - smaller).mean() < 1


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 2_000)])
def test_an_image_with_extreme_aspect_ratio_is_cropped(name, size):
    image = decoded(saved(plain(size=size), name))
    assert max(image.size) == app.images.decode.MAX_ASPECT * min(image.size)
    assert min(image.size) == min(size)
    assert_colour(image, ORANGE, tolerance=4)


def test_the_centre_of_an_image_with_extreme_aspect_ratio_is_kept():
    stripes = np.zeros((1, 1001, 3), dtype=np.uint8)
    stripes[0, 500] = 255
    assert np.asarray(decoded(saved(Image.fromarray(stripes), "PNG")))[0, :, 0].tolist() == [0] * 25 + [255] + [0] * 24


# --- limits ------------------------------------------------------------------------------------------------------


@contextmanager
def no_pixels_decoded():
    """Fail the test if a decoder is created or memory for pixels is allocated."""

    def refuse(*args, **kwargs):
        pytest.fail("pixels were about to be decoded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "_getdecoder", refuse)
        patch.setattr(Image.core, "new", refuse)
        patch.setattr(Image.core, "fill", refuse)
        patch.setattr(Image.Image, "frombytes", refuse)
        yield


def tiff_with_size(width, height, tile=None):
    file = BytesIO()
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory.update({256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1})
    if tile:
        directory.update({322: tile[0], 323: tile[1], 324: 8, 325: 8})
    else:
        directory.update({273: 8, 278: height, 279: 8})
    file.write(b"II*\0\x08\0\0\0" + directory.tobytes(8))
    return file.getvalue()


def bmp_with_size(width, height):
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def jpeg_with_size(width, height):
    data = saved(plain(size=(8, 8)), "JPEG")
    return data.replace(struct.pack(">HH", 8, 8), struct.pack(">HH", height, width), 1)


def webp_with_size(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0"
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "a PNG of 10 kB": lambda: png(10_000, 10_000, 1, 0, (b"\0" + bytes(1250)) * 10_000),
    "a PNG that declares gigapixels": lambda: png(2**31 - 1, 2**31 - 1, 8, 2),
    "a JPEG": lambda: jpeg_with_size(65_500, 65_500),
    "a GIF by its screen": lambda: gif((65_535, 65_535), (1, 1)),
    "a GIF by its frame": lambda: gif((1, 1), (10_000, 10_000)),
    "a GIF by a frame past Pillow's own limit": lambda: gif((1, 1), (65_535, 65_535)),
    "a WebP": lambda: webp_with_size(8_000, 8_000),
    "a WebP past Pillow's own limit": lambda: webp_with_size(16_383, 16_383),
    "a BMP": lambda: bmp_with_size(100_000, 100_000),
    "a TIFF": lambda: tiff_with_size(100_000, 100_000),
    "a TIFF by its tile": lambda: tiff_with_size(16, 16, tile=(65_536, 65_536)),
    "a PPM": lambda: b"P6 99999 99999 255 abc",
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_too_many_pixels_are_rejected_from_the_header(make):
    data = make()
    assert len(data) < 20_000
    with (
        no_pixels_decoded(),
        pytest.raises(ImageTooLargeError, match=r"pixels.*limit is 20,000,000; .*DEIXIS_MAX_IMAGE_PIXELS"),
    ):
        decoded(data)


@pytest.mark.parametrize("name", [*({"AVIF"} & set(PILLOW_FORMATS)), pytest.param("HEIF", marks=needs_heif)])
def test_too_many_pixels_of_an_avif_or_heif_are_rejected_from_the_header(name):
    data = saved(plain(size=(128, 64)), name)
    message = "128 x 64 = 8,192 pixels and the limit is 8,191"
    with no_pixels_decoded(), pytest.raises(ImageTooLargeError, match=message):
        decoded(data, max_pixels=8191)


def test_an_image_exactly_at_the_limits_is_decoded():
    data = saved(plain(size=(50, 20)), "PNG")
    assert decode_image(data, max_bytes=len(data), max_pixels=1000).size == (50, 20)
    with pytest.raises(
        ImageTooLargeError, match=f"{len(data):,} bytes and the limit is {len(data) - 1:,};.*DEIXIS_MAX_IMAGE_BYTES"
    ):
        decode_image(data, max_bytes=len(data) - 1, max_pixels=1000)
    with pytest.raises(ImageTooLargeError, match="50 x 20 = 1,000 pixels and the limit is 999"):
        decode_image(data, max_bytes=len(data), max_pixels=999)


@pytest.mark.parametrize("warning_filter", ["error", "ignore", "always"])
def test_the_limit_of_pillow_has_no_effect(monkeypatch, capsys, warning_filter):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(warning_filter)
        assert decoded(saved(plain(), "PNG")).size == (40, 30)
        with pytest.raises(ImageTooLargeError):
            decoded(gif((1, 1), (100, 10)), max_pixels=600)
    assert caught == []
    assert capsys.readouterr().err == ""


def test_running_out_of_memory_is_reported_as_too_large(monkeypatch):
    def exhausted(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(ImageTooLargeError, match="more memory"):
        decoded(saved(plain(), "BMP"))


def test_a_jpeg_with_too_many_scans_is_rejected():
    data = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with no_pixels_decoded(), pytest.raises(NotAnImageError, match=r"2\d\d scans and the limit is 50"):
        decoded(data[:-2] + last_scan * 200 + b"\xff\xd9")


@pytest.mark.parametrize(
    "data",
    [
        b"P6 1 1 100 abc",
        bmp_with_size(4, 4)[:28] + struct.pack("<HI", 8, 1) + bytes(20) + bytes(1024),
    ],
)
def test_encodings_that_pillow_decodes_in_python_are_rejected(data):
    with pytest.raises(NotAnImageError, match="too slow to decode; save it as PNG"):
        decoded(data)


# --- other files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "likeness"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript file"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\n<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"<HTML><BODY>", "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="1">', "an SVG drawing"),
        (b'<?xml version="1.0"?><note/>', "an XML document"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "an MP4 or QuickTime video"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a Matroska or WebM video"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\0\0\1\0\1\0\x10\x10", "a Windows icon"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a data: URL"),
        (b"/9j/4AAQSkZJRgABAQ", "base64 text"),
        (b"https://example.org/cat.jpg", "a URL"),
        (b'{"error": "not found"}', "a JSON document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"just some words", "text"),
        ("ceci n'est pas une pipe, à côté".encode(), "text"),
        (b"BMW is a maker of cars and of motorcycles", "text"),
        (b"\x00\x01\x02\xff", "begins with the bytes 00 01 02 ff"),
    ],
)
def test_the_error_for_another_file_names_its_type_and_the_accepted_formats(data, likeness):
    with pytest.raises(NotAnImageError, match="accepted formats: JPEG, PNG") as refusal:
        decoded(data)
    seems = likeness if likeness.startswith("begins") else f"looks like {likeness}"
    assert refusal.value.message.startswith(f"the data {seems}")


@pytest.mark.parametrize("name", ["EPS", "PCX", "TGA", "ICO", "ICNS", "SGI", "DDS", "JPEG2000", "PDF", "XBM"])
def test_an_unsupported_format_of_pillow_is_rejected(name):
    mode = "1" if name == "XBM" else "RGB"
    with pytest.raises(NotAnImageError, match="accepted formats"):
        decoded(saved(plain(size=(64, 64)).convert(mode), name))


def test_empty_data_is_rejected():
    with pytest.raises(NotAnImageError, match="empty"):
        decoded(b"")


def test_the_error_for_heif_without_its_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(app.images.formats, "find_spec", lambda name: None)
    with pytest.raises(NotAnImageError, match=r"HEIF needs the extra 'heif'.*; or send one of: JPEG"):
        decoded(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "HEIF" not in supported_formats()
    assert ".heic" not in supported_suffixes()


@pytest.mark.parametrize(
    ("major", "others", "name"),
    [
        (b"heic", b"mif1heic", "HEIF"),
        (b"mif1", b"miafheix", "HEIF"),
        (b"mif1", b"miafavif", "AVIF"),
        (b"avif", b"mif1miaf", "AVIF"),
        (b"mif1", b"miaf", "HEIF"),
        (b"isom", b"avc1mp41", None),
    ],
)
def test_brands_distinguish_images_from_videos(major, others, name):
    box = b"ftyp" + major + b"\0\0\0\0" + others
    assert app.images.formats._format_name(struct.pack(">I", len(box) + 4) + box + b"avifheic") == name


def test_the_common_formats_and_their_suffixes_are_supported():
    assert {"JPEG", "PNG"} <= set(supported_formats())
    assert {".jpg", ".jpeg", ".png"} <= supported_suffixes()


# --- damaged files -----------------------------------------------------------------------------------------------


def samples():
    """Return one small file for every code path of the decoders."""
    image, frames = noise(0), [noise(1), noise(2)]
    common = {"exif": with_orientation(6), "icc_profile": srgb_profile()}
    made = {name: saved(image, name) for name in PILLOW_FORMATS}
    made |= {
        f"{name} with metadata": saved(image, name, **common)
        for name in PILLOW_FORMATS
        if name not in {"GIF", "BMP", "PPM"}
    }
    made["progressive JPEG"] = saved(image, "JPEG", progressive=True)
    made["CMYK JPEG"] = saved(image.convert("CMYK"), "JPEG")
    made["palette PNG"] = saved(image.quantize(16), "PNG", transparency=3)
    made["palette BMP"] = saved(image.convert("P"), "BMP")
    for name in ("GIF", "PNG", "MPO", *({"WEBP"} & set(PILLOW_FORMATS))):
        made[f"animated {name}"] = saved(image, name, save_all=True, append_images=frames)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"{compression} TIFF"] = saved(image, "TIFF", compression=compression)
    made["fax TIFF"] = saved(image.convert("1"), "TIFF", compression="group4")
    made["float TIFF"] = saved(image.convert("F"), "TIFF")
    if HAS_HEIF:
        made["HEIF"] = saved(image, "HEIF")
    return made


SAMPLES = samples()


@pytest.mark.parametrize(
    "name", ["JPEG", "progressive JPEG", "CMYK JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "HEIF"]
)
def test_a_truncated_file_is_rejected_at_any_length(name):
    if name not in SAMPLES:
        pytest.skip("not in this installation")
    data = SAMPLES[name]
    # The last bytes of PNG and GIF (a checksum, an end marker) follow the last pixel.
    for length in range(0, len(data) - 24, max(1, len(data) // 60)):
        with pytest.raises(NotAnImageError):
            decoded(data[:length])


def test_a_truncated_jpeg_is_rejected_if_another_package_allows_them_in_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = saved(noise(size=(200, 200)), "JPEG")
    with pytest.raises(NotAnImageError, match="truncated"):
        decoded(data[: len(data) // 2])


def survives(data):
    try:
        image = decode_image(data, max_bytes=1_000_000, max_pixels=1_000_000, target_px=4)
    except (NotAnImageError, ImageTooLargeError):
        return
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    assert max(image.size) <= app.images.decode.MAX_ASPECT * min(image.size)


edits = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 2**16), st.sampled_from([0, 1, 127, 128, 255])),
        st.tuples(st.just("byte"), st.integers(0, 200), st.integers(0, 255)),
        st.tuples(st.just("word"), st.integers(0, 400), st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**32 - 1])),
        st.tuples(st.just("cut"), st.integers(1, 2**16), st.just(0)),
        st.tuples(st.just("repeat"), st.integers(0, 2**16), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=8,
)


def damaged(data, changes):
    content = bytearray(data)
    for kind, position, value in changes:
        at = position % len(content)
        if kind == "byte":
            content[at] = value
        elif kind == "word":
            content[at : at + 4] = struct.pack(">I", value)
        elif kind == "cut":
            del content[max(1, at) :]
        else:
            content[at:at] = content[at : at + value]
    return bytes(content)


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(SAMPLES)), changes=edits)
def test_a_damaged_file_is_decoded_or_rejected(name, changes):
    survives(damaged(SAMPLES[name], changes))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([data[:12] for data in SAMPLES.values()]), st.binary(max_size=200))
@example(b"\xff\xd8\xff", b"")
def test_a_known_signature_with_random_bytes_is_decoded_or_rejected(beginning, rest):
    survives(beginning + rest)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(min_size=1, max_size=100), st.text(min_size=1, max_size=50).map(str.encode)))
def test_random_bytes_and_random_text_are_rejected(data):
    survives(data)


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError,
        struct.error,
        OverflowError,
        ZeroDivisionError,
        EOFError,
        RuntimeError,
        TypeError,
        KeyError,
        OSError,
        RecursionError,
        AssertionError,
        UserWarning,
    ],
)
def test_every_error_of_a_decoder_is_reported_as_not_an_image(monkeypatch, error):
    def fails(self):
        raise error("of some\ndecoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(NotAnImageError, match=r"the BMP image is damaged.*of some") as refusal:
        decoded(saved(plain(), "BMP"))
    assert isinstance(refusal.value.__cause__, error)


# --- threads and buffers -----------------------------------------------------------------------------------------


def test_eight_threads_return_the_same_pixels_as_one():
    files = [SAMPLES[name] for name in sorted(SAMPLES)] + [data[: len(data) // 2] for data in SAMPLES.values()]
    files = (files * (200 // len(files) + 1))[:200]

    def outcome(data):
        try:
            return decoded(data, target_px=4).tobytes()
        except NotAnImageError as error:
            return error.message

    alone = list(map(outcome, files))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, files)) == alone


def test_a_memoryview_is_decoded_and_released():
    buffer = bytearray(saved(plain(), "PNG"))
    assert_colour(decoded(memoryview(buffer)), ORANGE)
    buffer.append(0)  # raises BufferError if a view still exists


def test_the_image_does_not_depend_on_the_file():
    data = saved(plain(), "TIFF")
    image = decoded(data)
    del data
    assert_colour(image.resize((5, 5)), ORANGE)
