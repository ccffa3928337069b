import threading
from pathlib import Path

import pytest

from app.cli import common
from app.cli.common import report_warnings
from app.encoders.fake import FakeEncoder
from deixis.answers import ImageResult, Problem
from tests.conftest import picture


def _result(*warnings):
    return ImageResult(predictions=[], warnings=list(warnings))


def test_a_warning_is_printed_once_with_the_files_it_concerns(capsys):
    files = [Path(name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "bad.jpg")]
    problem = Problem(type="x", title="x", status=415, detail="not an image")
    bad = ImageResult(predictions=[], error=problem)
    results = [_result("all"), _result("all", "weak"), *[_result("all", "weak", "few")] * 3, bad]
    report_warnings(files, results)
    assert capsys.readouterr().err.splitlines() == [
        "warning: all",
        "warning: b.jpg, c.jpg, d.jpg and 1 more: weak",
        "warning: c.jpg, d.jpg, e.jpg: few",
    ]


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("auto", "Loading the model ..."),
        ("torch-compile", "Loading the model, and compiling its image tower with torch, which takes minutes ..."),
    ],
)
def test_without_a_terminal_a_command_says_in_a_line_that_it_loads_a_model_for_long(
    run, monkeypatch, tmp_path, backend, line
):
    lines, printed = [], threading.Event()

    def load(_):
        assert printed.wait(30)
        return [FakeEncoder()]

    def note(text):
        lines.append(text)
        printed.set()

    (tmp_path / "red.png").write_bytes(picture("red"))
    monkeypatch.setenv("DEIXIS_IMAGE_BACKEND", backend)
    monkeypatch.setattr("app.cli.backends.in_process.load_encoders", load)
    monkeypatch.setattr(common, "SILENT_S", 0.0)
    monkeypatch.setattr(common, "note", note)
    done = run("classify", tmp_path / "red.png", "--labels", "red, blue", "--local")
    assert done.exit_code == 0, done.stderr
    assert lines[0] == line


def test_without_a_terminal_a_short_command_prints_nothing_but_its_result(run, tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    done = run("classify", tmp_path / "red.png", "--labels", "red, blue", "--local")
    assert (done.exit_code, done.stderr) == (0, "")


def test_without_a_terminal_progress_is_printed_in_lines(run, monkeypatch, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture("red"))
    command = ["classify", tmp_path, "--labels", "red, blue", "--local"]
    assert not run(*command).stderr.strip()
    monkeypatch.setattr(common, "_LINE_INTERVAL_S", 0.0)
    assert run(*command).stderr.split("\n")[:3] == [f"Classifying: {done} of 3" for done in (1, 2, 3)]


def test_without_a_terminal_a_build_of_captions_is_printed_in_lines(run, monkeypatch, tmp_path):
    (tmp_path / "captions.txt").write_text("".join(f"a cat {number}\n" for number in range(20)))
    monkeypatch.setattr(common, "_LINE_INTERVAL_S", 0.0)
    done = run("captions", "build", tmp_path / "captions.txt", "--name", "cats")
    assert done.exit_code == 0, done.stderr
    assert "Encoding: 20 of 20 captions" in done.stderr.splitlines()
