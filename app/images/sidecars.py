"""Sidecar files with the labels of an image: JSON, or keywords in an XMP packet; written atomically."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.images.xmp import XmpError, XmpPacket
from app.runtime.atomic_files import replace_content
from app.runtime.regular_files import FileTooLargeError, NotRegularFileError, read_regular

_MAX_BYTES = 16 * 1024 * 1024


class ForeignSidecarError(Exception):
    """A file with the name of the sidecar is not a sidecar; it is not changed."""


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """The labels of an image, and what they were computed from.

    Args:
        sha256: of the image file, hexadecimal.
        question: the request, with the model and the version of the label set; an image is classified again if it
            changes.
        predictions: label, score and similarity, best first.
        rejected: whether the image was rejected as an unknown class; None without rejection.
        prediction_set: the labels that contain the true one with the requested coverage; None without coverage.
        labelled_at: ISO 8601, UTC.
        version: of Deixis.
        labels: those that reach their threshold, where an image may have several; None elsewhere.
        path: the labels from a root of the hierarchy, with scores, empty if none fits; None without a hierarchy.
    """

    sha256: str
    question: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    rejected: bool | None
    prediction_set: Sequence[str] | None
    labelled_at: str
    version: str
    labels: Sequence[str] | None = None
    path: Sequence[Mapping[str, Any]] | None = None

    def keywords(self, min_score: float) -> list[str]:
        """Return the labels with at least this score, or the path of them; none for a rejected image.

        An image that may have several labels has those that reach their own threshold.
        """
        if self.labels is not None:
            return list(self.labels)
        if self.rejected:
            return []
        if self.path is not None:
            levels = [step["label"] for step in self.path if step["score"] >= min_score]
            return ["|".join(levels)] if levels else []
        return [prediction["label"] for prediction in self.predictions if prediction["score"] >= min_score]


def sha256_of(content: bytes) -> str:
    """Return the hash that identifies an image file."""
    return hashlib.sha256(content).hexdigest()


def question_key(question: Mapping[str, Any]) -> str:
    """Return a hash that identifies a request."""
    return sha256_of(json.dumps(question, sort_keys=True).encode())[:16]


class JsonSidecar:
    """A file ``NAME.EXT.json`` next to the image."""

    suffix = ".json"
    options: Mapping[str, str] = MappingProxyType({})
    """What determines the content, beside the request."""

    @staticmethod
    def read_key(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the request's key of a sidecar; None if it does not exist.

        Raises:
            ForeignSidecarError: the file is not a sidecar.
        """
        try:
            content = _read(file)
            if content is None:
                return None
            found = json.loads(content)
            return found["sha256"], question_key(found["question"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ForeignSidecarError(f"{file} was not written by Deixis; move it to another folder") from error

    @staticmethod
    def write(file: Path, record: LabelRecord, min_score: float) -> None:
        """Write all predictions; ``min_score`` is not used."""
        del min_score
        replace_content(file, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


class XmpSidecar:
    """A file ``NAME.EXT.xmp`` next to the image with labels as keywords; keeps other content.

    Args:
        prefix: the keyword below which the labels are, such as ``Deixis`` or ``Automatic|Deixis``.
    """

    suffix = ".xmp"

    def __init__(self, prefix: str | None = None) -> None:
        self._prefix = f"{prefix}|" if prefix else ""
        self.options: Mapping[str, str] = {"subject_prefix": prefix} if prefix else {}

    @staticmethod
    def read_key(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the request's key of our keywords; None if the file has none.

        Raises:
            ForeignSidecarError: the file is not XMP.
        """
        packet = _read_xmp(file)
        image, question = packet.read_own("image"), packet.read_own("question")
        return None if image is None or question is None else (image, question)

    def write(self, file: Path, record: LabelRecord, min_score: float) -> None:
        """Replace the keywords that we wrote before; everything else in the file stays as it is.

        Raises:
            ForeignSidecarError: the file has keywords in a form that is not understood.
        """
        try:
            keywords = [f"{self._prefix}{label}" for label in record.keywords(min_score)]
            content = _read_xmp(file).replace_keywords(keywords, record.sha256, question_key(record.question))
        except XmpError as error:
            raise _foreign_xmp(file, error) from error
        replace_content(file, content)


def _read(file: Path) -> bytes | None:
    """Return the content of a sidecar; None if it does not exist.

    Raises:
        ForeignSidecarError: it is larger than any sidecar, or not a regular file.
    """
    try:
        return read_regular(file, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except (FileTooLargeError, NotRegularFileError) as error:
        raise ForeignSidecarError(f"{file} cannot be a sidecar: {error.strerror}; move it to another folder") from error


def _read_xmp(file: Path) -> XmpPacket:
    try:
        return XmpPacket(_read(file))
    except XmpError as error:
        raise _foreign_xmp(file, error) from error


def _foreign_xmp(file: Path, error: XmpError) -> ForeignSidecarError:
    return ForeignSidecarError(f"{file} is not an XMP sidecar that can be changed: {error}; move it to another folder")
