"""XMP packets: every legal form of keywords is changed in place, and read by Exiv2 and ExifTool."""

import codecs
import json
import os
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from app.images.xmp import XmpError, XmpPacket

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'
OURS = 'xmlns:deixis="urn:deixis:xmp:1.0/"'
OTHER = '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"><xmp:Rating>4</xmp:Rating></rdf:Description>'
BAG = "<dc:subject><rdf:Bag><rdf:li>holiday</rdf:li><rdf:li>cat</rdf:li></rdf:Bag></dc:subject>"
EARLIER = f"{OURS} deixis:image='1' deixis:question='2'"


def described(content, attributes=""):
    return f'<rdf:Description rdf:about="" {DC} {attributes}>{content}</rdf:Description>'


def packet(*nodes, rdf="rdf", root="xmpmeta"):
    inner = f'<{rdf}:RDF xmlns:{rdf}="{RDF}">\n {"".join(nodes)}\n</{rdf}:RDF>'
    meta = f'<x:{root} xmlns:x="adobe:ns:meta/" x:xmptk="Some editor">\n{inner}\n</x:{root}>' if root else inner
    padding = (" " * 99 + "\n") * 20
    begin = "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>"
    return f"{begin}\n{meta}\n{padding}<?xpacket end='w'?>"


FORMS = {
    "one description per namespace, as ExifTool writes": (packet(OTHER, described(BAG)), ["holiday", "cat"]),
    "no keywords": (packet(OTHER), []),
    "no description": (packet(), []),
    "an empty element": (f'<rdf:RDF xmlns:rdf="{RDF}"/>', []),
    "an attribute": (packet(described("", 'dc:subject="holiday"')), ["holiday"]),
    "an attribute in single quotes": (
        packet(described("", "dc:format='dc:subject=\"x\"' dc:subject = 'a\"b'")),
        ['a"b'],
    ),
    "one value": (packet(described("<dc:subject>holiday</dc:subject>")), ["holiday"]),
    "one value with a qualifier": (
        packet(
            described(
                "<dc:subject rdf:parseType='Resource'><rdf:value>holiday</rdf:value>"
                "<q:by xmlns:q='urn:q'>me</q:by></dc:subject>"
            )
        ),
        ["holiday"],
    ),
    "a resource": (packet(described("<dc:subject rdf:resource='http://a.example/'/>")), ["http://a.example/"]),
    "an empty property": (packet(described("<dc:subject/>")), []),
    "an empty bag": (packet(described("<dc:subject><rdf:Bag/></dc:subject>")), []),
    "a sequence": (packet(described(BAG.replace("Bag", "Seq"))), ["holiday", "cat"]),
    "alternatives": (packet(described(BAG.replace("Bag", "Alt"))), ["holiday", "cat"]),
    "qualified items": (
        packet(
            described(
                "<dc:subject><rdf:Bag><rdf:li rdf:parseType='Resource'><rdf:value>cat</rdf:value>"
                "<q:by xmlns:q='urn:q'>me</q:by></rdf:li>"
                "<rdf:li><rdf:Description rdf:value='fur' xmlns:q='urn:q' q:by='me'/></rdf:li>"
                "<rdf:li xml:lang='de'>Katze</rdf:li></rdf:Bag></dc:subject>"
            )
        ),
        ["cat", "fur", "Katze"],
    ),
    "other prefixes": (
        packet(
            "<r:Description r:about='' xmlns:d='http://purl.org/dc/elements/1.1/'><d:subject><r:Bag><r:li>holiday"
            "</r:li></r:Bag></d:subject></r:Description>",
            rdf="r",
        ),
        ["holiday"],
    ),
    "a default namespace": (
        (
            f"<RDF xmlns='{RDF}'><Description xmlns:r='{RDF}' r:about=''>"
            f"<subject xmlns='http://purl.org/dc/elements/1.1/'><Bag xmlns='{RDF}'><li>holiday</li></Bag></subject>"
            "</Description></RDF>"
        ),
        ["holiday"],
    ),
    "a typed node": (packet(f"<p:Photo xmlns:p='urn:p' rdf:about='' {DC}>{BAG}</p:Photo>"), ["holiday", "cat"]),
    "the name of the first releases": (packet(described(BAG), root="xapmeta"), ["holiday", "cat"]),
    "no x:xmpmeta": (packet(described(BAG), root=None), ["holiday", "cat"]),
    "comments, references and CDATA": (
        packet(
            described(
                "<!-- <dc:subject/> --><dc:subject><rdf:Bag><!-- a --><rdf:li>a &amp; b</rdf:li>"
                "<rdf:li><![CDATA[<c>]]></rdf:li></rdf:Bag></dc:subject>"
            )
        ),
        ["a & b", "<c>"],
    ),
    "padding inside of the list of nodes": (packet(described(BAG), " \n" * 2000), ["holiday", "cat"]),
    "keywords in nested structures": (
        packet(
            described(
                f"<s:part xmlns:s='urn:s' rdf:parseType='Resource'>{BAG.replace('holiday', 'other')}</s:part>", OURS
            )
        ),
        [],
    ),
    "two properties, as earlier releases wrote": (
        packet(
            described(
                "<dc:subject><rdf:Bag><rdf:li>cat</rdf:li><rdf:li>sofa</rdf:li></rdf:Bag></dc:subject><deixis:keywords>"
                "<rdf:Bag><rdf:li>cat</rdf:li><rdf:li>sofa</rdf:li></rdf:Bag></deixis:keywords>",
                EARLIER,
            ),
            described(BAG),
        ),
        ["holiday", "cat"],
    ),
    "ours": (
        packet(
            described(
                BAG.replace("holiday", "sofa")
                + "<deixis:keywords><rdf:Bag><rdf:li>sofa</rdf:li></rdf:Bag></deixis:keywords>",
                EARLIER,
            )
        ),
        ["cat"],
    ),
    "one keyword of ours as attributes": (
        packet(described("", f"{EARLIER} dc:subject='sofa' deixis:keywords='sofa'"), OTHER),
        [],
    ),
}


def read_by_exiv2(folder):
    """Return the sorted keywords of each file, as Exiv2 reads them."""
    files = sorted(folder.iterdir())
    done = subprocess.run(
        ["exiv2", "-K", "Xmp.dc.subject", "-Pv", "pr", *files], capture_output=True, text=True, check=False
    )
    assert not done.stderr
    read = {file.name: [] for file in files}
    for line in done.stdout.splitlines():
        path, _, keywords = line.partition(".xmp")
        read[f"{path.rpartition('/')[2]}.xmp"] = sorted(keywords.strip().split(", "))
    return read


def read_by_exiftool(folder):
    """Return the sorted keywords of each file, as ExifTool reads them."""
    done = subprocess.run(["exiftool", "-j", "-XMP-dc:Subject", folder], capture_output=True, text=True, check=False)
    read = {}
    for entry in json.loads(done.stdout):
        found = entry.get("Subject", [])
        read[entry["SourceFile"].rpartition("/")[2]] = sorted(found if isinstance(found, list) else [found])
    return read


# Legal RDF that one of these programs does not read, or not as a list of texts, whether we have changed it or not.
NOT_READ_ALIKE = {
    "an empty element",
    "a default namespace",
    "a typed node",
    "alternatives",
    "comments, references and CDATA",
    "one value with a qualifier",
    "other prefixes",
    "qualified items",
}


@pytest.mark.parametrize("form", FORMS)
def test_keywords_are_replaced_in_every_form_and_the_others_stay(form):
    text, theirs = FORMS[form]
    for ours in (["cat", "lamp & <desk>"], [], ["lamp"], ["x\r\x01"]):
        changed = XmpPacket(text.encode()).replace_keywords(ours, "i", "q")
        again = XmpPacket(changed)
        expected = [*theirs, *(keyword.replace("\x01", "\ufffd") for keyword in ours if keyword not in theirs)]
        assert sorted(again.keywords()) == sorted(expected)
        assert (again.read_own("image"), again.read_own("question")) == ("i", "q")
        # Others stay, and repeated runs do not let the file grow.
        assert again.replace_keywords(ours, "i", "q") == changed
        assert sorted(XmpPacket(again.replace_keywords([], "j", "q")).keywords()) == sorted(theirs)


@pytest.mark.parametrize(("program", "read"), [("exiv2", read_by_exiv2), ("exiftool", read_by_exiftool)])
def test_other_programs_read_the_changed_packets(program, read, tmp_path):
    if shutil.which(program) is None:
        if os.environ.get("TEST_REQUIRE_EXIV2"):
            pytest.fail(f"{program} is required and not installed")
        pytest.skip(f"{program} is not installed")
    expected = {}
    for number, (form, (text, theirs)) in enumerate(FORMS.items()):
        if form not in NOT_READ_ALIKE:
            changed = XmpPacket(text.encode()).replace_keywords(["cat", "lamp & <desk>"], "i", "q")
            (tmp_path / f"{number}.xmp").write_bytes(changed)
            expected[f"{number}.xmp"] = sorted({*theirs, "cat", "lamp & <desk>"})
    assert read(tmp_path) == expected


LISTS = {
    "dc:subject": "http://purl.org/dc/elements/1.1/",
    "lr:hierarchicalSubject": "http://ns.adobe.com/lightroom/1.0/",
    "digiKam:TagsList": "http://www.digikam.org/ns/1.0/",
}


def listing(name, *values):
    items = "".join(f"<rdf:li>{value}</rdf:li>" for value in values)
    prefix = name.partition(":")[0]
    return (
        f'<rdf:Description rdf:about="" xmlns:{prefix}="{LISTS[name]}"><{name}><rdf:Seq>{items}</rdf:Seq></{name}>'
        "</rdf:Description>"
    )


def lists_of(content):
    """Return the values of each property of ``LISTS`` in a packet."""
    root = ElementTree.fromstring(content)
    found = {}
    for name, namespace in LISTS.items():
        properties = root.findall(f".//{{{namespace}}}{name.partition(':')[2]}")
        assert len(properties) <= 1, "programs read nothing of a packet with a property twice"
        found[name] = [item.text for each in properties for item in each.iter(f"{{{RDF}}}li")]
    return tuple(found.values())


BIRD = (
    listing("dc:subject", "owl"),
    listing("lr:hierarchicalSubject", "animal|owl"),
    listing("digiKam:TagsList", "animal/owl"),
)


@pytest.mark.parametrize(
    ("before", "keywords", "expected"),
    [
        ((), ["cat"], (["cat"], [], [])),
        ((), ["animal|cat", "dog"], (["cat", "dog"], ["animal|cat", "dog"], [])),
        ((), [" animal | |cat|"], (["cat"], ["animal|cat"], [])),
        ((), ["|"], (["|"], [], [])),
        ((), ["a|bat", "b|bat"], (["bat"], ["a|bat", "b|bat"], [])),
        (BIRD[:1], ["animal|cat"], (["owl", "cat"], ["animal|cat"], [])),
        (BIRD[1:2], ["cat"], (["cat"], ["animal|owl", "cat"], [])),
        (BIRD, ["animal|cat"], (["owl", "cat"], ["animal|owl", "animal|cat"], ["animal/owl", "animal/cat"])),
        (BIRD, ["animal|owl"], (["owl"], ["animal|owl"], ["animal/owl"])),
        (BIRD[2:], ["and/or"], (["and/or"], [], ["animal/owl", "and-or"])),
    ],
)
def test_levels_are_written_where_programs_read_them_and_removed_again(before, keywords, expected):
    text = packet(OTHER, *before).encode()
    changed = XmpPacket(text).replace_keywords(keywords, "i", "q")
    assert lists_of(changed) == expected
    assert XmpPacket(changed).replace_keywords(keywords, "i", "q") == changed
    assert lists_of(XmpPacket(changed).replace_keywords([], "i", "q")) == lists_of(text)
    plain = XmpPacket(changed).replace_keywords(["sofa"], "i", "q")
    assert lists_of(plain) == lists_of(XmpPacket(text).replace_keywords(["sofa"], "i", "q"))


def test_other_programs_read_levels(tmp_path):
    files = {"new": packet(), "with the lists of others": packet(OTHER, *BIRD)}
    for name, text in files.items():
        (tmp_path / f"{name}.xmp").write_bytes(XmpPacket(text.encode()).replace_keywords(["animal|cat"], "i", "q"))
    expected = {
        "new": {"subject": ["cat"], "hierarchicalSubject": ["animal|cat"]},
        "with the lists of others": {
            "subject": ["owl", "cat"],
            "hierarchicalSubject": ["animal|owl", "animal|cat"],
            "TagsList": ["animal/owl", "animal/cat"],
        },
    }
    for program in ("exiv2", "exiftool"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    for name, lists in expected.items():
        command = ["exiv2", "-PXkv", tmp_path / f"{name}.xmp"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        by_key = {key.rpartition(".")[2]: value.split(", ") for key, value in (line.split(None, 1) for line in lines)}
        assert {key: by_key[key] for key in lists} == lists
        command = [
            "exiftool",
            "-j",
            "-XMP:Subject",
            "-XMP:HierarchicalSubject",
            "-XMP:TagsList",
            tmp_path / f"{name}.xmp",
        ]
        (read,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found = {key[0].lower() + key[1:] if key != "TagsList" else key: value for key, value in read.items()}
        found.pop("sourceFile")
        assert {key: value if isinstance(value, list) else [value] for key, value in found.items()} == lists


def test_nothing_else_in_a_packet_changes():
    text, _ = FORMS["one description per namespace, as ExifTool writes"]
    before = text.encode()
    changed = XmpPacket(before).replace_keywords(["sofa"], "i", "q")
    ours = changed[changed.index(b"\n  <rdf:Description") : changed.index(b"\n</rdf:RDF>")]
    assert changed.replace(b"<rdf:li>sofa</rdf:li>", b"", 1).replace(ours, b"") == before
    back = XmpPacket(changed).replace_keywords([], "i", "q")
    assert b"sofa" not in back


@pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", b""),
    ],
)
def test_the_encoding_of_a_packet_stays(encoding, bom):
    text = packet(OTHER, described(BAG.replace("holiday", "猫")))
    changed = XmpPacket(bom + text.encode(encoding)).replace_keywords(["犬"], "i", "q")
    assert changed.startswith(bom)
    assert "犬" in changed[len(bom) :].decode(encoding)
    assert XmpPacket(changed).keywords() == ["猫", "cat", "犬"]


def test_a_declared_encoding_is_read_and_written():
    inner = packet(described(BAG.replace("holiday", "café")), root=None)
    text = "<?xml version='1.0' encoding='ISO-8859-1'?>" + inner[inner.index("<rdf:RDF") :].partition("<?xpacket")[0]
    changed = XmpPacket(text.encode("latin-1")).replace_keywords(["猫"], "i", "q")
    assert "caf\u00e9".encode("latin-1") in changed
    assert XmpPacket(changed).keywords() == ["café", "cat", "猫"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not XML"),
        (packet(described("<dc:a/>" * 50_000)), "more than 50,000 elements"),
        (packet(described("", " ".join(f"dc:a{number}='x'" for number in range(50_000)))), "more than 50,000 elements"),
        (packet(described("<dc:subject>" + "<dc:a>" * 50_000 + "</dc:a>" * 50_000 + "</dc:subject>")), "more than"),
        ("no xml", "not XML"),
        ("<a/>", "no rdf:RDF"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "document type"),
        ("<?xml version='1.0' encoding='punycode'?><a/>", "encoding punycode"),
        (f"<a><rdf:RDF xmlns:rdf='{RDF}'/><rdf:RDF xmlns:rdf='{RDF}'/></a>", "several rdf:RDF"),
        (
            packet(OTHER.replace('about=""', 'about="a"'), described(BAG).replace('about=""', 'about="b"')),
            "several resources",
        ),
        (packet(described(BAG).replace("about", "nodeID").replace('nodeID=""', 'nodeID="a"')), "part of a resource"),
        (packet(described(BAG.replace("rdf:li>cat", "rdf:_1>cat").replace("cat</rdf:li", "cat</rdf:_1"))), "unusual"),
        (packet(described("<dc:subject rdf:parseType='Literal'><b/></dc:subject>")), "unusual"),
        (packet(described("<dc:subject><rdf:Bag rdf:_1='cat'/></dc:subject>")), "unusual"),
        (packet(described("<dc:subject rdf:ID='a'>cat</dc:subject>")), "unusual"),
        (packet(described(BAG), described("<dc:subject rdf:resource='a:b'/>")), "qualifiers"),
    ],
)
def test_what_is_not_understood_is_refused(text, reason):
    with pytest.raises(XmpError, match=reason):
        XmpPacket(text.encode()).replace_keywords(["cat"], "i", "q")
