import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidFieldError, TooLargeError
from app.names.class_names import clean_classes, clean_classnames
from app.types import ClassEntry
from tests.names.texts import TEXTS

ENTRIES = st.builds(ClassEntry, TEXTS, st.lists(TEXTS, max_size=3).map(tuple), st.lists(TEXTS, max_size=3).map(tuple))


def classes(*entries, **options):
    return clean_classes(entries, **{"max_classes": 100, "setting": "DEIXIS_MAX_CLASSES"} | options)


def problems_of(*entries, **options):
    with pytest.raises(InvalidFieldError) as caught:
        classes(*entries, **options)
    return [(problem.field, problem.problem) for problem in caught.value.problems]


def test_class_names_are_trimmed_normalised_and_kept_in_order():
    assert clean_classnames([" sea \t\n lion", "lynx\u3000", "cafe\u0301"], max_classes=3, setting="S") == (
        "sea lion",
        "lynx",
        "café",
    )


def test_a_string_is_a_class_without_descriptions():
    lynx = ClassEntry("lynx", ("a cat  with tufted ears",), (" bobcat ",))
    assert classes("puma", lynx) == (
        ClassEntry("puma"),
        ClassEntry("lynx", ("a cat with tufted ears",), ("bobcat",)),
    )


def test_repeated_descriptions_are_removed():
    assert classes(ClassEntry("lynx", ("tufted ears", "short tail", "tufted  ears"))) == (
        ClassEntry("lynx", ("tufted ears", "short tail")),
    )


def test_a_class_name_may_contain_characters_reserved_in_label_set_names():
    assert clean_classnames(["a/c, 100% (.5 #1) @home?"], max_classes=1, setting="S") == ("a/c, 100% (.5 #1) @home?",)


def test_every_problem_of_every_class_is_reported_with_its_path():
    found = problems_of(
        "", "lynx", ClassEntry("pu\0ma", ("good", "ba\u200bd"), ("", "x" * 1001)), "LYNX", "y" * 201, "lynx "
    )
    assert [path for path, _ in found] == [
        "classes.0",
        "classes.2",
        "classes.2.descriptions.1",
        "classes.2.synonyms.0",
        "classes.2.synonyms.1",
        "classes.3",
        "classes.4",
        "classes.5",
    ]


def test_a_repeated_class_is_rejected_with_the_index_of_the_first():
    assert problems_of("lynx", "puma", " lynx") == [
        ("classes.2", "'lynx' repeats 'lynx' at index 0; remove one of them")
    ]


def test_class_names_that_differ_only_in_case_are_rejected_with_both_names():
    [(path, problem)] = problems_of("Jaguar", "jaguar", field="labels")
    assert path == "labels.1"
    assert "'jaguar' repeats 'Jaguar' at index 0, because letter case is ignored" in problem


def test_names_that_are_equal_only_under_full_case_folding_are_different():
    assert clean_classnames(["Maße", "Masse"], max_classes=2, setting="S") == ("Maße", "Masse")


def test_class_names_that_are_equal_after_normalisation_are_duplicates():
    assert "repeats" in problems_of("caf\u00e9", "cafe\u0301")[0][1]


def test_a_long_class_name_is_rejected_and_shortened_in_the_error():
    [(_, problem)] = problems_of("x" * 5000, max_label_chars=30)
    assert "has 5000 characters, at most 30 are allowed" in problem
    assert len(problem) < 200


def test_an_empty_list_of_classes_is_rejected():
    assert problems_of(field="labels") == [("labels", "the list is empty; give at least one class")]


def test_too_many_descriptions_of_a_class_are_rejected():
    entry = ClassEntry("lynx", ("a", "b", "c"))
    assert problems_of(entry, max_descriptions=2) == [
        ("classes.0.descriptions", "3 are given, at most 2 are allowed; remove some")
    ]


def test_too_many_labels_are_rejected_with_number_limit_and_setting():
    with pytest.raises(TooLargeError, match=r"^3 classes are given, at most 2 .* DEIXIS_MAX_LABELS"):
        clean_classnames(["a", "b", "c"], max_classes=2, setting="DEIXIS_MAX_LABELS")


@given(st.lists(st.one_of(TEXTS, ENTRIES), max_size=6))
def test_cleaning_classes_is_idempotent_and_raises_only_client_errors(raw):
    try:
        cleaned = classes(*raw, max_classes=5)
    except (InvalidFieldError, TooLargeError) as error:
        error.message.encode()
    else:
        assert classes(*cleaned) == cleaned
        assert len({entry.name.lower() for entry in cleaned}) == len(raw)
        for entry in cleaned:
            for text in (entry.name, *entry.descriptions, *entry.synonyms):
                assert text.encode()
                assert text == " ".join(text.split()) != ""
                assert unicodedata.is_normalized("NFC", text)
