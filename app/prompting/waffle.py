"""Random descriptors: the control for descriptions, which shows what meaningless words add.

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
    """Return ``count`` descriptors for all classes, alternately of random words and of random characters.

    They have the average length of the class names, in words and in characters; words are cut to this length.
    """
    return draw_descriptors(
        classnames, words=_words(), characters=_CHARACTERS, count=count, rng=np.random.default_rng(seed)
    )


def draw_descriptors(
    classnames: Sequence[str], *, words: Sequence[str], characters: str, count: int, rng: np.random.Generator
) -> list[str]:
    """Return descriptors as ``random_descriptors``, drawn from the given words and characters."""
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
