"""Decode bytes to an upright RGB image, within limits; without I/O.

The first bytes select one decoder from the list below; no other one is tried. The list excludes formats that run a
program (EPS), vector formats (SVG, PDF, WMF), formats whose header hides other sizes (ICO, ICNS) and rare formats.
Pillow's plugin classes are used directly, because ``Image.open`` uses a process-wide registry and the process-wide
limit ``MAX_IMAGE_PIXELS``.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import lru_cache
from io import BytesIO
from types import MappingProxyType
from typing import cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from app.errors import DeixisError, ImageTooLargeError, NotAnImageError
from app.images.containers import possible_ends, without_metadata
from app.images.formats import ImageFormat, accepted_formats, recognise

MAX_ASPECT = 50
"""Maximum ratio of the sides; longer images are cropped around the centre.

Resizing the shorter side to 224 pixels would turn an allowed 1 x 50,000 image into 224 x 11,200,000 pixels.
"""

MAX_JPEG_SCANS = 50
"""A progressive JPEG has about ten scans. Each one takes a pass over all pixels, and 75 bytes can cover 50 MP."""


def _open_heif(file: BytesIO) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # noqa: PLC0415 - an optional dependency

    return cast("ImageFile.ImageFile", HeifImageFile(file))


_OPEN: Mapping[str, Callable[[BytesIO], ImageFile.ImageFile]] = MappingProxyType(
    {
        "JPEG": JpegImageFile,
        "PNG": PngImageFile,
        "WebP": WebPImageFile,
        "GIF": GifImageFile,
        "BMP": BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "PPM": PpmImageFile,
        "AVIF": AvifImageFile,
        "HEIF": _open_heif,
    }
)
"""The function that opens a file of each format of ``app.images.formats``."""

_PILLOW_MODULES = re.compile(r"PIL\.")

_TURN_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    data: bytes | memoryview, *, max_bytes: int, max_pixels: int, target_px: int | None = None
) -> Image.Image:
    """Return the image in ``data``: mode RGB, upright, in sRGB, composited over white, without metadata.

    The first frame of an animation is decoded. 16-bit channels are scaled to 8 bits. 32-bit grey values are unchanged
    within 0..255, scaled from 0..1 if they are floating point within that range, scaled from 0..65535 if they are
    integers within that range, and otherwise stretched from the smallest to the largest value. Images with a ratio
    above ``MAX_ASPECT`` are cropped. A damaged JPEG with a complete end may be partly grey. Metadata that is damaged or
    too large is ignored, and an end marker may be missing if no pixel is.

    Args:
        data: a complete file.
        max_bytes: maximum size of the file.
        max_pixels: maximum width times height; compared with the header before any pixel is decoded.
        target_px: the size that the shorter side will be resized to, at least 1. A JPEG may then be decoded at 1/2, 1/4
            or 1/8 of its size, and an image with a colour profile may be reduced; the shorter side stays at least twice
            as large as this.

    Raises:
        ImageTooLargeError: the image exceeds a limit or the available memory.
        NotAnImageError: the format is not supported, or the file is damaged or truncated.
    """
    size_bytes = memoryview(data).nbytes
    if not size_bytes:
        raise NotAnImageError(f"the image is empty (0 bytes); accepted formats: {accepted_formats()}")
    if size_bytes > max_bytes:
        raise ImageTooLargeError(
            f"the image has {size_bytes:,} bytes and the limit is {max_bytes:,}; "
            "send a smaller file, or raise DEIXIS_MAX_IMAGE_BYTES"
        )
    content = bytes(data)
    image_format = recognise(content)
    content = without_metadata(image_format.name, content)
    _make_pillow_strict()
    try:
        return _decoded_at_its_end(image_format, content, max_pixels, target_px)
    except DeixisError:
        raise
    except Image.DecompressionBombError as error:  # a frame is larger than the header says
        raise ImageTooLargeError(
            f"the {image_format.name} image has too many pixels ({_reason(error)}) and the limit is {max_pixels:,}; "
            "send a smaller image, or raise DEIXIS_MAX_IMAGE_PIXELS"
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(
            f"the {image_format.name} image needs more memory than is available; send a smaller image"
        ) from error
    except Exception as error:  # decoders raise errors of any type for hostile bytes
        raise NotAnImageError(
            f"the {image_format.name} image is damaged, truncated or of an unsupported kind ({_reason(error)}); "
            "check that the complete file was sent, or save it as a baseline JPEG or PNG"
        ) from error


def _decoded_at_its_end(
    image_format: ImageFormat, content: bytes, max_pixels: int, target_px: int | None
) -> Image.Image:
    files = possible_ends(content) if image_format.name == "JPEG" else ()
    first, *others = [_decoded(image_format, file, max_pixels, target_px) for file in files or (content,)]
    if any(first.tobytes() != other.tobytes() for other in others):
        raise OSError("image file is truncated")
    return first


def _decoded(image_format: ImageFormat, content: bytes, max_pixels: int, target_px: int | None) -> Image.Image:
    with closing(_OPEN[image_format.name](BytesIO(content))) as image:
        _check_pixels(image, max_pixels)
        _check_decoding_cost(image, content)
        if target_px is not None and isinstance(image, JpegImageFile):
            _decode_smaller(image, target_px)
        image.load()
        _check_pixels(image, max_pixels)  # the true size of a HEIF is only known now
        return _turn_upright(_to_rgb(_crop_to_max_aspect(image), target_px), _orientation(image))


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
    return "".join(c for c in text if c.isprintable())[:200]


def _make_pillow_strict() -> None:
    """Set Pillow's process-wide options.

    This happens for each image, because another package may change them. Each option has only one value here, so
    threads cannot interfere. Warnings are ignored, not caught: ``warnings.catch_warnings`` is not thread-safe, and
    Python keeps every distinct warning in memory, whose text the file can choose.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # Pillow's own reader decodes the image once for each offset in a TIFF; libtiff uses the dimensions.
    TiffImagePlugin.READ_LIBTIFF = True
    muted = ("ignore", None, Warning, _PILLOW_MODULES, 0)
    if muted not in warnings.filters:
        warnings.filterwarnings("ignore", category=Warning, module=_PILLOW_MODULES.pattern)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded completely, even if only a part is visible
        width, height = max(width, _tag(image, 322)), max(height, _tag(image, 323))
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height:,} pixels and the limit is {max_pixels:,}; "
            "send a smaller image, or raise DEIXIS_MAX_IMAGE_PIXELS"
        )


def _tag(image: TiffImagePlugin.TiffImageFile, number: int) -> int:
    value = image.tag_v2.get(number, 0)
    return value if isinstance(value, int) else 0


def _check_decoding_cost(image: ImageFile.ImageFile, content: bytes) -> None:
    """Refuse images whose decoding takes much longer than their size suggests."""
    if isinstance(image, JpegImageFile):
        # In coded pixels 0xFF is always followed by 0x00 or a marker, so this counts almost only scans.
        scans = content.count(b"\xff\xda")
        if scans > MAX_JPEG_SCANS:
            raise NotAnImageError(
                f"the JPEG image has {scans} scans and the limit is {MAX_JPEG_SCANS}; save it as baseline JPEG"
            )
    slow = sorted({tile[0] for tile in image.tile} & Image.DECODERS.keys())
    if slow:  # decoders in Python are 50 to 100 times slower and hold the GIL
        raise NotAnImageError(
            f"the {image.format} image has the encoding '{slow[0]}', which is too slow to decode; save it as PNG"
        )


def _decode_smaller(image: JpegImageFile, target_px: int) -> None:
    # The orientation does not matter: turning an image does not change its shorter side.
    min_px = 2 * target_px
    if min(image.size) // min_px >= 2:
        image.draft(None, (min_px, min_px))


def _crop_to_max_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    kept_width, kept_height = min(width, longest), min(height, longest)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if it is missing or invalid; TIFF and HEIF are already upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken metadata does not make the pixels unusable
        return 1
    return orientation if isinstance(orientation, int) else 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURN_BY_ORIENTATION.get(orientation)
    image = image if turn is None else image.transpose(turn)
    image.info = {}
    return image


def _to_rgb(image: Image.Image, target_px: int | None) -> Image.Image:
    """Return a new RGB image in sRGB, composited over white."""
    profile = image.info.get("icc_profile")
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile, target_px)
    is_grey = image.mode in {"1", "L", "LA", "La"}
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    colours = _to_srgb(rgba.getchannel(0) if is_grey else rgba.convert("RGB"), profile)
    white = Image.new("RGB", rgba.size, "white")
    white.paste(colours, mask=rgba.getchannel("A"))
    return white


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits as L, or as LA if one of its values means transparent."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow does for 16-bit colour
    else:
        grey = _stretch(values, whole=image.mode == "I")
    eight_bit = Image.fromarray(grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight_bit.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return eight_bit


def _stretch(values: np.ndarray, *, whole: bool) -> np.ndarray:
    # Row by row, so that the float64 values never exist for the whole image.
    lows, highs = zip(*(_range(row) for row in values), strict=True)
    low, high = min(lows), max(highs)
    if low < 0 or high > (65535 if whole else 255):
        bottom, top = low, high
    elif whole:
        bottom, top = 0.0, 255.0 if high <= 255 else 65535.0
    else:
        bottom, top = 0.0, 1.0 if high <= 1 else 255.0
    stretched = np.empty(values.shape, dtype=np.uint8)
    for row, target in zip(values, stretched, strict=True):
        finite = np.where(np.isfinite(row), row, low).astype(np.float64)
        target[:] = np.rint((finite - bottom) / max(top - bottom, 1e-300) * 255)
    return stretched


def _range(row: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value; (0, 0) without finite values."""
    finite = row[np.isfinite(row)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _to_srgb(image: Image.Image, profile: bytes | None, target_px: int | None = None) -> Image.Image:
    """Return a new RGB image, converted with its colour profile if that differs from sRGB."""
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "LAB" or (profile and not (image.mode == "RGB" and _is_srgb(profile))):
        # lcms takes 24 ns per pixel, so large images are reduced first, as in _decode_smaller.
        factor = min(image.size) // (2 * target_px) if target_px else 1
        try:
            transform = _transform(profile, image.mode)
            return transform.apply(image.reduce(factor) if factor > 1 else image)
        except Exception:  # noqa: BLE001,S110 - a broken profile does not make the pixels unusable
            pass
    return image.convert("RGB")


def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _is_srgb(profile: bytes) -> bool:
    # Building a transform takes 4 ms. Most images have one of a few small profiles, so only those are cached.
    return _keeps_colours(profile) if len(profile) <= 65536 else _keeps_colours.__wrapped__(profile)


@lru_cache(maxsize=64)
def _keeps_colours(profile: bytes) -> bool:
    """Return whether a profile changes none of 216 colours by more than 3; profile names are not reliable."""
    steps = np.linspace(0, 255, 6)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3).astype(np.uint8)
    try:
        changed = np.asarray(_transform(profile, "RGB").apply(Image.fromarray(cube)))
    except Exception:  # noqa: BLE001 - an invalid profile is ignored
        return True
    return bool(np.abs(changed.astype(np.int16) - cube).max() <= 3)
