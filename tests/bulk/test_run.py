"""`deixis bulk` in one process: the predictions of `deixis classify`, interruptions, bad images and refusals."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog
from typer.testing import CliRunner

from app.bulk import readers
from app.bulk.parts import PartStore
from app.bulk.request import BulkRequest
from app.bulk.run import prepare_run, process_engine, run_bulk, service_in_loop
from app.classification.request import ClassifyRequest
from app.cli import cli
from app.encoders.fake import FakeEncoder
from app.errors import ConflictError, StoreError
from app.settings import load_settings
from tests.captions_made import CaptionEncoder
from tests.conftest import picture

CLASSES = {
    "classes": [
        {"name": "rose", "features": ["red petals", "green thorns"], "descriptions": ["A rose is often red."]},
        {"name": "meadow", "features": ["green grass"], "synonyms": ["lawn"]},
        {"name": "sky", "features": ["a blue colour"], "prompt": "the blue {}"},
    ],
    "templates": "ensemble",
}


@pytest.fixture
def encoder():
    return CaptionEncoder()


@pytest.fixture
def run(monkeypatch, tmp_path, encoder):
    """Run a command with its own data folder, and return typer's result."""
    for module in ("app.cli.backends.in_process", "app.cli.bulk_run"):
        monkeypatch.setattr(f"{module}.load_encoders", lambda _: [encoder])
        monkeypatch.setattr(f"{module}.configure_logs", lambda *_: None)
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path / "data"))
    runner = CliRunner()

    def invoke(*arguments):
        # Logs would otherwise go to standard output.
        with structlog.testing.capture_logs():
            return runner.invoke(cli, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def photos(tmp_path):
    """Forty images of different colours, in two folders."""
    rng = np.random.default_rng(0)
    for number in range(40):
        place = tmp_path / "photos" / ("a" if number % 3 else "b")
        place.mkdir(parents=True, exist_ok=True)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (place / f"{number}.png").write_bytes(picture(colour, (9 + number % 5, 12)))
    return tmp_path / "photos"


def classify(run, folder, *query):
    done = run("classify", folder, *query, "-k", 5, "-f", "json")
    assert done.exit_code == 0, done.stderr
    return {each.pop("path"): each for each in json.loads(done.stdout)}


def rows_of(out):
    return pq.read_table(out).to_pylist()


def keys_of(out):
    return [row["key"] for row in rows_of(out)]


def assert_error(done, status, *words):
    assert done.exit_code == status, (done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line


@pytest.fixture
def nature(run, tmp_path):
    """A label set with descriptions."""
    (tmp_path / "nature.json").write_text(json.dumps(CLASSES))
    assert run("label-sets", "import", "nature", tmp_path / "nature.json").exit_code == 0


@pytest.fixture
def with_examples(run, tmp_path, nature):
    """The label set with example images."""
    examples = tmp_path / "examples"
    for name, colour in (("rose", "red"), ("meadow", "green"), ("sky", "blue")):
        (examples / name).mkdir(parents=True)
        for number in range(3):
            (examples / name / f"{number}.png").write_bytes(picture(colour, (8, 8 + number)))
    assert run("examples", "add", "nature", examples).exit_code == 0


@pytest.fixture
def scenes(run, tmp_path):
    """A caption database."""
    captions = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("owl", "bench", "kite")]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    assert run("captions", "build", tmp_path / "captions.txt", "--name", "scenes").exit_code == 0


@pytest.fixture
def hierarchy(run, tmp_path):
    """A label set whose classes have parents."""
    (tmp_path / "colours.csv").write_text("name,parent\nred,warm\norange,warm\ngreen,\nblue,cold\n")
    assert run("label-sets", "import", "colours", tmp_path / "colours.csv").exit_code == 0


QUERIES = {
    "labels": (["-l", "red, green, blue", "--reject-below", "0.6"], None),
    "priors": (["-s", "nature", "--priors", '{"rose": 5, "meadow": 1, "sky": 2}'], "with_examples"),
    "a label set with descriptions": (["-s", "nature", "--method", "cupl-ensemble"], "nature"),
    "weighed prompts": (["-s", "nature@1", "--method", "autoclip", "-o", "beta=0.7", "-t", "a {}."], "nature"),
    "a label set with examples": (["-s", "nature"], "with_examples"),
    "no labels": (["-d", "scenes"], "scenes"),
    "none of these": (["-l", "green, blue", "--reject", "auto"], None),
    "a hierarchy": (["-s", "colours", "--min-score", "0.6"], "hierarchy"),
}


@pytest.mark.parametrize(("query", "stored"), QUERIES.values(), ids=QUERIES)
def test_predictions_are_those_of_classify(run, photos, tmp_path, request, query, stored):
    if stored is not None:
        request.getfixturevalue(stored)
    expected = classify(run, photos, *query)
    labelled = ["--no-labels"] if stored == "scenes" else []

    done = run("bulk", photos, *query, *labelled, "--out", tmp_path / "out", "--part-images", 7)

    assert done.exit_code == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert [f"{row['source']}/{row['key']}" for row in rows] == list(expected)
    for row, result in zip(rows, expected.values(), strict=True):
        predictions = result["predictions"]
        assert row["labels"] == [each["label"] for each in predictions]
        assert row["scores"] == [each["score"] for each in predictions]
        assert row["similarities"] == [each["similarity"] for each in predictions]
        best = predictions[0]
        assert (row["label"], row["score"], row["similarity"]) == (best["label"], best["score"], best["similarity"])
        assert (row["rejected"], row["error"]) == (result.get("rejected"), None)
        path = result.get("label_path")
        assert row["label_path"] == (path and [step["label"] for step in path])
        assert row["label_path_scores"] == (path and [step["score"] for step in path])
        assert row["out_of_vocabulary"] == result.get("out_of_vocabulary", {}).get("score")
        assert row["weak_match"] == result.get("weak_match")


def test_all_kinds_of_sources_give_the_same_predictions(run, photos, tmp_path):
    files = sorted(photos.rglob("*.png"), key=lambda file: (file.parent.name, file.name))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for file in files:
            archive.add(file, file.relative_to(photos))
    table = {"bytes": [file.read_bytes() for file in files], "path": [str(file) for file in files]}
    pq.write_table(pa.table({"image": table["bytes"]}), tmp_path / "bytes.parquet", row_group_size=9)
    pq.write_table(pa.table({"path": table["path"]}), tmp_path / "paths.parquet")
    answers = []
    for source in (photos, tmp_path / "s.tar", tmp_path / "bytes.parquet", tmp_path / "paths.parquet"):
        out = tmp_path / f"{source.name}-labels.parquet"
        done = run("bulk", source, "-l", "red, green, blue", "--out", out, "--part-images", 6)
        assert done.exit_code == 0, done.stderr
        assert f"40 images, 0 bad, in {out}" in done.stdout
        answers.append([(row["labels"], row["scores"]) for row in rows_of(out)])
    assert len({str(answer) for answer in answers}) == 1


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_failed_run_resumes_after_its_last_part(run, photos, tmp_path, monkeypatch, encoder, kind):
    source = photos
    if kind == "tar":
        source = tmp_path / "s.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(photos, ".")
    elif kind == "parquet":
        source = tmp_path / "p.parquet"
        contents = [file.read_bytes() for file in sorted(photos.rglob("*.png"))]
        pq.write_table(pa.table({"image": contents}), source, row_group_size=16)
    command = ["bulk", source, "-l", "red, green, blue", "--part-images", 6]
    assert run(*command, "--out", tmp_path / "whole").exit_code == 0
    write, written = PartStore.write, []

    def write_until_the_disk_is_full(self, unit, part, rows, *, ends_unit):
        if len(written) == 3:
            raise StoreError("the disk is full")
        written.append(len(rows))
        write(self, unit, part, rows, ends_unit=ends_unit)

    monkeypatch.setattr(PartStore, "write", write_until_the_disk_is_full)
    assert_error(run(*command, "--out", tmp_path / "out"), 2, "the disk is full")
    monkeypatch.setattr(PartStore, "write", write)
    assert len(keys_of(tmp_path / "out")) == sum(written)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*")}
    encoder.image_batches.clear()

    # A resumed run keeps the size of its parts.
    done = run(*command[:-1], 9, "--out", tmp_path / "out")

    assert done.exit_code == 0, done.stderr
    assert "resuming the run of" in done.stderr
    assert f"{sum(written)} images are done" in done.stderr
    assert sum(encoder.image_batches) == 40 - sum(written)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_reports_the_parts_that_are_saved(run, photos, tmp_path, sent, status):
    command = ["bulk", photos, "-l", "red, green", "--part-images", 5, "--out", tmp_path / "out.parquet"]
    words = [sys.executable, "-m", "tests.bulk.bulk_until_stopped", str(int(sent)), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    saved = len(list((tmp_path / "out.parquet.parts").glob("part-*")))
    assert done.returncode == status, done.stderr
    assert 3 <= saved < 8
    assert f"stopped: {saved} parts are saved in '{tmp_path}/out.parquet.parts'; repeat the command" in done.stderr
    assert run(*command).exit_code == 0
    assert len(keys_of(tmp_path / "out.parquet")) == 40


def test_a_run_that_is_stopped_while_the_model_loads_reports_no_parts(run, photos, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("app.cli.bulk_run.load_encoders", interrupt)
    done = run("bulk", photos, "-l", "red, green", "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert f"stopped: 0 parts are saved in '{tmp_path}/out'" in done.stderr


def test_without_a_terminal_progress_is_printed_in_lines(run, photos, tmp_path, monkeypatch):
    command = ["bulk", photos, "-l", "red, green", "--out"]
    assert run(*command, tmp_path / "quick").stderr == ""
    monkeypatch.setattr("app.cli.common._LINE_INTERVAL_S", 0.0)
    lines = run(*command, tmp_path / "slow").stderr.splitlines()
    assert len(lines) == 3  # one for each batch
    assert re.fullmatch(r"Classifying: 40 of 40 images, 0 bad, [\d,.]+/s", lines[-1])


def test_a_finished_run_does_not_classify_again(run, photos, tmp_path, encoder):
    for out in (tmp_path / "out", tmp_path / "out.parquet"):
        command = ["bulk", photos, "-l", "red, green", "--out", out]
        assert run(*command).exit_code == 0
        encoder.image_batches.clear()
        (photos / "later.png").write_bytes(picture("red"))
        done = run(*command)
        assert done.exit_code == 0, done.stderr
        assert "40 images, 0 bad" in done.stdout
        assert "files added to the sources since then are not included" in done.stderr
        assert encoder.image_batches == []
        (photos / "later.png").unlink()


def test_parts_that_a_killed_run_did_not_remove_are_removed_later(run, photos, tmp_path, monkeypatch):
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    command = ["bulk", photos, "-l", "red, green", "--out", out]
    with monkeypatch.context() as killed:
        killed.setattr("app.bulk.run.remove_parts", lambda *_: None)
        assert run(*command).exit_code == 0
    assert (parts / "part-00000000-000000-end.parquet").exists()
    assert run(*command).exit_code == 0
    assert not parts.exists()


def test_another_folder_with_the_name_of_the_parts_is_left_alone(run, photos, tmp_path):
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    command = ["bulk", photos, "-l", "red, green", "--out", out]
    assert run(*command).exit_code == 0
    assert not parts.exists()
    parts.mkdir()
    (parts / "part-00000000-000000-end.parquet").write_text("mine")
    assert run(*command).exit_code == 0
    assert [file.name for file in parts.iterdir()] == ["part-00000000-000000-end.parquet"]


def test_resuming_with_another_query_is_refused(run, photos, tmp_path, nature):
    command = ["bulk", photos, "--out", tmp_path / "out"]
    assert run(*command, "-s", "nature").exit_code == 0
    assert_error(run(*command, "-l", "red, green"), 2, 'label_set "nature@1"', "and this command has null")
    assert_error(run(*command, "-s", "nature", "-k", 1), 2, "top_k 3", "has 1")
    assert_error(run(*command, "-s", "nature", "--method", "cupl"), 2, 'method "zero-shot"', '"cupl"')
    (tmp_path / "nature.json").write_text(json.dumps({**CLASSES, "templates": "photo"}))
    assert run("label-sets", "import", "nature", tmp_path / "nature.json").exit_code == 0
    assert_error(run(*command, "-s", "nature"), 2, '"nature@1", and this command has "nature@2"')
    assert run(*command, "-s", "nature@1").exit_code == 0


def test_resuming_with_other_weights_of_the_same_model_is_refused(run, photos, tmp_path, monkeypatch):
    command = ["bulk", photos, "-l", "red, green", "--out", tmp_path / "out"]
    assert run(*command).exit_code == 0
    monkeypatch.setattr(FakeEncoder, "image_fingerprint", lambda _: "retrained")
    assert_error(run(*command), 2, 'model_fingerprint "fake"', '"retrained"')


def test_resuming_with_other_examples_is_refused(run, photos, tmp_path, with_examples):
    command = ["bulk", photos, "-s", "nature", "--out", tmp_path / "out"]
    assert run(*command).exit_code == 0
    (tmp_path / "more" / "sky").mkdir(parents=True)
    (tmp_path / "more" / "sky" / "x.png").write_bytes(picture((0, 30, 250)))
    assert run("examples", "add", "nature", tmp_path / "more").exit_code == 0
    assert_error(run(*command), 2, "examples_revision")


# --- bad images -------------------------------------------------------------------------------------------------------


def test_bad_images_have_the_reason_and_the_others_their_labels(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DEIXIS_MAX_IMAGE_BYTES", "3000")
    (photos / "a" / "0 words.jpg").write_text("words")
    (photos / "a" / "0 large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3000))
    (photos / "b" / "cut.png").write_bytes(picture("red")[:60])
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(photos / "a" / "0 words.jpg", "0.jpg")
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content[:514])

    done = run("bulk", photos, tmp_path / "s.tar", "-l", "red, green", "--out", tmp_path / "out")

    assert done.exit_code == 1, done.stderr
    assert "44 images, 4 bad" in done.stdout
    bad = {row["key"]: row for row in rows_of(tmp_path / "out") if row["error"] is not None}
    assert set(bad) == {"a/0 words.jpg", "a/0 large.png", "b/cut.png", "s.tar"}
    assert "looks like text" in bad["a/0 words.jpg"]["error"]
    assert "3,008 bytes and the limit is 3,000" in bad["a/0 large.png"]["error"]
    assert "cannot be read as a tar file" in bad["s.tar"]["error"]
    for row in bad.values():
        assert {name for name, value in row.items() if value is not None} == {"key", "source", "error"}
    # Bad images of an earlier command count too.
    assert run("bulk", photos, tmp_path / "s.tar", "-l", "red, green", "--out", tmp_path / "out").exit_code == 1


def test_a_retry_classifies_only_bad_images(run, photos, tmp_path, encoder, hierarchy, monkeypatch):
    """An interrupted retry can be repeated, and images that are still bad stay bad."""
    (photos / "a" / "0 later.png").write_text("words")
    (photos / "b" / "9 later.png").write_text("words")
    (photos / "b" / "9 words.png").write_text("words")
    command = ["bulk", photos, "-s", "colours", "--reject", "auto", "--part-images", 6]
    out = tmp_path / "out"
    assert "43 images, 3 bad" in run(*command, "--out", out).stdout
    before = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    for name in ("a/0 later.png", "b/9 later.png"):
        (photos / name).write_bytes(picture("blue"))
    encoder.image_batches.clear()
    assert run(*command, "--out", out).exit_code == 1
    assert encoder.image_batches == []

    write, written = PartStore.write, []

    def write_until_the_disk_is_full(self, unit, part, rows, *, ends_unit):
        if written:
            raise StoreError("the disk is full")
        written.append(unit)
        write(self, unit, part, rows, ends_unit=ends_unit)

    with monkeypatch.context() as full:
        full.setattr(PartStore, "write", write_until_the_disk_is_full)
        assert_error(run(*command, "--out", out, "--retry-bad"), 2, "the disk is full")
    assert len(keys_of(out)) == 43
    encoder.image_batches.clear()
    done = run(*command, "--out", out, "--retry-bad")

    assert done.exit_code == 1, done.stderr
    assert "43 images, 1 bad" in done.stdout
    assert "41 images are done" in done.stderr
    assert sum(encoder.image_batches) == 1
    changed = [file for file, stamp in before.items() if file.stat().st_mtime_ns != stamp]
    asked = {"a/0 later.png", "b/9 later.png", "b/9 words.png"}
    assert changed == [file for file in before if asked.intersection(keys_of(file))]
    assert run(*command, "--out", tmp_path / "whole").exit_code == 1
    assert rows_of(out) == rows_of(tmp_path / "whole")
    (photos / "b" / "9 words.png").unlink()
    (photos / "b" / "9 words.png").write_bytes(picture("red"))
    assert run(*command, "--out", out, "--retry-bad").exit_code == 0
    assert run(*command, "--out", out, "--retry-bad").exit_code == 0


def test_a_retry_reads_the_rest_of_a_tar_file_after_a_read_error(run, photos, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(photos, ".")
    command = ["bulk", tmp_path / "s.tar", "-l", "red, green, blue", "--part-images", 6, "--out"]
    assert run(*command, tmp_path / "whole").exit_code == 0
    read, reads = readers._member, []

    def fail_once(*arguments):
        reads.append(None)
        if len(reads) == 9:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    with monkeypatch.context() as damaged:
        damaged.setattr(readers, "_member", fail_once)
        assert "9 images, 1 bad" in run(*command, tmp_path / "out").stdout
    assert keys_of(tmp_path / "out")[-1] == "s.tar"
    assert run(*command, tmp_path / "out").exit_code == 1

    done = run(*command, tmp_path / "out", "--retry-bad")

    assert done.exit_code == 0, done.stderr
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_bad_images_of_merged_parts_cannot_be_retried(run, photos, tmp_path):
    command = ["bulk", photos, "-l", "red, green, blue", "--retry-bad", "--out", tmp_path / "out.parquet"]
    (photos / "words.png").write_text("words")
    assert run(*command).exit_code == 1  # there is nothing to retry yet
    assert_error(run(*command), 2, "its 1 bad images cannot be retried; name another --out")
    assert run(*command[:-3], *command[-2:]).exit_code == 1


def test_files_that_do_not_exist_are_bad_images(run, photos, tmp_path):
    pq.write_table(pa.table({"path": ["photos/a/1.png", "photos/none.png", "photos"]}), tmp_path / "p.parquet")
    done = run("bulk", tmp_path / "p.parquet", "-l", "red, green", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert [row["error"] for row in rows_of(tmp_path / "out")] == [
        None,
        "No such file or directory",
        "not a regular file, but a folder",
    ]


@pytest.mark.parametrize("change", ["moved", "not mounted", "another"])
def test_a_folder_that_disappears_ends_the_run_without_bad_images(run, photos, tmp_path, encoder, monkeypatch, change):
    command = ["bulk", photos, "-l", "red, green", "--out", tmp_path / "out", "--part-images", 5]
    aside, encode = tmp_path / "aside", CaptionEncoder.encode_images

    def move_and_encode(self, pixels):
        if not aside.exists():
            photos.rename(aside)
            if change != "moved":
                photos.mkdir()
            if change == "another":
                (photos / "x.png").write_bytes(picture("red"))
        return encode(self, pixels)

    monkeypatch.setattr(CaptionEncoder, "encode_images", move_and_encode)
    assert_error(run(*command), 2, "can no longer be read", "restore it")
    if change != "another":  # a new run sees a folder whose images are missing
        assert_error(run(*command), 2, "can no longer be read", "restore it")
    shutil.rmtree(photos, ignore_errors=True)
    aside.rename(photos)
    monkeypatch.setattr(CaptionEncoder, "encode_images", encode)
    assert run(*command).exit_code == 0
    assert {row["error"] for row in rows_of(tmp_path / "out")} == {None}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_broken_links_are_bad_images_and_skipped_archives_are_reported(run, photos, tmp_path):
    (photos / "a" / "gone.png").symlink_to("nowhere")
    with tarfile.open(photos / "more.tar", "w") as archive:
        archive.add(photos / "b", "b")
    command = ["bulk", photos, "-l", "red, green", "--out", tmp_path / "out"]
    done = run(*command)
    assert done.exit_code == 1, done.stderr
    assert "41 images, 1 bad" in done.stdout
    assert f"1 archives in '{photos}' are skipped" in done.stderr
    (bad,) = [row for row in rows_of(tmp_path / "out") if row["error"] is not None]
    assert (bad["key"], bad["error"]) == ("a/gone.png", "broken link: its target does not exist")
    assert "are skipped" not in run(*command).stderr  # only a new run reports them


def test_a_run_with_only_bad_images_has_status_2(run, tmp_path):
    (tmp_path / "x.jpg").write_text("words")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    command = ["-l", "red, green", "--out"]
    assert run("bulk", tmp_path / "x.jpg", *command, tmp_path / "out").exit_code == 2
    assert run("bulk", tmp_path / "empty.tar", *command, tmp_path / "empty").exit_code == 2
    (row,) = rows_of(tmp_path / "empty")
    assert (row["key"], row["source"]) == ("empty.tar", str(tmp_path / "empty.tar"))


class Fragile(FakeEncoder):
    """Fails on white images, and on every image once it is broken."""

    def __init__(self):
        super().__init__()
        self.broken = False

    def encode_images(self, pixels):
        if self.broken or any(each.min() == 255 for each in pixels):
            raise RuntimeError("division by zero")
        return super().encode_images(pixels)


@pytest.fixture
def fragile(monkeypatch, run):
    encoder = Fragile()
    monkeypatch.setattr("app.cli.bulk_run.load_encoders", lambda _: [encoder])
    return encoder


def test_an_image_that_makes_the_model_fail_is_bad_and_the_others_are_not(run, photos, tmp_path, fragile):
    (photos / "a" / "white.png").write_bytes(picture("white"))
    done = run("bulk", photos, "-l", "red, green", "--out", tmp_path / "out")
    assert done.exit_code == 1, done.stderr
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert len(rows) == 41
    assert rows.pop("a/white.png")["error"] == "the model fails on this image: division by zero"
    assert {row["error"] for row in rows.values()} == {None}


def test_a_model_that_fails_on_every_image_ends_the_run(run, photos, tmp_path, fragile):
    fragile.broken = True
    done = run("bulk", photos, "-l", "red, green", "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert isinstance(done.exception, RuntimeError)
    assert not list((tmp_path / "out").glob("part-*"))
    fragile.broken = False
    assert run("bulk", photos, "-l", "red, green", "--out", tmp_path / "out").exit_code == 0


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[], ["-l", "a,b", "--no-labels"], ["-l", "a,b", "-s", "x"]])
def test_exactly_one_source_of_labels_must_be_given(run, photos, tmp_path, given):
    done = run("bulk", photos, *given, "--out", tmp_path / "out")
    assert_error(done, 2, "pass exactly one of --labels, --label-set and --no-labels")


def test_methods_whose_results_depend_on_other_images_are_refused(run, photos, tmp_path, nature):
    done = run("bulk", photos, "-s", "nature", "--method", "zlap", "--out", tmp_path / "out")
    assert_error(done, 2, "'zlap' classifies the images of a request jointly")
    done = run("bulk", photos, "-s", "nature", "--method", "tda", "--out", tmp_path / "out")
    assert_error(done, 2, "'tda' adapts to earlier images")
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_reported_before_files_are_written(run, photos, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert_error(run("bulk", photos, "-s", "nowhere", *out), 2, "unknown label set 'nowhere'")
    assert_error(run("bulk", photos, "-l", "a,b", "-m", "x", *out), 2, "unknown model 'x'; known: fake")
    assert_error(run("bulk", photos, "--no-labels", "-d", "x", *out), 2, "unknown caption database 'x'")
    assert not (tmp_path / "out").exists()
    assert_error(run("bulk", tmp_path / "no", "-l", "a,b", *out), 2, "neither a file nor a folder")


def test_invalid_sources_and_outputs_are_reported_before_the_model_is_loaded(run, photos, tmp_path, monkeypatch):
    command = ["bulk", photos, "-l", "a,b", "--out"]
    (tmp_path / "labels.tsv").mkdir()
    assert run(*command, tmp_path / "begun").exit_code == 0
    (tmp_path / "begun").rename(tmp_path / "labels.json")
    assert run(*command, tmp_path / "labels.json").exit_code == 0
    monkeypatch.setattr("app.cli.bulk_run.load_encoders", lambda _: pytest.fail("the model was loaded"))
    for name in ("labels.csv", "labels.tsv", "labels.JSONL"):
        message = f"'{tmp_path}/{name}' would be a folder of Parquet files"
        assert_error(run(*command, tmp_path / name), 2, message, ".parquet")
    out = ["-l", "a,b", "--out", tmp_path / "out"]
    assert_error(run("bulk", tmp_path / "no", *out), 2, "neither a file nor a folder")
    assert_error(run("bulk", tmp_path / "*.tar", *out), 2, "does not match anything as a pattern")
    assert_error(run("bulk", photos, photos / "a", *out), 2, "name only one of them")
    assert_error(run(*command, tmp_path / ("x" * 300)), 2, "File name too long")


@pytest.mark.parametrize("replicas", ["0", "3-2", "2:3", "many", ""])
def test_an_invalid_number_of_replicas_is_refused(run, photos, tmp_path, replicas):
    done = run("bulk", photos, "-l", "a,b", "--engine", "ray", "--replicas", replicas, "--out", tmp_path / "out")
    assert_error(done, 2, "--replicas", "not a number of replicas")


def test_the_command_line_does_not_import_the_extras():
    imports = "import sys, app.cli.bulk_run, app.cli.serving"
    program = f"{imports}; print(sorted({{'ray', 'pyarrow', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_extra_is_reported_with_its_installation(run, photos, tmp_path, monkeypatch):
    command = ["bulk", photos, "-l", "a,b", "--out", tmp_path / "out"]
    for module, extra, more in (("ray", "ray", ["--engine", "ray"]), ("pyarrow", "bulk", [])):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            assert_error(run(*command, *more), 2, f"needs the extra '{extra}'")


# --- changes during a run --------------------------------------------------------------------------------------------


class NoProgress:
    """Ignores the progress of a run."""

    def warn(self, message):
        pass

    def start(self, manifest, done):
        pass

    def advance(self, images, bad):
        pass


@pytest.mark.parametrize("change", ["examples", "captions"])
def test_a_change_of_examples_or_captions_ends_the_run(run, photos, tmp_path, request, encoder, change):
    query = (
        ClassifyRequest(label_set="nature", method="gda")
        if change == "examples"
        else ClassifyRequest(database="scenes")
    )
    request.getfixturevalue("with_examples" if change == "examples" else "scenes")
    settings = load_settings()
    bulk_request = BulkRequest([photos], tmp_path / "out")
    with service_in_loop(settings, [encoder]) as (loop, service):
        spec = loop.run(prepare_run(service, query, bulk_request, 10**6))
    if change == "examples":
        (tmp_path / "more" / "sky").mkdir(parents=True)
        (tmp_path / "more" / "sky" / "x.png").write_bytes(picture((0, 30, 250)))
        assert run("examples", "add", "nature", tmp_path / "more").exit_code == 0
    else:
        (tmp_path / "captions.txt").write_text("a red owl\na blue owl\na green owl\n")
        assert run("captions", "build", tmp_path / "captions.txt", "--name", "scenes").exit_code == 0
    with service_in_loop(settings, [encoder]) as (loop, service):
        message = "have revision 2, and the run uses revision 1" if change == "examples" else "is now 'scenes@.*'"
        with pytest.raises(ConflictError, match=message):
            run_bulk(bulk_request, spec, process_engine(loop, service), NoProgress())
    assert not list((tmp_path / "out").glob("part-*"))
