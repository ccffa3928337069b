"""Scores and names from retrieved captions, compared with their parts and with the reference."""

import numpy as np
import pytest

from app.captions.cased.candidates import NOTHING_FOUND
from app.captions.cased.lexicon import Lexicon
from app.captions.cased.scoring import ALPHA, centroid, choose_shared_words, score, score_many, shared_vocabulary
from app.captions.cased.vocabulary import (
    CaptionCandidates,
    ScoreOptions,
    explain_captions,
    find_candidates,
    label_separately,
    label_together,
)
from app.captions.database import NearestCaptions
from app.types import ImageResult, Prediction
from tests.oracles import cased as oracle

LEXICON = Lexicon(
    nouns=frozenset({"dog", "cat", "puppy", "retriever", "beach", "ball"}),
    adjectives=frozenset({"golden", "red", "small"}),
    verbs=frozenset({"run"}),
    adverbs=frozenset({"quickly"}),
)
WORDS = ("dog", "cat", "puppy", "retriever", "beach", "ball", "golden", "red", "dogs", "cats", "running", "photo", "a")
LOGIT_SCALE = 100.0
EVERY = 10_000


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def scale_of(alpha=ALPHA, top_k=EVERY, reject_below=None):
    return ScoreOptions(LOGIT_SCALE, alpha, top_k, reject_below)


def encode(words):
    """Return a direction for each word that depends only on the word."""
    return unit([np.random.default_rng(list(word.encode())).standard_normal(24) for word in words])


def problem(seed, images=1, captions=10):
    """Return unit images, and for each a search result with random captions of few words."""
    rng = np.random.default_rng(seed)
    queries = unit(rng.standard_normal((images, 24)))
    found = []
    for image in queries:
        texts = tuple(" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(captions))
        features = unit(rng.standard_normal((captions, 24)) + 2 * image)
        if seed % 3 == 0:
            features[1::3] = unit(features[::3][: len(features[1::3])] + 1e-3)  # near duplicates
        cosines = features @ image
        order = np.argsort(-cosines, kind="stable")
        found.append(NearestCaptions(tuple(texts[at] for at in order), cosines[order], features[order], "0" * 16))
    return queries, found


def mined_of(found, **options):
    return [find_candidates(item, LEXICON, **({"with_phrases": False} | options)) for item in found]


def scores_of(result):
    return {prediction.label: prediction.score for prediction in result.predictions}


# --- separate images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, ALPHA, 1.0])
def test_scores_equal_those_of_the_reference(alpha):
    for seed in range(60):
        (image,), (found,) = problem(seed)
        (mined,) = mined_of([found])
        kept = oracle.dedup(found.features)
        texts = [found.captions[at] for at in kept]
        expected = oracle.cased(
            image,
            texts,
            found.features[kept],
            encode,
            alpha=alpha,
            scale=LOGIT_SCALE,
            inflect=lambda word: word[:-1],
            tag=LEXICON.tag,
        )

        (result,) = label_separately(image[None], [mined], [encode(mined.candidates)], scale_of(alpha))

        assert mined.captions == tuple(texts)
        assert [prediction.label for prediction in result.predictions] == [word for word, _ in expected]
        np.testing.assert_allclose(
            [prediction.score for prediction in result.predictions], [s for _, s in expected], atol=1e-5
        )


def test_scores_are_a_mixture_of_image_and_caption_scores():
    for seed in range(20):
        images, found = problem(seed, images=3)
        mined = mined_of(found)
        own = [encode(item.candidates) for item in mined]
        for image, item, words, result in zip(
            images, mined, own, label_separately(images, mined, own, scale_of()), strict=True
        ):
            expected = score(image, words, item.features, logit_scale=LOGIT_SCALE, alpha=ALPHA)
            outcome = scores_of(result)
            np.testing.assert_array_equal([outcome[word] for word in item.candidates], expected)
            assert sum(outcome.values()) == pytest.approx(1, abs=1e-5)
            for prediction in result.predictions:
                cosine = float(encode([prediction.label])[0] @ image)
                assert prediction.similarity == pytest.approx(cosine, abs=1e-6)
            assert result.rejected is None


def test_an_image_has_the_same_result_alone_and_in_a_batch():
    images, found = problem(7, images=6)
    mined = mined_of(found)
    own = [encode(item.candidates) for item in mined]
    together = label_separately(images, mined, own, scale_of())
    for at in range(6):
        (alone,) = label_separately(images[at : at + 1], mined[at : at + 1], own[at : at + 1], scale_of())
        assert alone == together[at]


def test_candidates_with_equal_scores_are_in_alphabetical_order():
    image = unit(np.eye(24)[:1])
    mined = CaptionCandidates(("a",), np.ones(1, np.float32), image, ("ball", "cat", "dog"))
    same = np.repeat(image, 3, axis=0)
    for top_k in (1, 2, 3):
        (result,) = label_separately(image, [mined], [same], scale_of(top_k=top_k))
        assert [prediction.label for prediction in result.predictions] == ["ball", "cat", "dog"][:top_k]
    assert [prediction.score for prediction in result.predictions] == [pytest.approx(1 / 3)] * 3


def test_top_k_keeps_the_best_predictions():
    images, found = problem(4)
    mined = mined_of(found)
    own = [encode(item.candidates) for item in mined]
    (every,) = label_separately(images, mined, own, scale_of())
    for top_k in (1, 2, EVERY):
        (few,) = label_separately(images, mined, own, scale_of(top_k=top_k))
        assert few.predictions == every.predictions[:top_k]


def test_an_image_is_rejected_if_its_best_score_is_below_the_threshold():
    images, found = problem(5)
    mined = mined_of(found)
    own = [encode(item.candidates) for item in mined]
    (result,) = label_separately(images, mined, own, scale_of())
    best = result.predictions[0].score
    for threshold, rejected in ((0.0, False), (best, False), (np.nextafter(best, 2), True), (1.0, best < 1)):
        (outcome,) = label_separately(images, mined, own, scale_of(reject_below=threshold))
        assert outcome.rejected is rejected


def test_a_similarity_is_a_cosine_despite_rounding():
    image = np.full((1, 3), np.float32(0.57735032))
    mined = CaptionCandidates(("a",), np.ones(1, np.float32), image, ("ball",))
    (result,) = label_separately(image, [mined], [image], scale_of())
    assert -1 <= result.predictions[0].similarity <= 1
    assert result.predictions[0].score == pytest.approx(1)


# --- candidates ----------------------------------------------------------------------------------------------------


def test_near_duplicates_are_removed_and_the_first_is_kept():
    features = unit([[1, 0, 0], [1, 0.01, 0], [0, 1, 0]])
    found = NearestCaptions(("a dog", "a dog!", "a cat"), np.array([0.9, 0.8, 0.1], np.float32), features, "0" * 16)
    mined = find_candidates(found, LEXICON, with_phrases=False)
    assert mined.captions == ("a dog", "a cat")
    np.testing.assert_array_equal(mined.cosines, np.array([0.9, 0.1], np.float32))
    np.testing.assert_array_equal(mined.features, features[[0, 2]])
    assert mined.candidates == ("cat", "dog")


def test_phrases_are_added_to_words_only_on_request():
    features = np.eye(3, dtype=np.float32)
    texts = ("a golden retriever", "two golden retrievers", "one golden retriever on a beach")
    found = NearestCaptions(texts, np.array([0.9, 0.8, 0.7], np.float32), features, "0" * 16)
    assert find_candidates(found, LEXICON, with_phrases=False).candidates == ("golden", "retriever")
    assert find_candidates(found, LEXICON, with_phrases=True).candidates == ("golden", "golden retriever", "retriever")


def test_captions_without_a_word_give_one_candidate():
    found = NearestCaptions(("!", "12"), np.array([0.2, 0.1], np.float32), np.eye(2, dtype=np.float32), "0" * 16)
    for with_phrases in (False, True):
        assert find_candidates(found, LEXICON, with_phrases=with_phrases).candidates == (NOTHING_FOUND,)


# --- several images together ---------------------------------------------------------------------------------------


def together(seed, images, min_images, **scale):
    queries, found = problem(seed, images=images)
    mined = mined_of(found)
    vocabulary = shared_vocabulary([item.candidates for item in mined])
    words = encode(vocabulary)
    result = label_together(queries, mined, vocabulary, words, scale_of(**scale), min_images=min_images)
    return queries, mined, vocabulary, words, *result


@pytest.mark.parametrize("min_images", [1, 2, 3, 50])
def test_each_shared_name_is_the_best_of_enough_images_and_only_these_are_returned(min_images):
    for seed in range(30):
        images = 1 + seed % 9
        _, _, vocabulary, _, results, names = together(seed, images, min_images)
        used = {item.label: item.images for item in names}
        assert set(used) <= set(vocabulary)
        best = [item.predictions[0].label for item in results]
        assert {name: best.count(name) for name in set(best)} == used
        assert min(used.values()) >= min(min_images, images)
        assert [item.images for item in names] == sorted((item.images for item in names), reverse=True)
        for result in results:
            assert {prediction.label for prediction in result.predictions} == set(used)
            assert sum(prediction.score for prediction in result.predictions) <= 1 + 1e-5
            scores = [prediction.score for prediction in result.predictions]
            assert scores == sorted(scores, reverse=True)


def test_shared_scores_sum_to_one_over_the_vocabulary():
    queries, mined, vocabulary, words, results, _ = together(11, 8, 2)
    centroids = np.stack([centroid(item.features) for item in mined])
    scores = score_many(queries, words, centroids, logit_scale=LOGIT_SCALE, alpha=ALPHA)
    names = choose_shared_words(scores, min_images=2)
    for image, row, chosen, result in zip(queries, scores, names.chosen, results, strict=True):
        assert result.predictions[0].label == vocabulary[chosen]
        for prediction in result.predictions:
            at = vocabulary.index(prediction.label)
            assert prediction.score == pytest.approx(row[at], abs=1e-7)
            assert prediction.similarity == pytest.approx(float(words[at] @ image), abs=1e-6)


def test_with_one_image_per_name_each_image_gets_its_best_word():
    queries, mined, vocabulary, words, results, _ = together(12, 7, 1)
    centroids = np.stack([centroid(item.features) for item in mined])
    scores = score_many(queries, words, centroids, logit_scale=LOGIT_SCALE, alpha=ALPHA)
    assert [result.predictions[0].label for result in results] == [vocabulary[at] for at in scores.argmax(axis=1)]


def test_a_single_image_in_a_group_has_the_same_label_as_alone():
    for seed in range(10):
        queries, mined, vocabulary, words, (result,), (name,) = together(seed, 1, 2)
        assert vocabulary == mined[0].candidates
        (alone,) = label_separately(queries, mined, [words], scale_of(top_k=1))
        assert name.images == 1
        assert result.predictions[0].label == alone.predictions[0].label == name.label
        assert result.predictions[0].score == pytest.approx(alone.predictions[0].score, abs=1e-6)


def test_the_order_of_the_images_does_not_change_names():
    queries, found = problem(13, images=9)
    mined = mined_of(found)
    vocabulary = shared_vocabulary([item.candidates for item in mined])
    words = encode(vocabulary)
    results, names = label_together(queries, mined, vocabulary, words, scale_of(), min_images=3)
    order = np.random.default_rng(0).permutation(9)
    others, again = label_together(
        queries[order], [mined[at] for at in order], vocabulary, words, scale_of(), min_images=3
    )
    assert again == names
    assert [other.predictions[0].label for other in others] == [results[at].predictions[0].label for at in order]


def test_names_of_equally_many_images_are_in_alphabetical_order():
    features = np.eye(4, dtype=np.float32)
    images = features[[1, 0, 1, 0]]
    words = features[:2]
    mined = [CaptionCandidates(("x",), np.ones(1, np.float32), image[None], ("ball", "cat")) for image in images]
    _, names = label_together(images, mined, ("ball", "cat"), words, scale_of(), min_images=2)
    assert [(name.label, name.images) for name in names] == [("ball", 2), ("cat", 2)]


def test_a_shared_name_with_a_low_score_is_rejected():
    *_, results, _ = together(14, 6, 6, reject_below=0.5)
    for result in results:
        assert result.rejected is (result.predictions[0].score < 0.5)


# --- captions in results -------------------------------------------------------------------------------------------


def test_captions_are_returned_with_the_predictions_that_they_suggested():
    texts = ("two dogs", "a dog and a cat", "a beach")
    mined = CaptionCandidates(
        texts, np.array([0.5, 0.25, 0.125], np.float32), np.eye(3, dtype=np.float32), ("cat", "dog")
    )
    result = ImageResult((Prediction("dog", 0.6, 0.1), Prediction("cat", 0.4, 0.1)))

    outcome = explain_captions(result, mined, LEXICON)

    assert [(item.caption, item.similarity, item.suggested) for item in outcome] == [
        ("two dogs", 0.5, ("dog",)),
        ("a dog and a cat", 0.25, ("dog", "cat")),
        ("a beach", 0.125, ()),
    ]
    assert explain_captions(ImageResult(()), mined, LEXICON)[0].suggested == ()


def test_the_similarity_of_a_caption_is_a_cosine_despite_half_precision():
    mined = CaptionCandidates(
        ("a dog", "a cat"), np.array([1.0004, -1.0004], np.float32), np.eye(2, dtype=np.float32), ("dog",)
    )
    result = explain_captions(ImageResult((Prediction("dog", 1.0, 1.0),)), mined, LEXICON)
    assert [item.similarity for item in result] == [1, -1]


def test_every_prediction_is_suggested_by_a_caption_if_any_was_found():
    for seed in range(30):
        images, found = problem(seed)
        mined = mined_of(found, with_phrases=True)
        (result,) = label_separately(images, mined, [encode(mined[0].candidates)], scale_of())
        outcome = explain_captions(result, mined[0], LEXICON)
        suggested = {label for item in outcome for label in item.suggested}
        assert {prediction.label for prediction in result.predictions} - {NOTHING_FOUND} <= suggested
        assert [item.caption for item in outcome] == list(mined[0].captions)
