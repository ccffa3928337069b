"""The plan of a caption database, in requests and in stored jobs."""

import json
import re

import pytest

from app.captions.build_plan import EVERYDAY, WORDNET, BuildPlan
from app.captions.cased.candidates import NOTHING_FOUND, STOP_WORDS
from app.captions.cleaning import Counts
from app.captions.everyday import everyday_names
from app.captions.wordnet import LICENCE as WORDNET_LICENCE
from app.captions.wordnet import NOTES, wordnet_captions
from app.errors import ConfigurationError, InvalidFieldError
from tests.captions.cased.test_lexicon import LICENCE, SAMPLE, installed

LEMMAS = ["entity", "dog", "golden retriever", "stride"]


@pytest.fixture
def lexicon_folder(tmp_path):
    tmp_path.joinpath("data.noun").write_text(LICENCE + SAMPLE["data.noun"])
    return tmp_path


def read(plan, sources=(), wordnet=None):
    counts = Counts()
    return list(plan.read(sources, wordnet, counts)), counts


@pytest.mark.parametrize(
    "plan",
    [
        BuildPlan("fake", source=WORDNET),
        BuildPlan("fake", source=EVERYDAY),
        BuildPlan(
            "fake", files=("a.csv", "b/c.json.gz"), column="caption", source_notes="\u00fcber", licence="CC0-1.0"
        ),
        BuildPlan("fake", captions=("a red ball", "\u20ac"), min_chars=1, max_chars=9, latin_only=True),
        BuildPlan("fake", captions=("a",), near_duplicates=0.97, recall=0.99),
    ],
)
def test_a_plan_can_be_stored_as_json_with_captions_stored_separately(plan):
    content = json.loads(json.dumps(plan.to_json()))
    assert content["captions"] == []
    assert BuildPlan.from_json(content, plan.captions) == plan
    assert BuildPlan.from_json(content, list(plan.captions)) == plan


def test_captions_are_cleaned_and_counted():
    plan = BuildPlan("fake", captions=("a  red ball", "a red ball", "no", "a blue ball that is long"), max_chars=11)
    captions, counts = read(plan)
    assert captions == ["a red ball", "a blue ball"]
    assert (counts.read, counts.kept, counts.duplicates, counts.too_short, counts.cut) == (4, 2, 1, 1, 1)


def test_files_are_read_in_order_without_duplicates(tmp_path):
    (tmp_path / "a.txt").write_text("a red ball\na dog\n", "utf-8")
    (tmp_path / "b.csv").write_text("id,words\n1,a dog\n2,a cat\n", "utf-8")
    plan = BuildPlan("fake", files=("a.txt", "b.csv"), column="words")
    captions, counts = read(plan, [tmp_path / "a.txt", tmp_path / "b.csv"])
    assert captions == ["a red ball", "a dog", "a cat"]
    assert (counts.read, counts.kept, counts.duplicates) == (4, 3, 1)


def test_a_plan_can_be_read_repeatedly(lexicon_folder):
    for plan in (BuildPlan("fake", source=WORDNET), BuildPlan("fake", captions=("a red ball", "a dog"))):
        assert read(plan, wordnet=lexicon_folder) == read(plan, wordnet=lexicon_folder)


def test_nouns_are_read_by_their_first_lemmas_and_counted(lexicon_folder):
    captions, counts = read(BuildPlan("fake", source=WORDNET), wordnet=lexicon_folder)
    assert captions == LEMMAS == list(wordnet_captions(lexicon_folder))
    assert counts.read == counts.kept == 4


def test_the_packaged_names_are_read_in_order_and_need_no_files():
    captions, counts = read(BuildPlan("fake", source=EVERYDAY))
    names = list(everyday_names())
    assert captions == [name for name in names if len(name) > 2]
    assert counts.duplicates == 0
    assert names.index("dog") < names.index("stingray") < names.index("sheep dog")
    assert BuildPlan("fake", source=EVERYDAY).notes[1] == "Apache-2.0"


def test_every_packaged_name_can_be_a_label():
    """A name has letters a-z, spaces, hyphens and apostrophes, and is not a word for the picture itself."""
    names = everyday_names()
    assert len({name.casefold() for name in names}) == len(names) > 2000
    assert [name for name in names if not re.fullmatch(r"[A-Za-z]+([ '-]+[A-Za-z]+)*", name)] == []
    assert not {NOTHING_FOUND, *STOP_WORDS} & {name.casefold() for name in names}


def test_a_missing_lexicon_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="install Debian's package wordnet-base"):
        read(BuildPlan("fake", source=WORDNET), wordnet=tmp_path)


@pytest.mark.parametrize(("least", "most"), [(0, 5), (-1, 5), (6, 5), (1, 0)])
def test_rules_that_exclude_every_caption_are_rejected_with_both_numbers(least, most):
    with pytest.raises(InvalidFieldError, match=f"is {least}, and max_chars {most}; write 1 <=") as caught:
        _ = BuildPlan("fake", captions=("a dog",), min_chars=least, max_chars=most).rules
    assert caught.value.problems[0].field == "min_chars"


def test_nouns_have_default_notes_and_a_default_licence():
    assert BuildPlan("fake", source=WORDNET).notes == (NOTES, WORDNET_LICENCE)
    assert BuildPlan("fake", source=WORDNET, source_notes="mine").notes == ("mine", WORDNET_LICENCE)
    assert BuildPlan("fake", source=WORDNET, licence="other").notes == (NOTES, "other")
    assert BuildPlan("fake", captions=("a dog",)).notes == ("", "")
    assert BuildPlan("fake", files=("a.txt",), source_notes="a", licence="b").notes == ("a", "b")


@installed
def test_wordnet_has_the_documented_number_of_first_lemmas():
    captions = list(wordnet_captions())
    assert (len(captions), len(set(captions))) == (82_115, 67_893)
