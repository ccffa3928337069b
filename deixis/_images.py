"""Images in the forms that programs use, converted to what a request carries."""

import errno
import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union, cast

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ImageLike: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], "Image.Image", "np.ndarray[Any, Any]", "ImageId"
]
"""A path; an http(s) URL, if the service may fetch it; a data: URL; an encoded file as bytes or as an open file; or
pixels, as a Pillow image or an array of uint8, shape (height, width), (height, width, 3) in RGB or (height, width, 4)
in RGBA; or the id of an image that an earlier request sent."""

# The size of the largest request that a service accepts by default.
MAX_FILE_BYTES = 128 * 1024 * 1024

# The modes that PNG stores as they are, those that it stores after a conversion without loss, and those of TIFF. The
# service converts all of them to 8-bit RGB, in the same way as a file with the mode.
_PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})
_PNG_CONVERSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"La": ("LA",), "PA": ("RGBA",), "RGBa": ("RGBA",), "I;16B": ("I", "I;16"), "I;16L": ("I", "I;16")}
)
_TIFF_MODES = frozenset({"I", "F", "CMYK", "LAB"})
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Upload:
    """An encoded image file that is sent with a request."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """The address of an image that the service fetches, or a ``data:`` URL, which it decodes."""

    url: str


@dataclass(frozen=True, slots=True)
class ImageId:
    """The ``image_id`` of an image that an earlier request sent with ``keep_features``; only for ``classify``."""

    id: str


SentImage: TypeAlias = Upload | ImageUrl | ImageId
"""What is sent for an image."""


def read_image(image: ImageLike) -> SentImage:
    """Return what is sent for an image.

    Raises:
        OSError: a file cannot be read, is not a regular file, or has more than ``MAX_FILE_BYTES``.
        TypeError: the type is not one of ``ImageLike``.
        ValueError: an array of another data type or shape.
        ImportError: an array, and Pillow is not installed.
    """
    if isinstance(image, ImageId):
        return image
    if isinstance(image, str) and image[:80].lstrip().lower().startswith(("http://", "https://", "data:")):
        return ImageUrl(image)
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        # A name that is not UTF-8 cannot be part of a request.
        return Upload(os.fsencode(path.name).decode(errors="backslashreplace"), _read_file(path))
    if isinstance(image, bytes | bytearray | memoryview):
        return Upload("image", bytes(image))
    is_pillow = hasattr(image, "save") and hasattr(image, "getexif")
    if is_pillow or hasattr(image, "__array_interface__"):
        return _encoded(cast("Image.Image", image) if is_pillow else _pillow_image(image))
    if hasattr(image, "read"):
        return _read_open_file(image)
    raise TypeError(
        f"a {type(image).__name__} is not an image; pass a path, bytes, an open file, a Pillow image or an array"
    )


def _read_file(path: Path) -> bytes:
    """Return the content of a file. Pipes and devices, which may never end, and huge files are not read."""
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # opening a folder raises
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_FILE_BYTES:,} bytes, the limit of an image", str(path))
    return path.read_bytes()


def read_upload(image: ImageLike) -> Upload:
    """Return an encoded file, for the routes whose images the service does not fetch.

    Raises:
        ValueError: the image is a URL; and the errors of ``read_image``.
    """
    read = read_image(image)
    if isinstance(read, Upload):
        return read
    if isinstance(read, ImageId):
        raise TypeError("an ImageId can only be classified; pass the image itself")
    raise ValueError(
        f"'{read.url[:80]}' is a URL, which the service does not fetch for this request; pass the image itself"
    )


def _read_open_file(file: IO[bytes]) -> Upload:
    if hasattr(file, "seekable") and file.seekable():
        file.seek(0)  # another program may have read it
    content = file.read()
    if not isinstance(content, bytes):
        raise TypeError("the file is open as text; open it with mode 'rb'")
    name = getattr(file, "name", None)
    return Upload(Path(name).name if isinstance(name, str) else "image", content)


def _pillow_image(array: Any) -> "Image.Image":
    if array.dtype != "uint8":
        raise ValueError(f"an array of {array.dtype} is not an image; scale it to [0, 255] and convert it to uint8")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in {3, 4})) or 0 in array.shape:
        raise ValueError(
            f"an array of shape {array.shape} is not an image; the shape must be (height, width), (height, width, 3) or"
            " (height, width, 4)"
        )
    try:
        from PIL import Image  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ImportError("arrays are encoded by Pillow, which is not installed; run: pip install pillow") from error
    return Image.fromarray(array)


def _encoded(image: "Image.Image") -> Upload:
    """Return a picture as a file without loss, because only the service knows the range of its values."""
    image.load()  # turns some formats upright, and removes the orientation from their EXIF data
    options: dict[str, Any] = {"icc_profile": image.info.get("icc_profile"), "exif": _orientation(image)}
    for mode in _PNG_CONVERSIONS.get(image.mode, ()):
        image = image.convert(mode)
    file = io.BytesIO()
    if image.mode in _TIFF_MODES:
        image.save(file, "TIFF", compression="tiff_adobe_deflate", **options)
        return Upload("image.tif", file.getvalue())
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    # With little compression because that is faster.
    image.save(file, "PNG", compress_level=1, **options)
    return Upload("image.png", file.getvalue())


def _orientation(image: "Image.Image") -> Any:
    """Return EXIF data with the orientation alone; the rest may be damaged."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - broken metadata does not make the pixels unusable
        return b""
    only = type(exif)()
    if isinstance(orientation, int) and orientation in range(1, 9):
        only[_ORIENTATION] = orientation
    return only
