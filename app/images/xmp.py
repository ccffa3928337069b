"""Keywords in an XMP packet, changed in place: every other byte of the packet stays as it is.

A keyword may have levels, as in ``animal|cat``. ``dc:subject`` lists its last level, ``lr:hierarchicalSubject`` the
whole keyword, and ``digiKam:TagsList`` ``animal/cat``. Programs prefer one of the last two to ``dc:subject``; so if
another program wrote one of them, our keywords are added to it as well.

XMP is RDF/XML, which states the same keywords in many ways: the properties of an image may be divided over any number
of ``rdf:Description`` elements, be attributes of one, and use any prefix. A packet must not contain the property
``dc:subject`` twice, since programs then read none of its metadata. A form that is not understood is refused.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_LR = "http://ns.adobe.com/lightroom/1.0/"
_DIGIKAM = "http://www.digikam.org/ns/1.0/"
_XML = "http://www.w3.org/XML/1998/namespace"
# Our own properties: the image and the request that the keywords belong to, and the keywords that we wrote.
_OURS = "urn:deixis:xmp:1.0/"

_DESCRIPTION, _LI = (_RDF, "Description"), (_RDF, "li")
_CONTAINERS = {(_RDF, "Bag"), (_RDF, "Seq"), (_RDF, "Alt")}
_LANG, _RESOURCE, _VALUE = (_XML, "lang"), (_RDF, "resource"), (_RDF, "value")
# The resource that a top-level node describes; without a namespace in packets of the first releases of XMP.
_ABOUT = {(_RDF, "about"), ("", "about")}

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WITHOUT_BOM = ((b"<\0\0\0", "utf-32-le"), (b"\0\0\0<", "utf-32-be"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
_OTHER_ENCODINGS = re.compile(r"(?i)utf-?8|us-ascii|iso-8859-\d+|windows-125\d")
# Elements and attributes of a packet; a sidecar of a photograph has hundreds.
_MAX_SIZE = 50_000
_DECLARED = re.compile(rb"<\?xml\s[^>]*?encoding\s*=\s*[\"']([A-Za-z][\w.-]*)[\"']")
_START_TAG = re.compile(rb"<([^\s/>]+)((?:[^\"'>]|\"[^\"]*\"|'[^']*')*?)(/?)>")
_ATTRIBUTE = re.compile(rb"\s+([^\s=]+)\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EMPTY = '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n <rdf:RDF xmlns:rdf="{}">\n </rdf:RDF>\n</x:xmpmeta>'
_PACKET = f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{_EMPTY.format(_RDF)}\n<?xpacket end="w"?>\n'


@dataclass(frozen=True, slots=True)
class _KeywordList:
    """A property that lists keywords.

    Args:
        name: namespace and local name.
        own: our property that lists which of the values we wrote.
        prefix: of the namespace, where we add the property.
        container: of the values, where we add the property.
        separator: between the levels of a keyword; None lists the last level only.
    """

    name: tuple[str, str]
    own: tuple[str, str]
    prefix: str
    container: str
    separator: str | None

    @property
    def tag(self) -> str:
        """The qualified name, where we add the property."""
        return f"{self.prefix}:{self.name[1]}"

    def values(self, keywords: Iterable[Sequence[str]]) -> list[str]:
        """Return the values for keywords, each given by its levels."""
        if self.separator is None:
            return [levels[-1] for levels in keywords]
        return [self.separator.join(level.replace(self.separator, "-") for level in levels) for levels in keywords]


_SUBJECT = _KeywordList((_DC, "subject"), (_OURS, "keywords"), "dc", "Bag", None)
_HIERARCHY = _KeywordList((_LR, "hierarchicalSubject"), (_OURS, "hierarchy"), "lr", "Bag", "|")
_TAGS = _KeywordList((_DIGIKAM, "TagsList"), (_OURS, "tags"), "digiKam", "Seq", "/")
_LISTS = (_SUBJECT, _HIERARCHY, _TAGS)
_LIST_NAMES = frozenset(each.name for each in _LISTS)


class XmpError(Exception):
    """The file is not XMP, or XMP in a form that cannot be changed without a loss; the message is the reason."""


@dataclass(slots=True)
class _Element:
    """An element, with its place in the packet.

    Args:
        name: namespace and local name.
        tag: the start tag: the qualified name, the attributes and ``/`` of an empty element.
        attributes: their values; without namespace declarations.
        start: of the start tag.
        inner: the end of the start tag.
        inner_end: the start of the end tag.
        end: of the end tag.
    """

    name: tuple[str, str]
    tag: "re.Match[bytes]"
    attributes: dict[tuple[str, str], str]
    depth: int
    start: int
    inner: int
    inner_end: int = 0
    end: int = 0
    children: "list[_Element]" = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The character data, without that of children."""
        return "".join(self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether the element contains only text, perhaps with a language."""
        return not self.children and self.attributes.keys() <= {_LANG}

    @property
    def value(self) -> str:
        """The text; of a value with qualifiers, that of ``rdf:value``."""
        for each in (self, *self.children, *(grandchild for child in self.children for grandchild in child.children)):
            if each.name == _VALUE:
                return each.text
            if _VALUE in each.attributes:
                return each.attributes[_VALUE]
        return self.attributes.get(_RESOURCE, self.text)


@dataclass(frozen=True, slots=True)
class _Edit:
    start: int
    end: int
    new: bytes


class XmpPacket:
    """An XMP packet.

    Args:
        content: the file; None for a new packet.

    Raises:
        XmpError: the file is not XMP, or has a document type.
    """

    def __init__(self, content: bytes | None = None) -> None:
        self._bom, self._encoding, text = _decoded(_PACKET.encode() if content is None else content)
        self._data = text.encode()
        self._rdf = _parse(self._data)
        self._nodes = self._rdf.children
        abouts = {value for node in self._nodes for name, value in node.attributes.items() if name in _ABOUT}
        if len(abouts - {""}) > 1:
            raise XmpError("it describes several resources")
        if any((_RDF, name) in node.attributes for node in self._nodes for name in ("ID", "nodeID")):
            raise XmpError("it describes a part of a resource")
        self._about = max(abouts, default="")

    def read_own(self, name: str) -> str | None:
        """Return the value of our property ``image`` or ``question``; None if there is none."""
        for node in self._nodes:
            if (_OURS, name) in node.attributes:
                return node.attributes[_OURS, name]
            for child in node.children:
                if child.name == (_OURS, name):
                    return child.text
        return None

    def keywords(self) -> list[str]:
        """Return the keywords of all programs, without the levels above them.

        Raises:
            XmpError: their form is not understood.
        """
        return self._values(_SUBJECT)

    def _values(self, kind: _KeywordList) -> list[str]:
        values = [value for node in self._nodes for name, value in node.attributes.items() if name == kind.name]
        return values + [item.value for _, prop in self._elements(kind.name) for item in _items(prop)]

    def replace_keywords(self, keywords: Iterable[str], image: str, question: str) -> bytes:
        """Return the packet with these keywords instead of those that we wrote before, and our other properties.

        A keyword that another program wrote stays. Properties that occur twice are united.

        Args:
            keywords: with ``|`` between levels.
            image: the hash of the image.
            question: the key of the request.

        Raises:
            XmpError: the form of its keywords is not understood.
        """
        wanted = [_levels(_NOT_XML.sub("\ufffd", keyword)) for keyword in keywords]
        edits = _Edits(self._data)
        elements: list[tuple[_Element, _Element]] = []
        attributes: list[tuple[_Element, tuple[str, str]]] = []
        added: dict[_KeywordList, list[str]] = {}
        absent: dict[_KeywordList, Sequence[tuple[str, str | None]]] = {}
        expected: dict[_KeywordList, list[str]] = {}
        for kind in _LISTS:
            target, found = self._found(kind)
            present = {value for value, _ in found.kept}
            moved = [(value, lang) for value, lang in dict(found.moved).items() if value not in present]
            present.update(value for value, _ in moved)
            has_levels = kind is _HIERARCHY and any(len(levels) > 1 for levels in wanted)
            values = kind.values(wanted) if kind is _SUBJECT or has_levels or present else ()
            added[kind] = [value for value in dict.fromkeys(values) if value not in present]
            new = [*moved, *((value, None) for value in added[kind])]
            if target is not None and not (found.kept or new):
                found.elements.append(target)
            elif target is not None:
                edits.change_items(kind, target[1], [item for _, item in found.kept], found.removed, new)
            else:
                absent[kind] = new
            expected[kind] = sorted(value for value, _ in (*found.kept, *new))
            elements += found.elements
            attributes += found.attributes
        for name in (*(kind.own for kind in _LISTS), (_OURS, "image"), (_OURS, "question")):
            elements += self._elements(name)
            attributes += [(node, name) for node in self._nodes if name in node.attributes]
        edits.remove(elements, attributes)
        edits.append(self._rdf, self._descriptions(image, question, added, absent))

        content = self._encode(edits.applied())
        written = XmpPacket(content)
        if (written.read_own("image"), written.read_own("question")) != (image, question) or any(
            sorted(written._values(kind)) != values for kind, values in expected.items()
        ):
            raise XmpError("it redefines the prefixes of XMP")
        return content

    def _found(self, kind: _KeywordList) -> "tuple[tuple[_Element, _Element] | None, _Found]":
        """Return the property that will contain all keywords, after its node, and what becomes of the others."""
        before, own_node = self._own_keywords(kind)
        subjects = self._elements(kind.name)
        target = subjects[0] if subjects else None
        found = _Found(attributes=[(node, kind.name) for node in self._nodes if kind.name in node.attributes])
        # Of several, ours are beside our own properties; the others are of other programs.
        is_only = len(subjects) + len(found.attributes) == 1
        for node, _ in found.attributes:
            value = node.attributes[kind.name]
            if value not in before or not (is_only or node is own_node):
                found.moved.append((value, None))
        for node, subject in subjects:
            is_target = target is not None and subject is target[1]
            if not is_target:
                found.elements.append((node, subject))
            for item in _items(subject):
                if item.is_plain and item.value in before and (is_only or node is own_node):
                    found.removed += [item] if is_target else []
                elif is_target:
                    found.kept.append((item.value, item))
                elif item.is_plain:
                    found.moved.append((item.value, item.attributes.get(_LANG)))
                else:
                    raise XmpError(f"it has several properties {kind.tag}, with qualifiers")
        return target, found

    def _elements(self, name: tuple[str, str]) -> list[tuple[_Element, _Element]]:
        """Return the properties of this name, after the node that each belongs to."""
        return [(node, child) for node in self._nodes for child in node.children if child.name == name]

    def _own_keywords(self, kind: _KeywordList) -> tuple[set[str], _Element | None]:
        """Return the keywords that we wrote, and the node that lists them."""
        for node, found in self._elements(kind.own):
            return {item.value for item in _items(found)}, node
        for node in self._nodes:
            if kind.own in node.attributes:
                return {node.attributes[kind.own]}, node
        return set(), None

    def _descriptions(
        self,
        image: str,
        question: str,
        added: "Mapping[_KeywordList, Sequence[str]]",
        absent: "Mapping[_KeywordList, Sequence[tuple[str, str | None]]]",
    ) -> str:
        """Return a description with our own properties, after one for each list that the packet does not have."""
        own = [
            f"<deixis:image>{escape(image)}</deixis:image>",
            f"<deixis:question>{escape(question)}</deixis:question>",
        ]
        for kind, values in added.items():
            if values:
                items = _new_items("rdf", [(value, None) for value in values])
                own.append(f"<deixis:{kind.own[1]}><rdf:Bag>{items}</rdf:Bag></deixis:{kind.own[1]}>")
        described = [
            (f'xmlns:{kind.prefix}="{kind.name[0]}"', [f"<{kind.tag}>{_new_container(kind, new)}</{kind.tag}>"])
            for kind, new in absent.items()
            if new
        ]
        described.append((f'xmlns:deixis="{_OURS}"', own))
        rdf = "" if self._rdf.tag[1] == b"rdf:RDF" else f' xmlns:rdf="{_RDF}"'
        start = f"\n  <rdf:Description{rdf} rdf:about={quoteattr(self._about)}"
        return "".join(
            f"{start} {namespace}>{''.join(f'{chr(10)}   {line}' for line in lines)}\n  </rdf:Description>"
            for namespace, lines in described
        )

    def _encode(self, data: bytes) -> bytes:
        return self._bom + data.decode().encode(self._encoding, "xmlcharrefreplace")


@dataclass(slots=True)
class _Found:
    """The keywords of a packet.

    Args:
        kept: values of other programs that stay in their place.
        moved: text of other programs that moves to the only property, with its language.
        removed: the elements of our values in that property.
        elements: other properties to remove, each after its node.
        attributes: attributes to remove, each after its node.
    """

    kept: list[tuple[str, _Element]] = field(default_factory=list)
    moved: list[tuple[str, str | None]] = field(default_factory=list)
    removed: list[_Element] = field(default_factory=list)
    elements: list[tuple[_Element, _Element]] = field(default_factory=list)
    attributes: list[tuple[_Element, tuple[str, str]]] = field(default_factory=list)


class _Edits:
    """Changes of places of a packet that do not overlap."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._edits: list[_Edit] = []

    def applied(self) -> bytes:
        """Return the changed packet."""
        pieces, end = [], 0
        for edit in sorted(self._edits, key=lambda edit: (edit.start, edit.end)):
            assert edit.start >= end
            pieces += [self._data[end : edit.start], edit.new]
            end = edit.end
        return b"".join([*pieces, self._data[end:]])

    def change_items(
        self,
        kind: _KeywordList,
        subject: _Element,
        kept: Sequence[_Element],
        removed: Sequence[_Element],
        new: Sequence[tuple[str, str | None]],
    ) -> None:
        """Change the items of a property."""
        container = _container(subject)
        if container is not None:
            for item in removed:
                self._cut(item)
            prefix = container.tag[1].decode().rpartition(":")[0]
            if new:
                at = kept[-1].end if kept else container.inner
                indent = self._spaces_before(kept[-1].start, container.inner).decode() if kept else ""
                self._insert(container, at, _new_items(prefix, new, indent))
            return
        # One value, whose attributes and content become those of the first item.
        first = ""
        if kept:
            inner = self._data[subject.inner : subject.inner_end].decode()
            first = f"<rdf:li{subject.tag[2].decode().rstrip()}>{inner}</rdf:li>"
        if new or removed:
            start = f'<{kind.tag} xmlns:{kind.prefix}="{kind.name[0]}" xmlns:rdf="{_RDF}">'
            self._add(subject.start, subject.end, f"{start}{_new_container(kind, new, first)}</{kind.tag}>")

    def append(self, parent: _Element, text: str) -> None:
        """Add elements at the end of ``parent``."""
        spaces = self._spaces_before(parent.inner_end, parent.inner)
        self._insert(parent, parent.inner_end - len(spaces), text)

    def remove(
        self, found: Iterable[tuple[_Element, _Element]], attributes: Iterable[tuple[_Element, tuple[str, str]]]
    ) -> None:
        """Remove elements and attributes, each given after its node, and descriptions that have no others."""
        by_node: dict[int, tuple[_Element, list[_Element], list[tuple[str, str]]]] = {}
        for node, element in found:
            by_node.setdefault(node.start, (node, [], []))[1].append(element)
        for node, name in attributes:
            by_node.setdefault(node.start, (node, [], []))[2].append(name)
        for node, elements, names in by_node.values():
            others = node.attributes.keys() - _ABOUT - set(names)
            if node.name == _DESCRIPTION and len(elements) == len(node.children) and not others:
                self._cut(node)
                continue
            for element in elements:
                self._cut(element)
            for name in names:
                self._cut_attribute(node, name)

    def _add(self, start: int, end: int, new: str) -> None:
        self._edits.append(_Edit(start, end, new.encode()))

    def _cut(self, element: _Element) -> None:
        self._add(element.start - len(self._spaces_before(element.start, 0)), element.end, "")

    def _spaces_before(self, end: int, start: int) -> bytes:
        at = end
        while at > start and self._data[at - 1] in b" \t\r\n":
            at -= 1
        return self._data[at:end]

    def _cut_attribute(self, element: _Element, name: tuple[str, str]) -> None:
        names = _attribute_names(element)
        for found in _ATTRIBUTE.finditer(element.tag[2]):
            if found[1] == names[name]:
                offset = element.tag.start(2)
                self._add(offset + found.start(), offset + found.end(), "")

    def _insert(self, parent: _Element, at: int, text: str) -> None:
        if parent.tag[3]:  # <a/> becomes <a></a>
            name = parent.tag[1].decode()
            self._add(parent.tag.start(3), parent.end, f">{text}</{name}>")
        else:
            self._add(at, at, text)


def _levels(keyword: str) -> list[str]:
    return [level.strip() for level in keyword.split("|") if level.strip()] or [keyword]


def _attribute_names(element: _Element) -> dict[tuple[str, str], bytes]:
    """Return the qualified name of each attribute: both lists are in the order of the start tag."""
    raw = [found[1] for found in _ATTRIBUTE.finditer(element.tag[2])]
    names = [name for name in raw if name != b"xmlns" and not name.startswith(b"xmlns:")]
    return dict(zip(element.attributes, names, strict=True))


def _new_items(prefix: str, items: Iterable[tuple[str, str | None]], indent: str = "") -> str:
    name = f"{prefix}:li" if prefix else "li"
    return "".join(
        f"{indent}<{name}{f' xml:lang={quoteattr(lang)}' if lang else ''}>{escape(value, {chr(13): '&#13;'})}</{name}>"
        for value, lang in items
    )


def _new_container(kind: _KeywordList, items: Iterable[tuple[str, str | None]], first: str = "") -> str:
    return f"<rdf:{kind.container}>{first}{_new_items('rdf', items)}</rdf:{kind.container}>"


def _container(prop: _Element) -> _Element | None:
    """Return the container of a property's values; None if it has one value, or none."""
    (child,) = prop.children if len(prop.children) == 1 else (None,)
    return child if child is not None and child.name in _CONTAINERS and not prop.attributes.keys() - {_LANG} else None


def _items(prop: _Element) -> Sequence[_Element]:
    """Return the elements that contain the values of a property.

    Raises:
        XmpError: its form is not understood.
    """
    container = _container(prop)
    if container is not None:
        if (
            any(child.name != _LI for child in container.children)
            or container.attributes.keys() - {_LANG}
            or (container.text + prop.text).strip()
        ):
            raise XmpError(f"the list of {prop.name[1]} has an unusual form")
        return container.children
    if (
        prop.attributes.get((_RDF, "parseType"), "Resource") != "Resource"
        or {
            (_RDF, "ID"),
            (_RDF, "nodeID"),
        }
        & prop.attributes.keys()
    ):
        raise XmpError(f"the property {prop.name[1]} has an unusual form")
    if any(child.name in _CONTAINERS for child in prop.children) or (prop.children and prop.text.strip()):
        raise XmpError(f"the property {prop.name[1]} has an unusual form")
    is_empty = not (prop.children or prop.attributes.keys() - {_LANG} or prop.text.strip())
    return [] if is_empty else [prop]


def _decoded(content: bytes) -> tuple[bytes, str, str]:
    """Return the byte order mark, the encoding and the text of a packet."""
    bom, encoding = next(((bom, name) for bom, name in _BOMS if content.startswith(bom)), (b"", None))
    if encoding is None:
        declared = _DECLARED.match(content[:200])
        encoding = next(
            (name for start, name in _WITHOUT_BOM if content.startswith(start)),
            declared[1].decode("ascii") if declared else "utf-8",
        )
        if not (encoding.startswith(("utf-16-", "utf-32-")) or _OTHER_ENCODINGS.fullmatch(encoding)):
            raise XmpError(f"it has the encoding {encoding}; save it in UTF-8")
    try:
        return bom, encoding, content[len(bom) :].decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise XmpError(f"it is not text in the encoding {encoding}") from error


def _parse(data: bytes) -> _Element:
    """Return ``rdf:RDF`` with what we need of its content: nodes, their properties, and the values of keywords.

    Raises:
        XmpError: it is not XML, has a document type, or has no RDF or several.
    """
    found: list[_Element] = []
    open_elements: list[_Element | None] = []
    size = 0

    def name_of(expanded: str) -> tuple[str, str]:
        uri, _, local = expanded.rpartition(" ")
        return uri, local

    def start(expanded: str, attributes: list[str]) -> None:
        nonlocal size
        size += 1 + len(attributes) // 2
        if size > _MAX_SIZE:
            raise XmpError(f"it has more than {_MAX_SIZE:,} elements and attributes")
        name, parent = name_of(expanded), open_elements[-1] if open_elements else None
        is_wanted = name == (_RDF, "RDF") or (
            parent is not None
            and (parent.depth < 2 or parent.depth > 2 or parent.name in _LIST_NAMES or parent.name[0] == _OURS)
        )
        element = None
        if is_wanted:
            at = parser.CurrentByteIndex
            tag = _START_TAG.match(data, at)
            assert tag is not None
            pairs = zip(map(name_of, attributes[::2]), attributes[1::2], strict=True)
            depth = 0 if parent is None else parent.depth + 1
            element = _Element(name, tag, dict(pairs), depth, at, tag.end())
            (found if parent is None or name == (_RDF, "RDF") else parent.children).append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        element = open_elements.pop()
        if element is not None:
            at = parser.CurrentByteIndex
            is_empty = bool(element.tag[3])
            element.inner_end = element.inner if is_empty else at
            element.end = element.inner if is_empty else data.index(b">", at) + 1

    def text(content: str) -> None:
        if open_elements and open_elements[-1] is not None and open_elements[-1].depth > 1:
            open_elements[-1].pieces.append(content)

    def doctype(*_: Any) -> None:
        raise XmpError("it has a document type, which XMP does not allow")

    # All characters are known, so a declared encoding is ignored.
    parser = expat.ParserCreate("utf-8", " ")
    parser.ordered_attributes = True
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(data, True)  # noqa: FBT003 - expat takes no keyword
    except expat.ExpatError as error:
        raise XmpError(f"it is not XML: {error}") from error
    if len(found) != 1:
        raise XmpError("it has no rdf:RDF" if not found else "it has several rdf:RDF")
    return found[0]
