"""The same with FiftyOne itself, where it is installed; datasets only where FIFTYONE_DATABASE_URI names a MongoDB."""

import os
from pathlib import Path

import pytest

from app.integrations.fiftyone import classify_samples
from app.main import create_app
from deixis import Client
from tests.api.live import live
from tests.cli.conftest import new_encoder, run  # noqa: F401 - fixtures
from tests.conftest import picture

fiftyone = pytest.importorskip("fiftyone", reason="needs fiftyone")

COLOURS = ["red", "green", "blue"]
needs_database = pytest.mark.skipif(
    "FIFTYONE_DATABASE_URI" not in os.environ, reason="FIFTYONE_DATABASE_URI is not set"
)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for colour in (*COLOURS, "yellow"):
        (place / f"{colour}.png").write_bytes(picture(colour))
    return place


@pytest.fixture
def client(settings, encoder):
    with live(create_app(settings, lambda _: [encoder])) as (host, port), Client(f"http://{host}:{port}") as client:
        yield client


@pytest.fixture
def labels_json(run, folder, tmp_path):  # noqa: F811
    """Return a function that has the command write the file; its arguments are flags."""

    def write(*flags):
        done = run("classify", folder, "-l", ",".join(COLOURS), "-f", "fiftyone", *flags)
        assert done.exit_code == 0, done.stderr
        file = tmp_path / "labels.json"
        file.write_text(done.stdout)
        return file

    return write


def imported(file):
    importer = fiftyone.utils.data.FiftyOneImageClassificationDatasetImporter(labels_path=str(file))
    with importer:
        assert importer.get_dataset_info() == {"classes": COLOURS}
        return {Path(path).name: label for path, _, label in importer}


def test_the_importer_reads_the_file_of_the_command(labels_json):
    found = imported(labels_json("--reject-below", "0.75"))
    assert {name: label and label.label for name, label in found.items()} == {
        "red.png": "red",
        "green.png": "green",
        "blue.png": "blue",
        "yellow.png": None,
    }
    assert 0.9 < found["red.png"].confidence <= 1
    several = imported(labels_json("--top-k", "2"))
    assert len(several["red.png"].classifications) == 2
    assert several["red.png"].classifications[0].label == "red"


def test_the_path_of_a_hierarchy_is_an_attribute(run, client, folder, tmp_path):  # noqa: F811
    (names := tmp_path / "names.csv").write_text("name,parent\nred,warm\nblue,cold\ngreen,\n")
    assert run("label-sets", "import", "warmth", names).exit_code == 0
    done = run("classify", folder / "red.png", "-s", "warmth", "-f", "fiftyone")
    (tmp_path / "labels.json").write_text(done.stdout)
    importer = fiftyone.utils.data.FiftyOneImageClassificationDatasetImporter(labels_path=str(tmp_path / "labels.json"))
    with importer:
        ((_, _, label),) = importer
    assert label.label_path == ["warm", "red"]
    client.label_sets.put("warmth", [{"name": "red", "parent": "warm"}, {"name": "blue", "parent": "cold"}])
    sample = fiftyone.Sample(filepath=str(folder / "blue.png"))
    classify_samples([sample], client, label_set="warmth")
    assert sample.deixis.label_path == ["cold", "blue"]


def test_samples_outside_a_dataset_are_labelled(client, folder):
    samples = [fiftyone.Sample(filepath=str(folder / f"{colour}.png")) for colour in COLOURS]
    classify_samples(samples, client, labels=COLOURS, store_logits=True)
    assert [sample.deixis.label for sample in samples] == COLOURS
    assert samples[0].deixis.tags == ["fake"]
    assert len(samples[0].deixis.logits) == 3


@needs_database
def test_a_dataset_and_a_view_are_labelled_and_saved(client, folder):
    dataset = fiftyone.Dataset()
    try:
        files = [str(folder / f"{colour}.png") for colour in (*COLOURS, "yellow")] * 10
        dataset.add_samples([fiftyone.Sample(filepath=file) for file in files])
        dataset.add_sample(fiftyone.Sample(filepath=str(folder / "gone.png")))
        summary = classify_samples(dataset, client, labels=COLOURS, reject_below=0.75, store_logits=True)
        assert (summary.labelled, summary.rejected, len(summary.skipped)) == (30, 10, 1)
        dataset.reload()
        assert dataset.count_values("deixis.label") == {"red": 10, "green": 10, "blue": 10, None: 11}
        assert dataset.bounds("deixis.confidence")[0] > 0.75
        view = dataset.match(fiftyone.ViewField("deixis.label") == "red")
        classify_samples(view, client, labels=["red", "blue"], label_field="again", top_k=2)
        assert dataset.count("again.classifications") == 20
    finally:
        dataset.delete()


@needs_database
def test_a_dataset_is_created_from_the_file_of_the_command(labels_json):
    dataset = fiftyone.Dataset.from_dir(
        dataset_type=fiftyone.types.FiftyOneImageClassificationDataset, labels_path=str(labels_json())
    )
    try:
        assert len(dataset) == 4
        assert dataset.count_values("ground_truth.label")["green"] >= 1
    finally:
        dataset.delete()
