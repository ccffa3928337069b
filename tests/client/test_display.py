"""Results in a terminal, in a notebook, as a dictionary and as a table."""

import base64
import builtins
import copy
import io
import pickle
import re

import numpy as np
import pytest
from PIL import Image

import deixis
from deixis import Classification, ImageResult, Prediction, StreamResult
from tests.conftest import picture

COLOURS = ["red", "green", "blue"]


def result(*predictions, **more):
    return ImageResult(
        predictions=[Prediction(label=label, score=score, similarity=0.123456) for label, score in predictions], **more
    )


def classification(*results):
    return Classification(model="m", label_set=None, method="zero-shot", results=list(results), timing_ms={})


ERROR = {"type": "urn:deixis:problem:not-an-image", "title": "t", "status": 415, "detail": "no <b>image</b>"}


def test_images_and_labels_are_given_in_any_of_the_usual_forms(client):
    red, blue = picture("red"), picture("blue")
    assert [each.label for each in client.classify([red, blue], labels=COLOURS).results] == ["red", "blue"]
    assert [each.label for each in client.classify([red, blue], COLOURS).results] == ["red", "blue"]
    assert [each.label for each in client.classify(red, blue, tuple(COLOURS)).results] == ["red", "blue"]
    for labels in ("red, green,blue", "red\ngreen\r\nblue\n", ["red", "green", "blue"]):
        (only,) = client.classify(red, labels=labels, top_k=3).results
        assert {each.label for each in only.predictions} == set(COLOURS), labels
    assert [each.result.label for each in client.stream([red, blue], labels="red, blue")] == ["red", "blue"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([picture()], ["a"], ["b"]), TypeError, "list is not an image"),
        (([],), ValueError, "one or more images"),
        (([], ["a"]), ValueError, "one or more images"),
    ],
)
def test_other_forms_are_refused(client, arguments, error, message):
    with pytest.raises(error, match=message):
        client.classify(*arguments)


def test_labels_that_are_given_twice_are_refused(client):
    with pytest.raises(TypeError, match="given twice"):
        client.classify(picture(), ["a"], labels=["b"])


def test_representations_are_short_and_round_scores():
    several = [(f"label {number}", 1 / 3) for number in range(1000)]
    assert repr(result(*several).predictions[0]) == "Prediction('label 0', 0.3333)"
    assert repr(result(*several)) == ("ImageResult('label 0' 0.3333, 'label 1' 0.3333, 'label 2' 0.3333, 997 more)")
    assert repr(result(error=ERROR)) == "ImageResult(error='no <b>image</b>')"
    answer = classification(*[result(("cat", 0.99996))] * 4, result(error=ERROR))
    assert str(answer) == "Classification(5 images: 'cat', 'cat', 'cat', ...; model='m', method='zero-shot')"
    assert answer.results[0].predictions[0].score == 0.99996
    assert repr(StreamResult(3, b"x" * 1000, result(("cat", 0.5)))) == "StreamResult(3, ImageResult('cat' 0.5000))"


def test_a_notebook_shows_thumbnails_and_bars(client, tmp_path):
    (tmp_path / "a <i>.png").write_bytes(picture("red", (640, 480)))
    html = client.classify([tmp_path / "a <i>.png", picture("blue")], labels=["red", "<script>"])._repr_html_()
    assert html.count('<img src="data:image/png;base64,') == 2
    assert "a &lt;i&gt;.png" in html
    assert "&lt;script&gt; 0." in html
    assert len(html) < 20_000
    assert not re.search(r"<script|<i>|https?:|\bon\w+=", html)


def test_a_notebook_shows_errors_rejections_and_warnings_as_text():
    rejected = result(("cat", 0.5), rejected=True, warnings=["few & weak"])
    html = classification(result(error=ERROR), rejected, *[result(("dog", 2.0))] * 60)._repr_html_()
    assert "no &lt;b&gt;image&lt;/b&gt;" in html
    assert "rejected" in html
    assert "few &amp; weak" in html
    assert "width:120px" in html  # of a score that is no probability
    assert "and 12 more images" in html


def test_a_thumbnail_is_upright():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (400, 200)).save(file, "JPEG", exif=exif)
    html = classification(result(("cat", 0.5))).of([file.getvalue()])._repr_html_()
    (thumbnail,) = re.findall(r"base64,([^\"]+)", html)
    assert Image.open(io.BytesIO(base64.b64decode(thumbnail))).size == (48, 96)


def test_an_image_that_is_gone_has_no_thumbnail(client, tmp_path):
    file = tmp_path / "red.png"
    file.write_bytes(picture("red"))
    answer = client.classify(file, labels=COLOURS)
    file.unlink()
    assert "<img" not in answer._repr_html_()
    assert "red.png" in answer._repr_html_()
    assert "<img" in StreamResult(0, picture(), result(("red", 1.0)))._repr_html_()


def test_the_image_of_a_result_is_no_part_of_comparisons_copies_and_pickles(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    with (tmp_path / "red.png").open("rb") as file:
        answers = [classification(result(("cat", 0.5))).of([image]) for image in (file, np.zeros((2, 2)), np.ones(3))]
        assert answers[0] == answers[1] == answers[2] != classification(result(("cat", 0.6)))
        assert copy.deepcopy(answers[0]) == pickle.loads(pickle.dumps(answers[0])) == answers[0]
        assert "<img" in answers[0]._repr_html_()


def test_a_result_is_a_dictionary_of_json_values(client):
    answer = client.classify(picture("red"), labels=COLOURS)
    assert Classification.model_validate(answer.to_dict()).to_dict() == answer.to_dict()
    assert answer.to_dict()["results"][0]["predictions"][0]["label"] == "red"


def test_a_result_is_a_table_with_a_row_for_each_prediction(client, tmp_path):
    pytest.importorskip("pandas")
    (tmp_path / "red.png").write_bytes(picture("red"))
    table = client.classify(tmp_path / "red.png", b"no image", labels=COLOURS, top_k=2).to_pandas()
    assert list(table.columns) == ["image", "rank", "label", "score", "similarity", "rejected", "error"]
    assert list(table["image"]) == [str(tmp_path / "red.png")] * 2 + [1]
    assert table["label"][0] == "red"
    assert "text" in table["error"][2]
    assert table["error"].isna().tolist() == [True, True, False]


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    import_module = builtins.__import__

    def without_pandas(name, *arguments):
        if name == "pandas":
            raise ImportError(name)
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match="pip install pandas"):
        classification().to_pandas()


def test_a_label_set_shows_its_version_and_the_number_of_its_classes(client):
    made = client.label_sets.put("pets", ["cat", "dog"])
    assert repr(made) == f"LabelSet('pets@{made.version}', 2 classes)"


def test_every_public_name_can_be_imported():
    assert all(getattr(deixis, name) for name in deixis.__all__)
