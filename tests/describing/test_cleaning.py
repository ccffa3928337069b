"""Answers of a language model become sentences and phrases that a label set accepts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.describing.cleaning import clean_features, clean_sentences
from app.names.class_names import clean_classes
from app.types import ClassEntry
from tests.oracles.text_prototypes import parse_bullets


def cleaned(text, classname="lynx"):
    """Return the one sentence of a text, or None."""
    (*sentences,) = clean_sentences([text], classname)
    assert len(sentences) <= 1
    return sentences[0] if sentences else None


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("\n\nA lynx has tufted ears", "A lynx has tufted ears."),
        ("A lynx  has\n\n\ttufted\u00a0ears.", "A lynx has tufted ears."),
        ("A lynx\x00 has\x1b[1m ears\u200b.", "A lynx has[1m ears."),
        ("1. A lynx has ears.", "A lynx has ears."),
        ("12) A lynx has ears.", "A lynx has ears."),
        ("- A lynx has ears.", "A lynx has ears."),
        ("\u2022 A lynx has ears.", "A lynx has ears."),
        ("A: A lynx has ears.", "A lynx has ears."),
        ("A: 1. - A lynx has ears.", "A lynx has ears."),
        ('"A lynx has ears."', "A lynx has ears."),
        ('"A lynx has ears".', "A lynx has ears."),
        ('"A lynx has ears', "A lynx has ears."),
        ("\u201cA lynx has ears\u201d", "A lynx has ears."),
        ("'A lynx's ears are tufted.'", "A lynx's ears are tufted."),
        ("## A lynx has **tufted** ears", "A lynx has tufted ears."),
    ],
)
def test_marks_around_a_sentence_are_removed(raw, sentence):
    assert cleaned(raw) == sentence


def test_rows_of_combining_marks_that_a_label_set_refuses_are_dropped():
    marks = "\u0301\u0316" * 20
    assert clean_sentences([f"A lynx{marks} has ears.", "A lynx has ears."], "lynx") == ["A lynx has ears."]
    assert clean_features(f"- ears{marks}\n- tufts", "lynx") == ["tufts"]


def test_a_long_answer_gives_few_features():
    assert len(clean_features("\n".join(f"- mark {number}" for number in range(100_000)), "lynx")) < 1000


@pytest.mark.parametrize(
    "sentence",
    [
        '"King" is the name of one lynx.',
        '"King" and "Queen" is what they are called.',
        "'Tis the lynx's ear.",
        "3.5 feet is its length.",
        "Asked: a lynx is a cat.",
        'It is called "lynx."',
        "It has tufted ears (both of them.)",
        "\u5c71\u732b\u6709\u8033\u6735\u3002",
    ],
)
def test_marks_within_a_sentence_are_kept(sentence):
    assert cleaned(sentence) == sentence


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("A lynx has tufted ears. It also has a", "A lynx has tufted ears."),
        ("It is big! Its ears are tufted? Its tail", "It is big! Its ears are tufted?"),
        ('It says "hello." Then it', 'It says "hello."'),
        ("A lynx has tufted ears", "A lynx has tufted ears."),
        ("A lynx has tufted ears, and a", "A lynx has tufted ears, and a."),
        ("A lynx has the following:", "A lynx has the following."),
        ("A lynx is approx. 80 cm long and has", "A lynx is approx. 80 cm long and has."),
        ("A lynx, e.g. The Iberian one, has", "A lynx, e.g. The Iberian one, has."),
        ("Prof. J. Smith saw a lynx. It was", "Prof. J. Smith saw a lynx."),
        ("It has: 1. Tufted ears 2. A short", "It has: 1. Tufted ears 2. A short."),
        ("\u5c71\u732b\u6709\u8033\u6735\u3002\u5b83\u7684\u5c3e", "\u5c71\u732b\u6709\u8033\u6735\u3002"),
    ],
)
def test_a_truncated_sentence_is_dropped_or_given_a_full_stop(raw, sentence):
    assert cleaned(raw) == sentence


def test_a_full_stop_in_the_class_name_does_not_end_a_sentence():
    assert cleaned("The No. One Bar has a red door and", "No. One Bar") == "The No. One Bar has a red door and."
    assert cleaned("The Feat. Kit is red. It has", "Feat. Kit") == "The Feat. Kit is red."


@pytest.mark.parametrize(
    "raw",
    [
        "",
        ".",
        " \n ",
        "...!!",
        '"."',
        "1.",
        "- ",
        "cat.",
        "? A lynx has tufted ears.",
        '"? A lynx has tufted ears."',
        "![A lynx](lynx.png)",
        "A lynx [see](here) is a cat.",
        "A lynx [see [1]) is a cat.",
        "See https://example.org/lynx for a lynx.",
        "See www.example.org for a lynx.",
        "As an AI, I have no eyes.",
        "Sorry, as an AI language model I cannot see.",
        "I'm sorry, but I cannot help.",
        "I\u2019m sorry.",
        "I cannot describe that.",
        '"I can\'t describe that."',
        "x" * 1000,
    ],
)
def test_an_answer_that_is_not_a_description_is_dropped(raw):
    assert cleaned(raw) is None


def test_a_description_of_the_maximum_length_is_kept():
    assert cleaned("x" * 999 + ".") == "x" * 999 + "."


def test_sentences_keep_their_order_and_those_that_differ_in_case_spaces_and_last_mark_are_dropped():
    raw = ["A lynx is a cat", "It has tufts.", "a Lynx is a  cat!", "- A lynx is a cat.", "It has a tail."]
    assert clean_sentences(raw, "lynx") == ["A lynx is a cat.", "It has tufts.", "It has a tail."]


PIECES = st.sampled_from(
    "Ae .?\"'\n\u201c\u201d\u00e9\u0301\u200c\u200d\ufe0f\U0001f431\ud800\u2028\u3002"
) | st.sampled_from(["lynx", "Sorry", "A: ", "1. ", "- ", "**", "](", "e.g."])
TEXTS = st.text(max_size=60) | st.lists(PIECES, max_size=12).map("".join)


@given(st.lists(TEXTS, max_size=4), st.text(max_size=8))
def test_a_label_set_accepts_every_cleaned_text(raw, classname):
    sentences = tuple(clean_sentences(raw, classname))
    features = tuple(clean_features("\n".join(f"- {text}" for text in raw), classname))
    (entry,) = clean_classes(
        [ClassEntry("lynx", descriptions=sentences, features=features)], max_classes=1, setting="DEIXIS_MAX_CLASSES"
    )
    assert entry.descriptions == sentences
    assert entry.features == features


@given(st.lists(TEXTS, max_size=4))
def test_cleaning_a_clean_text_changes_nothing(raw):
    once = clean_sentences(raw, "lynx")
    assert clean_sentences(once, "lynx") == once


def test_features_are_the_items_of_the_list_and_not_other_lines():
    raw = "A lynx has:\n- tufted ears\n* Short tail.\n1. Spotted coat\n\n  - broad paws\nThat is all.\n-nothing\n- \n"
    assert clean_features(raw, "lynx") == ["tufted ears", "short tail", "spotted coat", "broad paws"]


@pytest.mark.parametrize(
    ("line", "feature"),
    [
        ("- Black tufts", "black tufts"),
        ("- A short tail", "a short tail"),
        ("- LED headlights", "LED headlights"),
        ("- V-shaped nose", "V-shaped nose"),
        ("- U.S. flag", "U.S. flag"),
        ("- **Ears:** tufted", "ears: tufted"),
        ("10. black tufts;", "black tufts"),
        ("- tufts,\u200b  black.", "tufts, black"),
        ("- \u5c71\u732b", "\u5c71\u732b"),
    ],
)
def test_a_feature_is_a_phrase_that_fits_into_a_sentence(line, feature):
    assert clean_features(line, "lynx") == [feature]


@pytest.mark.parametrize(
    "line", ["- lynx", "- A Lynx.", "- the lynx", "- ...", "- see https://x.org", f"- {'x' * 201}"]
)
def test_a_worthless_feature_is_dropped(line):
    assert clean_features(line, "lynx") == []


def test_a_feature_that_only_begins_like_the_class_is_kept():
    assert clean_features("- lynx-like ears\n- a lynx in snow", "a lynx") == ["lynx-like ears", "a lynx in snow"]


def test_features_keep_their_order_and_repeated_ones_are_dropped():
    assert clean_features("- b\n- a\n- B.\n- c\n- A", "lynx") == ["b", "a", "c"]


@given(st.lists(st.text("abc xyz", max_size=10)))
def test_plain_lists_are_read_as_classification_by_description_reads_them(lines):
    raw = "\n".join(f"- {line}" for line in lines)
    expected = [" ".join(feature.split()) for feature in parse_bullets(raw)]
    first = {feature.replace(" ", ""): feature for feature in reversed(expected)}
    assert clean_features(raw, "lynx") == [fromkey for fromkey in dict.fromkeys(expected) if fromkey in first.values()]


@pytest.mark.parametrize(
    "answer",
    [
        "- " * 200_000,
        "'\"" * 200_000,
        "a\u0301\u0316" * 200_000,
        "!" * 400_000,
        ". a" * 100_000,
        "- x" + "\u0316\u0301" * 200_000,
    ],
    ids=["bullets", "quotes", "marks", "ends", "sentences", "marks in a list"],
)
def test_an_answer_without_end_is_cleaned_in_limited_time(answer):
    """The endpoint of the language model may return anything."""
    began = time.thread_time()
    clean_sentences([answer], "lynx")
    clean_features(answer, "lynx")
    assert time.thread_time() - began < 2
