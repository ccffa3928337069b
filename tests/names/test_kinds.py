import runpy
from pathlib import Path

import pytest

from app.captions.cased.lexicon import is_installed
from app.captions.everyday import everyday_groups, everyday_names
from app.names.kinds import WordKinds

WORDS = ("dog", "police dog", "beagle", "dog house", "polo shirt", "shirt", "glasses", "T-shirt", "car", "猫")
KINDS = WordKinds(WORDS, {"dog": {"animal"}, "police dog": {"animal"}, "beagle": {"hound", "dog", "animal"}})


@pytest.mark.parametrize(
    ("names", "related"),
    [
        (["dog"], {"dog", "police dog", "beagle"}),
        (["Dogs"], {"dog", "police dog", "beagle"}),
        (["beagle"], {"beagle", "dog"}),
        (["animal"], {"dog", "police dog", "beagle"}),
        (["shirt"], {"polo shirt", "shirt", "T-shirt"}),
        (["polo shirt"], {"polo shirt", "shirt"}),
        (["t shirt"], {"T-shirt", "shirt"}),
        (["car", "glasses"], {"car", "glasses"}),
        (["猫"], {"猫"}),
        (["perro", "voiture", "собака"], set()),
        (["!?"], set()),
        ([], set()),
    ],
)
def test_words_for_a_class_its_kinds_and_its_groups_are_related(names, related):
    unrelated = {WORDS[index] for index in KINDS.unrelated(names)}
    assert set(WORDS) - unrelated == related


@pytest.fixture(scope="module")
def everyday():
    words = everyday_names()
    return words, WordKinds(words, everyday_groups())


@pytest.mark.parametrize(
    ("label", "related", "others"),
    [
        ("animal", {"beagle", "butterfly", "penguin", "tabby cat"}, {"car", "apple", "castle"}),
        ("vehicles", {"car", "bicycle", "mountain bicycle", "truck"}, {"road", "horse"}),
        ("clothing", {"shirt", "polo shirt", "sweater"}, {"wardrobe", "sheep"}),
        ("beagle", {"beagle", "dog"}, {"cat", "police dog"}),
    ],
)
def test_everyday_words_know_their_groups(everyday, label, related, others):
    words, kinds = everyday
    assert (related | others) <= set(words)
    unrelated = {words[index] for index in kinds.unrelated([label])}
    assert unrelated & related == set()
    assert others <= unrelated


def test_nearly_every_everyday_word_has_a_group(everyday):
    words, _ = everyday
    groups = everyday_groups()
    assert list(groups) == list(words)
    assert sum(not groups[word] for word in words) < 30


@pytest.mark.skipif(not is_installed(), reason="needs WordNet")
def test_the_file_of_groups_is_that_of_the_words():
    folder = Path(__file__).parents[2] / "prompts"
    made = runpy.run_path(str(folder / "build_everyday_groups.py"))["groups_file"]()
    assert made == (folder / "everyday_groups.txt").read_text("utf-8")


def test_ten_thousand_labels_leave_the_words_that_are_none_of_them(everyday):
    words, kinds = everyday
    labels = [f"label {number}" for number in range(10_000)] + list(words[:100])
    unrelated = [words[index] for index in kinds.unrelated(labels)]
    assert not set(words[:100]) & set(unrelated)
    assert len(unrelated) > 1000
