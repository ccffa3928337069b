import pytest

from app.errors import InvalidFieldError
from app.names.references import LabelSetReference


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [("pets", "pets", None), ("pets@3", "pets", 3), ("acme#pets@0", "acme#pets", 0), ("a@999999999", "a", 999_999_999)],
)
def test_a_reference_is_a_name_with_or_without_a_version(text, name, version):
    reference = LabelSetReference.parse(text)
    assert reference == (name, version)
    assert str(reference) == text


@pytest.mark.parametrize("version", ["", "x", "-1", "1.0", " 1", "1@2", "٣", "1" * 10])
def test_a_version_that_is_not_an_integer_is_rejected(version):
    with pytest.raises(InvalidFieldError, match=r"^label_set: .* is not a version; write name or name@3$"):
        LabelSetReference.parse(f"pets@{version}")


def test_the_error_shows_at_most_40_characters_of_the_version():
    with pytest.raises(InvalidFieldError) as caught:
        LabelSetReference.parse("pets@" + "9" * 5000, "reference")
    assert caught.value.message == f"reference: '{'9' * 40}' is not a version; write name or name@3"
