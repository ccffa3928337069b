"""What is written beside an image about its labels: JSON, or keywords in an XMP packet; whole or not at all."""

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
# Of our own properties: which image and question the keywords are of, and which of them are ours.
_OURS = "urn:deixis:xmp:1.0/"
_PREFIXES = {"x": _META, "rdf": _RDF, "dc": _DC, "deixis": _OURS}
_MAX_XMP_BYTES = 16 * 1024 * 1024


class ForeignSidecarError(Exception):
    """There is a file in the sidecar's place that cannot be read as one; it is left as it is."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """What an image was labelled with.

    Args:
        sha256: of the image file, hexadecimal.
        question: what was asked, with the model and the version of the label set, so that another question is asked
            again.
        predictions: label, score and similarity, best first.
        rejected: whether it is none of the labels; None where that was not asked.
        prediction_set: labels that the true one is among as often as was asked; None where that was not.
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
        """Return the labels with at least this score; none where the image was rejected."""
        return [] if self.rejected else [each["label"] for each in self.predictions if each["score"] >= min_score]


def sha256_of(content: bytes) -> str:
    """Return the hash by which an image is known again."""
    return hashlib.sha256(content).hexdigest()


def question_key(question: Mapping[str, Any]) -> str:
    """Return a text that two questions share only if they are the same."""
    return sha256_of(json.dumps(question, sort_keys=True).encode())[:16]


class JsonSidecar:
    """``NAME.EXT.json`` beside the image."""

    suffix = ".json"

    @staticmethod
    def key_of(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the question's key that a sidecar is about; None where there is none.

        Raises:
            ForeignSidecarError: another file is in its place.
        """
        try:
            found = json.loads(file.read_bytes())
            return found["sha256"], question_key(found["question"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ForeignSidecarError(f"{file} is not by Deixis; move it away") from error

    @staticmethod
    def write(file: Path, labelled: Labelled, min_score: float) -> None:
        """Write it; every prediction is in it, whatever its score."""
        del min_score
        write_atomically(file, json.dumps(asdict(labelled), indent=2, ensure_ascii=False) + "\n")


class XmpSidecar:
    """``NAME.EXT.xmp`` beside the image, with labels as keywords (``dc:subject``); what others wrote in it stays."""

    suffix = ".xmp"

    @staticmethod
    def key_of(file: Path) -> tuple[str, str] | None:
        """Return the image's hash and the question's key that our keywords are of; None where there are none of ours.

        Raises:
            ForeignSidecarError: it is no XMP.
        """
        found = _read_xmp(file)
        if found is None:
            return None
        image, question = (_description(found).findtext(f"{{{_OURS}}}{name}") for name in ("image", "question"))
        return None if image is None or question is None else (image, question)

    @staticmethod
    def write(file: Path, labelled: Labelled, min_score: float) -> None:
        """Write keywords: those that we wrote before are replaced, those of others stay."""
        root = _read_xmp(file)
        if root is None:
            root = ElementTree.Element(f"{{{_META}}}xmpmeta")
            rdf = ElementTree.SubElement(root, f"{{{_RDF}}}RDF")
            ElementTree.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
        place = _description(root)
        ours = labelled.keywords(min_score)
        before = set(_bag(place, f"{{{_OURS}}}keywords"))
        kept = [each for each in _bag(place, f"{{{_DC}}}subject") if each not in before]
        _set_bag(place, f"{{{_DC}}}subject", [*kept, *(each for each in ours if each not in kept)])
        # Not what was there already: that is somebody else's.
        _set_bag(place, f"{{{_OURS}}}keywords", [each for each in ours if each not in kept])
        for name, value in (("image", labelled.sha256), ("question", question_key(labelled.question))):
            element = place.find(f"{{{_OURS}}}{name}")
            if element is None:
                element = ElementTree.SubElement(place, f"{{{_OURS}}}{name}")
            element.text = value
        packet = ElementTree.tostring(root, encoding="unicode")
        write_atomically(
            file, f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{packet}\n<?xpacket end="w"?>\n'
        )


def _read_xmp(file: Path) -> ElementTree.Element | None:
    try:
        if file.stat().st_size > _MAX_XMP_BYTES:
            raise ForeignSidecarError(f"{file} is larger than any XMP sidecar; move it away")
        with file.open("rb") as opened:
            spaces = [each for _, each in defusedxml.ElementTree.iterparse(opened, events=("start-ns",))]
        # So that prefixes stay what they are; those of the form ns0 are the library's own.
        for prefix, uri in [*spaces, *_PREFIXES.items()]:
            if not prefix.startswith("ns"):
                ElementTree.register_namespace(prefix, uri)
        root: ElementTree.Element = defusedxml.ElementTree.fromstring(file.read_bytes())
    except FileNotFoundError:
        for prefix, uri in _PREFIXES.items():
            ElementTree.register_namespace(prefix, uri)
        return None
    except (ElementTree.ParseError, defusedxml.DefusedXmlException, ValueError) as error:
        raise ForeignSidecarError(f"{file} is no XMP sidecar that can be read; move it away") from error
    if root.find(f".//{{{_RDF}}}RDF") is None and root.tag != f"{{{_RDF}}}RDF":
        raise ForeignSidecarError(f"{file} is no XMP sidecar; move it away")
    return root


def _description(root: ElementTree.Element) -> ElementTree.Element:
    """Return where our properties go: the first description, which is made where there is none."""
    rdf = root if root.tag == f"{{{_RDF}}}RDF" else root.find(f".//{{{_RDF}}}RDF")
    assert rdf is not None
    found = rdf.find(f"{{{_RDF}}}Description")
    if found is None:
        found = ElementTree.SubElement(rdf, f"{{{_RDF}}}Description", {f"{{{_RDF}}}about": ""})
    return found


def _bag(place: ElementTree.Element, tag: str) -> list[str]:
    return [each.text or "" for each in place.findall(f"{tag}/*/{{{_RDF}}}li")]


def _set_bag(place: ElementTree.Element, tag: str, values: Sequence[str]) -> None:
    for old in place.findall(tag):
        place.remove(old)
    if values:
        bag = ElementTree.SubElement(ElementTree.SubElement(place, tag), f"{{{_RDF}}}Bag")
        for value in values:
            ElementTree.SubElement(bag, f"{{{_RDF}}}li").text = value
