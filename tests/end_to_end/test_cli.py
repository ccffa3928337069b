"""The command line, in process and with a server: the results are the same."""

import csv
import io
import json

import pytest

from tests.end_to_end.conftest import TRUE_LABELS
from tests.end_to_end.forked_commands import deixis
from tests.end_to_end.server import serving

LABELS = "cat, coffee cup, rocket, astronaut, temple, flower, dog, car, pizza, laptop"


@pytest.fixture(params=["in process", "through a server"])
def where(request, server) -> list[str]:
    return ["--server", server.url] if request.param == "through a server" else []


def test_classify_writes_json_for_a_folder_and_skips_a_bad_file(where, photograph_folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("this is no picture")

    done = deixis("classify", photograph_folder, bad, "--labels", LABELS, "--format", "json", *where, data_dir=tmp_path)

    assert done.returncode == 1, done.stderr
    answers = {answer["path"].rpartition("/")[2]: answer for answer in json.loads(done.stdout)}
    found = {name: answers[f"{name}.jpg"]["predictions"][0]["label"] for name in TRUE_LABELS}
    assert found == TRUE_LABELS
    assert answers["bad.png"]["error"]["type"] == "urn:deixis:problem:not-an-image"
    assert "bad.png" in done.stderr
    assert "cat.jpg" not in done.stderr


def test_classify_writes_a_table_or_csv_for_globs(server, photograph_folder, tmp_path):
    arguments = ("classify", f"{photograph_folder}/*/ch*.jpg", "-l", "cat", "-l", "temple", "--server", server.url)
    table = deixis(*arguments, data_dir=tmp_path)
    rows = deixis(*arguments, "-f", "csv", "-k", 2, data_dir=tmp_path)

    assert (table.returncode, rows.returncode) == (0, 0), table.stderr + rows.stderr
    assert "temple" in table.stdout
    parsed = list(csv.DictReader(io.StringIO(rows.stdout)))
    assert [(row["path"].rpartition("/")[2], row["rank"], row["label"]) for row in parsed] == [
        ("chelsea.jpg", "1", "cat"),
        ("chelsea.jpg", "2", "temple"),
        ("china.jpg", "1", "temple"),
        ("china.jpg", "2", "cat"),
    ]


def test_an_explanation_is_printed_as_bars_or_json(where, photograph_folder, tmp_path):
    photo = photograph_folder / "cat" / "chelsea.jpg"
    animals = tmp_path / "animals.json"
    classes = [("cat", ["whiskers", "pointed ears"]), ("dog", ["a wagging tail"]), ("horse", ["hooves"])]
    animals.write_text(json.dumps([{"name": name, "features": features} for name, features in classes]))
    assert deixis("label-sets", "import", "animals", animals, *where, data_dir=tmp_path).returncode == 0
    arguments = ("classify", photo, "-s", "animals", "--method", "dclip", "--explain", *where)

    table = deixis(*arguments, data_dir=tmp_path)
    as_json = deixis(*arguments, "-f", "json", data_dir=tmp_path)

    assert table.returncode == 0, table.stderr
    bars = [line for line in table.stdout.splitlines() if "\u2588" in line]
    assert any("+" in line and "cat, which has" in line for line in bars)
    assert any(line.strip().startswith("-") for line in bars)
    (answer,) = json.loads(as_json.stdout)
    best = answer["explanation"]["labels"][0]
    assert best["label"] == "cat"
    assert best["supporting"][0]["source"] == "feature"


def test_options_reach_the_method_and_warnings_are_printed(where, photograph_folder, tmp_path):
    photo = photograph_folder / "cat" / "chelsea.jpg"
    plain = deixis("classify", photo, "-l", LABELS, "--method", "autoclip", *where, data_dir=tmp_path)
    refused = deixis("classify", photo, "-l", LABELS, "--method", "autoclip", "-o", "beta=7", *where, data_dir=tmp_path)
    malformed = deixis("classify", photo, "-l", LABELS, "--method", "autoclip", "-o", "beta", *where, data_dir=tmp_path)

    assert plain.returncode == 0
    assert "nothing to weight" in plain.stderr
    assert (refused.returncode, malformed.returncode) == (2, 2)
    assert "7 is not a number from 0.01 to 1" in refused.stderr
    assert "not of the form NAME=NUMBER" in malformed.stderr


def test_the_shipped_label_sets_are_listed_and_another_name_is_refused(tmp_path):
    listed = deixis("label-sets", "shipped", data_dir=tmp_path)
    refused = deixis("label-sets", "import", "animls", data_dir=tmp_path)

    assert "vehicles" in listed.stdout
    assert refused.returncode == 2
    assert "unknown shipped label set 'animls'; known: animals, " in refused.stderr


def test_evaluate_compares_all_methods_and_prints_a_verdict(photograph_folder, tmp_path):
    report, described = tmp_path / "report.json", tmp_path / "described.json"
    classes = [{"name": word, "descriptions": [f"This is a {word}."]} for word in sorted(set(TRUE_LABELS.values()))]
    described.write_text(json.dumps(classes))
    assert deixis("label-sets", "import", "things", described, data_dir=tmp_path).returncode == 0
    done = deixis(
        *("evaluate", photograph_folder, "-s", "things", "--method", "all", "--json", report), data_dir=tmp_path
    )

    assert done.returncode == 0, done.stderr
    assert "waffle (2 random, mean of 7)" in done.stdout
    assert "keep zero-shot, or evaluate on more labelled images" in done.stdout
    figures = json.loads(report.read_text())
    assert {each["method"] for each in figures["methods"]} >= {"zero-shot", "cupl", "dclip", "autoclip"}
    assert figures["images"] == 6


def test_evaluate_measures_a_folder_with_a_subfolder_per_class(where, photograph_folder, tmp_path):
    report = tmp_path / "report.json"

    done = deixis("evaluate", photograph_folder, "--json", report, *where, data_dir=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "top-1 1.0000" in done.stdout
    figures = json.loads(report.read_text())
    assert (figures["images"], figures["top1"], figures["top5"], figures["skipped"]) == (6, 1.0, 1.0, 0)
    assert {row["name"] for row in figures["classes"]} == set(TRUE_LABELS.values())
    assert figures["images_per_s"] > 0


def test_evaluate_takes_better_names_and_refuses_unknown_subfolders(server, photograph_folder, tmp_path):
    better = deixis(
        "evaluate", photograph_folder, "-n", "cat=kitten", "--json", "-", "--server", server.url, data_dir=tmp_path
    )
    wrong = deixis("evaluate", photograph_folder, "-n", "kat=kitten", "--server", server.url, data_dir=tmp_path)

    assert better.returncode == 0, better.stderr
    assert "kitten" in {row["name"] for row in json.loads(better.stdout)["classes"]}
    assert wrong.returncode == 2
    assert "unknown subfolder 'kat'" in wrong.stderr


def test_a_label_set_is_exported_and_imported(where, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("lynx\npuma\n\nsnow leopard\n", "utf-8")
    exported = tmp_path / "cats.json"

    steps = [
        deixis("label-sets", *arguments, *where, data_dir=tmp_path)
        for arguments in (
            ("import", "wild cats", names, "--templates", "ensemble"),
            ("export", "wild cats", "--output", exported),
            ("import", "copied", exported),
            ("show", "copied@1"),
            ("list",),
            ("show", "no such"),
        )
    ]

    assert [step.returncode for step in steps] == [0, 0, 0, 0, 0, 2], [step.stderr for step in steps]
    assert [each["name"] for each in json.loads(exported.read_text())["classes"]] == ["lynx", "puma", "snow leopard"]
    assert "templates: ensemble" in steps[3].stdout
    assert "snow leopard" in steps[3].stdout
    assert "wild cats" in steps[4].stdout
    assert "unknown label set 'no such'" in steps[5].stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "nowhere.jpg", "-l", "cat"), "matches nothing"),
        (("classify", "{photo}", "-l", "cat", "--method", "zlp"), "unknown method 'zlp'; known: auto, autoclip, "),
        (("classify", "{photo}", "-l", "cat", "--server", "http://127.0.0.1:9"), "is the server running"),
        (("evaluate", "{photo}"), "is not a folder"),
        (("models", "show", "nothing"), "unknown model 'nothing'"),
        (("models", "download", "hf-hub:nobody/nothing"), "HF_HUB_OFFLINE"),
        (("serve", "--port", "x"), "DEIXIS_PORT"),
        (("serve", "--models", "ViT-B-32"), "is not a model name"),
        (("serve", "--models", "local-dir:/nowhere"), "the folder /nowhere does not exist"),
        (("serve", "--database-url", "mysql://x/y"), "DEIXIS_DATABASE_URL"),
    ],
)
def test_an_invalid_command_fails_with_one_line(arguments, message, photograph_folder, tmp_path):
    photo = str(photograph_folder / "cat" / "chelsea.jpg")

    done = deixis(*(photo if each == "{photo}" else each for each in arguments), data_dir=tmp_path)

    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error_of_one_line_before_models_are_loaded(server, tmp_path):
    port = server.url.rpartition(":")[2]

    done = deixis("serve", "--port", port, "--models", "local-dir:/nowhere", data_dir=tmp_path)

    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_recommended_models_are_listed_and_shown(tmp_path):
    listed = deixis("models", "list", data_dir=tmp_path)
    shown = deixis("models", "show", "ViT-B-32/laion2b_s34b_b79k", data_dir=tmp_path)

    assert (listed.returncode, shown.returncode) == (0, 0)
    assert "ViT-B-32/laion2b_s34b_b79k" in listed.stdout
    assert "MIT" in shown.stdout


def test_the_server_uses_the_measurement_of_models_tune(tmp_path):
    tuned = deixis("models", "tune", "--seconds", "2", data_dir=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    rows = [line.split() for line in tuned.stdout.splitlines()]
    assert ["openvino", "fp32", "1.0000", "chosen"] in [[*row[:2], *row[-2:]] for row in rows]
    # "best so far", and without a rate, if other processes used the CPU
    best = next(line for line in tuned.stdout.splitlines() if line.startswith("best"))
    with serving(data_dir=tmp_path) as server, server.client() as client:
        (model,) = client.get("/v1/models").json()["models"]
    path = model["image_path"]
    assert f": {path['backend']} {path['precision']}, {path['image_batch']} images in a batch" in best
    assert "provisional" in best if path["images_per_s"] is None else f"{path['images_per_s']} images/s" in best
