"""Commands in process with the fake encoder; end_to_end/ runs them as users do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.encoders.fake import FakeEncoder
from app.settings import Settings
from tests.conftest import picture


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command with its own data folder; returns typer's result."""
    monkeypatch.setattr("app.cli.load_encoders", lambda _: [FakeEncoder()])
    monkeypatch.setattr("app.cli.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """Three pictures of each of two colours."""
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


def test_a_file_of_labels_that_is_missing_is_told(run, folder):
    done = run("classify", folder, "-l", "@nowhere.txt")

    assert done.exit_code == 2
    assert "nowhere.txt" in done.stderr


def test_exit_status_tells_all_some_or_none(run, folder, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    arguments = ("-l", "red, blue")

    assert run("classify", folder, *arguments).exit_code == 0
    assert run("classify", folder, bad, *arguments).exit_code == 1
    assert run("classify", bad, *arguments).exit_code == 2


def test_a_file_that_cannot_be_read_is_reported_and_skipped(run, folder, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path == folder / "red" / "1.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)

    done = run("classify", folder, "-l", "red, blue")

    assert done.exit_code == 1
    assert "1.png: Permission denied" in done.stderr.replace("\n", " ")


def test_evaluate_counts_what_is_right(run, folder):
    (folder / "red" / "wrong.png").write_bytes(picture("blue"))

    done = run("evaluate", folder, "--json", "-")

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["top1"]) == (7, pytest.approx(6 / 7))
    assert {row["name"]: row["correct"] for row in report["classes"]} == {"dark blue": 3, "red": 3}
    assert report["confusion"] == [[3, 0], [1, 3]]


def test_evaluate_takes_a_label_set_whose_classes_the_subfolders_are_called_by(run, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("blue\nred\ngreen", "utf-8")
    assert run("label-sets", "import", "colours", names).exit_code == 0

    named = run("evaluate", folder, "-s", "colours", "-n", "dark_blue=blue")
    unnamed = run("evaluate", folder, "-s", "colours")

    assert named.exit_code == 0, named.stderr
    assert "top-1 1.0000" in named.stdout
    assert unnamed.exit_code == 2
    assert "unknown class 'dark blue'" in unnamed.stderr


def test_a_label_set_file_that_is_none_is_told(run, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"klasses": ["a"]}', "utf-8")

    done = run("label-sets", "import", "x", wrong)

    assert done.exit_code == 2
    assert "is no label set" in done.stderr


def test_every_setting_is_a_flag_of_serve(run):
    help_text = run("serve", "--help").stdout

    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in help_text
