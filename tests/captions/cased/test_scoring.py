import random
import zlib

import numpy as np
import pytest

from app.captions.cased.candidates import candidates, singular_form
from app.captions.cased.scoring import centroid, choose_shared_words, distinct, score, score_many, shared_vocabulary
from tests.oracles import cased as oracle

PROBLEMS = 200


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def near_duplicates(seed):
    """Return unit rows (k, d) around a few directions, which form chains of different lengths."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(rng.integers(1, 6), 16))
    which = rng.integers(0, len(directions), rng.integers(1, 25))
    noise = rng.uniform(0.05, 0.4) * rng.normal(size=(len(which), 16))
    return unit(unit(directions)[which] + noise).astype(np.float32)


def problem(seed, words=None):
    """Return an image (d,), word features (w, d), caption features (k, d) and a logit scale."""
    rng = np.random.default_rng(seed)
    dims = int(rng.integers(2, 40))
    return (
        unit(rng.normal(size=dims)),
        rng.uniform(0.5, 2) * rng.normal(size=(words or int(rng.integers(1, 12)), dims)),
        unit(rng.normal(size=(int(rng.integers(1, 11)), dims))),
        float(rng.uniform(1, 120)),
    )


def encode(words, dims=24):
    """Return rows (w, d) of different lengths that depend only on the word."""
    return np.stack([np.random.default_rng(zlib.crc32(word.encode())).normal(size=dims) for word in words])


def probabilities(seed, images=12, words=20):
    """Return rows that sum to 1, some of them equal, and often with equal entries."""
    rng = np.random.default_rng(seed)
    groups = rng.dirichlet(np.full(words, 0.3), size=rng.integers(1, 5))
    rows = groups[rng.integers(0, len(groups), images)] + 0.3 * rng.dirichlet(np.full(words, 0.3), size=images)
    rounded = np.round(rows, 2) + 1e-3
    return rounded / rounded.sum(axis=1, keepdims=True)


def labels_by_the_rule(rows, min_images):
    """Return the word of each image by a literal implementation of the rule."""
    images, words = rows.shape
    needed = min(min_images, images)
    left = list(range(words))
    while True:
        chosen = [max(left, key=lambda word, row=row: (row[word], -word)) for row in rows]
        undecided = [image for image in range(images) if chosen.count(chosen[image]) < needed]
        if not undecided:
            return chosen
        logs = np.log(np.maximum(rows[undecided], 1e-12))
        left.remove(
            min(
                {chosen[image] for image in undecided},
                key=lambda word: (chosen.count(word), round(float(logs[:, word].sum()), 9), -word),
            )
        )


def test_two_hundred_random_problems_keep_the_captions_of_the_reference():
    dropped = 0
    for seed in range(PROBLEMS):
        rows = near_duplicates(seed)
        kept = distinct(rows)
        assert kept.tolist() == oracle.dedup(rows)
        dropped += len(rows) - len(kept)
    assert dropped > PROBLEMS


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.8, 1.0])
def test_other_thresholds_equal_the_reference(threshold):
    for seed in range(50):
        rows = near_duplicates(seed)
        assert distinct(rows, threshold).tolist() == oracle.dedup(rows, threshold)


def test_a_chain_of_similar_captions_is_one_group_even_if_its_ends_differ():
    angles = np.array([0.0, 0.6, 0.3, 2.0])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert rows[0] @ rows[1] < 0.94 < rows[0] @ rows[2]
    assert distinct(rows).tolist() == [0, 3]


def test_the_first_of_each_chain_is_kept_in_the_order_of_retrieval():
    rows = np.eye(3)[[2, 0, 2, 1, 0]]
    assert distinct(rows).tolist() == [0, 1, 3]


def test_one_caption_and_no_captions_are_unchanged():
    assert distinct(np.eye(3)[:1]).tolist() == [0]
    assert distinct(np.eye(3)[:0]).tolist() == []


def test_two_hundred_random_problems_have_the_scores_of_the_reference():
    """With words from captions, with the scale of the encoder and with different weights of the image."""
    worst = 0.0
    texts = ("dog", "dogs", "cat", "house", "houses", "red", "running", "tree", "trees", "sky", "old", "birds")
    for seed in range(PROBLEMS):
        rng = random.Random(seed)
        captions = [" ".join(rng.choices(texts, k=6)) for _ in range(rng.randint(1, 8))]
        image, _, _, scale = problem(seed)
        image, caption_features = unit(np.resize(image, 24)), encode(captions)
        alpha = rng.choice([0.0, 0.5, 0.7, 1.0])
        wanted = oracle.cased(image, captions, caption_features, encode, alpha, scale, inflect=singular_form)
        words = candidates(captions)
        ours = score(image, encode(words), caption_features, logit_scale=scale, alpha=alpha)
        assert sorted(words) == sorted(word for word, _ in wanted)
        result = dict(zip(words, ours, strict=True))
        worst = max(worst, *(abs(result[word] - probability) for word, probability in wanted))
    assert worst <= 1e-12


def test_scores_in_single_precision_are_accurate():
    for seed in range(50):
        image, words, captions, scale = problem(seed)
        exact = score(image, words, captions, logit_scale=scale)
        rough = score(*(rows.astype(np.float32) for rows in (image, words, captions)), logit_scale=scale)
        assert rough == pytest.approx(exact, abs=1e-4)


def test_word_probabilities_sum_to_one():
    for seed in range(PROBLEMS):
        image, words, captions, scale = problem(seed)
        result = score(image, words, captions, logit_scale=scale)
        assert result.shape == (len(words),)
        assert result.sum() == pytest.approx(1)
        assert result.min() >= 0


def test_a_larger_scale_gives_more_confident_scores():
    image, words, captions, _ = problem(3, words=5)
    flat, sharp = (score(image, words, captions, logit_scale=scale, alpha=1.0) for scale in (0.0, 1e4))
    assert flat == pytest.approx(np.full(5, 0.2))
    assert sharp.max() == pytest.approx(1)


def test_the_lengths_of_word_and_caption_features_do_not_matter():
    image, words, captions, scale = problem(5)
    longer = score(image, 3 * words, captions * np.arange(1, len(captions) + 1)[:, None], logit_scale=scale)
    assert longer == pytest.approx(score(image, words, captions, logit_scale=scale))


@pytest.mark.parametrize("signs", [(), (1, -1)])
def test_without_captions_or_if_they_cancel_out_only_the_image_counts(signs):
    for seed in range(50):
        image, words, captions, scale = problem(seed)
        none = np.concatenate([captions[:0], *(sign * captions for sign in signs)])
        assert not centroid(none).any()
        alone = score(image, words, captions, logit_scale=scale, alpha=1.0)
        assert score(image, words, none, logit_scale=scale) == pytest.approx(alone)


def test_the_centroid_is_a_unit_row_for_captions_of_any_length():
    _, _, captions, _ = problem(8)
    assert np.linalg.norm(centroid(captions)) == pytest.approx(1)
    assert centroid(captions * 5) == pytest.approx(centroid(captions))


def test_an_image_has_the_same_scores_alone_and_in_a_batch():
    for seed in range(50):
        _, words, _, scale = problem(seed)
        rng = np.random.default_rng(seed)
        images = unit(rng.normal(size=(4, words.shape[1])))
        captions = [unit(rng.normal(size=(rng.integers(0, 5), words.shape[1]))) for _ in images]
        many = score_many(images, words, np.stack([centroid(caption) for caption in captions]), logit_scale=scale)
        for row, image, item in zip(many, images, captions, strict=True):
            assert row == pytest.approx(score(image, words, item, logit_scale=scale), abs=1e-12)


def test_inputs_are_not_modified():
    image, words, captions, scale = problem(9)
    for rows in (image, words, captions):
        rows.setflags(write=False)
    score(image, words, captions, logit_scale=scale)
    rows = probabilities(0)
    rows.setflags(write=False)
    choose_shared_words(rows)


def test_the_shared_vocabulary_is_sorted_and_unique():
    assert shared_vocabulary([("dog", "cat"), ("dog",), ()]) == ("cat", "dog")
    assert shared_vocabulary([]) == ()


def test_images_can_share_a_word_that_is_the_first_choice_of_none():
    """With unrelated images. The words are beagle, car, dog and poodle."""
    rows = np.array([[0.6, 0.01, 0.3, 0.09], [0.05, 0.01, 0.3, 0.64], [0.1, 0.7, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
    names = choose_shared_words(rows)
    assert names.chosen.tolist() == [2, 2, 1, 1]
    assert names.kept.tolist() == [1, 2]
    assert names.images.tolist() == [2, 2]


def test_an_image_without_similar_ones_gets_its_best_remaining_name():
    rows = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.2, 0.1, 0.7]])
    assert choose_shared_words(rows).chosen.tolist() == [0, 0, 0]


@pytest.mark.parametrize("min_images", [1, 2, 3, 5, 50])
def test_random_groups_are_labelled_as_by_the_literal_rule(min_images):
    for seed in range(40):
        rows = probabilities(seed)
        assert choose_shared_words(rows, min_images=min_images).chosen.tolist() == labels_by_the_rule(rows, min_images)


@pytest.mark.parametrize("min_images", [1, 2, 4, 12, 13])
def test_each_name_is_the_best_remaining_one_of_enough_images(min_images):
    for seed in range(PROBLEMS):
        rows = probabilities(seed)
        names = choose_shared_words(rows, min_images=min_images)
        assert names.kept.tolist() == sorted(set(names.chosen.tolist()))
        assert names.images.tolist() == [names.chosen.tolist().count(word) for word in names.kept]
        assert names.images.min() >= min(min_images, len(rows))
        best = rows[:, names.kept].max(axis=1)
        assert rows[np.arange(len(rows)), names.chosen] == pytest.approx(best)


def test_with_one_image_per_name_each_image_gets_its_best_word():
    rows = probabilities(4)
    assert choose_shared_words(rows, min_images=1).chosen.tolist() == rows.argmax(axis=1).tolist()
    assert choose_shared_words(rows[:1], min_images=3).chosen.tolist() == [rows[0].argmax()]


def test_the_order_of_the_images_does_not_matter():
    for seed in range(50):
        rows = probabilities(seed)
        turned = np.random.default_rng(seed).permutation(len(rows))
        assert choose_shared_words(rows[turned], min_images=3).chosen.tolist() == (
            choose_shared_words(rows, min_images=3).chosen[turned].tolist()
        )


def test_a_minimum_of_all_images_gives_one_name():
    names = choose_shared_words(probabilities(2, images=100, words=300), min_images=100)
    assert len(names.kept) == 1
    assert names.images.tolist() == [100]


def test_no_images_get_no_names():
    names = choose_shared_words(np.zeros((0, 3)))
    assert len(names.kept) == len(names.chosen) == len(names.images) == 0


@pytest.mark.parametrize(("shape", "min_images"), [((2, 0), 2), ((2, 3), 0)])
def test_names_require_words_and_at_least_one_image_each(shape, min_images):
    with pytest.raises(ValueError, match="cannot share"):
        choose_shared_words(np.zeros(shape), min_images=min_images)
