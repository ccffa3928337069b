"""The one spelling of texts, on texts that make normalization slow."""

import time
import unicodedata

import pytest
from hypothesis import given

from app.errors import InvalidFieldError
from app.names.class_names import clean_classes, clean_classnames, indices_of
from app.names.namespaces import clean_label_set_name
from app.names.text import check_text, clean_text, nfc, normalized
from app.types import ClassEntry
from tests.names.texts import TEXTS

# Each takes minutes to normalize in one call: the marks of a run are sorted by insertion.
SLOW = {
    "two marks in the wrong order": "a" + "\u0301" * 300_000 + "\u0316" * 300_000,
    "marks that decompose into two": "\u0344" * 200_000 + "\u0316" * 200_000,
    "letters that decompose into marks": "\u0f73" * 300_000,
    "alternating marks": "a" + "\u0301\u0316" * 300_000,
    "many long runs": ("a" + "\u0301" * 5000 + "\u0316" * 5000) * 40,
}


@pytest.mark.parametrize("raw", SLOW.values(), ids=SLOW)
def test_any_number_of_combining_marks_is_normalized_in_linear_time(raw):
    began = time.thread_time()
    text = normalized(raw)
    assert time.thread_time() - began < 2
    assert unicodedata.is_normalized("NFC", text[:1000])


@pytest.mark.parametrize("raw", SLOW.values(), ids=SLOW)
@pytest.mark.parametrize(
    "clean",
    [
        lambda raw: clean_text(raw, max_chars=1_000_000, field="text"),
        lambda raw: clean_classnames([raw], max_classes=1, setting=""),
        lambda raw: clean_label_set_name(raw, "name"),
    ],
    ids=["text", "class name", "label set name"],
)
def test_a_name_with_too_many_combining_marks_is_refused(clean, raw):
    with pytest.raises(InvalidFieldError):
        clean(raw)


@pytest.mark.parametrize(("marks", "accepted"), [(30, True), (31, False), (40, False), (41, False), (500, False)])
@pytest.mark.parametrize("mark", ["\u0316", "\u0323", "\u0e48"])
def test_thirty_combining_marks_in_a_row_are_allowed(mark, marks, accepted):
    """The limit of the Stream-Safe Text Format; the letter has no composed form with these marks."""
    text, problems = check_text("\u0e01" + mark * marks, 1000)
    assert (problems == []) == accepted, problems
    if accepted:
        assert text == "\u0e01" + mark * marks
    else:
        assert "more than 30 combining marks in a row" in problems[0]


def test_every_character_that_normalization_sorts_is_counted():
    sorted_ones = [
        character
        for character in map(chr, range(0x110000))
        if unicodedata.combining(unicodedata.normalize("NFD", character)[0])
    ]
    assert len(sorted_ones) > 900
    for character in sorted_ones:
        assert len(unicodedata.normalize("NFD", nfc("a" + character * 1000))) <= 1 + 40 * 4, hex(ord(character))


@given(TEXTS)
def test_ordinary_texts_are_what_the_standard_calls_nfc(raw):
    assert nfc(raw) == unicodedata.normalize("NFC", raw)


@pytest.mark.parametrize("raw", ["x" * 100_000, " " * 100_000 + "x", "x" + " " * 100_000 + "x", "é" * 100_000])
def test_a_text_far_above_its_limit_is_refused_without_reading_it(raw):
    text, (problem,) = check_text(raw, 200)
    assert text == ""
    assert f"has {len(raw)} characters, at most 200 are allowed" in problem


def test_a_text_that_normalization_shortens_most_is_accepted():
    """Four characters become one, the largest shrinkage in Unicode."""
    decomposed = unicodedata.normalize("NFD", "\u1f82")
    assert len(decomposed) == 4
    assert check_text(decomposed * 200, 200) == ("\u1f82" * 200, [])


def test_a_long_name_is_looked_up_in_limited_time():
    began = time.thread_time()
    with pytest.raises(Exception, match="class"):
        indices_of(["a\u0301\u0316" * 3_000_000], ["a"])
    assert time.thread_time() - began < 2


def test_a_prompt_of_a_class_may_contain_its_name_ten_times():
    """A prompt of 300 characters could otherwise become one of 30,000."""
    accepted = ClassEntry("cat", prompt="{}" * 10)
    assert clean_classes([accepted], max_classes=1, setting="") == (accepted,)
    with pytest.raises(InvalidFieldError, match="11 times; at most 10"):
        clean_classes([ClassEntry("cat", prompt="{}" * 11)], max_classes=1, setting="")
