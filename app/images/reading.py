"""Reading an image file that somebody has named; its kind, size and first bytes are checked before its content."""

from pathlib import Path

from app.errors import ClientError
from app.images.formats import check_signature
from app.runtime.regular_files import FileTooLargeError, read_regular


class UnreadableFileError(Exception):
    """A file that cannot be read, or is no image; the message is the reason. The cause may be an ``OSError``."""


def read_image_file(file: Path, max_bytes: int) -> bytes:
    """Return the content of an image file.

    Large files that do not begin like an image are not read to the end. Others are left to the decoder.

    Raises:
        UnreadableFileError: it cannot be read, is not a regular file, is too large, or is no image.
    """
    try:
        return read_regular(file, max_bytes, check_signature)
    except FileTooLargeError as error:
        raise UnreadableFileError(f"{error.strerror}; raise DEIXIS_MAX_IMAGE_BYTES") from None
    except ClientError as error:
        raise UnreadableFileError(error.message) from None
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL character
        raise UnreadableFileError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
