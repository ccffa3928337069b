import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidFieldError, TooLargeError
from app.names.class_names import clean_classes, clean_classnames, clean_label_set_name
from app.types import ClassEntry

# Everything that a JSON string can carry, lone surrogates included, with what the rules are about made frequent.
TEXTS = st.text(
    st.one_of(st.sampled_from(" \t\n./@,aAéß\u0301\u200c\u200d\ufe0f\u200b\ud800\0❤🔥"), st.characters()), max_size=80
)
ENTRIES = st.builds(ClassEntry, TEXTS, st.lists(TEXTS, max_size=3).map(tuple), st.lists(TEXTS, max_size=3).map(tuple))


def classes(*entries, **options):
    return clean_classes(entries, **{"max_classes": 100, "setting": "DEIXIS_MAX_CLASSES"} | options)


def problems_of(*entries, **options):
    with pytest.raises(InvalidFieldError) as caught:
        classes(*entries, **options)
    return [(problem.field, problem.problem) for problem in caught.value.problems]


def refusal_of_name(raw):
    with pytest.raises(InvalidFieldError) as caught:
        clean_label_set_name(raw, "name")
    assert {problem.field for problem in caught.value.problems} == {"name"}
    return caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "pets",
        "Wild animals (Kenya) v1.2 + birds & more",
        "動物",
        "حيوانات",
        "सिंह",
        "می\u200cخواهم",  # noqa: RUF001 - Persian is meant
        "PDF\u200cها",  # noqa: RUF001 - Persian is meant
        "क्\u200dष",
        "🐶",
        "👩🏽\u200d🚒",
        "❤\ufe0f\u200d🔥",
        "1\ufe0f\u20e3",
        "🇫🇮",
        "\U0001fae8",  # Unicode 15, younger than the tables of Python 3.11
        "x" * 64,
    ],
)
def test_a_label_set_may_be_named_in_any_script_and_in_emoji(name):
    assert clean_label_set_name(name, "name") == name


def test_a_label_set_name_is_trimmed_and_composed():
    assert clean_label_set_name(" \tcafe\u0301\u3000", "name") == "caf\u00e9"


def test_a_label_set_name_is_measured_after_composing():
    assert clean_label_set_name("e\u0301" * 64, "name") == "é" * 64


@pytest.mark.parametrize("raw", ["", " ", "\u3000\n"])
def test_an_empty_label_set_name_is_refused(raw):
    assert "empty" in refusal_of_name(raw)


@pytest.mark.parametrize("raw", [".", "..", ".hidden"])
def test_a_label_set_name_that_begins_with_a_dot_is_refused(raw):
    assert f"'{raw}' begins with '.'" in refusal_of_name(raw)


@pytest.mark.parametrize("character", "/\\@:?#%,")
def test_a_label_set_name_with_a_character_of_urls_is_refused(character):
    assert f"contains {character} ," in refusal_of_name(f"a{character}b")


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ("a\0b", "U+0000"),
        ("a\tb", "U+0009"),
        ("a\nb", "U+000A"),
        ("a\x7fb", "U+007F"),
        ("a\u00a0b", "U+00A0 NO-BREAK SPACE"),
        ("a\u00adb", "U+00AD SOFT HYPHEN"),
        ("a\u200bb", "U+200B ZERO WIDTH SPACE"),
        ("a\u202eb", "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ("\ufeffab", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        ("a\u2028b", "U+2028 LINE SEPARATOR"),
        ("a\ud800b", "U+D800"),
        ("a\ue000b", "U+E000"),
        ("a\ufffeb", "U+FFFE"),
        ("pets\u200d", "U+200D ZERO WIDTH JOINER"),
        ("\u200cpets", "U+200C ZERO WIDTH NON-JOINER"),
        ("pe\u200dts", "U+200D ZERO WIDTH JOINER"),
        ("🐶\u200d 🐶", "U+200D ZERO WIDTH JOINER"),
        ("🐶\u200d\u200d🐶", "U+200D ZERO WIDTH JOINER"),
        ("pets\ufe0f", "U+FE0F VARIATION SELECTOR-16"),
        ("\ufe0f", "U+FE0F VARIATION SELECTOR-16"),
        ("❤\ufe0f\ufe0f", "U+FE0F VARIATION SELECTOR-16"),
    ],
)
def test_a_label_set_name_with_a_character_that_cannot_be_seen_is_refused_by_its_code_point(raw, named):
    assert named in refusal_of_name(raw)


def test_a_label_set_name_of_65_characters_is_refused_with_its_length():
    assert "has 65 characters, at most 64" in refusal_of_name("x" * 65)


def test_every_problem_of_a_label_set_name_is_told():
    message = refusal_of_name("./\0" + "x" * 70)
    assert all(part in message for part in ["73 characters", "U+0000", "begins with '.'", "contains /"])


@given(TEXTS)
def test_cleaning_a_label_set_name_twice_changes_nothing_and_nothing_but_a_refusal_is_raised(raw):
    try:
        name = clean_label_set_name(raw, "name")
    except InvalidFieldError as error:
        error.message.encode()
    else:
        assert clean_label_set_name(name, "name") == name
        assert name.encode()
        assert 1 <= len(name) <= 64
        assert unicodedata.is_normalized("NFC", name)
        assert not re.search(r"[\x00-\x1f/\\@:?#%,]", name)


def test_class_names_are_trimmed_composed_and_single_spaced_in_the_order_given():
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


def test_a_repeated_description_is_kept_once():
    assert classes(ClassEntry("lynx", ("tufted ears", "short tail", "tufted  ears"))) == (
        ClassEntry("lynx", ("tufted ears", "short tail")),
    )


def test_a_class_name_may_hold_what_a_label_set_name_may_not():
    assert clean_classnames(["a/c, 100% (.5 #1) @home?"], max_classes=1, setting="S") == ("a/c, 100% (.5 #1) @home?",)


def test_every_problem_of_every_class_is_told_with_its_path():
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


def test_a_class_given_twice_is_refused_with_the_place_of_the_first():
    assert problems_of("lynx", "puma", " lynx") == [
        ("classes.2", "'lynx' repeats 'lynx' of classes.0; leave one of them out")
    ]


def test_class_names_that_differ_in_case_only_are_refused_with_both_names():
    [(path, problem)] = problems_of("Jaguar", "jaguar", field="labels")
    assert path == "labels.1"
    assert "'jaguar' repeats 'Jaguar' of labels.0, as letter case is not told apart" in problem


def test_words_that_only_full_case_folding_makes_equal_are_different_classes():
    assert clean_classnames(["Maße", "Masse"], max_classes=2, setting="S") == ("Maße", "Masse")


def test_class_names_that_are_equal_once_composed_are_duplicates():
    assert "repeats" in problems_of("caf\u00e9", "cafe\u0301")[0][1]


def test_a_long_class_name_is_refused_with_its_length_and_shown_shortened():
    [(_, problem)] = problems_of("x" * 5000, max_label_chars=30)
    assert "has 5000 characters, at most 30 are allowed" in problem
    assert len(problem) < 200


def test_an_empty_list_of_classes_is_refused():
    assert problems_of(field="labels") == [("labels", "the list is empty; give at least one class")]


def test_too_many_descriptions_of_a_class_are_refused():
    entry = ClassEntry("lynx", ("a", "b", "c"))
    assert problems_of(entry, max_descriptions=2) == [
        ("classes.0.descriptions", "3 are given, at most 2 are allowed; leave some out")
    ]


def test_too_many_labels_are_refused_with_number_limit_and_setting():
    with pytest.raises(TooLargeError, match=r"labels: 3 classes are given, at most 2 .* DEIXIS_MAX_LABELS"):
        clean_classnames(["a", "b", "c"], max_classes=2, setting="DEIXIS_MAX_LABELS")


@given(st.lists(st.one_of(TEXTS, ENTRIES), max_size=6))
def test_cleaning_classes_twice_changes_nothing_and_nothing_but_a_refusal_is_raised(raw):
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
