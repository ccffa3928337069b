"""The supported image formats: their suffixes, and how their first bytes are recognised."""

import codecs
import re
from dataclasses import dataclass
from importlib.util import find_spec

from app.errors import NotAnImageError
from deixis.extras import needs_extra


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """A supported format; ``feature`` is the optional part of Pillow that it needs."""

    name: str
    suffixes: tuple[str, ...]
    feature: str | None = None

    @property
    def available(self) -> bool:
        """Whether this installation can decode it."""
        if self.name == "HEIF":
            return find_spec("pillow_heif") is not None
        if self.feature is None:
            return True
        from PIL import features  # noqa: PLC0415 - the help of commands needs no images

        return bool(features.check(self.feature))


_FORMATS = (
    # A multi-picture file (MPO, from phones and stereo cameras) is a sequence of JPEGs; the first one is decoded.
    ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    ImageFormat("PNG", (".png", ".apng")),
    ImageFormat("WebP", (".webp",), "webp"),
    ImageFormat("GIF", (".gif",)),
    ImageFormat("BMP", (".bmp",)),
    ImageFormat("TIFF", (".tif", ".tiff")),
    # Binary PGM and PPM are formats of research data sets such as GTSRB.
    ImageFormat("PPM", (".ppm", ".pgm", ".pnm")),
    ImageFormat("AVIF", (".avif",), "avif"),
    ImageFormat("HEIF", (".heic", ".heif", ".hif")),
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
_STILL_BRANDS = frozenset({b"mif1", b"msf1"})  # of any codec, which another brand usually names

# Data that clients send by mistake, so that the error can say so.
_COMMON_MISTAKES = (
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


def supported_formats() -> tuple[str, ...]:
    """Return the names of the formats that this installation can decode."""
    return tuple(image_format.name for image_format in _FORMATS if image_format.available)


def supported_suffixes() -> frozenset[str]:
    """Return the file name suffixes of the supported formats, in lower case and with the dot."""
    return frozenset(suffix for image_format in _FORMATS if image_format.available for suffix in image_format.suffixes)


def accepted_formats() -> str:
    """Return the names of the supported formats for a message."""
    return ", ".join(supported_formats())


def is_image(content: bytes) -> bool:
    """Return whether data begin as a file of a supported format does."""
    return _format_name(content[:256]) is not None


def check_signature(head: bytes) -> None:
    """Check that the first bytes of a file are those of an image.

    Raises:
        NotAnImageError: they are not.
    """
    if _format_name(head[:256]) is None:
        raise NotAnImageError(f"the data {_describe(head)}; accepted formats: {accepted_formats()}")


def recognise(content: bytes) -> ImageFormat:
    """Return the format of a file.

    Raises:
        NotAnImageError: it is not an image, or this installation cannot decode its format.
    """
    check_signature(content)
    name = _format_name(content[:256])
    found = next(image_format for image_format in _FORMATS if image_format.name == name)
    if not found.available:
        reason = (
            needs_extra(found.name, "heif")
            if found.name == "HEIF"
            else f"this service was installed without {found.name}"
        )
        raise NotAnImageError(f"{reason}; or send one of: {accepted_formats()}")
    return found


def _describe(content: bytes) -> str:
    head = content[:1024].removeprefix(codecs.BOM_UTF8)
    for name, first in _COMMON_MISTAKES:
        if re.match(first, head, re.DOTALL | re.IGNORECASE):
            return f"looks like {name}"
    text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(head)
    if all(c.isprintable() or c.isspace() for c in text) and "\ufffd" not in text:
        return "looks like text"
    return f"begins with the bytes {content[:8].hex(' ')}"


def _format_name(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":  # ISO media: the brands distinguish images from videos
        box = head[: int.from_bytes(head[:4])]
        brands = [box[start : start + 4] for start in (8, *range(16, len(box) - 3, 4))]
        for brand in brands:
            if brand in _AVIF_BRANDS:
                return "AVIF"
            if brand in _HEVC_BRANDS:
                return "HEIF"
        return "HEIF" if _STILL_BRANDS.intersection(brands) else None
    return next((name for name, first in _SIGNATURES if re.match(first, head, re.DOTALL)), None)
