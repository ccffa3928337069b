"""Labels that are written as one text."""

import pytest

from app.errors import InvalidFieldError, MalformedRequestError, TooLargeError
from app.names.labels import split_labels

ONE_TEXT = [
    ("cat,dog", ["cat", "dog"]),
    ("cat\ndog", ["cat", "dog"]),
    ("cat\r\ndog\r\n", ["cat", "dog"]),
    ("\ncat\n\ndog\n", ["cat", "dog"]),
    ("cat,\ndog,\nowl", ["cat", "dog", "owl"]),
    ("cat, dog\nowl", ["cat", "dog", "owl"]),
    ("cat;dog", ["cat", "dog"]),
    ("cat | dog", ["cat", "dog"]),
    ("猫\uff0c犬", ["猫", "犬"]),
    ("猫、犬、鳥", ["猫", "犬", "鳥"]),
    ("猫\uff1b犬", ["猫", "犬"]),
    ("قطة، كلب", ["قطة", "كلب"]),
    ("a;b, c", ["a;b", "c"]),
    ("猫、小, 犬", ["猫、小", "犬"]),
    ("cat", ["cat"]),
]


@pytest.mark.parametrize(("text", "expected"), ONE_TEXT)
def test_one_text_is_split_at_what_separates_its_labels(text, expected):
    assert [label.strip() for label in split_labels(text)] == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (['["cat; dog"]'], ["cat; dog"]),
        (['["cat, dog", "owl"]'], ["cat, dog", "owl"]),
        (["cat; dog", "owl"], ["cat; dog", "owl"]),
        (["cat", '["a,b"]'], ["cat", "a,b"]),
        (["cat,,dog"], ["cat", "", "dog"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_labels_that_are_listed_one_by_one_are_not_split_further(texts, expected):
    assert split_labels(*texts) == expected


def test_texts_that_cannot_be_split_are_refused():
    for text, error in (('["a"', MalformedRequestError), ("[1]", InvalidFieldError), ("\n" * 100_001, TooLargeError)):
        with pytest.raises(error):
            split_labels(text)
