"""A picture is the same for the service in every form in which a program has it."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from app.images.decode import decode_image
from deixis._images import read_image

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
COLOURS = Image.fromarray((np.stack([RAMP, 1 - RAMP, RAMP**2], -1) * 255).astype(np.uint8))
ALPHA = Image.fromarray((RAMP[::-1] * 255).astype(np.uint8))


def with_alpha(image):
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(COLOURS, *profiles, outputMode="LAB")


MODES = {
    "F from 0 to 1": lambda: Image.fromarray(RAMP.astype(np.float32)),
    "F from 0 to 255": lambda: Image.fromarray((RAMP * 255).astype(np.float32)),
    "F beyond": lambda: Image.fromarray((RAMP * 5000 - 900).astype(np.float32)),
    "I from 0 to 255": lambda: Image.fromarray((RAMP * 255).astype(np.int32)),
    "I from 0 to 65535": lambda: Image.fromarray((RAMP * 65535).astype(np.int32)),
    "I beyond": lambda: Image.fromarray((RAMP * 2e9 - 1e9).astype(np.int32)),
    "I;16": lambda: Image.fromarray((RAMP * 65535).astype(np.uint16)),
    "I;16B": lambda: Image.frombytes("I;16B", (64, 48), (RAMP * 65535).astype(">u2").tobytes()),
    "I;16B with small values": lambda: Image.frombytes("I;16B", (64, 48), (RAMP * 700).astype(">u2").tobytes()),
    "1": lambda: COLOURS.convert("1"),
    "L": lambda: COLOURS.convert("L"),
    "P": lambda: COLOURS.convert("P"),
    "LA": lambda: with_alpha(COLOURS.convert("L")),
    "PA": lambda: with_alpha(COLOURS.convert("P").convert("PA")),
    "RGB": lambda: COLOURS,
    "RGBA": lambda: with_alpha(COLOURS),
    "RGBX": lambda: COLOURS.convert("RGBX"),
    "CMYK": lambda: COLOURS.convert("CMYK"),
    "LAB": lab,
}


def pixels(image):
    return np.asarray(decode_image(read_image(image).content, max_bytes=10**7, max_pixels=10**6)).astype(int)


@pytest.mark.parametrize("name", MODES)
def test_a_picture_of_any_mode_is_the_same_as_its_file(tmp_path, name):
    image = MODES[name]()
    assert image.mode == name.partition(" ")[0]
    image.save(tmp_path / "a.tif")
    expected = pixels(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels(image), expected)
    np.testing.assert_array_equal(pixels(Image.open(tmp_path / "a.tif")), expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(
    ("mode", "same_as"),
    [("RGBa", with_alpha(COLOURS)), ("La", with_alpha(COLOURS.convert("L"))), ("HSV", COLOURS), ("YCbCr", COLOURS)],
)
def test_a_mode_without_a_file_format_is_converted_and_not_clipped(mode, same_as):
    through_alpha = same_as.convert(mode)
    np.testing.assert_allclose(pixels(through_alpha), pixels(same_as), atol=6)


@pytest.mark.parametrize("options", [{"transparency": 3}, {"transparency": bytes(range(256))}])
def test_the_transparent_colours_of_a_palette_stay(tmp_path, options):
    COLOURS.quantize(200).save(tmp_path / "a.png", **options)
    np.testing.assert_array_equal(pixels(Image.open(tmp_path / "a.png")), pixels(tmp_path / "a.png"))
    assert (pixels(tmp_path / "a.png") == 255).all(axis=-1).any()


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_picture_is_turned_upright_once_and_keeps_its_profile(tmp_path, suffix, loaded):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    COLOURS.save(
        tmp_path / f"a{suffix}", exif=exif, icc_profile=profile, **({"lossless": True} if suffix == ".webp" else {})
    )
    opened = Image.open(tmp_path / f"a{suffix}")
    if loaded:
        opened.load()
    assert pixels(opened).shape == (64, 48, 3)
    np.testing.assert_array_equal(pixels(opened), pixels(tmp_path / f"a{suffix}"))
    assert Image.open(BytesIO(read_image(opened).content)).info["icc_profile"] == profile


def test_damaged_exif_data_do_not_prevent_sending_a_picture():
    file = BytesIO()
    COLOURS.save(file, "JPEG", exif=b"Exif\0\0rubbish that is no TIFF header", quality=100)
    np.testing.assert_allclose(pixels(Image.open(BytesIO(file.getvalue()))), pixels(file.getvalue()))


def test_an_open_file_is_sent_from_its_start(tmp_path):
    COLOURS.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    file = BytesIO()
    COLOURS.save(file, "PNG")
    for opened in (file, (tmp_path / "a.png").open("rb")):
        with opened:
            opened.seek(20)
            assert read_image(opened).content == content
            assert read_image(opened).content == content


def test_a_stream_that_cannot_be_rewound_is_read_from_where_it_is():
    class Pipe(BytesIO):
        def seekable(self):
            return False

    assert read_image(Pipe(b"the rest")).content == b"the rest"
