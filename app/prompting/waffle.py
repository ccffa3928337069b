"""Random descriptors, the control of every set of descriptions: what do words add that mean nothing?

Roth et al., "Waffling around for Performance: Visual Classification with Random Words and Broad Concepts", ICCV 2023,
section 3.2.
"""

import functools
import string
from collections.abc import Sequence

import numpy as np

from app.runtime.data_files import resources

_CHARACTERS = string.ascii_lowercase + string.digits

# Deviation: for class names such as "4" and "7" the paper's averages give descriptors of one character, which are
# hardly random.
_SHORTEST = 3


def random_descriptors(classnames: Sequence[str], *, count: int, seed: int) -> list[str]:
    """Return ``count`` descriptors for all of the classes, random words and random characters in turn.

    They are as long as the class names are on average, in words and in characters; words are cut to length.
    """
    return draw_descriptors(
        classnames, words=_words(), characters=_CHARACTERS, count=count, rng=np.random.default_rng(seed)
    )


def draw_descriptors(
    classnames: Sequence[str], *, words: Sequence[str], characters: str, count: int, rng: np.random.Generator
) -> list[str]:
    """Draw from ``words`` and ``characters``; ``random_descriptors`` with the sources given."""
    split = [name.split() for name in classnames]
    word_count = max(round(float(np.mean([len(parts) for parts in split]))), 1)
    mean_length = float(np.mean([np.mean([len(part) for part in parts]) for parts in split]))
    longest = float(np.mean([max(map(len, parts)) for parts in split]))
    group_count = round(float(np.mean([len(parts) - 1 for parts in split]))) + 1
    letters = int(np.ceil(longest))
    letters += group_count - letters % group_count
    in_group = max(letters // group_count, _SHORTEST)
    cut = [word[: max(round(mean_length), _SHORTEST)] for word in words]
    letters_of = list(characters)
    descriptors: list[str] = []
    while len(descriptors) < count:
        descriptors.append(" ".join(str(rng.choice(cut)) for _ in range(word_count)))
        groups = ("".join(str(rng.choice(letters_of)) for _ in range(in_group)) for _ in range(group_count))
        descriptors.append(", ".join(groups))
    return descriptors[:count]


@functools.cache
def _words() -> tuple[str, ...]:
    """Return the common words of prompts/words.txt, read once."""
    return tuple((resources("prompts") / "words.txt").read_text(encoding="utf-8").split())
