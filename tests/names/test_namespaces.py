import re
import unicodedata

import pytest
from hypothesis import given

from app.errors import InvalidFieldError
from app.names.namespaces import (
    OPEN_NAMESPACE,
    Namespace,
    clean_label_set_name,
    clean_namespace,
    is_qualified_database_name,
    namespace_of,
    own_name,
)
from tests.names.texts import TEXTS


def problem_of_name(raw):
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
        "می\u200cخواهم",  # noqa: RUF001 - Persian text
        "PDF\u200cها",  # noqa: RUF001 - Persian text
        "क्\u200dष",
        "🐶",
        "👩🏽\u200d🚒",
        "❤\ufe0f\u200d🔥",
        "1\ufe0f\u20e3",
        "🇫🇮",
        "\U0001fae8",  # Unicode 15, newer than the tables of Python 3.11
        "x" * 64,
    ],
)
def test_a_label_set_name_may_use_any_script_and_emoji(name):
    assert clean_label_set_name(name, "name") == name


def test_a_label_set_name_is_trimmed_and_normalised():
    assert clean_label_set_name(" \tcafe\u0301\u3000", "name") == "caf\u00e9"


def test_the_length_of_a_label_set_name_is_checked_after_normalisation():
    assert clean_label_set_name("e\u0301" * 64, "name") == "é" * 64


@pytest.mark.parametrize("raw", ["", " ", "\u3000\n"])
def test_an_empty_label_set_name_is_rejected(raw):
    assert "empty" in problem_of_name(raw)


@pytest.mark.parametrize("raw", [".", "..", ".hidden"])
def test_a_label_set_name_with_a_leading_dot_is_rejected(raw):
    assert f"'{raw}' begins with '.'" in problem_of_name(raw)


@pytest.mark.parametrize("character", "/\\@:?#%,")
def test_a_label_set_name_with_a_reserved_character_is_rejected(character):
    assert f"contains {character} ," in problem_of_name(f"a{character}b")


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
def test_a_label_set_name_with_an_invisible_character_is_rejected_with_its_code_point(raw, named):
    assert named in problem_of_name(raw)


def test_a_label_set_name_of_65_characters_is_rejected_with_its_length():
    assert "has 65 characters, at most 64" in problem_of_name("x" * 65)


def test_every_problem_of_a_label_set_name_is_reported():
    message = problem_of_name("./\0" + "x" * 70)
    assert all(part in message for part in ["73 characters", "U+0000", "begins with '.'", "contains /"])


@given(TEXTS)
def test_cleaning_a_label_set_name_is_idempotent_and_raises_only_invalid_field_errors(raw):
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


def test_a_namespace_qualifies_names_and_is_removed_from_qualified_names():
    acme = Namespace("acme")
    assert acme.label_set(" pets ") == "acme#pets"
    assert acme.reference("pets@3") == ("acme#pets", 3)
    assert acme.database("toys") == "acme#toys"
    assert OPEN_NAMESPACE.reference("pets@3") == ("pets", 3)
    assert own_name("acme#pets@3") == own_name("pets@3") == "pets@3"
    assert namespace_of("acme#pets") == acme
    assert namespace_of("pets") == OPEN_NAMESPACE
    assert acme.contains("acme#pets")
    assert not any(acme.contains(name) for name in ("pets", "acmes#pets", "acm#pets"))
    assert not OPEN_NAMESPACE.contains("acme#pets")
    assert acme.hide("unknown label set 'acme#pets', class 'c#'") == "unknown label set 'pets', class 'c#'"


@pytest.mark.parametrize("name", ["acme#pets", "#pets", "pets#"])
@pytest.mark.parametrize("namespace", [OPEN_NAMESPACE, Namespace("acme")])
def test_a_name_cannot_refer_to_another_namespace(namespace, name):
    for qualified in (namespace.label_set, namespace.reference, namespace.database):
        with pytest.raises(InvalidFieldError):
            qualified(name)


@pytest.mark.parametrize("name", ["Acme", "a b", "a#b", "-a", "a" * 33, "a/b", "ä"])
def test_an_invalid_namespace_is_rejected(name):
    with pytest.raises(InvalidFieldError, match="is not a valid namespace"):
        clean_namespace(name, "Deixis-Namespace")


def test_the_empty_name_is_the_open_namespace():
    assert clean_namespace("", "Deixis-Namespace") == OPEN_NAMESPACE


@pytest.mark.parametrize(
    ("name", "valid"),
    [("things", True), ("acme#things", True), ("Things", False), ("#things", False), ("a#b#c", False), ("../x", False)],
)
def test_a_qualified_database_name_is_never_a_path(name, valid):
    assert is_qualified_database_name(name) == valid
