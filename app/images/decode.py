"""Bytes to an upright RGB picture, within limits; no I/O, and never a URL.

The first bytes choose one decoder from the list below and no other is tried. The list leaves out formats that run a
program (EPS), draw (SVG, PDF, WMF), hide other sizes behind a small header (ICO, ICNS) or are hardly sent by anybody.
Pillow's plugin classes are built directly, because ``Image.open`` consults a process-wide registry and warns by the
process-wide ``MAX_IMAGE_PIXELS`` instead of by the caller's limit.
"""

import codecs
import re
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from typing import cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from app.errors import DeixisError, ImageTooLargeError, NotAnImageError

MAX_ASPECT = 50
"""Longer pictures are cut to this many times their shorter side, around the middle.

A transform that brings the shorter side to 224 pixels would make 224 x 11,200,000 out of a lawful 1 x 50,000.
"""

MAX_JPEG_SCANS = 50
"""A progressive JPEG has about ten scans. Each costs a pass over all pixels, and one of 75 bytes can cover 50 MP."""


def _open_heif(file: BytesIO) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # noqa: PLC0415 - an extra that may be absent

    return cast("ImageFile.ImageFile", HeifImageFile(file))


@dataclass(frozen=True, slots=True)
class _Format:
    """A format on the allow-list; ``feature`` names the part of Pillow that a build may lack."""

    name: str
    media_type: str
    suffixes: tuple[str, ...]
    open: Callable[[BytesIO], ImageFile.ImageFile]
    feature: str | None = None

    @property
    def available(self) -> bool:
        if self.name == "HEIF":
            return find_spec("pillow_heif") is not None
        return self.feature is None or bool(features.check(self.feature))


_FORMATS = (
    # A multi-picture file (MPO, from phones and stereo cameras) is a JPEG with more JPEGs behind it: the first is read.
    _Format("JPEG", "image/jpeg", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), JpegImageFile),
    _Format("PNG", "image/png", (".png", ".apng"), PngImageFile),
    _Format("WebP", "image/webp", (".webp",), WebPImageFile, "webp"),
    _Format("GIF", "image/gif", (".gif",), GifImageFile),
    _Format("BMP", "image/bmp", (".bmp",), BmpImageFile),
    _Format("TIFF", "image/tiff", (".tif", ".tiff"), TiffImagePlugin.TiffImageFile),
    # Binary PGM and PPM: research data sets (GTSRB, for one) come as these.
    _Format("PPM", "image/x-portable-anymap", (".ppm", ".pgm", ".pnm"), PpmImageFile),
    _Format("AVIF", "image/avif", (".avif",), AvifImageFile, "avif"),
    _Format("HEIF", "image/heif", (".heic", ".heif", ".hif"), _open_heif),
)

_SIGNATURES = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WebP", rb"RIFF....WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("PPM", rb"P[56]\s"),
)

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEVC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_STILL_BRANDS = frozenset({b"mif1", b"msf1"})  # whatever it is coded in, which another brand tells as a rule

# What callers send by mistake, so that the refusal can say so.
_LOOK_ALIKES = (
    ("a PDF document", rb"%PDF"),
    ("a PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("a ZIP archive (or an Office document)", rb"PK[\x03\x05\x07]"),
    ("gzip-compressed data", rb"\x1f\x8b"),
    ("an HTML page", rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)\b"),
    ("an SVG drawing", rb"\s*(<[?!].*)?<svg[\s>]"),
    ("an XML document", rb"\s*<\?xml"),
    ("an MP4 or QuickTime video", rb".{4}(ftyp|moov|mdat)"),
    ("a Matroska or WebM video", rb"\x1aE\xdf\xa3"),
    ("an AVI video", rb"RIFF....AVI "),
    ("a WAV sound", rb"RIFF....WAVE"),
    ("a Photoshop file", rb"8BPS"),
    ("a JPEG XL image", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("a JPEG 2000 image", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("a Windows icon", rb"\0\0[\x01\x02]\0"),
    ("a Git LFS pointer (fetch the file with `git lfs pull`)", rb"version https://git-lfs"),
    ("a data: URL (send what it encodes)", rb"data:"),
    ("a URL (send the image itself)", rb"https?://"),
    ("base64 text (decode it first)", rb"/9j/[A-Za-z0-9+/]|iVBORw0KGgo|R0lGOD[dl]|UklGR[A-Za-z0-9+/]"),
    ("a JSON document", rb"\s*[\[{]\s*[\"\[{\]}]"),
)

_PILLOW_MODULES = re.compile(r"PIL\.")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def supported_formats() -> tuple[str, ...]:
    """Return the names of the formats that this installation reads."""
    return tuple(known.name for known in _FORMATS if known.available)


def supported_suffixes() -> frozenset[str]:
    """Return the file name endings of the supported formats, in lower case and with their dot."""
    return frozenset(suffix for known in _FORMATS if known.available for suffix in known.suffixes)


def decode_image(
    data: bytes | memoryview, *, max_bytes: int, max_pixels: int, target_px: int | None = None
) -> Image.Image:
    """Return the picture in ``data``: mode RGB, upright, in sRGB, on white where transparent, without metadata.

    Of an animation the first frame is taken. 16-bit channels are divided by their range. 32-bit grey is taken as it
    is when within 0..255, as a fraction when it is floating point within 0..1, as 16-bit when it is whole numbers
    within 0..65535, and otherwise stretched from its least to its greatest value. Pictures longer than ``MAX_ASPECT``
    times their shorter side lose their ends. A JPEG with damage inside, its end in place, may come out partly grey.

    Args:
        data: a whole file.
        max_bytes: the most bytes that are looked at.
        max_pixels: the most pixels, width times height; compared with the header before any pixel is decoded.
        target_px: what the shorter side will be resized to, at least 1. A JPEG may then be decoded at 1/2, 1/4 or 1/8
            of its size, and a picture with a colour profile averaged down; the shorter side stays at least twice this.

    Raises:
        ImageTooLargeError: more bytes or pixels than the limits allow, or than there is memory for.
        NotAnImageError: no supported format, damaged, or cut short.
    """
    size_bytes = memoryview(data).nbytes
    if not size_bytes:
        raise NotAnImageError(f"the image is empty (0 bytes); accepted formats: {_accepted()}")
    if size_bytes > max_bytes:
        raise ImageTooLargeError(
            f"the image has {size_bytes:,} bytes and the limit is {max_bytes:,}; "
            "send a smaller file, or raise DEIXIS_MAX_IMAGE_BYTES"
        )
    content = bytes(data)
    recognised = _recognise(content)
    _make_pillow_strict()
    try:
        with closing(recognised.open(BytesIO(content))) as image:
            _check_pixels(image, max_pixels)
            _check_work(image, content)
            if target_px is not None and isinstance(image, JpegImageFile):
                _decode_smaller(image, target_px)
            image.load()
            _check_pixels(image, max_pixels)  # HEIF learns its true size only now
            return _upright(_to_rgb(_middle(image), target_px), _orientation(image))
    except DeixisError:
        raise
    except Image.DecompressionBombError as error:  # a frame that outgrows the header
        raise ImageTooLargeError(
            f"the {recognised.name} image has too many pixels ({_reason(error)}) and the limit is {max_pixels:,}; "
            "send a smaller picture, or raise DEIXIS_MAX_IMAGE_PIXELS"
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(
            f"the {recognised.name} image needs more memory to decode than there is; send a smaller picture"
        ) from error
    except Exception as error:  # hostile bytes raise whatever class a decoder's parser trips over
        raise NotAnImageError(
            f"the {recognised.name} image is damaged, cut short or of an unsupported kind ({_reason(error)}); "
            "check that the whole file was sent, or save it as a plain JPEG or PNG"
        ) from error


def _accepted() -> str:
    return ", ".join(supported_formats())


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
    return "".join(c for c in text if c.isprintable())[:200]


def _recognise(content: bytes) -> _Format:
    name = _format_name(content[:256])
    found = next((known for known in _FORMATS if known.name == name), None)
    if found is None:
        raise NotAnImageError(f"the data {_likeness(content)}; accepted formats: {_accepted()}")
    if not found.available:
        way_out = "`pip install 'deixis[heif]'`" if found.name == "HEIF" else f"install a Pillow with {found.name}"
        raise NotAnImageError(f"this installation does not read {found.name}; {way_out}, or send one of: {_accepted()}")
    return found


def _likeness(content: bytes) -> str:
    head = content[:1024].removeprefix(codecs.BOM_UTF8)
    for what, first in _LOOK_ALIKES:
        if re.match(first, head, re.DOTALL | re.IGNORECASE):
            return f"looks like {what}"
    text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(head)
    if all(c.isprintable() or c.isspace() for c in text) and "\ufffd" not in text:
        return "looks like text"
    return f"begins with the bytes {content[:8].hex(' ')}"


def _format_name(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":  # ISO media: the brands tell stills from films
        box = head[: int.from_bytes(head[:4])]
        brands = [box[start : start + 4] for start in (8, *range(16, len(box) - 3, 4))]
        for brand in brands:
            if brand in _AVIF_BRANDS:
                return "AVIF"
            if brand in _HEVC_BRANDS:
                return "HEIF"
        return "HEIF" if _STILL_BRANDS.intersection(brands) else None
    return next((name for name, first in _SIGNATURES if re.match(first, head, re.DOTALL)), None)


def _make_pillow_strict() -> None:
    """Put Pillow's process-wide switches where this module needs them.

    Each is only ever set to the one value, so that threads cannot disturb each other, and it is done for each picture
    because any other package may turn them. Warnings are muted, not caught: ``warnings.catch_warnings`` is not
    thread-safe, their text is chosen by whoever made the file, and Python remembers every distinct one for ever.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # Pillow's own strip reader repeats the picture once for each offset a TIFF lists; libtiff goes by the geometry.
    TiffImagePlugin.READ_LIBTIFF = True
    muted = ("ignore", None, Warning, _PILLOW_MODULES, 0)
    if muted not in warnings.filters:
        warnings.filterwarnings("ignore", category=Warning, module=_PILLOW_MODULES.pattern)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded whole, however little of it shows
        width, height = max(width, _tag(image, 322)), max(height, _tag(image, 323))
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} = {width * height:,} pixels and the limit is {max_pixels:,}; "
            "send a smaller picture, or raise DEIXIS_MAX_IMAGE_PIXELS"
        )


def _tag(image: TiffImagePlugin.TiffImageFile, number: int) -> int:
    value = image.tag_v2.get(number, 0)
    return value if isinstance(value, int) else 0


def _check_work(image: ImageFile.ImageFile, content: bytes) -> None:
    """Refuse what takes far longer to decode than its size tells."""
    if isinstance(image, JpegImageFile):
        # Within coded pixels 0xFF is always followed by 0x00 or a marker, so this counts scans and little else.
        scans = content.count(b"\xff\xda")
        if scans > MAX_JPEG_SCANS:
            raise NotAnImageError(
                f"the JPEG image has {scans} scans and at most {MAX_JPEG_SCANS} are decoded; save it as baseline JPEG"
            )
    slow = sorted({tile[0] for tile in image.tile} & Image.DECODERS.keys())
    if slow:  # written in Python: 50 to 100 times slower, and holding the interpreter
        raise NotAnImageError(
            f"the {image.format} image is coded as '{slow[0]}', which is too slow to decode; save it as PNG"
        )


def _decode_smaller(image: JpegImageFile, target_px: int) -> None:
    # Which way is up does not matter: the shorter side stays the shorter one when turned.
    kept_px = 2 * target_px
    if min(image.size) // kept_px >= 2:
        image.draft(None, (kept_px, kept_px))


def _middle(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    kept_width, kept_height = min(width, longest), min(height, longest)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 when there is none or it cannot be read; TIFF and HEIF are turned by then."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken metadata is no reason to refuse good pixels
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    image = image if turn is None else image.transpose(turn)
    image.info = {}
    return image


def _to_rgb(image: Image.Image, target_px: int | None) -> Image.Image:
    """Return a new RGB image: eight bits, in sRGB, composited over white."""
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
    """Return a grey image of 16 or 32 bits as L, or LA where one of its values means transparent."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = (values >> 8).astype(np.uint8)  # the high byte, as Pillow takes it from 16-bit colour
    else:
        grey = _stretched(values, whole=image.mode == "I")
    eight_bit = Image.fromarray(grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        eight_bit.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return eight_bit


def _stretched(values: np.ndarray, *, whole: bool) -> np.ndarray:
    # Row by row, so that the wider numbers of the arithmetic never exist for the whole picture.
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
    """Return the least and the greatest finite value; nothing but infinities and NaN counts as 0."""
    finite = row[np.isfinite(row)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _to_srgb(image: Image.Image, profile: bytes | None, target_px: int | None = None) -> Image.Image:
    """Return a new RGB image, by its colour profile where it has one that differs from sRGB."""
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "LAB" or (profile and not (image.mode == "RGB" and _is_srgb(profile))):
        # lcms takes 24 ns for each pixel, so large pictures are first brought down as a JPEG is in _decode_smaller.
        factor = min(image.size) // (2 * target_px) if target_px else 1
        try:
            transform = _transform(profile, image.mode)
            return transform.apply(image.reduce(factor) if factor > 1 else image)
        except Exception:  # noqa: BLE001,S110 - a broken profile is no reason to refuse good pixels
            pass
    return image.convert("RGB")


def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _is_srgb(profile: bytes) -> bool:
    # Building a transform takes 4 ms and the same few profiles come with most pictures; none of them is large.
    return _leaves_colours(profile) if len(profile) <= 65536 else _leaves_colours.__wrapped__(profile)


@lru_cache(maxsize=64)
def _leaves_colours(profile: bytes) -> bool:
    """Tell by 216 colours spread over the cube, because names of profiles tell little."""
    steps = np.linspace(0, 255, 6)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3).astype(np.uint8)
    try:
        changed = np.asarray(_transform(profile, "RGB").apply(Image.fromarray(cube)))
    except Exception:  # noqa: BLE001 - a profile that cannot be used is one to ignore
        return True
    return bool(np.abs(changed.astype(np.int16) - cube).max() <= 3)
