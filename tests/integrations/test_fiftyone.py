"""Samples labelled by a real service, with as much of FiftyOne as that takes; test_fiftyone_itself.py has the rest."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.integrations.fiftyone import classify_samples, labels_file
from app.main import create_app
from deixis import Client, ImageResult, ProblemError
from tests.api.live import live
from tests.cli.conftest import new_encoder, run, where  # noqa: F401 - fixtures
from tests.conftest import picture


class Label(dict):
    """A label with fields, as FiftyOne's are."""

    def __init__(self, **fields):
        super().__init__(fields)


class Classification(Label):
    pass


class Classifications(Label):
    pass


class Sample(dict):
    """A sample with fields."""

    def __init__(self, filepath):
        super().__init__()
        self.filepath = str(filepath)


class Collection(list):
    """Samples that are saved, as those of a dataset."""

    def __init__(self, samples):
        super().__init__(samples)
        self.saved = []

    def save_context(self):
        collection = self

        class Context:
            def __enter__(self):
                return SimpleNamespace(save=collection.saved.append)

            def __exit__(self, *_):
                collection.saved.append("closed")

        return Context()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "fiftyone", SimpleNamespace(Classification=Classification, Classifications=Classifications)
    )


@pytest.fixture
def client(settings, encoder):
    with live(create_app(settings, lambda _: [encoder])) as (host, port), Client(f"http://{host}:{port}") as client:
        yield client


@pytest.fixture
def samples(tmp_path):
    found = []
    for number, colour in enumerate(["red", "green", "blue"] * 7):
        file = tmp_path / f"{number}.png"
        file.write_bytes(picture(colour))
        found.append(Sample(file))
    return found


COLOURS = ["red", "green", "blue"]


def test_each_sample_gets_a_label_a_confidence_and_tags(client, samples):
    dataset = Collection(samples)
    summary = classify_samples(dataset, client, labels=COLOURS, batch_size=4)
    assert (summary.labelled, summary.rejected, summary.skipped) == (21, 0, [])
    assert [sample["deixis"]["label"] for sample in samples] == COLOURS * 7
    assert all(isinstance(sample["deixis"], Classification) for sample in samples)
    assert all(0.9 < sample["deixis"]["confidence"] <= 1 for sample in samples)
    assert samples[0]["deixis"]["tags"] == ["fake"]
    assert dataset.saved == [*samples, "closed"]


def test_several_labels_have_the_version_of_the_label_set(client, samples):
    client.label_sets.put("colours", COLOURS)
    summary = classify_samples(iter(samples), client, label_set="colours", label_field="found", top_k=2, batch_size=8)
    assert summary.label_set == "colours@1"
    assert summary.labels == tuple(COLOURS)
    for sample, colour in zip(samples, COLOURS * 7, strict=True):
        assert isinstance(sample["found"], Classifications)
        first, second = sample["found"]["classifications"]
        assert first["label"] == colour
        assert first["confidence"] > second["confidence"]
        assert first["tags"] == ["fake", "colours@1"]


def test_logits_have_the_order_of_the_labels(client, samples):
    summary = classify_samples(samples, client, labels=COLOURS, store_logits=True)
    for sample, colour in zip(samples, COLOURS * 7, strict=True):
        scores = [math.exp(each) for each in sample["deixis"]["logits"]]
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert summary.labels[scores.index(max(scores))] == colour
    classify_samples(samples[:1], client, labels=COLOURS, store_logits=True, top_k=2, label_field="two")
    assert len(samples[0]["two"]["logits"]) == 3
    assert len(samples[0]["two"]["classifications"]) == 2


def test_the_path_of_a_hierarchy_is_an_attribute(client, samples):
    client.label_sets.put("warmth", [{"name": "red", "parent": "warm"}, {"name": "blue", "parent": "cold"}, "green"])
    classify_samples(samples[:3], client, label_set="warmth")
    assert [sample["deixis"]["label_path"] for sample in samples[:3]] == [["warm", "red"], ["green"], ["cold", "blue"]]
    classify_samples(samples[:1], client, label_set="warmth", top_k=2, min_score=1.0)
    assert samples[0]["deixis"]["label_path"] == []
    assert "label_path" not in samples[0]["deixis"]["classifications"][0]
    classify_samples(samples[:1], client, labels=COLOURS)
    assert "label_path" not in samples[0]["deixis"]


def test_an_unreadable_sample_is_listed_and_the_others_are_labelled(client, samples, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").unlink()
    samples[1]["deixis"] = "before"
    summary = classify_samples(samples, client, labels=COLOURS)
    assert [path for path, _ in summary.skipped] == [samples[1].filepath, samples[2].filepath]
    assert "looks like text" in summary.skipped[0][1]
    assert samples[1]["deixis"] == "before"
    assert summary.labelled == 19


def test_a_rejected_sample_gets_no_label(client, samples, tmp_path):
    (tmp_path / "0.png").write_bytes(picture("yellow"))
    samples[0]["deixis"] = "before"
    summary = classify_samples(samples, client, labels=COLOURS, reject_below=0.75)
    assert (summary.labelled, summary.rejected) == (20, 1)
    assert samples[0]["deixis"] is None


def test_invalid_arguments_are_errors_before_a_sample_is_read(client):
    def unread():
        pytest.fail("a sample was read")
        yield

    with pytest.raises(ValueError, match="top_k is 0"):
        classify_samples(unread(), client, labels=COLOURS, top_k=0)
    with pytest.raises(ValueError, match="store_logits needs labels"):
        classify_samples(unread(), client, store_logits=True)
    with pytest.raises(TypeError, match="not one string"):
        classify_samples(unread(), client, labels="cat")
    with pytest.raises(ProblemError, match="unknown label set 'nothing'"):
        classify_samples(unread(), client, label_set="nothing")
    with pytest.raises(TypeError, match="unknown argument colour"):
        classify_samples(unread(), client, labels=COLOURS, colour="red")


def test_a_label_that_the_service_normalises_has_no_logit(client, samples):
    with pytest.raises(ValueError, match="no score for 'dark  red'"):
        classify_samples(samples, client, labels=["dark  red", "blue"], store_logits=True)


def test_without_fiftyone_the_error_names_the_package(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ImportError, match="pip install fiftyone"):
        classify_samples([], client, labels=COLOURS)


def result(*labels, **more) -> ImageResult:
    found = [{"label": label, "score": 0.5, "similarity": 0.1} for label in labels]
    return ImageResult.model_validate({"predictions": found, **more})


def test_the_labels_file_has_absolute_paths_and_no_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "a.png", tmp_path.relative_to(tmp_path) / "b.png", tmp_path / "c.png"]
    bad = {"type": "x", "title": "x", "status": 400, "detail": "x"}
    results = [result("cat", "dog"), result("dog", rejected=True), result(error=bad)]
    one = labels_file(files, results, classes=["cat", "dog"], top_k=1)
    assert one == {
        "classes": ["cat", "dog"],
        "labels": {str(tmp_path / "a.png"): {"label": "cat", "confidence": 0.5}, str(tmp_path / "b.png"): None},
    }
    two = labels_file(files[:1], results[:1], classes=None, top_k=2)
    assert two["classes"] is None
    assert [each["label"] for each in two["labels"][str(tmp_path / "a.png")]] == ["cat", "dog"]
    below = result("cat", path=[{"label": "animal", "score": 0.9}])
    with_path = labels_file(files[:1], [below], classes=None, top_k=1)["labels"][str(tmp_path / "a.png")]
    assert with_path == {"label": "cat", "confidence": 0.5, "attributes": {"label_path": ["animal"]}}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_the_command_writes_a_labels_file(run, where, photos):  # noqa: F811
    done = run("classify", photos, "-l", "red,  dark   green,blue", "-f", "fiftyone", *where)
    assert done.exit_code == 1, done.stderr  # one is no picture
    content = json.loads(done.stdout)
    assert content["classes"] == ["red", "dark green", "blue"]
    found = {Path(path).stem: each["label"] for path, each in content["labels"].items()}
    assert found == {"red": "red", "green": "dark green", "blue": "blue"}
    assert all(Path(path).is_absolute() for path in content["labels"])


def test_the_command_names_the_classes_of_a_label_set(run, where, photos, tmp_path):  # noqa: F811
    names = tmp_path / "names.txt"
    names.write_text("\n".join(COLOURS))
    assert run("label-sets", "import", "colours", names).exit_code == 0
    content = json.loads(run("classify", photos / "red.png", "-s", "colours", "-f", "fiftyone", "-k", 2, *where).stdout)
    assert content["classes"] == COLOURS
    ((first, second),) = content["labels"].values()
    assert first["label"] == "red"
    assert first["confidence"] > second["confidence"]
