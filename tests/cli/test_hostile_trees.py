"""Every command on a folder with every kind of file: none ends early, nothing is lost, each bad file is reported."""

import csv
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.cli.csv_output import read_rows
from app.runtime.file_names import file_text
from tests.hostile_trees import contents_of, plant, reports_of

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it has no pipes, and other names")
LABELS = ("-l", "red, blue")


@pytest.fixture
def tree(tmp_path):
    return plant(tmp_path / "t" / "red")


@pytest.fixture
def survive(run, tree):
    """Run a command, and check what holds for all of them."""

    def survived(*command, unchanged=True):
        before = contents_of(tree.folder)
        done = run(*command)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 1, done.output
        assert set(reports_of(tree, done.stderr).values()) == {1}, done.stderr
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", done.stderr)
        if unchanged:
            assert contents_of(tree.folder) == before
        return done

    return survived


def path_of(text):
    """Undo the form of file names that docs/cli.md describes."""
    encoded = text.encode("utf-8")
    return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), encoded))


def test_classify_names_every_photograph_once(survive, tree, where):
    expected = sorted(map(str, tree.good))
    answers = json.loads(survive("classify", tree.folder, *LABELS, "-f", "json", *where).stdout)
    assert sorted(path_of(each["path"]) for each in answers if "error" not in each) == expected
    assert {each["predictions"][0]["label"] for each in answers if "error" not in each} == {"red"}
    rows = list(csv.DictReader(io.StringIO(survive("classify", tree.folder, *LABELS, "-f", "csv", *where).stdout)))
    assert sorted(path_of(row["path"]) for row in rows if not row["error"]) == expected
    assert [row["path"] for row in rows if row["error"]] == [each["path"] for each in answers if "error" in each]
    table = survive("classify", tree.folder, *LABELS, *where).stdout
    assert "escape\\x1b[31m.png" in table
    assert "\x1b" not in table


def test_a_label_that_is_not_utf8_is_refused(run, tree, where):
    done = run("classify", tree.good[0], "-l", "caf\udce9, dog", *where)
    assert done.exit_code == 2, done.output
    assert "error: " in done.stderr
    assert "caf\\xe9" in done.stderr or "labels" in done.stderr


def test_classify_writes_a_file_for_fiftyone(survive, tree):
    labels = json.loads(survive("classify", tree.folder, *LABELS, "-f", "fiftyone").stdout)["labels"]
    assert sorted(map(path_of, labels)) == sorted(map(str, tree.good))


@pytest.mark.parametrize("action", ["--copy", "--move", "--link"])
def test_sorting_loses_nothing_and_records_every_file(survive, tree, tmp_path, action):
    before, target = contents_of(tree.folder), tmp_path / "sorted"
    flags = [] if action == "--copy" else [action]
    survive("classify", tree.folder, *LABELS, "--to-folder", target, *flags, unchanged=action != "--move")
    photographs = {before[os.path.relpath(file, tree.folder)] for file in tree.good}
    assert set(contents_of(target / "red").values()) == photographs
    assert len(list((target / "red").iterdir())) == len(tree.good)
    assert [file for file in tree.good if file.exists()] == ([] if action == "--move" else tree.good)
    with (target / "deixis.csv").open(newline="", encoding="utf-8") as manifest:
        _, *rows = read_rows(manifest)
    assert sorted(path_of(row[0]) for row in rows) == sorted(map(str, tree.good))
    assert all((target / path_of(row[1])).is_file() for row in rows)


@pytest.mark.parametrize("sidecar", ["json", "xmp"])
def test_watch_labels_every_photograph(run, tree, sidecar):
    done = run("watch", tree.folder, *LABELS, "--once", "--settle", "0.1", "--write", sidecar)
    assert done.exit_code == 0, done.output
    assert set(reports_of(tree, done.stderr).values()) == {1}, done.stderr
    labelled = {file for file in tree.good if len(os.fsencode(file.name)) < 250 and Path(f"{file}.{sidecar}").exists()}
    (too_long,) = set(tree.good) - labelled
    assert len(too_long.name) == 255
    assert f"{too_long.name}: File name too long" in done.stderr
    assert not list(tree.folder.rglob("thumbnail.png.*"))


def test_evaluate_takes_the_folders_of_the_user_for_classes(survive, tree):
    done = survive("evaluate", tree.folder.parent, "--json", "-")
    report = json.loads(done.stdout)
    bad_files = [path for path in tree.bad if path.suffix]
    assert (report["images"], report["skipped"]) == (len(tree.good), len(bad_files))
    assert [row["name"] for row in report["classes"]] == ["red"]


def test_examples_are_added(run, survive, tree, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red\nblue\n")
    assert run("label-sets", "import", "colours", names).exit_code == 0
    done = survive("examples", "add", "colours", tree.folder.parent, "--by-subfolder")
    assert f"{len(tree.good)} added" in done.stdout


@pytest.mark.parametrize("source", ["folder", "pattern", "tar"])
def test_bulk_has_a_row_for_every_file(run, tree, tmp_path, source, new_encoder, monkeypatch):
    monkeypatch.setattr("app.cli.bulk_run.load_encoders", lambda _: [new_encoder()])
    monkeypatch.setattr("app.cli.bulk_run.configure_logs", lambda *_: None)
    paths = [tree.folder]
    if source == "pattern":
        paths = [f"{tree.folder}/*.png", f"{tree.folder}/*.PNG"]
        (tree.folder / "folder.png").rmdir()
    elif source == "tar":
        paths = [tmp_path / "t.tar"]
        with tarfile.open(paths[0], "w", errors="surrogateescape") as archive:
            for file in (*tree.good, *tree.folder.glob("*/thumbnail.png"), tree.folder / "text.png"):
                archive.add(file, file.relative_to(tree.folder.parent))
    done = run("bulk", *paths, *LABELS, "--out", tmp_path / "out.parquet")
    assert done.exit_code == 1, done.output
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    good = [row["key"].rpartition("/")[2] for row in rows if row["error"] is None]
    assert sorted(good) == sorted(file_text(file.name) for file in tree.good)
    in_pattern = [path for path in tree.bad if path.suffix and path.parent == tree.folder]
    assert len(rows) - len(good) == {"tar": 1, "pattern": len(in_pattern), "folder": len(tree.bad)}[source]


def test_captions_are_not_read_from_pipes_or_films(run, tree, tmp_path):
    for name, problem in (("pipe", "a named pipe"), ("film", "is not text")):
        done = run("captions", "build", "-n", "x", tree.folder / f"{name}.png")
        assert done.exit_code == 2, done.output
        assert problem in done.stderr
    assert not done.exception or isinstance(done.exception, SystemExit)
