"""Vocabulary-free classification (CaSED): search captions, find candidates, encode them, score them."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.captions.cased.scoring import shared_vocabulary
from app.captions.cased.vocabulary import (
    CaptionCandidates,
    ScoreOptions,
    explain_captions,
    find_candidates,
    label_separately,
    label_together,
)
from app.captions.catalogue import CaptionCatalogue
from app.models.served_model import ServedModel
from app.observability.tracing import past_stage
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.recipes import templates_only
from app.types import ClassEntry, ImageFeatures, ImageResult, SharedName, Task

CLASSIFIED_TOGETHER = (
    "the images of this request were classified together, so each may affect the results of the others"
)
"""A warning of the result."""

# By default, a shared word has at least one image in this many.
_IMAGES_PER_WORD = 50


@dataclass(frozen=True, slots=True)
class NamingResult:
    """The labels found for n images.

    ``results`` are in the order of the images. ``vocabulary`` are the shared labels of images that were labelled
    together, else None. ``database`` is ``name@generation``. ``timing_ms`` are the milliseconds of each stage.
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
    catalogue: CaptionCatalogue,
    class_embedding_cache: ClassEmbeddingCache,
    within_s: float | None,
) -> NamingResult:
    """Find labels for images in the captions near them, for each image separately or for all together.

    Args:
        task: names a database of its model, and has the options of ``cased``.
        image_features: unit rows (n, d).
        served: the model of the task.
        catalogue: contains the database of the task.
        class_embedding_cache: caches the features of words.
        within_s: the time after which the caller does not need the result any more.

    Raises:
        NotConfiguredError: WordNet's files are damaged.
        ServerError, ClientError: as ``CaptionCatalogue.search``.
    """
    assert task.database is not None
    options = dict(task.options)
    started = time.perf_counter()
    found = await catalogue.search(
        task.database,
        await served.text_fingerprint(),
        image_features,
        int(options["captions"]),
        features=True,
        within_s=within_s,
    )

    def find_all_candidates() -> tuple[list[CaptionCandidates], Sequence[str]]:
        lexicon = catalogue.lexicon()
        image_candidates = [
            find_candidates(nearest, lexicon, with_phrases=bool(options["phrases"])) for nearest in found
        ]
        return image_candidates, shared_vocabulary([own.candidates for own in image_candidates])

    image_candidates, vocabulary = await asyncio.to_thread(find_all_candidates)
    searched = time.perf_counter()
    recipe = templates_only([ClassEntry(word) for word in vocabulary], task.templates, {})
    words = await class_embedding_cache.get(task.model, served.encode_texts, recipe.pooling, recipe.rows)
    encoded = time.perf_counter()
    score_options = ScoreOptions(served.encoder.logit_scale, options["alpha"], task.top_k, task.scoring.reject_below)

    def score_all() -> tuple[list[ImageResult], tuple[SharedName, ...] | None]:
        shared: tuple[SharedName, ...] | None = None
        if task.together:
            min_images = int(options["min_images"]) or max(1, len(found) // _IMAGES_PER_WORD)
            results, shared = label_together(
                image_features, image_candidates, vocabulary, words, score_options, min_images=min_images
            )
        else:
            row_of = {word: row for row, word in enumerate(vocabulary)}
            own_words = [words[[row_of[word] for word in own.candidates]] for own in image_candidates]
            results = label_separately(image_features, image_candidates, own_words, score_options)
        if task.explain:
            lexicon = catalogue.lexicon()
            results = [
                replace(result, captions=explain_captions(result, own, lexicon))
                for result, own in zip(results, image_candidates, strict=True)
            ]
        return results, shared

    results, vocabulary_in_use = await asyncio.to_thread(score_all)
    past_stage("search", started, searched, images=len(found))
    past_stage("text", searched, encoded, words=len(vocabulary))
    past_stage("adapt", encoded, time.perf_counter(), method=task.method)
    timing_ms = {
        "search": (searched - started) * 1000,
        "text": (encoded - searched) * 1000,
        "adapt": (time.perf_counter() - encoded) * 1000,
    }
    warnings: tuple[str, ...] = (CLASSIFIED_TOGETHER,) if task.together and len(found) > 1 else ()
    warnings += tuple(dict.fromkeys(nearest.missing for nearest in found if nearest.missing is not None))
    return NamingResult(results, vocabulary_in_use, f"{task.database}@{found[-1].generation}", warnings, timing_ms)
