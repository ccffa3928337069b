"""The shipped label sets match their description in the guide."""

import json
from pathlib import Path

import pytest

from app.api.schemas.label_sets import LabelSetBody
from app.names.class_names import clean_classes
from app.prompting.recipes import feature_sentence

FILES = sorted((Path(__file__).parents[2] / "prompts" / "descriptions").glob("*.json"))
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLASSES = {"animals": 20, "cifar10": 10, "clothing": 10, "foods": 20, "household": 20, "scenes": 15, "vehicles": 10}


def entries_of(file):
    body = LabelSetBody.model_validate_json(file.read_bytes())
    return clean_classes(body.entries(), max_classes=1000, setting="")


def test_every_shipped_set_exists_with_all_classes():
    assert {file.stem: len(entries_of(file)) for file in FILES} == CLASSES
    assert [entry.name for entry in entries_of(next(file for file in FILES if file.stem == "cifar10"))] == CIFAR10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_class_has_six_features_and_six_sentences_with_its_name(file):
    for entry in entries_of(file):
        assert len(entry.features) >= 6, entry.name
        assert len(entry.descriptions) >= 6, entry.name
        for sentence in entry.descriptions:
            assert sentence.endswith("."), sentence
            assert 6 <= len(sentence.split()) <= 30, sentence
            assert entry.name.lower() in sentence.lower(), sentence
        for feature in entry.features:
            assert not feature.endswith("."), feature
            assert entry.name.lower() not in feature.lower().split(), feature
            assert feature_sentence(entry.name, feature).startswith(f"{entry.name}, which ")


def test_no_sentence_occurs_twice():
    sentences = [
        sentence.lower()
        for file in FILES
        for entry in json.loads(file.read_bytes())["classes"]
        for sentence in entry["descriptions"]
    ]
    assert len(sentences) == len(set(sentences))
