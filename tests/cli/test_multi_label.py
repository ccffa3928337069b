"""How commands and integrations show images that may have several labels."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from app.classification.request import ClassifyRequest
from app.cli.backends.over_http import client_options
from app.cli.predictions import NONE_OF_THESE, print_table, write_csv
from app.cli.sorting import FileAction, Sorter
from app.images.sidecars import LabelRecord
from app.integrations.fiftyone import labels_file
from app.integrations.label_studio import Preannotation, _Backend
from app.integrations.label_studio_config import read_config
from deixis.answers import Classification, ImageResult, Prediction
from tests.conftest import picture

TWO = ImageResult(
    predictions=[
        Prediction(label="red", score=0.9, similarity=0.3, threshold=0.5, above=True),
        Prediction(label="blue", score=0.7, similarity=0.2, threshold=0.8, above=False),
        Prediction(label="green", score=0.6, similarity=0.1, threshold=0.5, above=True),
    ],
    labels=["red", "green"],
)
NONE = ImageResult(
    predictions=[Prediction(label="blue", score=0.2, similarity=0.0, threshold=0.5, above=False)], labels=[]
)
FILES = [Path("two.png"), Path("none.png")]


def test_a_table_marks_every_label_that_reaches_its_threshold():
    console = Console(file=io.StringIO(), width=120)
    print_table(FILES, [TWO, NONE], console)
    lines = console.file.getvalue().splitlines()
    assert any("✓ red, ✓ green" in line and "0.9000, 0.6000" in line and "blue 0.7000" in line for line in lines)
    assert any(NONE_OF_THESE in line and "blue 0.2000" in line for line in lines)


def test_csv_says_of_each_prediction_whether_it_reaches_its_threshold(capsys):
    write_csv(FILES, [TWO, NONE])
    header, *rows = (line.split(",") for line in capsys.readouterr().out.splitlines())
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    found = [(each["label"], each["threshold"], each["above"]) for each in cells]
    assert found == [("red", "0.5", "yes"), ("blue", "0.8", "no"), ("green", "0.5", "yes"), ("blue", "0.5", "no")]


def test_keywords_are_the_labels_that_reach_their_threshold():
    rest = {"predictions": [], "rejected": None, "prediction_set": None, "labelled_at": "", "version": ""}
    for labels in (["red", "green"], []):
        assert LabelRecord("00", {}, **rest, labels=labels).keywords(0.99) == labels


def test_a_file_is_sorted_by_its_best_label_or_as_none_of_these(tmp_path):
    sorter = Sorter(tmp_path / "sorted", FileAction.COPY, dry_run=False)
    sorter.validate()
    folders = []
    for file, result in zip(FILES, (TWO, NONE), strict=True):
        (tmp_path / file).write_bytes(picture())
        folders.append(sorter.sort(tmp_path / file, result).parent.name)
    assert folders == ["red", f"_{NONE_OF_THESE}"]


def test_the_recorded_label_of_a_sorted_file_is_that_of_its_folder(tmp_path):
    """Also if a label below its threshold has a higher score; later runs find the folders of labels by the record."""
    best = Prediction(label="blue", score=0.95, similarity=0.4, threshold=0.99, above=False)
    result = TWO.model_copy(update={"predictions": [best, *TWO.predictions]})
    folders = []
    for number in range(2):
        sorter = Sorter(tmp_path / "sorted", FileAction.COPY, dry_run=False)
        sorter.validate()
        (tmp_path / f"{number}.png").write_bytes(picture((number, 0, 0)))
        folders.append(sorter.sort(tmp_path / f"{number}.png", result).parent.name)
    assert folders == ["red", "red"]
    assert [line.split(",")[2] for line in (tmp_path / "sorted/deixis.csv").read_text().splitlines()[1:]] == ["red"] * 2


def test_fiftyone_gets_a_list_of_the_labels():
    labels = labels_file(FILES, [TWO, NONE], classes=None, top_k=1)["labels"]
    assert [each and [entry["label"] for entry in each] for each in labels.values()] == [["red", "green"], None]


@pytest.mark.parametrize(("choice", "chosen"), [("multiple", ["Red", "Green"]), ("single", ["Red"])])
def test_label_studio_gets_all_labels_of_a_control_that_takes_several(choice, chosen):
    choices = "".join(f'<Choice value="{name}"/>' for name in ("Red", "Green", "Blue"))
    config = (
        f'<View><Image name="i" value="$u"/><Choices name="c" toName="i" choice="{choice}">{choices}</Choices></View>'
    )
    (control,) = read_config(config)
    backend = _Backend(None, None, Preannotation({}, multiple_above=0))
    index_of = {"red": 0, "green": 1, "blue": 2}
    region, _ = backend._region(control, control.choices_in({}), index_of, TWO)
    assert region["value"]["choices"] == chosen
    assert backend._region(control, control.choices_in({}), index_of, NONE)[0] is None


def test_a_request_for_one_label_overrides_the_label_set_over_http():
    for value in (True, False, None):
        sent = client_options(ClassifyRequest(label_set="pets", multi_label=value))
        assert sent.get("multi_label") is value


def test_answers_show_all_labels_of_an_image():
    answer = Classification(
        model="m", label_set=None, method="zero-shot", results=[TWO, NONE], timing_ms={}, multi_label=True
    )
    assert repr(TWO) == "ImageResult(labels=['red', 'green'])"
    assert repr(answer).startswith("Classification(2 images: ['red', 'green'], []")
    assert (TWO.label, NONE.label) == ("red", None)
    assert "✓ red" in TWO._repr_html_()
    assert "✓" not in NONE._repr_html_()
    table = answer.to_pandas()
    assert table.above.tolist() == [True, False, True, False]
    assert table.threshold.tolist() == [0.5, 0.8, 0.5, 0.5]
