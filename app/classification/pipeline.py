"""From image bytes to predictions: decode -> queue -> encode -> adapt.

The queue ends after the encoder: adapters run per request, on that request's features alone, so that one caller's
images never change another caller's predictions.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from app.captions.cased.pipeline import NamingResult, find_names
from app.captions.catalogue import CaptionCatalogue
from app.classification.classifiers import Classifier, ClassifierCache, recipe_of
from app.classification.image_features import ImageFeatureCache, ImageId
from app.classification.methods import METHODS
from app.classification.results import ClassScores, image_results, in_order, score_classes
from app.errors import ClientError, UnknownImageError
from app.fewshot.fitting import FitCache
from app.images.fetch import ImageUrl, RemoteImages
from app.models.registry import EncodedImage, ModelRegistry, gather_or_cancel
from app.models.served_model import ServedModel
from app.observability.metrics import Metrics
from app.observability.tracing import stage
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.explanations import MAX_LABELS, explain, prompts_to_explain
from app.runtime.turns import is_in_background
from app.types import Classification, ImageFeatures, ImageResult, Task

_Result = TypeVar("_Result")

# Of text features whose product with the images takes microseconds: a hundred labels of 512 dimensions, for one image.
# The rest of the work holds the interpreter, so a thread would only add the way there and back.
_BYTES_AT_ONCE = 256 * 1024
# Images whose similarities with the negative words, or the common ones, take a millisecond at most.
_COMPARED_AT_ONCE = 8


class Pipeline:
    """Classifies images.

    Args:
        models: decode and encode the images.
        image_features: of images that requests name by id.
        remote_images: fetches images that are given by URL.
        classifiers: of the tasks.
        fits: where methods that learn from the request itself run.
        catalogue: caption databases, for vocabulary-free classification.
        class_embedding_cache: of the words that captions suggest.
        metrics: counts requests and times their stages.
    """

    def __init__(
        self,
        models: ModelRegistry,
        remote_images: RemoteImages,
        *,
        classifiers: ClassifierCache,
        fits: FitCache,
        catalogue: CaptionCatalogue,
        class_embedding_cache: ClassEmbeddingCache,
        image_features: ImageFeatureCache,
        metrics: Metrics,
    ) -> None:
        self._models = models
        self._image_features = image_features
        self._remote_images = remote_images
        self._classifiers = classifiers
        self._fits = fits
        self._catalogue = catalogue
        self._class_embedding_cache = class_embedding_cache
        self._metrics = metrics

    async def classify(self, images: Sequence[bytes | ClientError | ImageUrl | ImageId], task: Task) -> Classification:
        """Return one result per image, in order; an image that cannot be decoded has its error in its result.

        Args:
            images: encoded images, where to fetch them, ids of images of earlier requests, or the error that kept one
                from being read.
            task: resolved.

        Raises:
            OverloadedError: the model's queue has no room for all of the images.
            DeadlineExceededError: the request's time is over.
        """
        served = self._models.get(task.model)
        fetched = await self._remote_images.fetch([image for image in images if not isinstance(image, ImageId)])
        began = time.perf_counter()
        async with self._models.deadline():
            with self._models.admitted(served, len(fetched), within_s=self._models.request_timeout_s) as read:
                if task.database is not None:
                    read_images = await gather_or_cancel(*map(read, fetched))
                    return await self._named(
                        task, images, began, self._with_kept(task.model, images, read_images, began)
                    )
                if len(fetched) == 1:
                    # Most requests have one image and known texts, so that nothing would run at the same time.
                    classifier, text_ready = await self._timed_classifier(task)
                    encoded = [await read(fetched[0])]
                else:
                    # New texts are encoded while the images are decoded.
                    (classifier, text_ready), *encoded = await gather_or_cancel(
                        self._timed_classifier(task), *map(read, fetched)
                    )
            adapt_began = time.perf_counter()
            encoded = self._with_kept(task.model, images, encoded, began)
            good = [image for image in encoded if not isinstance(image, ClientError)]
            results: Sequence[ImageResult] = ()
            warnings = classifier.warnings + task.scoring.warnings
            if good:
                image_features = np.stack([image.features for image in good])
                with stage("adapt", method=task.method, images=len(good)):
                    classes, results = await self._run(
                        task,
                        classifier,
                        len(good),
                        partial(_classified, served, task, image_features, classifier),
                    )
                warnings += classes.warnings
                if task.explain:
                    with stage("explain"):
                        results = await self._explained(task, image_features, classes, results)
        timing_ms = {
            "text": (text_ready - began) * 1000,
            **_timing_ms(began, good),
            "adapt": (time.perf_counter() - adapt_began) * 1000,
        }
        self._metrics.classified(task.model, good=len(good), bad=len(encoded) - len(good), timing_ms=timing_ms)
        return Classification(
            task,
            self._with_ids(task, images, encoded, in_order(encoded, results)),
            timing_ms,
            warnings,
            classifier.examples,
            classifier.transductive,
            priors=classifier.priors,
        )

    async def _named(
        self, task: Task, images: Sequence[object], began: float, encoded: Sequence[EncodedImage | ClientError]
    ) -> Classification:
        """Discover labels; the images keep their places in the queue, because words are encoded for them."""
        good = [image for image in encoded if not isinstance(image, ClientError)]
        named = await self.name(task, np.stack([image.features for image in good])) if good else None
        timing_ms = {**_timing_ms(began, good), **({} if named is None else named.timing_ms)}
        self._metrics.classified(task.model, good=len(good), bad=len(encoded) - len(good), timing_ms=timing_ms)
        return Classification(
            task,
            self._with_ids(task, images, encoded, in_order(encoded, () if named is None else named.results)),
            timing_ms,
            warnings=() if named is None else named.warnings,
            transductive=task.together and len(good) > 1,
            database=task.database if named is None else named.database,
            vocabulary=None if named is None else named.vocabulary,
        )

    def _with_kept(
        self, model: str, images: Sequence[object], encoded: Sequence[EncodedImage | ClientError], began: float
    ) -> list[EncodedImage | ClientError]:
        """Return one entry per image: the kept features if the request names it by id, else the next encoded one."""
        remaining = iter(encoded)
        return [self._kept(model, image, began) if isinstance(image, ImageId) else next(remaining) for image in images]

    def _kept(self, model: str, image: ImageId, began: float) -> EncodedImage | ClientError:
        try:
            return EncodedImage(self._image_features.get(model, image), began, began, began)
        except UnknownImageError as error:
            return error.with_traceback(None)

    def _with_ids(
        self,
        task: Task,
        images: Sequence[object],
        encoded: Sequence[EncodedImage | ClientError],
        results: tuple[ImageResult, ...],
    ) -> tuple[ImageResult, ...]:
        """Keep the images' features and add their ids to the results, if the request asks for it."""
        if not task.keep_features:
            return results
        return tuple(
            result
            if isinstance(image, ClientError)
            else replace(
                result,
                image_id=self._image_features.keep(
                    task.model, image.features, given if isinstance(given, ImageId) else None
                ),
            )
            for given, image, result in zip(images, encoded, results, strict=True)
        )

    async def name(self, task: Task, image_features: ImageFeatures) -> NamingResult:
        """Discover labels for image features (n, d); raises as ``find_names``."""
        return await find_names(
            task,
            image_features,
            served=self._models.get(task.model),
            catalogue=self._catalogue,
            class_embedding_cache=self._class_embedding_cache,
            within_s=self._models.request_timeout_s,
        )

    async def predict(self, task: Task, image_features: ImageFeatures) -> ClassScores:
        """Return the scores of image features (n, d)."""
        classifier = await self._classifiers.get(task)
        encoder = self._models.get(task.model).encoder
        work = partial(score_classes, encoder, task, image_features, classifier)
        return await self._run(task, classifier, len(image_features), work)

    async def _run(self, task: Task, classifier: Classifier, images: int, work: Callable[[], _Result]) -> _Result:
        if classifier.transductive or is_in_background():
            # A method that learns from the request takes as long as a fit, and takes its turn among the fits.
            return await self._fits.run(work)
        has_state = METHODS[task.method].stateful  # behind a lock
        is_fast = images * classifier.nbytes <= _BYTES_AT_ONCE
        if classifier.negatives is not None or classifier.word_logits is not None:
            is_fast = is_fast and images <= _COMPARED_AT_ONCE
        if classifier.examples is None and not has_state and is_fast:
            return work()
        return await asyncio.to_thread(work)

    async def _timed_classifier(self, task: Task) -> tuple[Classifier, float]:
        with stage("text", method=task.method, classes=len(task.classes)):
            classifier = await self._classifiers.get(task)
        return classifier, time.perf_counter()

    async def _explained(
        self, task: Task, image_features: ImageFeatures, classes: ClassScores, results: Sequence[ImageResult]
    ) -> Sequence[ImageResult]:
        """Add an explanation to each result; the features of its prompts are stored, or encoded again."""
        recipe = await asyncio.to_thread(recipe_of, task)
        explained = classes.ranked[:, : max(2, min(task.top_k, MAX_LABELS))]
        prompts = prompts_to_explain(recipe, np.unique(explained).tolist())
        features = dict(zip(prompts, await self._models.get(task.model).encode_texts(prompts), strict=True))

        def work() -> list[ImageResult]:
            weights = classes.prompt_weights
            return [
                replace(
                    result,
                    explanation=explain(
                        recipe,
                        task.classnames,
                        task.merge_synonyms,
                        best=explained[number].tolist(),
                        similarities=classes.similarities[number],
                        image=image_features[number],
                        features=features,
                        slot_weights=None if weights is None else weights[number],
                    ),
                )
                for number, result in enumerate(results)
            ]

        return await asyncio.to_thread(work)


def _classified(
    served: ServedModel, task: Task, image_features: ImageFeatures, classifier: Classifier
) -> tuple[ClassScores, list[ImageResult]]:
    classes = score_classes(served.encoder, task, image_features, classifier)
    negatives, scale = classifier.negatives, served.encoder.logit_scale
    none = None if negatives is None else negatives.compete(image_features, classes.similarities, scale)
    # A method that learned from images may be right where the names fit badly.
    return classes, image_results(task, classes, none, warns=not classifier.exclusive)


def _timing_ms(began: float, images: Sequence[EncodedImage]) -> dict[str, float]:
    """Return the milliseconds of each stage up to the features; of several images, those of the last one encoded."""
    last = max(images, key=lambda image: image.encoded_at, default=None)
    return {
        "decode": (last.decoded_at - began) * 1000 if last else 0.0,
        "queue": (last.encode_began_at - last.decoded_at) * 1000 if last else 0.0,
        "encode": (last.encoded_at - last.encode_began_at) * 1000 if last else 0.0,
    }
