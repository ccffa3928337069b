"""Commands in process with the fake encoder; end_to_end/ runs them as users do."""

import json
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import structlog
from typer.testing import CliRunner

from app.backends import OverHttp
from app.cli import cli
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings, load_settings
from tests.conftest import picture


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command with its own data folder; returns typer's result."""
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: [FakeEncoder()])
    monkeypatch.setattr("app.cli.common.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(params=["in process", "over HTTP"])
def where(request, monkeypatch):
    """Return the flags of a command that works in process, or through a server with the same settings."""

    @asynccontextmanager
    async def over_asgi(_):
        app = create_app(load_settings(), lambda _: [FakeEncoder()])
        # A server's log is no output of the command.
        with structlog.testing.capture_logs():
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    yield OverHttp(client)

    monkeypatch.setattr("app.cli.common.over_http", over_asgi)
    return ["--server", "http://test"] if request.param == "over HTTP" else []


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


@pytest.mark.parametrize("name", ["tabby__blue_cat", "_tabby_blue cat_", "tabby  blue_ cat"])
def test_a_subfolders_name_means_the_class_that_answers_spell_alike(run, where, tmp_path, name):
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


def test_a_name_given_for_a_subfolder_is_cleaned_too(run, where, folder):
    done = run("evaluate", folder, "-n", "red=cafe\u0301  red ", "--json", "-", *where)

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["top1"] == 1
    assert {row["name"] for row in report["classes"]} == {"dark blue", "caf\u00e9 red"}


@pytest.mark.parametrize("command", [["classify", "-l", "red, blue"], ["evaluate"]], ids=lambda each: each[0])
def test_limits_that_protect_a_server_do_not_stop_a_command_in_process(run, folder, monkeypatch, command):
    monkeypatch.setenv("DEIXIS_REQUEST_TIMEOUT_S", "0.001")
    monkeypatch.setenv("DEIXIS_MAX_QUEUED_IMAGES", "8")
    monkeypatch.setenv("DEIXIS_MAX_IMAGES_PER_REQUEST", "8")
    for number in range(40):
        (folder / "red" / f"more {number}.png").write_bytes(picture("red"))

    done = run(command[0], folder, *command[1:])

    assert done.exit_code == 0, done.stderr


def test_more_labels_than_allowed_are_one_error_and_no_file_is_called_bad(run, where, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"label {number}" for number in range(1500)), "utf-8")

    done = run("classify", folder, "-l", f"@{names}", *where)

    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "DEIXIS_MAX_LABELS" in done.stderr
    assert "skipped" not in done.stderr


@pytest.mark.parametrize("empty", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_no_label_set(run, tmp_path, empty):
    (tmp_path / "empty.txt").write_text(empty, "utf-8")

    done = run("label-sets", "import", "x", tmp_path / "empty.txt")

    assert_told_in_a_line(done, "empty.txt")


def test_a_label_set_that_cannot_be_written_out_is_told(run, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("blue\nred", "utf-8")
    assert run("label-sets", "import", "colours", names).exit_code == 0

    for output in (tmp_path / "nowhere" / "x.json", tmp_path):
        assert_told_in_a_line(run("label-sets", "export", "colours", "-o", output), str(output))


def test_a_report_that_could_not_be_written_is_told_before_anything_is_classified(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: pytest.fail("the model was loaded"))

    done = run("evaluate", folder, "--json", tmp_path / "nowhere" / "x.json")

    assert_told_in_a_line(done, "nowhere")


def test_a_port_that_is_taken_is_told_before_models_are_loaded(run, monkeypatch):
    monkeypatch.setattr("app.cli.common.load_encoders", lambda _: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        done = run("serve", "--port", port)

    assert_told_in_a_line(done, f"port {port}")


def assert_told_in_a_line(done, what):
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert what in done.stderr
    assert done.stdout == ""
    assert isinstance(done.exception, SystemExit)


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
