import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.prompting.waffle import _words, draw_descriptors, random_descriptors
from tests.oracles.text_prototypes import waffle_texts

# Words without a beginning that the reference takes for an article or a verb.
WORDS = ["lantern", "river", "pocket", "granite", "window"]
CHARACTERS = "bdfgjk"


@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(["zebra crossing", "owl house", "motorboat"]), min_size=1))
def test_the_draw_equals_that_of_the_reference(seed, classnames):
    drawn = draw_descriptors(classnames, words=WORDS, characters=CHARACTERS, count=30, rng=np.random.default_rng(seed))
    wanted = waffle_texts(classnames, WORDS, list(CHARACTERS), n=15, rng=np.random.default_rng(seed))
    name = classnames[0]
    assert [f"A photo of a {name}, which has {item}." for item in drawn] == wanted[name]


@pytest.mark.parametrize("classnames", [["4", "7"], ["ox"], ["a b", "c"]])
def test_short_class_names_do_not_give_one_character_descriptors(classnames):
    """In the reference, both lengths become 1 for one-letter classes."""
    for descriptor in random_descriptors(classnames, count=20, seed=0):
        assert all(len(part.strip(",")) >= 3 for part in descriptor.split())


def test_the_word_list_has_no_empty_words_and_no_numbers():
    """The list of the reference has both."""
    words = _words()
    assert len(words) == len(set(words)) >= 200
    assert all(word and set(word) <= set(string.ascii_lowercase) for word in words)


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_words_and_characters_alternate_up_to_the_requested_number(count):
    drawn = random_descriptors(["lantern fish"], count=count, seed=3)
    assert len(drawn) == count
    cut = {word[:6] for word in _words()}
    for descriptor in drawn[::2]:
        assert set(descriptor.split()) <= cut
