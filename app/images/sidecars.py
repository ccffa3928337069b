"""Sidecar files with the labels of an image: JSON, or keywords in an XMP packet; written atomically."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import defusedxml
import defusedxml.ElementTree

from app.runtime.atomic_files import write_atomically

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_META = "adobe:ns:meta/"
# Our own properties: the image and the request that the keywords belong to, and the keywords that we wrote.
_OURS = "urn:deixis:xmp:1.0/"
_PREFIXES = {"x": _META, "rdf": _RDF, "dc": _DC, "deixis": _OURS}
_MAX_XMP_BYTES = 16 * 1024 * 1024


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
    """

    sha256: str
    question: Mapping[str, Any]
    predictions: Sequence[Mapping[str, Any]]
    rejected: bool | None
    prediction_set: Sequence[str] | None
    labelled_at: str
    version: str

    def keywords(self, min_score: float) -> list[str]:
        """Return the labels with at least this score; none for a rejected image."""
        if self.rejected:
            return []
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

    @staticmethod
    def read_key(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the request's key of a sidecar; None if it does not exist.

        Raises:
            ForeignSidecarError: the file is not a sidecar.
        """
        try:
            found = json.loads(file.read_bytes())
            return found["sha256"], question_key(found["question"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ForeignSidecarError(f"{file} was not written by Deixis; move it to another folder") from error

    @staticmethod
    def write(file: Path, record: LabelRecord, min_score: float) -> None:
        """Write all predictions; ``min_score`` is not used."""
        del min_score
        write_atomically(file, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


class XmpSidecar:
    """A file ``NAME.EXT.xmp`` next to the image with labels as keywords (``dc:subject``); keeps other content."""

    suffix = ".xmp"

    @staticmethod
    def read_key(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the request's key of our keywords; None if the file has none.

        Raises:
            ForeignSidecarError: the file is not XMP.
        """
        found = _read_xmp(file)
        if found is None:
            return None
        image, question = (_description(found).findtext(f"{{{_OURS}}}{name}") for name in ("image", "question"))
        return None if image is None or question is None else (image, question)

    @staticmethod
    def write(file: Path, record: LabelRecord, min_score: float) -> None:
        """Replace the keywords that we wrote before; keywords of other programs are preserved."""
        root = _read_xmp(file)
        if root is None:
            root = ElementTree.Element(f"{{{_META}}}xmpmeta")
            rdf = ElementTree.SubElement(root, f"{{{_RDF}}}RDF")
            ElementTree.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
        description = _description(root)
        ours = record.keywords(min_score)
        before = set(_bag(description, f"{{{_OURS}}}keywords"))
        kept = [keyword for keyword in _bag(description, f"{{{_DC}}}subject") if keyword not in before]
        _set_bag(description, f"{{{_DC}}}subject", [*kept, *(keyword for keyword in ours if keyword not in kept)])
        # A keyword that was present before belongs to another program.
        _set_bag(description, f"{{{_OURS}}}keywords", [keyword for keyword in ours if keyword not in kept])
        for name, value in (("image", record.sha256), ("question", question_key(record.question))):
            element = description.find(f"{{{_OURS}}}{name}")
            if element is None:
                element = ElementTree.SubElement(description, f"{{{_OURS}}}{name}")
            element.text = value
        packet = ElementTree.tostring(root, encoding="unicode")
        write_atomically(
            file, f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{packet}\n<?xpacket end="w"?>\n'
        )


def _read_xmp(file: Path) -> ElementTree.Element | None:
    try:
        if file.stat().st_size > _MAX_XMP_BYTES:
            raise ForeignSidecarError(
                f"{file} has more than {_MAX_XMP_BYTES:,} bytes, the limit of a sidecar; move it to another folder"
            )
        with file.open("rb") as opened:
            namespaces = [namespace for _, namespace in defusedxml.ElementTree.iterparse(opened, events=("start-ns",))]
        # Preserves the prefixes of the file; the library reserves those of the form ns0.
        for prefix, uri in [*namespaces, *_PREFIXES.items()]:
            if not prefix.startswith("ns"):
                ElementTree.register_namespace(prefix, uri)
        root: ElementTree.Element = defusedxml.ElementTree.fromstring(file.read_bytes())
    except FileNotFoundError:
        for prefix, uri in _PREFIXES.items():
            ElementTree.register_namespace(prefix, uri)
        return None
    except (ElementTree.ParseError, defusedxml.DefusedXmlException, ValueError) as error:
        raise ForeignSidecarError(f"{file} cannot be read as an XMP sidecar; move it to another folder") from error
    if root.find(f".//{{{_RDF}}}RDF") is None and root.tag != f"{{{_RDF}}}RDF":
        raise ForeignSidecarError(f"{file} is not an XMP sidecar; move it to another folder")
    return root


def _description(root: ElementTree.Element) -> ElementTree.Element:
    """Return the first description, which contains our properties; create it if there is none."""
    rdf = root if root.tag == f"{{{_RDF}}}RDF" else root.find(f".//{{{_RDF}}}RDF")
    assert rdf is not None
    found = rdf.find(f"{{{_RDF}}}Description")
    if found is None:
        found = ElementTree.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
    return found


def _bag(description: ElementTree.Element, tag: str) -> list[str]:
    return [item.text or "" for item in description.findall(f"{tag}/*/{{{_RDF}}}li")]


def _set_bag(description: ElementTree.Element, tag: str, values: Sequence[str]) -> None:
    for old in description.findall(tag):
        description.remove(old)
    if values:
        bag = ElementTree.SubElement(ElementTree.SubElement(description, tag), f"{{{_RDF}}}Bag")
        for value in values:
            ElementTree.SubElement(bag, f"{{{_RDF}}}li").text = value
