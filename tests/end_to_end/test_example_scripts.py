"""Every script of examples/ works on a real server, with its own photographs and with other folders."""

import ast
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deixis
from tests.end_to_end.commands import environment

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = {file.stem for file in (EXAMPLES / "photos").glob("*.jpg")}
CAPTIONS = [
    "a cat on a sofa",
    "a rocket at its launch",
    "a cup of coffee on a table",
    "an astronaut in her suit",
    "galaxies in the night sky",
    "a photographer with a camera",
    "a dog on a beach",
    "a bridge over a river",
]


def run(server, script, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", *arguments, "--url", server.url],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == status, done.stderr
    return done


# Runs cells as a notebook does, and prints what it would show of each as a JSON array.
NOTEBOOK = """
import ast, json, sys
shown, names = [], {}
for cell in json.load(sys.stdin):
    body = ast.parse(cell).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
print(json.dumps(shown))
"""


def test_the_notebook_runs_and_shows_results(server):
    pytest.importorskip("pandas")
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "http://127.0.0.1:8000" in code[0]
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input=json.dumps([cell.replace("http://127.0.0.1:8000", server.url) for cell in code]),
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    one, several, table, dictionary, result, stream = json.loads(done.stdout)
    assert one.count("<img") == 1
    assert several.count("<img") == len(PHOTOS)
    assert "photos/rocket.jpg" in table
    assert "similarity" in dictionary
    assert "cat" in result
    labels = dict(zip(sorted(PHOTOS), ast.literal_eval(stream), strict=True))
    assert (labels["cat"], labels["coffee"], labels["rocket"]) == ("cat", "cup of coffee", "rocket")


def test_every_script_is_tested():
    assert {script.stem for script in EXAMPLES.glob("*.py")} == {
        *("camera_trap", "compare_methods", "moderation", "name_my_folder", "product_catalogue")
    }


def test_a_catalogue_has_a_row_for_each_image(server, tmp_path):
    rows = list(csv.DictReader(io.StringIO(run(server, "product_catalogue").stdout)))
    shelves = {row["file"].removesuffix(".jpg"): row["shelf"] for row in rows}
    assert shelves.keys() == PHOTOS
    assert (shelves["cat"], shelves["coffee"], shelves["rocket"]) == ("pets", "kitchen", "space and science")
    assert {row["review"] for row in rows} <= {"yes", "no"}
    (version,) = {row["label_set"] for row in rows}
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    shutil.copy(EXAMPLES / "photos/cat.jpg", tmp_path / "a cat.jpg")
    again = list(csv.DictReader(io.StringIO(run(server, "product_catalogue", tmp_path).stdout)))
    assert [(row["file"], row["review"]) for row in again] == [("a cat.jpg", "no"), ("broken.jpg", "yes")]
    assert again[0]["label_set"] == version


def test_moderation_decides_for_each_image(server):
    decisions = dict(line.split(maxsplit=2)[1::-1] for line in run(server, "moderation").stdout.splitlines())
    assert decisions.keys() == {f"{name}.jpg" for name in PHOTOS}
    assert (decisions["cat.jpg"], decisions["coffee.jpg"]) == ("pass", "pass")
    assert set(decisions.values()) <= {"pass", "review", "block"}


def test_moderation_blocks_reviews_or_passes_by_score_and_rejection(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from moderation import HARMLESS, UNWANTED, decide

    def result(unwanted, harmless, *, rejected=False):
        scores = {UNWANTED[0]: unwanted, HARMLESS[0]: harmless}
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        predictions = [deixis.Prediction(label=label, score=score, similarity=0) for label, score in ranked]
        return deixis.ImageResult(predictions=predictions, rejected=rejected)

    assert decide(result(0.9, 0.1))[0] == "block"
    assert decide(result(0.5, 0.5))[0] == "review"
    assert decide(result(0.1, 0.9))[0] == "pass"
    assert decide(result(0.9, 0.1, rejected=True)) == ("review", "none of the labels")


def test_a_camera_trap_learns_from_a_few_frames(server, photograph_folder):
    output = run(server, "camera_trap").stdout.splitlines()
    assert output[0].startswith("selected method: ")
    sets = dict(line.split(": ") for line in output[1:])
    assert len(sets) == 12
    correct = sum(file.partition("-")[0] in labels.split(", ") for file, labels in sets.items())
    assert correct >= 10
    with deixis.Client(server.url) as client:
        assert set(client.examples.counts("camera-trap").labelled.values()) == {12}
    own = run(server, "camera_trap", photograph_folder, EXAMPLES / "photos").stdout
    assert "cat.jpg: " in own


def test_the_camera_trap_refuses_a_single_folder(server, tmp_path):
    assert "both folders" in run(server, "camera_trap", tmp_path, status=2).stderr


def test_files_are_renamed_only_with_the_rename_option(server, tmp_path):
    with deixis.Client(server.url) as client:
        client.databases.build("captions-of-photos", captions=CAPTIONS).wait(timeout_s=60)
    folder = tmp_path / "photos"
    shutil.copytree(EXAMPLES / "photos", folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    output = run(server, "name_my_folder", folder, "--database", "captions-of-photos").stdout
    assert output.startswith("labels: ")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    run(server, "name_my_folder", folder, "--database", "captions-of-photos", "--rename")
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(after.values()) == sorted(before.values())
    assert after.keys() != before.keys()
    missing = run(server, "name_my_folder", folder, "--database", "nothing", status=1)
    assert "nothing" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_methods_are_compared_on_the_sample_photographs(server):
    output = run(server, "compare_methods").stdout
    assert "36 images in 3 classes" in output
    assert "zero-shot " in output


def test_methods_are_compared_with_descriptions_on_another_folder(server, photograph_folder, tmp_path):
    sentences = tmp_path / "sentences.json"
    names = [folder.name.replace("_", " ") for folder in photograph_folder.iterdir()]
    sentences.write_text(json.dumps({name: [f"a {name} seen from near", f"a {name} far away"] for name in names}))
    output = run(server, "compare_methods", photograph_folder, "--label-set", "own", "--descriptions", sentences).stdout
    assert "6 images in 6 classes" in output
    assert "cupl" in output
