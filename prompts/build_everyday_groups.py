"""Builds everyday_groups.txt: what the words of everyday_words.txt are kinds of, according to WordNet.

    python prompts/build_everyday_groups.py

Requires WordNet 3.0 (Debian's package wordnet-base). A word has the groups of its two most frequent senses. A phrase
that WordNet lacks has those of its last word.
"""

from collections.abc import Iterator
from pathlib import Path

from app.captions.cased.lexicon import WORDNET
from app.captions.everyday import everyday_names

_SENSES = 2
_HEADER = """\
# What the words of everyday_words.txt are kinds of. Made by build_everyday_groups.py from WordNet 3.0, Copyright 2006
# by Princeton University; its licence is models/embedded/LICENSE-WordNet.txt.
# A line has the names of a group and, behind "<", the numbers of the lines of the groups that it is a kind of, counted
# from 0 without comments. Groups come before their kinds. The words themselves are the last lines, in their order.
"""


def _entries(name: str) -> Iterator[list[str]]:
    for line in (WORDNET / name).read_text("utf-8").splitlines():
        if not line.startswith(" "):
            yield line.partition(" | ")[0].split()


def groups_file() -> str:
    """Return the content of the file."""
    names, parents, senses = {}, {}, {}
    for synset, _, _, count, *rest in _entries("data.noun"):
        lemmas = int(count, 16)
        names[synset] = [lemma.replace("_", " ").lower() for lemma in rest[: 2 * lemmas : 2]]
        pointers = rest[2 * lemmas + 1 :]
        kinds_of = zip(pointers[::4], pointers[1::4], strict=False)
        parents[synset] = [target for pointer, target in kinds_of if pointer in {"@", "@i"}]
    for lemma, _, _, pointers, *rest in _entries("index.noun"):
        senses[lemma.replace("_", " ")] = rest[int(pointers) + 2 :][:_SENSES]

    lines: list[str] = []
    line_of: dict[str, int] = {}

    def add(synset: str) -> int:
        if synset not in line_of:
            groups = [add(parent) for parent in parents[synset]]
            line_of[synset] = len(lines)
            lines.append(_line(", ".join(names[synset]), groups))
        return line_of[synset]

    def own_senses(word: str) -> list[str]:
        last = word.rpartition(" ")[2]
        forms = (form for name in (word, last) for form in (name, name.removesuffix("s"), name.removesuffix("es")))
        return next((senses[form] for form in forms if form in senses), [])

    words = everyday_names()
    groups_of = [[add(synset) for synset in own_senses(word.lower())] for word in words]
    lines += [_line(word, groups) for word, groups in zip(words, groups_of, strict=True)]
    return _HEADER + "\n".join(lines) + "\n"


def _line(names: str, groups: list[int]) -> str:
    return f"{names} < {' '.join(map(str, groups))}" if groups else names


if __name__ == "__main__":
    Path(__file__).with_name("everyday_groups.txt").write_text(groups_file(), "utf-8")
