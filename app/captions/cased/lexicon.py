"""The parts of speech and the singulars of words: those of WordNet if it is installed, else of the packaged names.

Fellbaum (ed.), "WordNet: An Electronic Lexical Database", MIT Press, 1998. The files are those of WordNet 3.0, which
Debian's package wordnet-base installs; the manual pages ``wndb`` and ``morphy`` describe them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from app.captions.cased.candidates import Singulariser, singular_form
from app.errors import ConfigurationError

_Parsed = TypeVar("_Parsed")

WORDNET = Path("/usr/share/wordnet")
"""The folder of Debian's package."""

OTHER = "X"
"""The tag of every part of speech that names nothing visible."""

_DETERMINERS = """
    the this that these those you she her hers him his its our ours they them their theirs your yours who whom whose
    which what whatever whoever myself yourself himself herself itself ourselves themselves someone somebody something
    anyone anybody anything everyone everybody everything nobody nothing none some any each every either neither both
    all another other such same several many much more most few fewer less least enough own one two three four five six
    seven eight nine ten first second third last next half lot
"""
_PREPOSITIONS_AND_CONJUNCTIONS = """
    about above across after against along alongside amid among amongst around atop because before behind below beneath
    beside besides between beyond but concerning despite due during except for from inside into near nor off onto
    opposite out outside over past per plus since than though although through throughout till toward towards under
    underneath unless unlike until upon versus via whereas whether while with within without and not yet
"""
_VERBS_THAT_SAY_LITTLE = """
    are was were been being has have had having does did doing done will would shall should could may might must ought
    cannot arent cant couldnt didnt doesnt dont hasnt havent isnt shouldnt wasnt wont wouldnt youre theyre thats
    get got gets getting give given go goes going gone come came coming let make made makes making put see seen take
    took taken takes taking use used using want look looking seem say said know become became went shown showing
    keep try need find found like
"""
_ADVERBS = """
    again ago almost already also always away even ever far here how however instead just maybe never now often only
    perhaps quite rather really sometimes soon still then there therefore thus together too very when whenever where
    wherever why yes
"""

FUNCTION_WORDS = frozenset(
    " ".join((_DETERMINERS, _PREPOSITIONS_AND_CONJUNCTIONS, _VERBS_THAT_SAY_LITTLE, _ADVERBS)).split()
)
"""Words that never are candidates, even if WordNet lists them as nouns; they include participles such as "taken".

Words that also name something visible, such as "can", "mine", "well" and "down", are not in the list: a wrong candidate
gets a low score from the image, but a missing one cannot be found.
"""

_FILES = ("index.noun", "index.adj", "index.verb", "index.adv", "noun.exc", "adj.exc", "verb.exc")

# The examples follow the definitions, in double quotes after a semicolon or a colon. Quotes within definitions follow
# other characters.
_FIRST_EXAMPLE = re.compile(r'[;:]\s*"')


@dataclass(frozen=True, slots=True)
class Noun:
    """A sense of nouns: its first lemma, its definition, and its id as in ImageNet.

    The id, such as ``n02084071``, is "n" and the offset in WordNet 3.0.
    """

    lemma: str
    gloss: str
    synset: str


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The lemmas of each part of speech in lower case; those of several words contain spaces.

    ``names`` are words that are nouns as they are, such as "shorts". ``mostly_adjectives`` are words that are both
    nouns and adjectives, with at least as many tagged senses as adjectives. ``irregular_*`` are inflected forms that no
    rule covers.
    """

    nouns: frozenset[str]
    adjectives: frozenset[str] = frozenset()
    verbs: frozenset[str] = frozenset()
    adverbs: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    mostly_adjectives: frozenset[str] = frozenset()
    irregular_nouns: frozenset[str] = frozenset()
    irregular_adjectives: frozenset[str] = frozenset()
    irregular_verbs: frozenset[str] = frozenset()

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Self:
        """Return a lexicon for machines without WordNet: the names are nouns, and unknown words are, too."""
        words = frozenset(name.lower() for name in names)
        return cls(nouns=words, names=words)

    @classmethod
    def load(cls, folder: Path = WORDNET) -> Self:
        """Read WordNet's index files and lists of exceptions.

        Raises:
            ConfigurationError: a file is missing or cannot be read.
        """
        lines = {name: _lines(folder, name) for name in _FILES}
        nouns, adjectives, verbs, adverbs = (
            dict(_parsed(folder, name, _index_entry, line) for line in lines[name] if not line.startswith(" "))
            for name in _FILES[:4]
        )
        irregular_nouns, irregular_adjectives, irregular_verbs = (
            frozenset(_parsed(folder, name, _first_word, line) for line in lines[name]) for name in _FILES[4:]
        )
        return cls(
            nouns=frozenset(nouns),
            adjectives=frozenset(adjectives),
            verbs=frozenset(verbs),
            adverbs=frozenset(adverbs),
            mostly_adjectives=frozenset(
                word for word in nouns.keys() & adjectives.keys() if adjectives[word] >= max(nouns[word], 1)
            ),
            irregular_nouns=irregular_nouns,
            irregular_adjectives=irregular_adjectives,
            irregular_verbs=irregular_verbs,
        )

    def tag(self, words: Sequence[str]) -> list[str]:
        """Return a Penn Treebank tag or ``OTHER`` for each lower-case word, without regard to its context.

        A word that can be a noun or an adjective is tagged so. A word that can only be a verb or an adverb is
        ``OTHER``, except participles. Unknown words are nouns, because most of them are names and brands.
        """
        return [self._tag(word) for word in words]

    def singular(self, word: str, rule: Singulariser = singular_form) -> str:
        """Return the singular by a rule; function words, names, and nouns that the rule turns into a non-word, stay.

        A deviation from the paper, whose rule turns "christmas" into "christma", "gas" into "ga" and "was" into "wa".
        """
        if word in FUNCTION_WORDS or word in self.names:
            return word
        singular = rule(word)
        # Words of two letters do not count: WordNet lists many abbreviations as nouns.
        is_word = singular in self.nouns and len(singular) > 2
        return singular if is_word or word not in self.nouns else word

    def _tag(self, word: str) -> str:
        if word in FUNCTION_WORDS:
            return OTHER
        if word in self.nouns:
            return "JJ" if word in self.mostly_adjectives else "NN"
        if word in self.adjectives:
            return "JJ"
        if word in self.irregular_nouns or not self.nouns.isdisjoint(_plural_stems(word)):
            return "NNS"
        if word in self.irregular_adjectives or not self.adjectives.isdisjoint(_comparison_stems(word)):
            return "JJS" if word.endswith("st") else "JJR"
        return self._verb_tag(word)

    def _verb_tag(self, word: str) -> str:
        """Return the tag of a word that is not a form of a noun or an adjective."""
        stems = _participle_stems(word)
        if word in self.irregular_verbs or not self.verbs.isdisjoint(stems):
            return "VBG" if word.endswith("ing") else "VBN"
        if word in self.verbs or word in self.adverbs or not self.verbs.isdisjoint(_plural_stems(word)):
            return OTHER
        return "NN"


def is_installed(folder: Path = WORDNET) -> bool:
    """Return whether a folder contains files of WordNet, complete or not."""
    return any((folder / name).exists() for name in _FILES)


def nouns(folder: Path = WORDNET) -> Iterator[Noun]:
    """Yield every sense of nouns in the order of the file. The definitions have no examples.

    Raises:
        ConfigurationError: ``data.noun`` is missing or cannot be read.
    """
    for line in _lines(folder, "data.noun"):
        if line.startswith(" "):
            continue
        yield _parsed(folder, "data.noun", _noun, line)


def _noun(line: str) -> Noun:
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    return Noun(
        lemma=fields[4].replace("_", " "),
        gloss=_FIRST_EXAMPLE.split(gloss, maxsplit=1)[0].strip(" ;"),
        synset=f"n{fields[0]}",
    )


def _lines(folder: Path, name: str) -> list[str]:
    try:
        return (folder / name).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"WordNet's file {folder / name} cannot be read ({error}); install Debian's package wordnet-base, or name"
            " the folder with the dict files of WordNet 3.0"
        ) from error


def _parsed(folder: Path, name: str, parse: Callable[[str], _Parsed], line: str) -> _Parsed:
    try:
        return parse(line)
    except (IndexError, ValueError) as error:
        raise ConfigurationError(
            f"WordNet's file {folder / name} is damaged: it has the line {line[:40]!r}; install wordnet-base again"
        ) from error


def _first_word(line: str) -> str:
    return line.split(maxsplit=1)[0]


def _index_entry(line: str) -> tuple[str, int]:
    """Return a lemma of an index file, and its number of tagged senses.

    The fields are: lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset...
    """
    fields = line.split()
    return fields[0].replace("_", " "), int(fields[int(fields[3]) + 5])


def _stems(endings: Sequence[tuple[str, str]]) -> Callable[[str], frozenset[str]]:
    """Return a function from a word to the words that it may be a form of, by its ending."""

    def stems(word: str) -> frozenset[str]:
        found = {
            word.removesuffix(ending) + replacement
            for ending, replacement in endings
            if word.endswith(ending) and len(word) > len(ending) + 1
        }
        # A doubled consonant, as in "sitting" and "biggest".
        doubled = {stem[:-1] for stem in found if len(stem) > 2 and stem[-1] == stem[-2]}
        return frozenset(found | doubled)

    return stems


_plural_stems = _stems([("s", ""), ("es", ""), ("ies", "y")])
_comparison_stems = _stems([("er", ""), ("er", "e"), ("ier", "y"), ("est", ""), ("est", "e"), ("iest", "y")])
_participle_stems = _stems([("ing", ""), ("ing", "e"), ("ed", ""), ("ed", "e"), ("ied", "y")])
