import os

import pytest

from app.captions.cased.candidates import KEPT_TAGS, candidates
from app.captions.cased.lexicon import FUNCTION_WORDS, OTHER, WORDNET, Lexicon, Noun, nouns
from app.errors import ConfigurationError

installed = pytest.mark.skipif(
    not (WORDNET / "data.noun").exists() and os.environ.get("TEST_REQUIRE_WORDNET") != "1",
    reason="WordNet's files are not there; install Debian's wordnet-base",
)

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"

SAMPLE = {
    "index.noun": """\
bear n 2 3 @ ~ #m 2 2 02131653 09831962
christmas n 2 1 @ 2 2 15196186 15186412
dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209 10023039 09886220 07676602 03901548 02710044
ga n 4 1 @ 4 0 08900535 05412584 03459591 14641397
gas n 6 1 @ 6 2 14877585 14481080 14686186 13491616 11452218 03425413
golden_retriever n 1 1 @ 1 0 02099601
lady n 3 1 @ 3 2 10243137 10244108 09847727
red n 4 2 @ ~ 4 3 04962784 09394007 10547145 13556893
""",
    "index.adj": """\
cold a 13 3 ! & = 13 10 01251128 01257145 00437539 01269073 00172732
cute a 2 1 & 2 2 00167829 00218950
red a 3 2 & ~ 3 3 00381097 02082037 02375828
""",
    "index.verb": """\
bear v 13 3 @ ~ $ 13 9 02518161 02701962 00056930
sit v 10 3 @ ~ $ 10 6 01543123 02699497 01984119
smile v 2 3 @ ~ + 2 1 00028565 01066775
write v 10 3 @ ~ > 10 9 01698271 01007027 00993014
carry v 40 3 @ ~ > 40 22 01449974 02079933 02717102
""",
    "index.adv": "quickly r 3 2 ! \\ 3 2 00085811 00104345 00085344\n",
    "noun.exc": "oxen ox\nladies lady\n",
    "adj.exc": "better good\nbest good\n",
    "verb.exc": "sat sit\nsitting sit\nwritten write\n",
    "data.noun": """\
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived to exist
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a member of the genus Canis; occurs in many breeds; "the dog barked all night"; "a dog!"
02099601 05 n 01 golden_retriever 0 001 @ 02099267 n 0000 | an English breed: "a golden coat"
00249987 04 n 01 stride 1 001 @ 00248659 n 0000 | progress (in the phrase "make strides"); "they made big strides"
""",  # noqa: E501 - a line of the file is a sense
}

SPOKEN = {
    "NN": """dog cat car house tree person woman man child boy girl street beach mountain river sky cloud water grass
        flower bird horse sheep cow elephant bear zebra giraffe pizza cake sandwich fruit apple banana table chair sofa
        bed kitchen bathroom window door wall floor bicycle motorcycle bus train truck boat airplane umbrella hat shirt
        dress shoe bag book phone camera computer keyboard television clock vase knife spoon bowl bottle glass cup plate
        ball bat skateboard surfboard player team game field park city building bridge church night winter sunset snow
        labrador siamese toyota paris london christmas nike batman""",
    "NNS": "men women children people feet teeth leaves ladies puppies cities potatoes tomatoes",
    "JJ": """red blue green yellow black white brown orange pink grey large small tall short old young new beautiful
        cute wooden metallic empty wet dry sunny cloudy modern ancient colorful happy sad fluffy striped furry shiny
        long round delicious vintage famous""",
    "JJR": "larger bigger taller",
    "JJS": "largest biggest tallest",
    "VBG": "walking running sitting standing eating wearing riding holding smiling sleeping swimming cooking",
    "VBN": "parked painted broken written covered grilled worn eaten taken filled decorated",
    OTHER: """the and with from for that this these those into over under near behind beside between while during are
        was were has have had been being will would could should not very also too only just then there here where when
        which who what his her their our your its they she you him them some any each every both all quickly slowly
        really always never often together sit wear contain include become remain seem wears contains give make take
        get see look eat""",
}
"""The main tag of words as used in captions, written by a human before the tagger was run on them."""


@pytest.fixture
def folder(tmp_path):
    for name, text in SAMPLE.items():
        tmp_path.joinpath(name).write_text(text if name.endswith(".exc") else LICENCE + text)
    return tmp_path


@pytest.fixture
def sample(folder):
    return Lexicon.load(folder)


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon.load()


def test_lemmas_are_read_with_spaces_and_without_the_licence(sample):
    assert sample.nouns == {"bear", "christmas", "dog", "ga", "gas", "golden retriever", "lady", "red"}
    assert sample.adjectives == {"cold", "cute", "red"}
    assert sample.verbs == {"bear", "sit", "smile", "write", "carry"}
    assert sample.adverbs == {"quickly"}


@pytest.mark.parametrize(
    ("word", "tag"),
    [
        ("dog", "NN"),
        ("bear", "NN"),  # also a verb, and much more frequent as one
        ("red", "JJ"),  # also a noun, and not more frequent as one
        ("cute", "JJ"),
        ("oxen", "NNS"),
        ("ladies", "NNS"),
        ("dogs", "NNS"),
        ("colder", "JJR"),
        ("cutest", "JJS"),
        ("best", "JJS"),
        ("smiling", "VBG"),
        ("sitting", "VBG"),
        ("smiled", "VBN"),
        ("carried", "VBN"),
        ("written", "VBN"),
        ("sit", OTHER),
        ("sits", OTHER),
        ("carries", OTHER),
        ("quickly", OTHER),
        ("the", OTHER),
        ("was", OTHER),
        ("pikachu", "NN"),
        ("sing", "NN"),  # "s" is not a stem
    ],
)
def test_a_word_has_the_tag_of_its_possible_parts_of_speech(sample, word, tag):
    assert sample.tag([word]) == [tag]


def test_tags_have_the_order_of_the_words(sample):
    assert sample.tag(["the", "dog", "dog", "sits"]) == [OTHER, "NN", "NN", OTHER]
    assert sample.tag([]) == []


@pytest.mark.parametrize(
    ("word", "one"),
    [
        ("dogs", "dog"),
        ("christmas", "christmas"),  # "christma" is not a word
        ("gas", "gas"),  # "ga" is an abbreviation
        ("was", "was"),  # "wa" is not a word
        ("toyotas", "toyota"),  # neither is known
        ("ladies", "ladies"),  # the rule does not apply
    ],
)
def test_only_singulars_that_are_words_are_used(sample, word, one):
    assert sample.singular(word) == one


def test_the_rule_for_singulars_can_be_replaced(sample):
    assert sample.singular("dogs", rule=lambda word: word + "es") == "dogses"


def test_candidates_use_the_tags_and_singulars_of_the_lexicon(sample):
    captions = ["The red dogs sit, christmas is quickly there", "the dog sits: christmas quickly smiling there"]
    assert candidates(captions, tag=sample.tag, singular=sample.singular) == ("christmas", "dog")


def test_nouns_are_in_the_order_of_the_file_with_definitions_without_examples(folder):
    assert list(nouns(folder)) == [
        Noun("entity", "that which is perceived to exist", "n00001740"),
        Noun("dog", "a member of the genus Canis; occurs in many breeds", "n02084071"),
        Noun("golden retriever", "an English breed", "n02099601"),
        Noun("stride", 'progress (in the phrase "make strides")', "n00249987"),
    ]


@pytest.mark.parametrize("name", sorted(SAMPLE.keys() - {"data.noun"}))
def test_the_error_for_a_missing_file_has_advice(folder, name):
    folder.joinpath(name).unlink()
    with pytest.raises(ConfigurationError, match=rf"{name} cannot be read .*wordnet-base"):
        Lexicon.load(folder)


def test_nouns_require_their_file(folder):
    folder.joinpath("data.noun").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"data\.noun cannot be read"):
        list(nouns(folder))


@installed
def test_wordnet_has_the_documented_number_of_lemmas(lexicon):
    """According to its manual page wnstats, which counts unique strings."""
    assert len(lexicon.nouns) == 117798
    assert len(lexicon.adjectives) == 21479
    assert len(lexicon.verbs) == 11529
    assert len(lexicon.adverbs) == 4481


@installed
def test_wordnet_has_the_documented_number_of_senses():
    """According to its manual page wnstats. Each has a lemma, a definition and a unique id."""
    senses = list(nouns())
    assert len(senses) == len({noun.synset for noun in senses}) == 82115
    assert all(noun.lemma and noun.gloss and "_" not in noun.lemma for noun in senses)
    assert sum('"' in noun.gloss for noun in senses) < 20
    assert senses == list(nouns())
    assert {noun.synset: noun.lemma for noun in senses}["n02099601"] == "golden retriever"  # as in ImageNet


@installed
def test_the_tagger_agrees_with_a_human_on_nearly_all_common_words(lexicon):
    """Most differences in exact tags are participles, which WordNet also lists as adjectives and nouns."""
    wanted = [(word, tag) for tag, words in SPOKEN.items() for word in words.split()]
    given = lexicon.tag([word for word, _ in wanted])
    kept = [
        (tag in KEPT_TAGS) == (find_candidates in KEPT_TAGS)
        for (_, tag), find_candidates in zip(wanted, given, strict=True)
    ]
    exact = [tag == find_candidates for (_, tag), find_candidates in zip(wanted, given, strict=True)]
    assert len(wanted) >= 200
    assert sum(kept) / len(kept) >= 0.98
    assert sum(exact) / len(exact) >= 0.85


@installed
def test_function_words_are_excluded_in_every_form(lexicon):
    words = sorted(FUNCTION_WORDS)
    assert set(lexicon.tag(words)) == {OTHER}
    assert [lexicon.singular(word) for word in words] == words


@installed
def test_every_noun_and_adjective_of_wordnet_except_function_words_is_kept(lexicon):
    words = sorted((lexicon.nouns | lexicon.adjectives) - FUNCTION_WORDS)
    assert set(lexicon.tag(words)) <= KEPT_TAGS
