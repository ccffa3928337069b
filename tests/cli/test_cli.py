"""`deixis classify`, `evaluate`, `label-sets` and `examples` with the fake encoder."""

import csv
import io
import json
import os
import re
import socket
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from app.classification.methods import METHODS
from app.cli.predictions import print_table
from app.runtime.regular_files import read_regular
from app.settings import SETTING_GROUPS, Settings
from deixis import answers
from tests.api.test_examples import shade
from tests.cli.output import assert_refused, cells
from tests.conftest import picture


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures of each of two colours."""
    for colour in ("red", "dark_blue"):
        place = tmp_path / "pictures" / colour
        place.mkdir(parents=True)
        for number in range(3):
            (place / f"{number}.png").write_bytes(picture(colour.removeprefix("dark_"), (8 + number, 8)))
    return tmp_path / "pictures"


def test_a_folder_is_classified_file_by_file_in_order(run, folder):
    done = run("classify", folder, "-l", "red, green, blue", "-f", "json")

    assert done.exit_code == 0, done.stderr
    found = [(answer["path"].split("/")[-2], answer["predictions"][0]["label"]) for answer in json.loads(done.stdout)]
    assert found == [("dark_blue", "blue")] * 3 + [("red", "red")] * 3


def test_labels_come_from_a_file(run, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\ufeffred\n\n green \n", "utf-8")

    done = run("classify", folder / "red", "-l", f"@{names}", "-l", '["blue, or so"]', "-f", "json", "-k", 3)

    assert done.exit_code == 0, done.stderr
    labels = {each["label"] for each in json.loads(done.stdout)[0]["predictions"]}
    assert labels == {"red", "green", "blue, or so"}


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("classify", "x", "-f", "tabel"), "table"),
        (("watch", ".", "--write", "Jsn"), "json"),
        (("keys", "create", "--scope", "reed"), None),
        (("keys", "create", "--scope", "clasify"), "classify"),
    ],
)
def test_a_value_that_is_not_one_of_the_choices_gets_a_suggestion(run, arguments, meant):
    done = run(*arguments)
    message = " ".join(done.stderr.replace("│", "").split())
    assert done.exit_code == 2
    assert f"'{arguments[-1]}' is not one of '" in message
    assert (f"; did you mean '{meant}'?" in message) if meant else ("did you mean" not in message)


def test_a_missing_file_of_labels_is_an_error(run, folder):
    done = run("classify", folder, "-l", "@nowhere.txt")

    assert done.exit_code == 2
    assert "nowhere.txt" in done.stderr


def test_the_exit_status_is_0_for_all_1_for_some_and_2_for_no_files(run, folder, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    arguments = ("-l", "red, blue")

    assert run("classify", folder, *arguments).exit_code == 0
    assert run("classify", folder, bad, *arguments).exit_code == 1
    assert run("classify", bad, *arguments).exit_code == 2


def deny_reading(monkeypatch, denied):
    def read(file, *arguments):
        if file == denied:
            raise PermissionError(13, "Permission denied")
        return read_regular(file, *arguments)

    monkeypatch.setattr("app.images.reading.read_regular", read)


def test_a_file_that_cannot_be_read_is_reported_and_skipped(run, folder, monkeypatch):
    deny_reading(monkeypatch, folder / "red" / "1.png")

    done = run("classify", folder, "-l", "red, blue")

    assert done.exit_code == 1
    assert "1.png: Permission denied" in done.stderr.replace("\n", " ")


def test_evaluate_counts_correct_predictions(run, folder):
    (folder / "red" / "wrong.png").write_bytes(picture("blue"))

    done = run("evaluate", folder, "--json", "-")

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["top1"]) == (7, pytest.approx(6 / 7))
    assert {row["name"]: row["correct"] for row in report["classes"]} == {"dark blue": 3, "red": 3}
    assert report["confusion"] == [
        {"label": "dark blue", "predicted": "dark blue", "count": 3},
        {"label": "red", "predicted": "red", "count": 3},
        {"label": "red", "predicted": "dark blue", "count": 1},
    ]


def test_evaluate_uses_a_label_set_and_the_names_of_subfolders(run, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("blue\nred\ngreen", "utf-8")
    assert run("label-sets", "import", "colours", names).exit_code == 0

    named = run("evaluate", folder, "-s", "colours", "-n", "dark_blue=blue")
    unnamed = run("evaluate", folder, "-s", "colours")

    assert named.exit_code == 0, named.stderr
    assert "top-1 1.0000" in named.stdout
    assert unnamed.exit_code == 2
    assert "unknown class 'dark blue'" in unnamed.stderr


@pytest.mark.parametrize("name", ["tabby__blue_cat", "_tabby_blue cat_", "tabby  blue_ cat"])
def test_the_name_of_a_subfolder_is_normalised_like_a_label(run, where, tmp_path, name):
    for subfolder, colour in [(name, "blue"), ("caf\u0065\u0301_red", "red")]:
        (tmp_path / "pictures" / subfolder).mkdir(parents=True)
        (tmp_path / "pictures" / subfolder / "a.png").write_bytes(picture(colour))
    spelt = {"tabby blue cat", "caf\u00e9 red"}

    for labels in (
        [],
        ["-l", "tabby  blue cat, cafe\u0301 red"],
        ["-l", json.dumps([" caf\u00e9 red", "tabby blue cat "])],
    ):
        done = run("evaluate", tmp_path / "pictures", *labels, "--json", "-", *where)

        assert done.exit_code == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["top1"] == 1
        assert {row["name"] for row in report["classes"]} == spelt


def test_a_name_for_a_subfolder_is_normalised_too(run, where, folder):
    done = run("evaluate", folder, "-n", "red=cafe\u0301  red ", "--json", "-", *where)

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["top1"] == 1
    assert {row["name"] for row in report["classes"]} == {"dark blue", "caf\u00e9 red"}


@pytest.mark.parametrize("command", [["classify", "-l", "red, blue"], ["evaluate"]], ids=lambda each: each[0])
def test_the_limits_of_a_server_do_not_apply_in_process(run, folder, monkeypatch, command):
    monkeypatch.setenv("DEIXIS_REQUEST_TIMEOUT_S", "0.001")
    monkeypatch.setenv("DEIXIS_MAX_QUEUED_IMAGES", "8")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "8")
    for number in range(40):
        (folder / "red" / f"more {number}.png").write_bytes(picture("red"))

    done = run(command[0], folder, *command[1:])

    assert done.exit_code == 0, done.stderr


def test_too_many_labels_are_one_error_and_no_file_is_reported(run, where, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"label {number}" for number in range(1500)), "utf-8")

    done = run("classify", folder, "-l", f"@{names}", *where)

    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "DEIXIS_MAX_LABELS" in done.stderr
    assert "skipped" not in done.stderr


@pytest.mark.parametrize("empty", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_not_a_label_set(run, tmp_path, empty):
    (tmp_path / "empty.txt").write_text(empty, "utf-8")

    done = run("label-sets", "import", "x", tmp_path / "empty.txt")

    assert_refused(done, "empty.txt")


def test_an_export_that_cannot_be_written_is_an_error(run, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("blue\nred", "utf-8")
    assert run("label-sets", "import", "colours", names).exit_code == 0

    for output in (tmp_path / "nowhere" / "x.json", tmp_path):
        assert_refused(run("label-sets", "export", "colours", "-o", output), str(output))


def test_a_report_that_cannot_be_written_is_an_error_before_the_model_is_loaded(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: pytest.fail("the model was loaded"))

    done = run("evaluate", folder, "--json", tmp_path / "nowhere" / "x.json")

    assert_refused(done, "nowhere")


def test_a_port_in_use_is_an_error_before_the_models_are_loaded(run, monkeypatch):
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        done = run("serve", "--port", port)

    assert_refused(done, f"port {port}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"klasses": ["a"]}', "is not a label set: classes: Field required"),
        (
            '{"classes": [{"name": "a", "threshold": true}]}',
            "classes.0.threshold: Input should be a number; given: true",
        ),
        ('[{"name": "a", "threshold": "high"}]', "unable to parse string as a number; given: 'high'"),
        ('{"classes": ["a"], "priors": {"a": false}}', "priors.a: Input should be a number; given: false"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_not_a_label_set_is_refused_with_the_field_and_its_value(run, tmp_path, content, problem):
    wrong = tmp_path / "wrong.json"
    wrong.write_text(content, "utf-8")
    assert_refused(run("label-sets", "import", "x", wrong), problem)


def test_every_setting_is_an_option_of_serve_in_the_panel_of_its_group(run):
    panels = run("serve", "--help").stdout.split("╭─ ")

    group = ""
    for name in Settings.model_fields:
        group = SETTING_GROUPS.get(name, group)
        (panel,) = [panel for panel in panels if panel.startswith(f"{group} ─")]
        assert f"--{name.replace('_', '-')} " in panel


@pytest.mark.parametrize("place", ["before the command", "after serve", "in a variable"])
def test_commands_read_the_configuration_file(run, tmp_path, monkeypatch, place):
    monkeypatch.setenv("DEIXIS_CONFIG", "")
    file = tmp_path / "mine.toml"
    file.write_text("port = 'x'", "utf-8")
    if place == "in a variable":
        monkeypatch.setenv("DEIXIS_CONFIG", str(file))
    arguments = {"before the command": ("--config", file, "keys", "list"), "after serve": ("serve", "--config", file)}

    assert_refused(run(*arguments.get(place, ("keys", "list"))), f"port in {file}: Input should be a valid integer")


# --- example images ------------------------------------------------------------------------------------------------

# The fake encoder cannot tell these words apart by the pictures.
SUBFOLDERS = ("tomato", "green_leaf", "sky")
CLASSES = ("tomato", "green-ish", "sky")
NAMED = ("-n", "green_leaf=green-ish")


def fill(folder, each, first=0):
    """Make ``each`` pictures in every subfolder."""
    for kind, name in enumerate(SUBFOLDERS):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            (folder / name / f"{number}.png").write_bytes(shade(kind, number))
    return folder


@pytest.fixture
def things(run, tmp_path):
    """A folder of examples, three of each class, beside a label set that is made."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES), "utf-8")
    assert run("label-sets", "import", "things", names).exit_code == 0
    return fill(tmp_path / "examples", 4)


def test_examples_are_added_by_subfolder_counted_used_for_selection_and_deleted(run, where, things):
    added = run("examples", "add", "things", things, "--by-subfolder", *NAMED, *where)

    assert added.exit_code == 0, added.stderr
    assert "12 added, 0 relabelled, 0 duplicates, 0 skipped" in added.stdout
    counted = cells(run("examples", "count", "things", *where))
    assert counted[1:] == [["green-ish", "4"], ["sky", "4"], ["tomato", "4"], ["(unlabelled)", "0"]]

    table = run("examples", "selection", "things", *where)
    selection = json.loads(run("examples", "selection", "things", "--json", *where).stdout)
    lines = cells(table)
    assert lines[0] == [selection["method"]]
    assert selection["labelled"] == 12
    assert selection["leaderboard"][0]["method"] in {"gda", "tip-adapter"}
    rows = {words[0]: words for words in lines if words}
    for row in selection["leaderboard"]:
        assert rows[row["method"]][1] == f"{row['accuracy']:.4f}"
    assert "NLL" in table.stdout
    assert "not run:" in table.stdout

    again = run("examples", "add", "things", things, "-b", *NAMED, *where)
    assert "0 added, 0 relabelled, 12 duplicates" in again.stdout

    gone = run("examples", "delete", "things", "--class", "sky", *where)
    assert "4 deleted" in gone.stdout
    assert cells(run("examples", "count", "things", *where))[1:3] == [["green-ish", "4"], ["tomato", "4"]]
    assert "8 deleted" in run("examples", "delete", "things", "--all", *where).stdout
    assert cells(run("examples", "count", "things", *where))[1:] == [["(unlabelled)", "0"]]


def test_examples_are_added_unlabelled_and_relabelled(run, where, things):
    done = run("examples", "add", "things", things / "tomato", things / "sky" / "*.png", *where)
    assert "8 added" in done.stdout
    assert cells(run("examples", "count", "things", *where))[1:] == [["(unlabelled)", "8"]]
    labelled = run("examples", "add", "things", things / "tomato", "-c", "tomato", *where)
    assert "0 added, 4 relabelled, 0 duplicates" in labelled.stdout
    assert cells(run("examples", "count", "things", *where))[1:] == [["tomato", "4"], ["(unlabelled)", "4"]]
    assert "4 deleted" in run("examples", "delete", "things", "--unlabelled", *where).stdout


def test_several_batches_of_examples_are_all_added(run, where, things, tmp_path):
    fill(tmp_path / "many", 15, first=100)
    done = run("examples", "add", "things", tmp_path / "many", *where)
    assert "45 added" in done.stdout, done.stderr


def test_bad_examples_are_reported_and_set_the_exit_status(run, where, things, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bad" / f"{name}.jpg").write_bytes(b"nonsense")

    some = run("examples", "add", "things", things / "sky", tmp_path / "bad", "-c", "sky", *where)
    every = run("examples", "add", "things", tmp_path / "bad", *where)

    assert (some.exit_code, every.exit_code) == (1, 2)
    assert "4 added, 0 relabelled, 0 duplicates, 2 skipped" in some.stdout
    for done in (some, every):
        skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
        assert [line.split()[1].rpartition("/")[2] for line in skipped] == ["a.jpg:", "b.jpg:"]


def test_an_unreadable_example_is_reported_and_skipped(run, things, monkeypatch):
    deny_reading(monkeypatch, things / "sky" / "1.png")
    done = run("examples", "add", "things", things, "-b", *NAMED)
    assert done.exit_code == 1
    assert "sky/1.png: Permission denied" in done.stderr
    assert "11 added, 0 relabelled, 0 duplicates, 1 skipped" in done.stdout


def test_invalid_examples_are_errors_of_one_line(run, where, things):
    for arguments, message in [
        (["things", things, "-b", "-c", "sky"], "excludes --by-subfolder"),
        (["things", things, things, "-b"], "there are 2 paths"),
        (["things", things, *NAMED], "needs --by-subfolder"),
        (["things", things, "-b", "-n", "leaf=sky"], "unknown subfolder 'leaf'"),
        (["things", things, "-b", "-n", "green_leaf"], "not of the form SUBFOLDER=CLASS"),
        (["things", things / "tomato", "-b"], "contains its images directly"),
        (["things", things / "nowhere"], "matches nothing"),
        (["things", things, "-b"], "unknown class 'green leaf'"),
        (["things", things, "-c", "puma"], "unknown class 'puma'; known: green-ish, sky, tomato"),
        (["none", things], "unknown label set 'none'; known: things"),
    ]:
        assert_refused(run("examples", "add", *arguments, *where), message)
    assert cells(run("examples", "count", "things", *where))[1:] == [["(unlabelled)", "0"]]


def test_invalid_options_of_examples_commands_are_errors_of_one_line(run, where, things):
    for arguments, message in [
        (["count", "none"], "unknown label set 'none'"),
        (["delete", "none", "--all"], "unknown label set 'none'"),
        (["delete", "things"], "pass exactly one of --class, --unlabelled and --all"),
        (["delete", "things", "--all", "--unlabelled"], "pass exactly one of --class, --unlabelled and --all"),
        (["delete", "things", "--all", "-c", "sky"], "pass exactly one of --class, --unlabelled and --all"),
        (["selection", "none"], "unknown label set 'none'"),
        (["selection", "things"], "wait until the methods have been compared"),
        (["selection", "things", "-m", "nope"], "unknown model 'nope'"),
    ]:
        assert_refused(run("examples", *arguments, *where), message)


def test_too_many_examples_are_an_error_that_names_the_setting(run, where, things, monkeypatch):
    monkeypatch.setenv("DEIXIS_MAX_EXAMPLES", "5")
    assert_refused(run("examples", "add", "things", things, *where), "DEIXIS_MAX_EXAMPLES")


def test_the_queue_limit_does_not_apply_to_examples_in_process(run, things, tmp_path, monkeypatch):
    monkeypatch.setenv("DEIXIS_MAX_QUEUED_IMAGES", "4")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "4")
    done = run("examples", "add", "things", fill(tmp_path / "many", 15, first=100))
    assert "45 added" in done.stdout, done.stderr


def test_priors_come_from_a_file_an_object_or_the_label_set(run, where, tmp_path):
    (image := tmp_path / "image.png").write_bytes(picture("teal"))
    (counts := tmp_path / "counts.json").write_text('{"red": 1000000, "blue": 1}')
    (labels := tmp_path / "labels.txt").write_text("red\nblue")
    plain = run("classify", image, "-l", "red,blue", "-f", "json", *where)
    expected = [[each["label"] for each in result["predictions"]] for result in json.loads(plain.stdout)]
    assert expected == [["blue"]]

    assert run("label-sets", "import", "colours", labels, "--priors", counts, *where).exit_code == 0
    for options in (["-l", "red,blue", "--priors", counts], ["-l", "red,blue", "--priors", counts.read_text()]):
        assert (
            json.loads(run("classify", image, *options, "-f", "json", *where).stdout)[0]["predictions"][0]["label"]
            == "red"
        )
    stored = run("classify", image, "-s", "colours", "-f", "json", *where)
    off = run("classify", image, "-s", "colours", "--priors", "uniform", "-f", "json", *where)
    found = [json.loads(done.stdout)[0]["predictions"][0]["label"] for done in (stored, off)]
    assert found == ["red", "blue"]

    exported = json.loads(run("label-sets", "export", "colours", *where).stdout)
    assert exported["priors"] == {"red": 1000000, "blue": 1}
    assert "prior" in run("label-sets", "show", "colours", *where).stdout
    bad = run("classify", image, "-l", "red,blue", "--priors", labels, *where)
    assert bad.exit_code == 2
    assert "labels.txt is not JSON" in bad.stderr or "is not JSON" in bad.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--priors", "unifrom"], ["'unifrom' is neither a file, nor", "did you mean 'uniform'?"]),
        (["--priors", '{"red": true, "blue": 1}'], ["has true for 'red', which is not a number"]),
        (["--priors", '{"red": 1, "blue": "many"}'], ["""has "many" for 'blue'"""]),
        (["--priors", "[1, 2]"], ["'[1, 2]' is neither a file"]),
        (["--min-score", "1.8"], ["--min-score", "less than or equal to 1; given: '1.8'"]),
        (["--top-k", "many"], ["--top-k", "given: 'many'"]),
        (["--explain", "--format", "csv"], ["--explain: has no place in the format 'csv'"]),
        (["--explain", "--format", "fiftyone"], ["--explain: has no place in the format 'fiftyone'"]),
    ],
)
def test_an_option_without_a_meaning_is_refused_with_its_value(run, tmp_path, options, words):
    (image := tmp_path / "image.png").write_bytes(picture("teal"))
    done = run("classify", image, "-l", "red,blue", *options)
    message = " ".join(done.stderr.replace("\u2502", " ").split())  # typer's errors are in a box
    assert done.exit_code == 2
    assert all(word in message for word in words), message


def test_a_hierarchy_is_imported_shown_and_exported_and_answers_end_at_a_sure_label(run, where, tmp_path):
    (image := tmp_path / "image.png").write_bytes(picture("blue"))
    (tree := tmp_path / "tree.txt").write_text("colour\n  warm\n    red\n    yellow\n  blue\n")
    assert run("label-sets", "import", "tree", tree, *where).exit_code == 0
    assert "colour|warm" in run("label-sets", "show", "tree", *where).stdout
    for suffix in (".txt", ".csv", ".json"):
        file = tmp_path / f"again{suffix}"
        assert run("label-sets", "export", "tree", "-o", file, *where).exit_code == 0
        assert run("label-sets", "import", "again", file, *where).exit_code == 0
        assert "colour|warm" in run("label-sets", "show", "again", *where).stdout

    (result,) = json.loads(run("classify", image, "-s", "tree", "-f", "json", *where).stdout)
    assert [step["label"] for step in result["label_path"]] == ["colour", "blue"]
    assert result["path"].endswith(".png")
    table = run("classify", image, "-s", "tree", "--min-score", "1", *where).stdout
    assert table.splitlines()[1].split()[1] == "colour"
    rows = list(csv.DictReader(io.StringIO(run("classify", image, "-s", "tree", "-f", "csv", *where).stdout)))
    assert rows[0]["label path"] == "colour|blue"
    assert rows[0]["path"].endswith(".png")


# --- classification with example images ----------------------------------------------------------------------


def test_classify_uses_the_selected_method(run, where, things, tmp_path):
    assert run("examples", "add", "things", things, "-b", *NAMED, *where).exit_code == 0
    asked = fill(tmp_path / "asked", 1, first=50)

    plain = run("classify", asked, "-s", "things", "-f", "json", *where)
    shares = ("--coverage", "0.8", "--reject-below", "0.2")
    as_csv = run("classify", asked, "-s", "things", "-f", "csv", *shares, *where)
    table = run("classify", asked, "-s", "things", *shares, *where)

    assert plain.exit_code == 0, plain.stderr
    assert [each["predictions"][0]["label"] for each in json.loads(plain.stdout)] == ["green-ish", "sky", "tomato"]
    assert all("rejected" not in each and "prediction_set" not in each for each in json.loads(plain.stdout))
    assert as_csv.exit_code == 0, as_csv.stderr
    rows = list(csv.DictReader(io.StringIO(as_csv.stdout)))
    assert list(rows[0]) == ["path", "rank", "label", "score", "similarity", "rejected", "prediction set", "error"]
    for row in rows:
        assert row["rejected"] == "no"
        assert row["prediction set"].split(", ")[0] == row["label"]
    assert table.exit_code == 0, table.stderr
    assert table.stdout.split("\n")[0].split() == ["image", "label", "score", "runner-up", "prediction", "set"]


def test_optional_columns_of_csv_appear_only_if_they_were_requested(run, folder):
    asked = ("classify", folder, "-l", "red, blue", "-f", "csv", "-k", "2")
    without = run(*asked)
    rejecting = run(*asked, "--reject-below", "1")

    assert without.exit_code == rejecting.exit_code == 0
    assert without.stdout.splitlines()[0] == "path,rank,label,score,similarity,error"
    assert rejecting.stdout.splitlines()[0] == "path,rank,label,score,similarity,rejected,error"
    assert rejecting.stdout.count("none of these") == 6 * 2


def test_a_table_has_a_row_per_image_with_its_best_label_and_the_next_ones(run, where, folder):
    asked = ("classify", folder / "red" / "0.png", "-l", "red, blue, green")
    by_format = {k: json.loads(run(*asked, "-k", k, "-f", "json", *where).stdout)[0]["predictions"] for k in (3,)}
    red, *others = [(each["label"], f"{each['score']:.4f}") for each in by_format[3]]
    path = str(folder / "red" / "0.png")

    assert cells(run(*asked, *where)) == [["image", "label", "score", "runner-up"], [path, *red, *others[0]]]
    assert cells(run(*asked, "-k", 1, *where)) == [["image", "label", "score"], [path, *red]]
    listed = [*others[0][:1], f"{others[0][1]},", *others[1]]
    assert cells(run(*asked, "-k", 3, *where))[1] == [path, *red, *listed]
    rejected = cells(run(*asked, "--reject-below", 1, *where))[1]
    assert rejected == [path, "none", "of", "these", red[0], f"{red[1]},", *others[0]]


def test_a_table_in_a_pipe_has_whole_paths_and_one_line_per_image(run, tmp_path):
    file = tmp_path.joinpath(*(["a" * 60] * 5)) / "red.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(picture("red"))

    done = run("classify", file, "-l", "red, blue")

    assert len(done.stdout.splitlines()) == 2
    assert str(file) in done.stdout


@pytest.mark.parametrize("name", ["a" * 100 + "/b.jpg", "\u6f22" * 50 + "/b.jpg"], ids=["narrow", "wide"])
def test_a_table_on_a_terminal_shortens_long_paths_at_their_start(name):
    results = [answers.ImageResult(predictions=[answers.Prediction(label="cat", score=0.9, similarity=0.3)])] * 2
    terminal = Console(width=40, force_terminal=True, color_system=None, file=io.StringIO())

    print_table([Path(name), Path("c.jpg")], results, terminal)

    _, long, short = terminal.file.getvalue().splitlines()
    assert cell_len(long) <= 40
    assert re.match(r"\u2026\S+/b\.jpg +cat +0\.9000$", long)
    assert short.split() == ["c.jpg", "cat", "0.9000"]


def test_files_and_folders_that_cannot_be_read_are_rows_with_an_error(run, where, folder, monkeypatch):
    bad = folder / "red" / "bad.jpg"
    bad.write_bytes(b"nothing")
    walk = os.scandir

    def scandir(place):
        if Path(place) == folder / "dark_blue":
            raise PermissionError(13, "Permission denied", str(place))
        return walk(place)

    monkeypatch.setattr("os.scandir", scandir)
    asked = ("classify", folder, "-l", "red, blue", *where)

    as_csv, as_json, table = (run(*asked, "-f", output) for output in ("csv", "json", "table"))

    assert [done.exit_code for done in (as_csv, as_json, table)] == [1, 1, 1]
    rows = list(csv.DictReader(io.StringIO(as_csv.stdout)))
    assert [(row["path"], row["label"]) for row in rows if not row["error"]] == [
        (str(folder / "red" / f"{number}.png"), "red") for number in range(3)
    ]
    failed = {row.pop("path"): row.pop("error") for row in rows if row["error"]}
    assert set(failed) == {str(bad), str(folder / "dark_blue")}
    assert failed[str(folder / "dark_blue")] == "the folder cannot be read: Permission denied"
    assert {each["path"]: each["error"]["detail"] for each in json.loads(as_json.stdout) if "error" in each} == failed
    assert len(table.stdout.splitlines()) == 1 + 3


def test_rejected_images_are_marked_in_json(run, where, folder):
    done = run("classify", folder, "-l", "red, blue", "--reject-below", "1", "-f", "json", *where)
    assert done.exit_code == 0, done.stderr
    assert [each["rejected"] for each in json.loads(done.stdout)] == [True] * 6


def test_invalid_shares_are_errors_of_one_line(run, where, folder, things):
    for arguments, message in [
        (["-l", "a", "--coverage", "1"], "--coverage"),
        (["-l", "a", "--coverage", "0"], "--coverage"),
        (["-l", "a", "--false-rejection-rate", "1.5"], "--false-rejection-rate"),
        (["-l", "a", "--coverage", "nan"], "--coverage"),
        (["-l", "a", "--coverage", "0.9"], "labelled example images"),
        (["-s", "things", "--false-rejection-rate", "0.1"], "labelled example images"),
        (["-l", "a", "--reject-below", "0.1", "--false-rejection-rate", "0.1"], "not both"),
    ]:
        assert_refused(run("classify", folder, *arguments, *where), message)
    assert run("classify", folder, "-l", "a", "--reject-below", "1.5", *where).exit_code == 2


# --- accuracy against the number of examples -----------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    return fill(tmp_path / "asked", 3, first=50)


@pytest.fixture
def pool(tmp_path):
    return fill(tmp_path / "pool", 4, first=80)


def test_a_learning_curve_is_a_table_a_text_chart_and_a_file(run, things, asked, pool, tmp_path):
    file = tmp_path / "curve.json"
    arguments = ("--support", things, "--pool", pool, "--shots", "4,1,2", "--draws", 2)

    done = run("evaluate", asked, "--method", "all", *arguments, "--json", file)

    assert done.exit_code == 0, done.stderr
    report = json.loads(file.read_text("utf-8"))
    assert (report["images"], report["labelled"], report["unlabelled"], report["skipped"]) == (9, 12, 12, 0)
    points = {(point["method"], point["shots"]): point for point in report["points"]}
    needs = {name: set(method.learns) for name, method in METHODS.items() if not (method.is_control or method.stateful)}
    for name, learns in needs.items():
        if "labelled images" in learns:
            for shots in (1, 2, 4):
                assert len(points[name, shots]["accuracies"]) == 2
        else:
            assert len(points[name, None]["accuracies"]) == 1
    # Four shots of four images are all there are, so that both draws learn the same.
    assert len(set(points["gda", 4]["accuracies"])) == 1
    assert points["gda", 4]["accuracies"][0] == 1
    for shots in (1, 2, 4):
        assert set(points["auto", shots]["chosen"]) <= set(METHODS)
    head = next(line for line in done.stdout.splitlines() if line.startswith("method"))
    assert [head.index(each) for each in ("1 shot", "2 shots", "4 shots")] == sorted(
        head.index(each) for each in ("1 shot", "2 shots", "4 shots")
    )
    assert "--- zero-shot" in done.stdout
    assert "A gda" in done.stdout


def test_a_learning_curve_on_standard_output_is_only_json(run, things, asked):
    done = run("evaluate", asked, "--method", "all", "--support", things, "--shots", 1, "--draws", 1, "--json", "-")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert {point["shots"] for point in report["points"]} == {None, 1}
    assert any("unlabelled" in each for each in report["not_run"]) or not report["not_run"]


def test_a_curve_of_unlabelled_images_has_one_point_per_method(run, asked, pool):
    done = run("evaluate", asked, "--method", "all", "--pool", pool, "--json", "-")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["labelled"], report["unlabelled"]) == (0, 12)
    assert {point["shots"] for point in report["points"]} == {None}
    assert {"zlap", "auto"} <= {point["method"] for point in report["points"]}


def test_a_curve_uses_the_classes_of_a_label_set_and_names_of_subfolders(run, things, asked):
    arguments = ("--method", "all", "--support", things, "--shots", 4, "--draws", 1, "--json", "-")
    done = run("evaluate", asked, "-s", "things", *NAMED, *arguments)
    assert done.exit_code == 0, done.stderr
    points = {(point["method"], point["shots"]): point for point in json.loads(done.stdout)["points"]}
    assert points["gda", 4]["accuracies"] == [1]
    assert_refused(run("evaluate", asked, "-s", "things", *arguments), "unknown class 'green leaf'")
    (things / "puma").mkdir()
    (things / "puma" / "0.png").write_bytes(shade(0, 99))
    refused = run("evaluate", asked, "-s", "things", *NAMED, *arguments)
    assert_refused(refused, "unknown class 'puma'")
    assert "--support" in refused.stderr


def test_bad_files_of_a_curve_are_reported_and_the_rest_is_measured(run, things, asked, pool):
    for place in (things / "sky", asked / "sky", pool / "sky"):
        (place / f"bad in {place.parent.name}.png").write_bytes(b"nonsense")
    arguments = ("--support", things, "--pool", pool, "--shots", 1, "--draws", 1, "--json", "-")

    done = run("evaluate", asked, "--method", "all", *arguments)

    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["images"], report["labelled"], report["unlabelled"], report["skipped"]) == (9, 12, 12, 3)
    for name in ("examples", "asked", "pool"):
        assert f"bad in {name}.png" in done.stderr


def test_an_invalid_curve_is_an_error_before_the_model_is_loaded(run, things, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", lambda _: pytest.fail("the model was loaded"))
    every = ("--method", "all")
    for arguments, message in [
        (["--support", things], "needs --method all"),
        (["--pool", things, "--method", "gda"], "needs --method all"),
        ([*every, "--picture", tmp_path / "a.svg"], "needs --support or --pool"),
        ([*every, "--support", things, "--picture", tmp_path / "a.bmp"], "must end in one of .svg, .png, .pdf"),
        ([*every, "--support", things, "--picture", tmp_path / "nowhere" / "a.svg"], "there is no folder"),
    ]:
        assert_refused(run("evaluate", asked, *arguments), message)


def test_invalid_numbers_of_images_are_errors_of_one_line(run, things, asked, tmp_path):
    for shots, message in [
        ("1,x", "not a list of numbers"),
        ("", "not a list of numbers"),
        ("0,1", "a number below 1"),
    ]:
        done = run("evaluate", asked, "--method", "all", "--support", things, "--shots", shots)
        assert_refused(done, message)
    assert run("evaluate", asked, "--method", "all", "--support", things, "--draws", 0).exit_code == 2
    (tmp_path / "empty").mkdir()
    for flag in ("--support", "--pool"):
        assert_refused(run("evaluate", asked, "--method", "all", flag, tmp_path / "empty"), "empty")


def test_a_server_measures_no_learning_curves(run, things, asked):
    done = run("evaluate", asked, "--method", "all", "--support", things, "--server", "http://127.0.0.1:9")
    assert_refused(done, "leave out --server")


def test_a_chart_is_written(run, things, asked, tmp_path):
    arguments = ("evaluate", asked, "--method", "all", "--support", things, "--shots", "1,2", "--draws", 1)
    file = tmp_path / "curve.svg"

    done = run(*arguments, "--picture", file)

    assert done.exit_code == 0, done.stderr
    assert "<svg" in file.read_text("utf-8")


def test_all_methods_are_compared_with_the_stored_examples(run, where, things, asked):
    assert run("examples", "add", "things", things, "-b", *NAMED, *where).exit_code == 0
    done = run("evaluate", asked, "-s", "things", *NAMED, "--method", "all", "--json", "-", *where)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["images"] == 9
    assert {"zero-shot", "cupl"} <= {each["method"] for each in report["methods"]}


# --- several labels per image --------------------------------------------------------------------------------------


@pytest.fixture
def labelled(folder, tmp_path):
    """Return a file with the labels of the pictures of a folder: two have both, and one has none."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    labels = {name: ["red"] if name.startswith("red") else ["blue"] for name in names}
    labels |= {names[0]: ["blue", "red"], names[-1]: ["red", "blue"], names[1]: []}
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(labels | {"nowhere.png": ["red"]}))
    return file


def test_evaluate_measures_several_labels_per_image(run, folder, labelled, where):
    done = run("evaluate", folder, "--image-labels", labelled, "-l", "red, blue", "--json", "-", *where)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["skipped"]) == (6, 0)
    rows = {row["name"]: row for row in report["at_default"]["labels"]}
    assert {name: row["support"] for name, row in rows.items()} == {"red": 4, "blue": 3}
    assert 0.5 < report["at_default"]["mean_average_precision"] < 1
    assert "1 of the 7 images" in " ".join(done.stderr.split())
    table = run("evaluate", folder, "--image-labels", labelled, *where)
    assert "mAP" in table.stdout
    assert "one per label, fitted" in table.stdout


def test_examples_of_several_classes_are_added_from_a_file_or_with_several_options(
    run, folder, labelled, tmp_path, where
):
    names = tmp_path / "names.txt"
    names.write_text("blue\nred\ngreen", "utf-8")
    assert run("label-sets", "import", "colours", names, *where).exit_code == 0
    added = run("examples", "add", "colours", folder, "--image-labels", labelled, *where)
    assert added.exit_code == 0, added.stderr
    assert "6 added" in added.stdout
    assert "2 of 5 labelled images have several classes" in added.stdout
    more = run("examples", "add", "colours", folder / "red", "--class", "red", "--class", "green", *where)
    assert "3 relabelled" in more.stdout
    assert "4 of 5 labelled images have several classes" in more.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", ".", "--image-labels", "labels.csv", "--method", "all"), "--image-labels"),
        (("evaluate", ".", "--image-labels", "labels.csv", "-n", "a=b"), "--image-labels"),
        (("examples", "add", "x", ".", "--image-labels", "labels.csv", "-b"), "--image-labels"),
        (("examples", "add", "x", ".", "..", "--image-labels", "labels.csv"), "--image-labels"),
        (("evaluate", ".", "--image-labels", "nowhere.csv"), "nowhere.csv: cannot be read"),
    ],
)
def test_a_file_of_labels_excludes_other_sources_of_labels(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
