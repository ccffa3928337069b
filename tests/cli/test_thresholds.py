"""`deixis thresholds`, in this process and on a server."""

import json
import re

import pytest
from rich.console import Console

from app.cli.pictures import check_picture, write_picture
from app.cli.thresholds import _figure, _text_chart
from deixis.answers import LabelThreshold
from tests.api.test_examples import shade

CLASSES = ["red", "green", "blue"]


@pytest.fixture
def taught(run, where, tmp_path):
    """A function that runs the command on a label set with four examples of each class, and returns its output."""
    content = {"multi_label": True, "classes": [{"name": "red", "threshold": 0.25}, "green", "blue"]}
    (tmp_path / "colours.json").write_text(json.dumps(content), "utf-8")
    assert run("label-sets", "import", "colours", tmp_path / "colours.json", *where).exit_code == 0
    for kind, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(shade(kind, number))
    assert run("examples", "add", "colours", tmp_path / "images", "--by-subfolder", *where).exit_code == 0

    def thresholds(*arguments, status=0):
        done = run("thresholds", "colours", *arguments, *where)
        assert done.exit_code == status, done.output
        return done.output

    return thresholds


def test_thresholds_are_shown_with_what_they_find(taught):
    shown = taught()
    assert "colours@1   12 labelled example images" in shown
    assert re.search(r"red +4 +1\.000 +0\.250 +own +1\.000 +1\.000 +1\.000", shown)
    assert re.search(r"green +4 +1\.000 +0\.\d+ +auto +1\.000 +1\.000 +1\.000", shown)
    assert "suggested: highest F1" in shown
    chart = shown[shown.rindex("\nblue\n") :].splitlines()
    assert re.fullmatch(r"  precision \|▃.*█ *\|", chart[2])  # a third of all images are blue
    assert re.fullmatch(r"  recall    \|█+▆? *\|", chart[3])
    assert re.fullmatch(r" +0 +\^ 0\.\d+ +1", chart[4])


def test_json_has_all_fields_of_the_chosen_labels(taught):
    shown = json.loads(taught("--json", "--label", "blue", "--recall", "0.5"))
    (blue,) = shown["labels"]
    assert (shown["label_set"], blue["label"], blue["images"], blue["own"]) == ("colours@1", "blue", 4, None)
    assert blue["curve"]["predicted"][0] == 12
    assert blue["suggested"] is not None


def test_thresholds_are_stored_and_calibration_is_kept(taught):
    before = json.loads(taught("--json"))
    assert before["calibrated"] is True
    assert "stored in colours@2" in taught("--set", "red=auto", "--set", "blue=0.75")
    stored = json.loads(taught("--json"))
    assert [each["own"] for each in stored["labels"]] == [None, None, 0.75]
    assert [each["curve"] for each in stored["labels"]] == [each["curve"] for each in before["labels"]]


def test_suggestions_are_stored_for_the_labels_that_have_one(taught):
    suggested = {
        each["label"]: each["suggested"] for each in json.loads(taught("--json", "--precision", "0.6"))["labels"]
    }
    assert "stored in colours@2" in taught("--precision", "0.6", "--store", "--label", "green", "--label", "blue")
    stored = {each["label"]: each["own"] for each in json.loads(taught("--json"))["labels"]}
    assert stored == {"red": 0.25} | {label: pytest.approx(suggested[label]) for label in ("green", "blue")}


def test_a_goal_that_no_threshold_reaches_is_explained(taught):
    shown = taught("--precision", "0.99")
    assert "no suggestion: red, green, blue: no threshold has a precision of 0.99" in shown
    assert "no label has a suggestion" in taught("--precision", "0.99", "--store", status=2)


def test_curves_are_drawn_as_a_picture(taught, tmp_path):
    taught("--picture", tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text("utf-8")


def of_label(name, threshold=0.5):
    curve = {"thresholds": [0.2, 0.6], "predicted": [2, 1], "correct": [1, 1]}
    own = {"threshold": threshold, "own": threshold, "automatic": 0.5, "suggested": None, "reason": None}
    return LabelThreshold(label=name, images=1, average_precision=1, curve=curve, **own)


def test_labels_with_signs_of_formulas_are_drawn_as_they_are(tmp_path):
    check_picture(tmp_path / "curves.svg")
    write_picture(_figure([of_label("$x^{$")]), tmp_path / "curves.svg")
    assert "$x^{$" in (tmp_path / "curves.svg").read_text("utf-8")


@pytest.mark.parametrize("width", [30, 40, 55, 200])
@pytest.mark.parametrize("threshold", [0, 0.5, 0.8, 0.95, 1])
def test_a_chart_fits_the_terminal_and_marks_the_threshold(monkeypatch, width, threshold):
    monkeypatch.setattr("app.cli.thresholds.out", Console(width=width))
    _, *bars, axis = _text_chart(of_label("cat", threshold)).splitlines()
    assert {len(line) for line in (*bars, axis)} == {min(width, 55)}
    last = bars[0].rindex("|") - 1
    assert abs(axis.index("^") - (13 + threshold * (last - 13))) <= 0.5
    assert f"{threshold:.3f}" in axis.split()


def test_without_examples_the_thresholds_in_use_are_shown(run, where, tmp_path):
    (tmp_path / "shades.txt").write_text("red\ngreen\n", "utf-8")
    run("label-sets", "import", "shades", tmp_path / "shades.txt", *where)
    done = run("thresholds", "shades", *where)
    assert done.exit_code == 0
    assert re.search(r"red +0 +0\.500 +auto", done.output)
    assert "Thresholds apply only with multi_label" in done.output
    assert "there are no labelled example images" in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--precision", "1.2"], "--precision: 1.2 is not above 0 and below 1"),
        (["--precision", "nan"], "--precision: nan is not above 0 and below 1"),
        (["--precision", "0.5", "--recall", "0.5"], "--recall: excludes --precision"),
        (["--set", "red"], "'red' is not LABEL=THRESHOLD"),
        (["--set", "red=2"], "'red=2' is not LABEL=THRESHOLD"),
        (["--set", "red=nan"], "'red=nan' is not LABEL=THRESHOLD"),
        (["--set", "=0.5"], "'=0.5' is not LABEL=THRESHOLD"),
        (["--set", "rad=0.5"], "unknown class 'rad'"),
        (["--label", "rad"], "unknown label 'rad'"),
        (["--picture", "curves.gif"], "'curves.gif' must end in one of .svg, .png, .pdf"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(run, tmp_path, arguments, problem):
    (tmp_path / "colours.txt").write_text("red\ngreen\n", "utf-8")
    run("label-sets", "import", "colours", tmp_path / "colours.txt")
    done = run("thresholds", "colours", *arguments)
    assert done.exit_code == 2
    assert problem in done.output
    assert "colours@1" in run("label-sets", "show", "colours").output


def test_an_unknown_label_set_is_refused(run):
    done = run("thresholds", "none")
    assert done.exit_code == 2
    assert "unknown label set 'none'" in done.output
