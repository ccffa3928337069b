"""Reports about folders of photographs, sidecars, data sets in files, and programs that label them."""

import json
import os
import re
from xml.etree import ElementTree

import pyarrow as pa
import pytest
from PIL import Image

from tests.bulk.source_files import RED, parquet_file, planned, read
from tests.conftest import picture
from tests.field.asking import encoded, saved
from tests.field.reports import report
from tests.integrations.test_label_studio import predict, tasks_of

LABELS = ("-l", "red, green, blue")
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"


@pytest.fixture
def photos(tmp_path):
    """A folder with one photograph in a folder of its own."""
    place = tmp_path / "photos"
    (place / "trip").mkdir(parents=True)
    (place / "trip" / "red.png").write_bytes(picture("red"))
    return place


def put(file, content):
    """Write a file with its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def classified(run, *paths, status=0):
    """Return the best label of each file by its name, and standard error."""
    done = run("classify", *paths, *LABELS, "-f", "json")
    assert done.exit_code == status, done.output
    answers = json.loads(done.stdout)
    return {
        each["path"].rpartition("/")[2]: each.get("error") or each["predictions"][0]["label"] for each in answers
    }, done


def labelled_with_xmp(run, photos):
    """Label a folder as ``watch`` does, and return the sidecar of its photograph."""
    done = run("watch", photos, *LABELS, "--once", "--settle", "0.1", "--write", "xmp")
    assert done.exit_code == 0, done.output
    return photos / "trip" / "red.png.xmp"


def keywords_of(sidecar):
    """Return the lists of keywords of a sidecar, each with the name of its container."""
    subjects = ElementTree.fromstring(sidecar.read_bytes()).findall(f".//{DC}subject")
    return [(subject[0].tag, [item.text for item in subject.iter(f"{RDF}li")]) for subject in subjects]


# --- folders ---------------------------------------------------------------------------------------------------------


@report("photoprism/photoprism#287", "The thumbnails that a NAS keeps in `@eaDir` were indexed as photographs.")
def test_thumbnails_of_a_nas_are_left_out(run, photos):
    put(photos / "@eaDir" / "red.png" / "SYNOPHOTO_THUMB_XL.jpg", picture("blue", file_format="JPEG"))
    assert classified(run, photos)[0] == {"red.png": "red"}


@report("photoprism/photoprism#1543", "`@eaDir` was ignored at the top, and indexed in each subfolder.")
def test_thumbnails_of_a_nas_are_left_out_at_any_depth(run, photos):
    put(photos / "trip" / "@eaDir" / "red.png" / "SYNOFILE_THUMB_M.png", picture("blue"))
    put(photos / "trip" / "day" / "@EADIR" / "thumb.png", picture("blue"))
    assert classified(run, photos)[0] == {"red.png": "red"}


@report("photoprism/photoprism#4921", "Deleted files in the `#recycle` folder of a share were indexed.")
def test_deleted_files_of_a_share_are_left_out(run, photos):
    put(photos / "#recycle" / "old.png", picture("blue"))
    assert classified(run, photos)[0] == {"red.png": "red"}


@report("photoprism/photoprism#275", "Hidden files were skipped, but not the files in the hidden folder `.thumbnails`.")
def test_hidden_folders_are_left_out(run, photos):
    put(photos / ".thumbnails" / "small.png", picture("blue"))
    assert classified(run, photos)[0] == {"red.png": "red"}


@report("photoprism/photoprism#2844", "Archives from a Mac brought `__MACOSX` folders and `._` files.")
def test_resource_forks_of_a_mac_are_left_out(run, photos):
    put(photos / "__MACOSX" / "trip" / "red.png", picture("blue"))
    put(photos / "trip" / "._red.png", b"\0\5\26\7")
    assert classified(run, photos)[0] == {"red.png": "red"}


@report("rom1504/clip-retrieval#257", "One truncated image made the encoding of a folder hang for ever.")
def test_a_truncated_file_is_named_and_the_others_are_classified(run, photos):
    put(photos / "cut.jpg", picture("blue", (200, 200), "JPEG")[:-300])
    put(photos / "whole.jpg", picture("blue", (200, 200), "JPEG"))
    found, done = classified(run, photos, status=1)
    assert (found["red.png"], found["whole.jpg"]) == ("red", "blue")
    assert "cut.jpg" in done.stderr


@report("upscayl/upscayl#204", "A bad file among 22,000 stopped the job, and nothing said which one it was.")
def test_each_bad_file_is_named_with_its_reason(run, photos):
    put(photos / "notes.png", b"these are words")
    put(photos / "page.jpg", b"<!doctype html><html>")
    _, done = classified(run, photos, status=1)
    assert re.search(r"notes\.png: .*text", done.stderr)
    assert re.search(r"page\.jpg: .*HTML", done.stderr)


@report("deepfates/memery#10", "A scan with very many pixels ended the indexing with `DecompressionBombError`.")
def test_a_scan_with_too_many_pixels_is_skipped(run, photos, monkeypatch):
    monkeypatch.setenv("DEIXIS_MAX_IMAGE_PIXELS", "1000000")
    put(photos / "scan.png", saved(Image.new("1", (2_000, 2_000))))
    found, done = classified(run, photos, status=1)
    assert found["red.png"] == "red"
    assert "scan.png" in done.stderr


@report("arsenetar/dupeguru#335", "A file name on a network share that is not UTF-8 crashed the scan.")
def test_a_file_name_that_is_not_utf8_is_written_with_an_escape(run, photos):
    put(photos / os.fsdecode(b"gr\xfcn.png"), picture("green"))
    assert classified(run, photos)[0] == {"red.png": "red", r"gr\xfcn.png": "green"}


@report("yurijmikhalevich/rclip#221", "Photographs of an iPhone in HEIC were not found.")
def test_heic_files_of_a_folder_are_classified(run, photos):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), "blue")).save(photos / "IMG_0001.HEIC")
    assert classified(run, photos)[0] == {"red.png": "red", "IMG_0001.HEIC": "blue"}


# --- sidecars --------------------------------------------------------------------------------------------------------


@report("yurijmikhalevich/rclip#13", "A user wanted the labels in the files that photo managers read.")
def test_labels_are_keywords_in_a_sidecar(run, photos):
    assert keywords_of(labelled_with_xmp(run, photos)) == [(f"{RDF}Bag", ["red"])]


@report("photoprism/photoprism#1442", "Labels below a chosen confidence could not be left out.")
def test_labels_below_the_chosen_score_are_left_out(run, photos):
    (photos / "trip" / "red.png").write_bytes(picture("#ff8080"))
    done = run("watch", photos, *LABELS, "--once", "--settle", "0.1", "--write", "xmp", "--min-score", "0.99")
    assert done.exit_code == 0, done.output
    assert not any(items for _, items in keywords_of(photos / "trip" / "red.png.xmp"))


@report(
    "darktable-org/darktable#12322", "The import overwrote the sidecars of another program with the same file name."
)
def test_edits_of_another_program_stay_in_the_sidecar(run, photos):
    edits = packet('<rdf:Description rdf:about="" xmlns:bop="urn:bop" bop:exposure="1.5"/>')
    (photos / "trip" / "red.png.xmp").write_text(edits, "utf-8")
    sidecar = labelled_with_xmp(run, photos)
    assert 'bop:exposure="1.5"' in sidecar.read_text("utf-8")
    assert keywords_of(sidecar) == [(f"{RDF}Bag", ["red"])]


@report(
    "exiftool/exiftool#16", "ExifTool writes one `rdf:Description` for each namespace, which programs did not expect."
)
def test_a_sidecar_with_several_descriptions_keeps_one_list_of_keywords(run, photos):
    rating = '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"><xmp:Rating>4</xmp:Rating>'
    keywords = (
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<dc:subject><rdf:Bag><rdf:li>holiday</rdf:li></rdf:Bag></dc:subject></rdf:Description>"
    )
    (photos / "trip" / "red.png.xmp").write_text(packet(f"{rating}</rdf:Description>", keywords), "utf-8")
    sidecar = labelled_with_xmp(run, photos)
    ((_, found),) = keywords_of(sidecar)
    assert sorted(found) == ["holiday", "red"]
    assert "<xmp:Rating>4</xmp:Rating>" in sidecar.read_text("utf-8")


@report(
    "darktable-org/darktable#4095", "Keywords in `rdf:Seq` instead of `rdf:Bag` lost their meaning in another program."
)
def test_keywords_that_are_added_to_a_sequence_are_read_back(run, photos):
    keywords = (
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<dc:subject><rdf:Seq><rdf:li>Ann</rdf:li></rdf:Seq></dc:subject></rdf:Description>"
    )
    (photos / "trip" / "red.png.xmp").write_text(packet(keywords), "utf-8")
    ((_, found),) = keywords_of(labelled_with_xmp(run, photos))
    assert sorted(found) == ["Ann", "red"]


@report("darktable-org/darktable#18154", "Internal tags of the program appeared among the keywords of the user.")
def test_what_the_program_remembers_is_not_a_keyword(run, photos):
    sidecar = labelled_with_xmp(run, photos)
    assert "deixis" in sidecar.read_text("utf-8")
    assert [items for _, items in keywords_of(sidecar)] == [["red"]]


@report("Exiv2/exiv2#3280", "A sidecar with an unusual root element was unreadable for another program.")
def test_a_sidecar_with_an_unusual_root_keeps_its_content(run, photos):
    node = '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"><xmp:Rating>5</xmp:Rating>'
    foreign = packet(f"{node}</rdf:Description>").replace("x:xmpmeta", "x:xml_doc")
    (photos / "trip" / "red.png.xmp").write_text(foreign, "utf-8")
    sidecar = labelled_with_xmp(run, photos)
    assert "<xmp:Rating>5</xmp:Rating>" in sidecar.read_text("utf-8")
    assert keywords_of(sidecar) == [(f"{RDF}Bag", ["red"])]


def packet(*nodes):
    """Return an XMP packet with these nodes."""
    inner = "".join(nodes)
    rdf = f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{inner}</rdf:RDF>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>'


# --- data sets and other programs ------------------------------------------------------------------------------------


@report("huggingface/datasets#6923", "An export had `bytes` of null and only a path in its structures.")
def test_a_structure_without_bytes_is_read_by_its_path(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    column = pa.array(
        [{"bytes": None, "path": "red.png"}, {"bytes": RED, "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    by_path, by_bytes = read(planned(parquet_file(tmp_path, {"image": column})))
    assert by_path.content == tmp_path / "red.png"
    assert by_bytes.content == RED


@report("HumanSignal/label-studio#7519", "An uploaded image gave 401, so that a whole set of tasks had no prediction.")
def test_uploaded_images_of_label_studio_are_fetched_with_its_token(start):
    (found,) = predict(start(), tasks_of("/data/upload/8/red.png"))
    assert found["result"][0]["value"] == {"choices": ["Red"]}


@report("HumanSignal/label-studio-ml-backend#285", "One image without access ended the prediction with a stack trace.")
def test_a_task_whose_image_cannot_be_fetched_leaves_the_others_alone(start):
    good = f"data:image/png;base64,{encoded(picture('blue'))}"
    found = predict(start(), tasks_of("/data/upload/3/none.png", good))
    assert found[0] == []
    assert found[1]["result"][0]["value"] == {"choices": ["Sea"]}
