import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.prompting.recipes import (
    Pooling,
    aligned_prompts,
    feature_sentence,
    features_only,
    random_words,
    sentences_only,
    templates_and_sentences,
    templates_only,
)
from app.types import ClassEntry
from tests.oracles.text_prototypes import dclip_sentence

PHOTO = ("a photo of a {}.",)
TWO = ("a {}.", "the {}, up close.")
ZEBRA = ClassEntry("zebra", ("A zebra is striped.", "A zebra grazes."), features=("stripes", "an upright mane"))
OWL = ClassEntry("owl", ("An owl has round eyes.",), features=("round eyes", "a hooked beak", "often perches"))
BARE = ClassEntry("rock")


def texts_of(recipe):
    return [list(row.texts) for row in recipe.rows]


# --- the sentence of a feature (A2) --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "sentence"),
    [
        ("stripes", "zebra, which has stripes"),
        ("a grazing animal", "zebra, which is a grazing animal"),
        ("an upright mane", "zebra, which is an upright mane"),
        ("used for riding", "zebra, which is used for riding"),
        ("has four legs", "zebra, which has four legs"),
        ("often stands in herds", "zebra, which often stands in herds"),
        ("typically white", "zebra, which typically white"),
        ("may gallop", "zebra, which may gallop"),
        ("can run", "zebra, which can run"),
    ],
)
def test_a_feature_becomes_a_sentence(feature, sentence):
    assert feature_sentence("zebra", feature) == sentence == dclip_sentence("zebra", feature)


@pytest.mark.parametrize("feature", ["antennae", "almond-shaped eyes", "are striped", "ascending lines"])
def test_words_that_start_with_a_are_not_articles(feature):
    """The reference uses startswith('a'), and so creates "which is antennae"."""
    assert feature_sentence("moth", feature) == f"moth, which has {feature}" == dclip_sentence("moth", feature)
    assert dclip_sentence("moth", feature, fixed=False) == f"moth, which is {feature}"


@pytest.mark.parametrize("feature", ["canine teeth", "mayfly wings", "hashed lines", "usedness"])
def test_words_that_start_like_a_verb_are_not_verbs(feature):
    assert feature_sentence("dog", feature) == f"dog, which has {feature}"


def test_an_empty_feature_gives_the_name_only():
    assert feature_sentence("zebra", "") == "zebra"


# --- prompts of each method ----------------------------------------------------------------------------------------


def test_templates_are_filled_with_the_name():
    recipe = templates_only([ZEBRA, BARE], TWO, {})
    assert texts_of(recipe) == [["a zebra.", "the zebra, up close."], ["a rock.", "the rock, up close."]]
    assert recipe.pooling is Pooling.PROTOTYPE
    assert recipe.warnings == ()


def test_cupl_uses_sentences_instead_of_templates():
    recipe = sentences_only([ZEBRA, OWL], PHOTO, {})
    assert texts_of(recipe) == [list(ZEBRA.descriptions), list(OWL.descriptions)]
    assert recipe.pooling is Pooling.PROTOTYPE


def test_cupl_ensemble_concatenates_prompts_of_equal_weight():
    """The mean is over prompts, not over kinds: eighty templates outweigh thirty sentences."""
    recipe = templates_and_sentences([ZEBRA], TWO, {})
    assert texts_of(recipe) == [["a zebra.", "the zebra, up close.", *ZEBRA.descriptions]]


def test_dclip_uses_features_and_does_not_normalise_their_mean():
    recipe = features_only([ZEBRA], PHOTO, {})
    assert texts_of(recipe) == [["zebra, which has stripes", "zebra, which is an upright mane"]]
    assert recipe.pooling is Pooling.MEAN


def test_dclip_falls_back_to_sentences_and_then_to_templates():
    recipe = features_only([ClassEntry("cat", ("A cat purrs.",)), BARE, ZEBRA], PHOTO, {})
    assert texts_of(recipe)[:2] == [["A cat purrs."], ["a photo of a rock."]]
    assert recipe.warnings == ("1 of 3 classes have no descriptions ('rock'); these are classified by their templates",)


def test_cupl_falls_back_to_features():
    assert texts_of(sentences_only([ClassEntry("cat", features=("whiskers",))], PHOTO, {})) == [
        ["cat, which has whiskers"]
    ]


@pytest.mark.parametrize("make", [sentences_only, templates_and_sentences, features_only])
def test_without_descriptions_templates_are_used_with_a_warning(make):
    recipe = make([BARE, ClassEntry("tree")], PHOTO, {})
    assert texts_of(recipe) == [["a photo of a rock."], ["a photo of a tree."]]
    assert recipe.warnings == ("no class has descriptions; the templates are used",)


# --- synonyms and class prompts ------------------------------------------------------------------------------------


def test_each_synonym_is_a_row_of_its_class():
    recipe = templates_only([ClassEntry("car", synonyms=("automobile", "motor car")), BARE], PHOTO, {})
    assert [row.class_index for row in recipe.rows] == [0, 0, 0, 1]
    assert texts_of(recipe)[:3] == [["a photo of a car."], ["a photo of a automobile."], ["a photo of a motor car."]]


def test_a_synonym_without_new_prompts_adds_no_row():
    described = ClassEntry("car", ("A car has four wheels.",), synonyms=("automobile",))
    assert len(sentences_only([described], PHOTO, {}).rows) == 1
    assert len(templates_only([ClassEntry("car", synonyms=("car",))], PHOTO, {}).rows) == 1


def test_a_class_prompt_replaces_the_templates():
    crane = ClassEntry("crane", prompt="a photo of a {}, the bird.")
    recipe = templates_only([crane, BARE], TWO, {})
    assert texts_of(recipe) == [["a photo of a crane, the bird."], ["a rock.", "the rock, up close."]]
    assert recipe.rows[0].slots[0].source == "class prompt"


# --- AutoCLIP's alignment (A4) -------------------------------------------------------------------------------------


def test_autoclip_aligns_each_template_and_each_group_of_descriptions():
    """Four texts of the zebra and four of the owl give four groups."""
    recipe = aligned_prompts([ZEBRA, OWL], TWO, {})
    assert recipe.pooling is Pooling.ALIGNED
    assert [len(row.slots) for row in recipe.rows] == [2 + 4, 2 + 4]
    assert [slot.source for slot in recipe.rows[0].slots] == ["template"] * 2 + ["description"] * 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_descriptions_are_divided_into_as_many_groups_as_the_class_with_the_fewest_has(counts, templates):
    classes = [
        ClassEntry(f"class {index}", tuple(f"sentence {index} {number}" for number in range(count)))
        for index, count in enumerate(counts)
    ]
    recipe = aligned_prompts(classes, tuple(f"{number} {{}}" for number in range(templates)), {})
    assert {len(row.slots) for row in recipe.rows} == {templates + min(counts)}
    for row, entry in zip(recipe.rows, classes, strict=True):
        assert all(slot.texts for slot in row.slots)
        assert sorted(row.texts[templates:]) == sorted(entry.descriptions)


def test_if_a_class_has_no_description_only_templates_are_weighted_with_a_warning():
    recipe = aligned_prompts([ZEBRA, BARE], TWO, {})
    assert [len(row.slots) for row in recipe.rows] == [2, 2]
    assert (
        "1 of 2 classes have no descriptions ('rock'); the descriptions of the other classes are not used"
        in recipe.warnings
    )


def test_with_one_prompt_per_class_nothing_is_weighted_with_a_warning():
    (warning,) = aligned_prompts([BARE], PHOTO, {}).warnings
    assert "nothing to weight" in warning
    assert aligned_prompts([ZEBRA], PHOTO, {}).warnings == ()


def test_a_class_prompt_fills_every_template_slot():
    recipe = aligned_prompts([ClassEntry("crane", prompt="a crane, the bird"), BARE], TWO, {})
    assert texts_of(recipe)[0] == ["a crane, the bird"] * 2


# --- the control (A3) ----------------------------------------------------------------------------------------------


def test_every_class_gets_the_same_random_features_in_the_sentence_of_the_paper():
    recipe = random_words([ZEBRA, OWL], PHOTO, {"descriptors": 30, "seed": 1})
    zebra, owl = texts_of(recipe)
    assert len(zebra) == len(set(zebra)) == 30
    assert [text.replace("zebra", "owl") for text in zebra] == owl
    assert all(text.startswith("A photo of a zebra, which ") and text.endswith(".") for text in zebra)
    assert recipe.pooling is Pooling.MEAN


def test_the_seed_determines_the_draw():
    draws = [texts_of(random_words([ZEBRA], PHOTO, {"descriptors": 10, "seed": seed})) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "make", [templates_only, sentences_only, templates_and_sentences, features_only, aligned_prompts]
)
@given(data=st.data())
def test_every_row_has_prompts_and_rows_have_the_order_of_the_classes(make, data):
    texts = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3).map(tuple)
    classes = data.draw(
        st.lists(st.builds(ClassEntry, st.text("xyz", min_size=1), texts, texts, texts), min_size=1, max_size=5)
    )
    recipe = make(classes, TWO, {})
    indices = [row.class_index for row in recipe.rows]
    assert indices == sorted(indices)
    assert set(indices) == set(range(len(classes)))
    assert all(row.texts for row in recipe.rows)
    if recipe.pooling is Pooling.ALIGNED:
        assert len({len(row.slots) for row in recipe.rows}) == 1
