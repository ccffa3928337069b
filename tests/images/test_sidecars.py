"""Sidecars: their content, and the content of other programs that is preserved."""

import json
import os
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from app.images.sidecars import ForeignSidecarError, JsonSidecar, LabelRecord, XmpSidecar, question_key

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
FOREIGN = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Some editor">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:lr="http://ns.adobe.com/lightroom/1.0/" xmp:Rating="4" lr:privateRTKInfo="x">
   <dc:subject><rdf:Bag><rdf:li>holiday</rdf:li><rdf:li>cat</rdf:li></rdf:Bag></dc:subject>
   <dc:title><rdf:Alt><rdf:li xml:lang="x-default">Tom</rdf:li></rdf:Alt></dc:title>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def labelled(*scores, rejected=None, sha256="a" * 64, question=None):
    predictions = [{"label": label, "score": score, "similarity": 0.1} for label, score in scores]
    return LabelRecord(
        sha256, question or {"labels": ["x"]}, predictions, rejected, None, "2026-01-01T00:00:00+00:00", "0.1.0"
    )


def keywords(file):
    root = ElementTree.fromstring(file.read_bytes())
    return [item.text for item in root.findall(f".//{DC}subject/{RDF}Bag/{RDF}li")]


def test_the_keyword_of_a_hierarchy_is_the_part_of_its_path_that_is_sure(tmp_path):
    path = [{"label": "animal", "score": 0.9}, {"label": "cat", "score": 0.6}]
    record = replace(labelled(("cat", 0.6)), path=path)
    XmpSidecar().write(tmp_path / "a.xmp", record, 0.5)
    assert record.keywords(0.5) == ["animal|cat"]
    assert keywords(tmp_path / "a.xmp") == ["cat"]
    assert b"animal|cat" in (tmp_path / "a.xmp").read_bytes()
    assert (record.keywords(0.7), record.keywords(0.95)) == (["animal"], [])


@pytest.mark.parametrize("sidecar", [JsonSidecar(), XmpSidecar()])
def test_a_sidecar_identifies_its_image_and_request(sidecar, tmp_path):
    file = tmp_path / f"a.jpg{sidecar.suffix}"
    assert sidecar.read_key(file) is None
    record = labelled(("cat", 0.9))
    sidecar.write(file, record, 0.5)
    assert sidecar.read_key(file) == (record.sha256, question_key(record.question))
    assert question_key({"a": 1, "b": 2}) == question_key({"b": 2, "a": 1}) != question_key({"a": 1})
    assert list(tmp_path.iterdir()) == [file]


def test_a_json_sidecar_has_all_predictions(tmp_path):
    file = tmp_path / "a.jpg.json"
    JsonSidecar.write(file, labelled(("猫", 0.9), ("dog", 0.1), rejected=False), 0.5)
    record = json.loads(file.read_text("utf-8"))
    assert [prediction["label"] for prediction in record["predictions"]] == ["猫", "dog"]
    assert record.keys() == {
        "sha256",
        "question",
        "predictions",
        "rejected",
        "prediction_set",
        "labelled_at",
        "version",
        "labels",
        "path",
    }


def test_keywords_are_labels_above_the_score_and_are_replaced(tmp_path):
    file = tmp_path / "a.jpg.xmp"
    XmpSidecar().write(file, labelled(("cat", 0.6), ("sofa & <chair>", 0.55), ("dog", 0.1)), 0.5)
    assert keywords(file) == ["cat", "sofa & <chair>"]
    XmpSidecar().write(file, labelled(("dog", 0.9), ("cat", 0.1)), 0.5)
    assert keywords(file) == ["dog"]
    XmpSidecar().write(file, labelled(("dog", 0.9), rejected=True), 0.5)
    assert keywords(file) == []


def test_content_of_other_programs_in_an_xmp_sidecar_is_preserved(tmp_path):
    file = tmp_path / "a.jpg.xmp"
    file.write_text(FOREIGN, "utf-8")
    assert XmpSidecar.read_key(file) is None
    XmpSidecar().write(file, labelled(("cat", 0.9), ("sofa", 0.8)), 0.5)
    assert keywords(file) == ["holiday", "cat", "sofa"]
    XmpSidecar().write(file, labelled(("lamp", 0.9)), 0.5)
    assert keywords(file) == ["holiday", "cat", "lamp"]  # `cat` existed before
    text = file.read_text("utf-8")
    for kept in (
        'xmp:Rating="4"',
        'lr:privateRTKInfo="x"',
        "Tom",
        'x:xmptk="Some editor"',
        "<dc:title>",
        "<?xpacket begin=",
    ):
        assert kept in text, kept
    assert "ns0:" not in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no xml",
        "<a/>",
        '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a>&d;</a>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
    ],
)
def test_a_file_that_is_not_a_sidecar_is_not_changed(tmp_path, content):
    xmp, as_json = tmp_path / "a.jpg.xmp", tmp_path / "a.jpg.json"
    for file, sidecar in ((xmp, XmpSidecar()), (as_json, JsonSidecar())):
        file.write_text(content)
        with pytest.raises(ForeignSidecarError, match="move it to another folder"):
            sidecar.read_key(file)
    with pytest.raises(ForeignSidecarError):
        XmpSidecar().write(xmp, labelled(("cat", 1)), 0.5)
    assert xmp.read_text() == content


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"sha256": "x"}', '{"sha256": 1, "question": {"a": 1}, "x": ' + "[" * 100_000]
)
def test_a_json_file_of_another_program_is_not_changed(tmp_path, content):
    file = tmp_path / "a.jpg.json"
    file.write_text(content)
    with pytest.raises(ForeignSidecarError):
        JsonSidecar.read_key(file)


@pytest.mark.parametrize("sidecar", [JsonSidecar(), XmpSidecar()])
def test_a_sidecar_is_written_through_a_link_and_keeps_its_mode(sidecar, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file, link = elsewhere / "real", tmp_path / f"a.jpg{sidecar.suffix}"
    link.symlink_to(file)
    sidecar.write(link, labelled(("cat", 0.9)), 0.5)
    file.chmod(0o604)
    sidecar.write(link, labelled(("dog", 0.9)), 0.5)
    assert link.is_symlink()
    assert "dog" in file.read_text("utf-8")
    assert file.stat().st_mode & 0o777 == 0o604
    assert list(elsewhere.iterdir()) == [file]


@pytest.mark.parametrize("sidecar", [JsonSidecar(), XmpSidecar()])
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge file"])
def test_a_sidecar_that_is_no_regular_file_or_huge_is_not_read(sidecar, kind, tmp_path):
    file = tmp_path / f"a.jpg{sidecar.suffix}"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        with file.open("wb") as opened:
            opened.truncate(3 * 2**30)
    with pytest.raises(ForeignSidecarError, match="move it to another folder"):
        sidecar.read_key(file)
