import asyncio
import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax

from app.adapters.cosine import Cosine
from app.captions.catalogue import CaptionCatalogue
from app.classification.classifiers import Classifier, ClassifierCache
from app.classification.image_features import ImageFeatureCache
from app.classification.pipeline import Pipeline
from app.classification.results import score_classes
from app.encoders.fake import FakeEncoder
from app.errors import (
    DeadlineExceededError,
    ImageTooLargeError,
    MalformedRequestError,
    NotAnImageError,
    OverloadedError,
)
from app.fewshot.fitting import FitCache
from app.images.decoder_pool import ImageLimits, ThreadDecoders
from app.images.fetch import RemoteImages
from app.models.negative_words import NegativeVocabulary
from app.models.registry import ModelRegistry
from app.models.served_model import ServedModel
from app.names.kinds import WordKinds
from app.observability.metrics import Metrics
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.store.examples import StoredFeatures
from app.types import ClassEntry, Task
from tests.conftest import picture
from tests.gated import GatedEncoder

pytestmark = pytest.mark.anyio

COLOURS = ("red", "green", "blue")


class NoExamples:
    """A store without example images."""

    async def features(self, name, model, classnames, *, max_pool=None):
        nothing = np.zeros((0, 0), np.float32)
        return StoredFeatures(nothing, np.zeros(0, np.int64), nothing, 0)


@pytest.fixture
async def start(anyio_backend):
    async with contextlib.AsyncExitStack() as stack:

        def make(
            *encoders,
            max_queued_images=64,
            image_batch=4,
            timeout_s=30.0,
            max_bytes=1_000_000,
            threads=2,
            classifier_bytes=1_000_000,
        ):
            metrics = Metrics()
            models = ModelRegistry(
                {
                    encoder.name: ServedModel.here(
                        encoder,
                        metrics=metrics,
                        max_queued_images=max_queued_images,
                        image_batch=image_batch,
                        text_batch=8,
                        stalled_after_s=60,
                    )
                    for encoder in encoders
                },
                decoders=ThreadDecoders(threads, ImageLimits(max_bytes, 1_000_000)),
                decoders_per_request=max(1, threads // 2),
                request_timeout_s=timeout_s,
            )
            fits, class_embedding_cache = FitCache(cache_bytes=1_000_000), ClassEmbeddingCache(1_000_000)
            classifiers = ClassifierCache(
                models,
                negative_words=NegativeVocabulary(models, lambda: ((), WordKinds((), {}))),
                class_embedding_cache=class_embedding_cache,
                cache_bytes=classifier_bytes,
                fits=fits,
                examples=NoExamples(),
                max_pool=100,
                metrics=metrics,
                words=["dog", "chair"],
            )
            pipeline = Pipeline(
                models,
                RemoteImages(None, max_bytes=0),
                image_features=ImageFeatureCache(max_bytes=1_000_000, ttl_s=60),
                classifiers=classifiers,
                fits=fits,
                catalogue=CaptionCatalogue(
                    Path("nowhere"),
                    default="wordnet",
                    wordnet=Path("nowhere"),
                    metrics=metrics,
                    max_queued=1,
                    stalled_after_s=60,
                ),
                class_embedding_cache=class_embedding_cache,
                metrics=metrics,
            )
            stack.push_async_callback(asyncio.to_thread, models.close)
            stack.push_async_callback(fits.close)
            for item in encoders:
                if isinstance(item, GatedEncoder):
                    stack.callback(item.open)
            return pipeline

        yield make


def a_task(classnames=COLOURS, *, model="fake", top_k=None, templates=("a {} thing.",)):
    return Task(model, "zero-shot", tuple(map(ClassEntry, classnames)), templates, top_k or len(classnames))


def labels_of(classification):
    return [result.predictions[0].label if result.predictions else None for result in classification.results]


def classifier_of(rows):
    adapter = Cosine().fit(rows, logit_scale=10.0, logit_bias=None)
    return Classifier(adapter.predict, np.arange(len(rows)), len(rows), (), rows.nbytes)


async def first_labels(pipeline, colours, **options):
    return labels_of(await pipeline.classify([picture(colour) for colour in colours], a_task(**options)))


# --- results -------------------------------------------------------------------------------------------------------


async def test_every_image_gets_its_result_in_order(start, encoder):
    pipeline = start(encoder)
    wanted = ["blue", "red", "green", "green", "red", "blue", "red"]
    assert await first_labels(pipeline, wanted) == wanted


@pytest.mark.parametrize("logit_bias", [None, -3.0])
async def test_scores_are_the_probabilities_of_the_encoder(start, logit_bias):
    encoder = FakeEncoder(logit_bias=logit_bias)
    classification = await start(encoder).classify([picture("purple")], a_task())
    (result,) = classification.results
    image = encoder.encode_images([encoder.transform(_opened("purple"))])[0].astype(float)
    texts = encoder.encode_texts([f"a {colour} thing." for colour in COLOURS]).astype(float)
    cosines = dict(zip(COLOURS, texts @ image, strict=True))
    logits = np.array([10 * cosine + (logit_bias or 0) for cosine in cosines.values()])
    scores = dict(zip(COLOURS, softmax(logits) if logit_bias is None else expit(logits), strict=True))
    assert [prediction.label for prediction in result.predictions] == sorted(COLOURS, key=scores.get, reverse=True)
    for prediction in result.predictions:
        assert prediction.score == pytest.approx(scores[prediction.label], rel=1e-5)
        assert prediction.similarity == pytest.approx(cosines[prediction.label], rel=1e-5)


def _opened(colour):
    from app.images.decode import decode_image

    return decode_image(picture(colour), max_bytes=10**6, max_pixels=10**6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
async def test_the_best_top_k_are_returned_and_their_scores_are_not_renormalised(start, encoder, top_k):
    pipeline = start(encoder)
    whole = (await pipeline.classify([picture("teal")], a_task())).results[0].predictions
    best = (await pipeline.classify([picture("teal")], a_task(top_k=top_k))).results[0].predictions
    assert best == whole[:top_k]
    assert sum(item.score for item in whole) == pytest.approx(1, abs=1e-6)


def test_classes_with_equal_scores_keep_the_order_of_the_request():
    encoder, same = FakeEncoder(), np.eye(16, dtype=np.float32)[[3, 3, 3]]
    predicted = score_classes(encoder, a_task(["b", "c", "a"]), np.eye(16, dtype=np.float32)[[3]], classifier_of(same))
    assert predicted.ranked.tolist() == [[0, 1, 2]]


def test_a_similarity_is_at_most_one():
    """Unit rows in float32 have length one to seven digits only."""
    encoder = FakeEncoder()
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert ((rows * rows).sum(axis=1) > 1).any()
    names = [str(number) for number in range(200)]
    predicted = score_classes(encoder, a_task(names), np.concatenate([rows, -rows]), classifier_of(rows))
    assert np.abs(predicted.similarities).max() == 1


async def test_an_image_has_the_same_result_alone_and_in_a_batch(start, encoder):
    pipeline = start(encoder)
    colours = ["navy", "teal", "olive", "orange", "pink"]
    together = await pipeline.classify([picture(colour) for colour in colours], a_task())
    for colour, result in zip(colours, together.results, strict=True):
        alone = await pipeline.classify([picture(colour)], a_task())
        assert labels_of(alone) == [result.predictions[0].label]
        for one, other in zip(alone.results[0].predictions, result.predictions, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-5)


async def test_concurrent_requests_get_their_own_results(start, encoder):
    pipeline = start(encoder, image_batch=2)
    requests = [[COLOURS[(first + step) % 3] for step in range(1 + first % 3)] for first in range(20)]
    answers = await asyncio.gather(*(first_labels(pipeline, request) for request in requests))
    assert answers == requests


async def test_the_first_model_is_the_default_and_each_has_its_own_embeddings(start):
    first, second = FakeEncoder("first"), FakeEncoder("second")
    pipeline = start(first, second)
    assert pipeline._models.default == "first"
    assert await first_labels(pipeline, ["blue"], model="second") == ["blue"]
    assert (first.encoded_texts, first.image_batches) == ([], [])
    assert len(second.encoded_texts) == 3
    assert await first_labels(pipeline, ["red"], model="first") == ["red"]
    assert len(first.encoded_texts) == 3


async def test_the_same_classes_are_not_encoded_again(start, encoder):
    pipeline = start(encoder)
    for _ in range(3):
        await first_labels(pipeline, ["red"])
    assert encoder.encoded_texts == ["a red thing.", "a green thing.", "a blue thing."]


async def test_the_time_of_every_stage_is_returned(start, encoder):
    timing = (await start(encoder).classify([picture("red")], a_task())).timing_ms
    assert list(timing) == ["text", "decode", "queue", "encode", "adapt"]
    assert all(0 <= item < 10_000 for item in timing.values())
    assert timing["decode"] > 0


# --- bad images ----------------------------------------------------------------------------------------------------


async def test_an_unreadable_image_has_an_error_at_its_position(start, encoder):
    bad = MalformedRequestError("already known to be bad")
    images = [b"no image", picture("red"), bad, picture("blue"), b"", picture("green")]
    classification = await start(encoder).classify(images, a_task())
    assert labels_of(classification) == [None, "red", None, "blue", None, "green"]
    errors = [result.error for result in classification.results]
    assert [type(error) for error in errors] == [
        NotAnImageError,
        type(None),
        MalformedRequestError,
        type(None),
        NotAnImageError,
        type(None),
    ]
    assert errors[2] is bad
    assert sum(encoder.image_batches) == 3


async def test_images_above_the_limits_are_rejected_individually(start, encoder):
    good = picture("red")
    classification = await start(encoder, max_bytes=len(good)).classify([good, good + b"\0"], a_task())
    assert labels_of(classification) == ["red", None]
    assert isinstance(classification.results[1].error, ImageTooLargeError)


async def test_nothing_is_encoded_if_every_image_is_bad(start, encoder):
    classification = await start(encoder).classify([b"no", b"image"], a_task())
    assert [result.predictions for result in classification.results] == [(), ()]
    assert encoder.image_batches == []
    assert classification.timing_ms["encode"] == 0


# --- threads -------------------------------------------------------------------------------------------------------


async def test_decoding_and_both_towers_run_in_separate_threads(start):
    encoder = GatedEncoder()
    await first_labels(start(encoder), COLOURS * 2)
    images, texts = encoder.threads["images"], encoder.threads["texts"]
    assert len(images) == len(texts) == 1
    assert not images & texts
    assert not encoder.threads["transform"] & (images | texts | {threading.current_thread()})


async def test_closing_ends_every_thread(start):
    encoder = GatedEncoder()
    pipeline = start(encoder)
    await first_labels(pipeline, ["red"])
    await pipeline._fits.close()
    await asyncio.to_thread(pipeline._models.close)
    assert not [thread for threads in encoder.threads.values() for thread in threads if thread.is_alive()]


# --- fair decoding -------------------------------------------------------------------------------------------------


class SlowToDecode(FakeEncoder):
    """Waits in the transform of blue images until it is released."""

    def __init__(self):
        super().__init__()
        self.entered, self.may_go_on = threading.Event(), threading.Event()

    def transform(self, image):
        if image.getpixel((0, 0)) == (0, 0, 255):
            self.entered.set()
            assert self.may_go_on.wait(10)
        return super().transform(image)


async def test_a_single_image_overtakes_a_request_with_many_images(start):
    encoder = SlowToDecode()
    pipeline = start(encoder, max_queued_images=65)
    many = asyncio.create_task(first_labels(pipeline, ["blue"] * 64))
    assert await asyncio.to_thread(encoder.entered.wait, 10)
    try:
        assert await asyncio.wait_for(first_labels(pipeline, ["red"]), 5) == ["red"]
        assert not many.done()
    finally:
        encoder.may_go_on.set()
    assert await many == ["blue"] * 64


async def test_a_request_cancelled_during_decoding_releases_the_threads(start):
    encoder = SlowToDecode()
    pipeline = start(encoder, threads=1)
    many = asyncio.create_task(first_labels(pipeline, ["blue"] * 10))
    assert await asyncio.to_thread(encoder.entered.wait, 10)
    many.cancel()
    with pytest.raises(asyncio.CancelledError):
        await many
    encoder.may_go_on.set()
    assert await first_labels(pipeline, ["red"]) == ["red"]


@pytest.mark.parametrize(("threads", "share"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3)])
async def test_one_request_uses_half_of_the_decoding_threads(start, threads, share):
    """The barrier requires half of them, and the count shows that there are not more."""

    class Counting(FakeEncoder):
        lock, together = threading.Lock(), threading.Barrier(share, timeout=10)
        running = most = 0

        def transform(self, image):
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
            self.together.wait()
            try:
                return super().transform(image)
            finally:
                with self.lock:
                    self.running -= 1

    encoder = Counting()
    assert await first_labels(start(encoder, threads=threads), ["red"] * 12) == ["red"] * 12
    assert encoder.most == share


# --- overload, deadlines, failures ---------------------------------------------------------------------------------


async def test_a_request_above_the_queue_limit_is_rejected_before_any_work(start):
    encoder = GatedEncoder()
    encoder.images_open.clear()
    pipeline = start(encoder, max_queued_images=3)
    admitted = asyncio.create_task(first_labels(pipeline, ["red", "blue"]))
    assert await asyncio.to_thread(encoder.images_entered.acquire, timeout=10)
    with pytest.raises(OverloadedError, match="2 of 3 places"):
        await first_labels(pipeline, ["red", "blue"], classnames=("never", "encoded"))
    assert "a never thing." not in encoder.encoded_texts
    encoder.images_open.set()
    assert await admitted == ["red", "blue"]
    assert await first_labels(pipeline, ["green"] * 3) == ["green"] * 3


async def test_bad_images_release_their_queue_places(start, encoder):
    pipeline = start(encoder, max_queued_images=2)
    for _ in range(3):
        await pipeline.classify([b"no", b"image"], a_task())
    assert pipeline._models.get("fake").images.admitted == 0


async def test_a_request_past_its_deadline_ends_and_the_next_one_succeeds(start):
    encoder = GatedEncoder()
    pipeline = start(encoder, timeout_s=1.0, max_queued_images=1)
    await first_labels(pipeline, ["red"])
    encoder.images_open.clear()
    with pytest.raises(DeadlineExceededError, match=r"took longer than 1 s; .*DEIXIS_REQUEST_TIMEOUT_S"):
        await first_labels(pipeline, ["red"])
    assert pipeline._models.get("fake").images.admitted == 0
    encoder.images_open.set()
    assert await first_labels(pipeline, ["blue"]) == ["blue"]


async def test_a_request_without_a_deadline_has_no_time_limit(start):
    assert await first_labels(start(FakeEncoder(), timeout_s=None), ["red"]) == ["red"]


async def test_texts_that_exceeded_the_deadline_are_ready_for_the_next_request(start):
    encoder = GatedEncoder()
    encoder.texts_open.clear()
    pipeline = start(encoder, timeout_s=0.2)
    with pytest.raises(DeadlineExceededError, match="kept for the next request"):
        await first_labels(pipeline, ["red"])
    encoder.texts_open.set()
    # Waits for the encoding that continues: the next request must not start another one.
    await pipeline._classifiers.get(a_task())
    assert await first_labels(pipeline, ["red"]) == ["red"]
    assert len(encoder.encoded_texts) == 3


@pytest.mark.parametrize("error", [RuntimeError("broken"), TimeoutError("a replica did not answer")])
async def test_an_encoder_error_fails_the_request_with_this_error(start, error):
    """Also a TimeoutError of the encoder, which is not the deadline of the service."""

    class Failing(FakeEncoder):
        broken = True

        def encode_images(self, pixels):
            if self.broken:
                raise error
            return super().encode_images(pixels)

    encoder = Failing()
    pipeline = start(encoder)
    with pytest.raises(type(error), match=str(error)):
        await first_labels(pipeline, ["red"])
    assert pipeline._models.get("fake").images.admitted == 0
    encoder.broken = False
    assert await first_labels(pipeline, ["red"]) == ["red"]


async def test_a_failing_transform_fails_its_request_only(start):
    class Failing(FakeEncoder):
        def transform(self, image):
            if image.getpixel((0, 0)) == (0, 0, 255):
                raise ZeroDivisionError
            return super().transform(image)

    pipeline = start(Failing())
    answers = await asyncio.gather(
        first_labels(pipeline, ["red", "blue"]), first_labels(pipeline, ["red"]), return_exceptions=True
    )
    assert isinstance(answers[0], ZeroDivisionError)
    assert answers[1] == ["red"]
    assert pipeline._models.get("fake").images.admitted == 0


async def test_a_cancelled_request_releases_its_places_and_its_images_are_not_encoded(start):
    encoder = GatedEncoder()
    pipeline = start(encoder, max_queued_images=4)
    await first_labels(pipeline, ["red"])
    assert await asyncio.to_thread(encoder.images_entered.acquire, timeout=10)
    encoder.images_open.clear()
    first = asyncio.create_task(first_labels(pipeline, ["red"]))
    assert await asyncio.to_thread(encoder.images_entered.acquire, timeout=10)
    abandoned = asyncio.create_task(first_labels(pipeline, ["blue"] * 3))
    await asyncio.sleep(0)  # lets it be admitted
    assert pipeline._models.get("fake").images.admitted == 4
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    assert pipeline._models.get("fake").images.admitted == 1
    encoder.images_open.set()
    assert await first == ["red"]
    assert await first_labels(pipeline, ["green"]) == ["green"]
    assert encoder.image_batches == [1, 1, 1]
