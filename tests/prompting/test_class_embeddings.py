import asyncio
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.prompting.class_embeddings import ClassEmbeddingCache, pool, prototype
from app.prompting.recipes import Pooling, Row, Slot, templates_only
from app.types import ClassEntry
from tests.oracles.text_prototypes import cupl_prototypes, dclip_scores, unit

pytestmark = pytest.mark.anyio

DIMS = 8
ROW_BYTES = DIMS * 4
PHOTO = ("a photo of a {}.",)
TWO = ("a {}.", "the {}, up close.")


def direction(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return unit(np.random.default_rng(seed).standard_normal(DIMS)).astype(np.float32)


def expected(templates, classnames):
    return cupl_prototypes([[direction(template.replace("{}", name)) for template in templates] for name in classnames])


class Encoder:
    """Records what it encodes. While closed, it waits; ``fail_next`` makes it raise an error."""

    def __init__(self, *, shut=False):
        self.texts = []
        self.fail_next = None
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        if not shut:
            self.open.set()

    async def __call__(self, prompts):
        self.texts.extend(prompts)
        self.entered.set()
        await self.open.wait()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        return np.stack([direction(text) for text in prompts])


@pytest.fixture
def cache():
    return ClassEmbeddingCache(1_000_000)


def get(cache, encode, classnames, *, model="m", templates=PHOTO):
    recipe = templates_only([ClassEntry(name) for name in classnames], templates, {})
    return cache.get(model, encode, recipe.pooling, recipe.rows)


# --- the arithmetic ------------------------------------------------------------------------------------------------


def row_of(*sizes):
    return Row(
        0, tuple(Slot("template", tuple(f"{slot} {text}" for text in range(size))) for slot, size in enumerate(sizes))
    )


@given(st.integers(1, 6), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_a_prototype_is_the_normalised_mean_of_unit_rows(prompts, dims, seed):
    features = unit(np.random.default_rng(seed).standard_normal((prompts, dims))).astype(np.float32)
    embedding = prototype(features)
    np.testing.assert_allclose(embedding, cupl_prototypes([features.astype(np.float64)])[0], atol=2e-5)
    assert embedding.dtype == np.float32


@given(st.integers(1, 6), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_a_mean_that_is_not_normalised_gives_the_mean_of_the_cosines(prompts, dims, seed):
    rng = np.random.default_rng(seed)
    features = unit(rng.standard_normal((prompts, dims))).astype(np.float32)
    image = unit(rng.standard_normal(dims))
    mean = pool(row_of(*[1] * prompts), Pooling.MEAN, features)
    np.testing.assert_allclose(mean @ image, dclip_scores(image[None], [features])[0, 0], atol=1e-6)


def test_aligned_slots_are_pooled_separately():
    features = np.stack([direction(text) for text in "abcdef"])
    pooled = pool(row_of(1, 3, 2), Pooling.ALIGNED, features)
    wanted = cupl_prototypes([features[:1], features[1:4], features[4:]])
    np.testing.assert_allclose(pooled, wanted, atol=1e-6)


def test_one_prompt_gives_its_embedding():
    np.testing.assert_allclose(prototype(direction("a")[None]), direction("a"), atol=1e-7)


def test_prompts_that_cancel_out_give_a_finite_row():
    features = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert prototype(features).tolist() == [0.0, 0.0]


# --- results -------------------------------------------------------------------------------------------------------


async def test_rows_have_the_order_of_the_class_names(cache):
    encode = Encoder()
    for classnames in (["lynx", "puma", "owl"], ["owl", "lynx"], ["puma"]):
        got = await get(cache, encode, classnames, templates=TWO)
        np.testing.assert_allclose(got, expected(TWO, classnames), atol=1e-6)
        assert got.dtype == np.float32


async def test_a_repeated_class_name_gets_a_row_each_time(cache):
    got = await get(cache, Encoder(), ["owl", "lynx", "owl"])
    np.testing.assert_allclose(got, expected(PHOTO, ["owl", "lynx", "owl"]), atol=1e-6)


async def test_the_result_is_read_only(cache):
    """Requests with the same classes share it."""
    encode = Encoder()
    for _ in range(2):
        got = await get(cache, encode, ["owl", "lynx"])
        with pytest.raises(ValueError, match="read-only"):
            got[0, 0] = 1


async def test_a_class_name_with_braces_is_not_formatted(cache):
    encode = Encoder()
    await get(cache, encode, ["{} {0}"])
    assert encode.texts == ["a photo of a {} {0}."]


# --- caching -------------------------------------------------------------------------------------------------------


async def test_cached_classes_are_not_encoded_again(cache):
    encode = Encoder()
    first = await get(cache, encode, ["owl", "lynx"])
    again = await get(cache, encode, ["owl", "lynx"])
    assert encode.texts == ["a photo of a owl.", "a photo of a lynx."]
    np.testing.assert_array_equal(first, again)


async def test_only_the_added_class_is_encoded(cache):
    encode = Encoder()
    await get(cache, encode, ["owl", "lynx"])
    await get(cache, encode, ["lynx", "puma", "owl"])
    assert encode.texts[2:] == ["a photo of a puma."]


async def test_concurrent_overlapping_requests_encode_each_class_once(cache):
    encode = Encoder(shut=True)
    names = [f"class {number}" for number in range(30)]
    wanted = [names[start : start + 10] for start in range(20)]
    requests = [asyncio.create_task(get(cache, encode, item, templates=TWO)) for item in wanted]
    await encode.entered.wait()
    encode.open.set()
    answers = await asyncio.gather(*requests)
    for classnames, answer in zip(wanted, answers, strict=True):
        np.testing.assert_allclose(answer, expected(TWO, classnames), atol=1e-6)
    assert sorted(encode.texts) == sorted(template.replace("{}", name) for name in names[:29] for template in TWO)


async def test_rows_are_cached_per_model_and_list_of_templates(cache):
    encode = Encoder()
    await get(cache, encode, ["owl"])
    await get(cache, encode, ["owl"], model="another")
    await get(cache, encode, ["owl"], templates=TWO)
    assert encode.texts == ["a photo of a owl."] * 2 + ["a owl.", "the owl, up close."]
    other = await get(cache, encode, ["owl"], templates=TWO)
    np.testing.assert_allclose(other, expected(TWO, ["owl"]), atol=1e-6)


async def test_a_large_label_set_is_encoded_in_chunks_of_whole_classes(cache):
    """The features of 80 prompts for each of 10,000 classes would not fit into memory together."""
    sizes = []

    async def encode(prompts):
        sizes.append(len(prompts))
        return np.stack([direction(text) for text in prompts])

    templates = tuple(f"{number} {{}}" for number in range(30))
    names = [f"class {number}" for number in range(60)]
    got = await get(cache, encode, names, templates=templates)
    np.testing.assert_allclose(got, expected(templates, names), atol=1e-5)
    assert sum(sizes) == 1800
    assert max(sizes) <= 256
    assert all(size % 30 == 0 for size in sizes)


# --- cancellation and failures -------------------------------------------------------------------------------------


async def test_a_cancelled_request_neither_stops_nor_loses_the_encoding(cache):
    encode = Encoder(shut=True)
    impatient = asyncio.create_task(get(cache, encode, ["owl", "lynx"]))
    await encode.entered.wait()
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    encode.open.set()
    got = await get(cache, encode, ["lynx", "owl"])
    np.testing.assert_allclose(got, expected(PHOTO, ["lynx", "owl"]), atol=1e-6)
    assert len(encode.texts) == 2


async def test_an_encoding_without_requests_ends_after_the_current_chunk(cache):
    """Otherwise abandoned requests would keep the text tower busy for minutes. Finished chunks are cached."""
    encode = Encoder(shut=True)
    names = [f"class {number}" for number in range(1000)]
    abandoned = asyncio.create_task(get(cache, encode, names))
    await encode.entered.wait()
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    encode.open.set()
    await get(cache, encode, ["another"])
    first = [text for text in encode.texts if text != "a photo of a another."]
    assert len(first) == 256

    np.testing.assert_allclose(await get(cache, encode, names), expected(PHOTO, names), atol=1e-6)
    assert len(encode.texts) == 1001


async def test_an_encoding_with_a_remaining_request_is_completed(cache):
    encode = Encoder(shut=True)
    names = [f"class {number}" for number in range(600)]
    impatient = asyncio.create_task(get(cache, encode, names))
    await encode.entered.wait()
    patient = asyncio.create_task(get(cache, encode, names[-1:]))
    await asyncio.sleep(0)  # lets it begin to wait
    impatient.cancel()
    encode.open.set()

    np.testing.assert_allclose(await patient, expected(PHOTO, names[-1:]), atol=1e-6)
    assert len(encode.texts) == 600


async def test_a_cancelled_request_does_not_affect_another(cache):
    encode = Encoder(shut=True)
    impatient = asyncio.create_task(get(cache, encode, ["owl"]))
    patient = asyncio.create_task(get(cache, encode, ["owl", "lynx"]))
    await encode.entered.wait()
    await asyncio.sleep(0)  # lets the second begin to wait for the first
    impatient.cancel()
    encode.open.set()
    np.testing.assert_allclose(await patient, expected(PHOTO, ["owl", "lynx"]), atol=1e-6)


async def test_a_failure_reaches_every_request_and_the_next_one_tries_again(cache):
    encode = Encoder(shut=True)
    encode.fail_next = ZeroDivisionError("no")
    waiters = [asyncio.create_task(get(cache, encode, names)) for names in (["owl"], ["owl"], ["owl"])]
    await encode.entered.wait()
    await asyncio.sleep(0)  # lets the others begin to wait
    encode.open.set()
    answers = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ZeroDivisionError] * 3
    assert len(encode.texts) == 1
    np.testing.assert_allclose(await get(cache, encode, ["owl"]), expected(PHOTO, ["owl"]), atol=1e-6)
    assert len(encode.texts) == 2


async def test_a_failure_without_requests_is_not_reported_as_never_retrieved(cache):
    lost = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    encode = Encoder(shut=True)
    encode.fail_next = ZeroDivisionError("no")
    waiter = asyncio.create_task(get(cache, encode, ["owl"]))
    await encode.entered.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    encode.open.set()
    got = await get(cache, Encoder(), ["lynx"])  # runs the loop, which lets the first fail
    assert got.shape == (1, DIMS)
    assert lost == []
    np.testing.assert_allclose(await get(cache, encode, ["owl"]), expected(PHOTO, ["owl"]), atol=1e-6)


async def test_an_encoder_with_too_few_rows_is_an_error_and_blocks_nothing(cache):
    async def short(prompts):
        return np.ones((1, DIMS), dtype=np.float32)

    with pytest.raises(ValueError, match="1 rows of features for 2 prompts"):
        await get(cache, short, ["owl", "lynx"])
    got = await get(cache, Encoder(), ["owl", "lynx"])
    np.testing.assert_allclose(got, expected(PHOTO, ["owl", "lynx"]), atol=1e-6)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [0, 1, 2 * ROW_BYTES - 1, 2 * ROW_BYTES, 6 * ROW_BYTES])
async def test_results_are_correct_with_a_tiny_cache(max_bytes):
    small = ClassEmbeddingCache(max_bytes)
    names = [f"class {number}" for number in range(10)]
    encode = Encoder()
    wanted = [names, names[5:], names[:2], names]
    answers = await asyncio.gather(*(get(small, encode, item) for item in wanted))
    answers += [await get(small, encode, item) for item in wanted]
    for classnames, answer in zip(wanted + wanted, answers, strict=True):
        np.testing.assert_allclose(answer, expected(PHOTO, classnames), atol=1e-6)


async def test_the_least_recently_used_rows_are_evicted():
    small = ClassEmbeddingCache(3 * ROW_BYTES)
    encode = Encoder()
    await get(small, encode, ["a", "b", "c"])
    await get(small, encode, ["a"])
    await get(small, encode, ["d"])  # in place of b
    encode.texts.clear()
    await get(small, encode, ["a", "d", "c"])
    assert encode.texts == []
    await get(small, encode, ["b"])
    assert encode.texts == ["a photo of a b."]


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True), max_size=8),
    st.integers(0, 12 * ROW_BYTES),
)
def test_results_and_the_memory_limit_do_not_depend_on_the_order_of_requests(requests, max_bytes):
    cache = ClassEmbeddingCache(max_bytes)

    async def ask_all():
        encode = Encoder()
        return await asyncio.gather(*(get(cache, encode, request) for request in requests))

    for classnames, answer in zip(requests, asyncio.run(ask_all()), strict=True):
        np.testing.assert_allclose(answer, expected(PHOTO, classnames), atol=1e-6)
    assert sum(kept.nbytes for kept in cache._rows.values()) <= max_bytes
