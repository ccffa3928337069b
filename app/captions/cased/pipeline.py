"""Names for images of which nobody has said what they may show: search -> candidates -> their features -> scores."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.captions.cased.scoring import pooled
from app.captions.cased.vocabulary import CaptionCandidates, Scale, mine, name_all, name_each, told_captions
from app.captions.catalogue import CaptionCatalogue
from app.models.served_model import ServedModel
from app.observability.tracing import past_stage
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.recipes import templates_only
from app.types import ClassEntry, ImageFeatures, ImageResult, SharedName, Task

LOOKED_AT_TOGETHER = (
    "the images of this request were looked at together, so that each may have changed the others' answers"
)
"""A warning."""

# Where callers leave it open, a shared name has one in so many of the images at least.
_IMAGES_PER_NAME = 50


@dataclass(frozen=True, slots=True)
class NamingResult:
    """Names that were found for n images: results in order, names in use where they are shared, and where from.

    ``timing_ms`` are those of the search and of the words' features.
    """

    results: Sequence[ImageResult]
    vocabulary: tuple[SharedName, ...] | None
    database: str
    warnings: tuple[str, ...]
    timing_ms: Mapping[str, float]


async def find_names(
    task: Task,
    image_features: ImageFeatures,
    *,
    served: ServedModel,
    databases: CaptionCatalogue,
    class_embedding_cache: ClassEmbeddingCache,
    within_s: float | None,
) -> NamingResult:
    """Find names for images in the captions near them, for each alone or, if the task says so, for all together.

    Args:
        task: names a database that suits its model, and has the options of ``cased``.
        image_features: unit rows (n, d).
        served: the task's model.
        databases: has the task's.
        class_embedding_cache: of the features of words.
        within_s: after which the answer is of no use.

    Raises:
        NotConfiguredError: WordNet is not there.
        ServerError, ClientError: as ``CaptionCatalogue.search``.
    """
    assert task.database is not None
    options = dict(task.options)
    began = time.perf_counter()
    found = await databases.search(
        task.database,
        await served.text_fingerprint(),
        image_features,
        int(options["captions"]),
        features=True,
        within_s=within_s,
    )

    def mine_all() -> tuple[list[CaptionCandidates], Sequence[str]]:
        lexicon = databases.lexicon()
        mined = [mine(each, lexicon, with_phrases=bool(options["phrases"])) for each in found]
        return mined, pooled([each.candidates for each in mined])

    mined, vocabulary = await asyncio.to_thread(mine_all)
    searched = time.perf_counter()
    recipe = templates_only([ClassEntry(word) for word in vocabulary], task.templates, {})
    words = await class_embedding_cache.get(task.model, served.encode_texts, recipe.pooling, recipe.rows)
    encoded = time.perf_counter()
    scale = Scale(served.encoder.logit_scale, options["alpha"], task.top_k, task.scoring.reject_below)

    def score_all() -> tuple[list[ImageResult], tuple[SharedName, ...] | None]:
        if task.together:
            least = int(options["min_images"]) or max(1, len(mined) // _IMAGES_PER_NAME)
            results, shared = name_all(image_features, mined, vocabulary, words, scale, min_images=least)
        else:
            row_of = {word: row for row, word in enumerate(vocabulary)}
            own = [words[[row_of[word] for word in each.candidates]] for each in mined]
            results, shared = name_each(image_features, mined, own, scale), None
        if task.explain:
            lexicon = databases.lexicon()
            captions = [told_captions(result, each, lexicon) for result, each in zip(results, mined, strict=True)]
            results = [replace(result, captions=each) for result, each in zip(results, captions, strict=True)]
        return results, shared

    results, vocabulary_in_use = await asyncio.to_thread(score_all)
    past_stage("search", began, searched, images=len(found))
    past_stage("text", searched, encoded, words=len(vocabulary))
    past_stage("adapt", encoded, time.perf_counter(), method=task.method)
    timing_ms = {
        "search": (searched - began) * 1000,
        "text": (encoded - searched) * 1000,
        "adapt": (time.perf_counter() - encoded) * 1000,
    }
    warnings: tuple[str, ...] = (LOOKED_AT_TOGETHER,) if task.together and len(mined) > 1 else ()
    warnings += tuple(dict.fromkeys(each.missing for each in found if each.missing is not None))
    return NamingResult(results, vocabulary_in_use, f"{task.database}@{found[-1].generation}", warnings, timing_ms)
