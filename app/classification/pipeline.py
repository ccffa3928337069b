"""From image bytes to predictions: decode -> queue -> encode -> adapt.

The queue ends after the encoder: what follows runs per request, on that request's features alone, so that one caller's
images can never change another's answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from cachetools import LRUCache

from app.adapters._base import Examples, Scores, merged, probabilities
from app.adapters._examples import Need
from app.captions.cased.pipeline import LOOKED_AT_TOGETHER, NamingResult, find_names
from app.captions.catalogue import CaptionCatalogue
from app.classification.methods import METHODS, TRANSDUCTIVE
from app.encoders._base import ModelInfo
from app.errors import ClientError, DeadlineExceededError, TooLargeError
from app.fewshot.fitting import ClassNames, FitCache, FitKey, FittedAdapter, learn, transduce
from app.images.decoder_pool import Decoders
from app.models.queue import Ticket
from app.models.served_model import ServedModel
from app.names.references import LabelSetReference
from app.observability.metrics import Metrics
from app.observability.tracing import past_stage, stage
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.explanations import MAX_LABELS, explain, prompts_to_explain
from app.prompting.recipes import Pooling, Recipe
from app.scoring.calibration import energy, max_concept_matching, prediction_sets
from app.scoring.numerics import tempered_softmax
from app.store.examples import StoredFeatures
from app.types import (
    Classification,
    ExamplesUsed,
    ImageFeatures,
    ImageResult,
    Logits,
    MergeSynonyms,
    OutOfVocabulary,
    Pixels,
    Prediction,
    Probabilities,
    Similarities,
    Task,
    TextFeatures,
)

_Result = TypeVar("_Result")


class ExampleSource(Protocol):
    """Where example images come from."""

    async def features(
        self, name: str, model: str, classnames: Sequence[str], *, max_pool: int | None = None
    ) -> StoredFeatures:
        """Return the examples of a label set whose classes are these, by the features of one model."""


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """An image's features (d,), and the times of its way to them on the clock of ``time.perf_counter``."""

    features: np.ndarray
    decoded: float
    began: float
    encoded: float


@dataclass(frozen=True, slots=True)
class Classifier:
    """What a method makes of a label set, and which rows of its scores belong to which class.

    ``answer`` takes unit rows (n, d) and returns scores (n, r); ``first_rows`` (c,) are the first rows of the classes,
    ascending. ``exclusive`` tells that an image is taken to be of one class, also where the encoder's own scores are
    of each class by itself; ``examples`` and ``transductive`` are as in a ``Classification``. ``names`` are where the
    similarities come from, if ``answer`` knows only one row for each class.
    """

    answer: Callable[[ImageFeatures], Scores]
    first_rows: np.ndarray
    prompt_count: int
    warnings: tuple[str, ...]
    nbytes: int
    exclusive: bool = False
    examples: ExamplesUsed | None = None
    transductive: bool = False
    names: ClassNames | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a classifier says of n images; ``ranked`` holds class indices, best first."""

    ranked: np.ndarray
    scores: Probabilities
    logits: Logits
    similarities: Similarities
    prompt_weights: np.ndarray | None
    warnings: tuple[str, ...]


class Pipeline:
    """Classifies images with the models it was given, the first of which is the default.

    Args:
        models: by name, in order.
        class_embedding_cache: of the rows that classifiers are made of.
        classifier_bytes: bound on the text in classifiers that are ready; one that is larger is refused.
        request_timeout_s: after which ``classify`` gives up; None never.
        decoders: of images; closed with the pipeline.
        decoders_per_request: that one request uses at a time, so that its many or slow images do not keep those of
            others waiting.
        metrics: told of every request.
        examples: where the example images of label sets are kept.
        learned_bytes: bound on what was learned from them.
        max_pool: unlabelled images that a method learns from; of more, so many are taken evenly.
        databases: where names are found for images without labels.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        class_embedding_cache: ClassEmbeddingCache,
        classifier_bytes: int,
        request_timeout_s: float | None,
        decoders: Decoders,
        decoders_per_request: int,
        metrics: Metrics,
        examples: ExampleSource,
        learned_bytes: int,
        max_pool: int,
        databases: CaptionCatalogue,
    ) -> None:
        self.models = models
        self._class_embedding_cache = class_embedding_cache
        self._classifiers: LRUCache[Hashable, Classifier] = LRUCache(
            classifier_bytes, getsizeof=lambda classifier: classifier.nbytes
        )
        self.learner = FitCache(cache_bytes=learned_bytes)
        self._examples = examples
        self._databases = databases
        self._max_pool = max_pool
        self._request_timeout_s = request_timeout_s
        self._metrics = metrics
        self._decoders_per_request = decoders_per_request
        self.decoders = decoders

    @property
    def default_model(self) -> str:
        """The name of the model that a request gets when it names none."""
        return next(iter(self.models))

    async def classify(self, images: Sequence[bytes | ClientError], task: Task) -> Classification:
        """Return one result per image, in order; an image that cannot be read has its error in its place.

        Args:
            images: encoded images, or the error that already kept one from being read.
            task: with a known model and method.

        Raises:
            OverloadedError: the model's queue has no room for this many images.
            DeadlineExceededError: not done within the request's time.
        """
        model = self.models[task.model]
        began = time.perf_counter()
        async with self._in_time():
            with model.images.admit(len(images), within_s=self._request_timeout_s) as caller:
                turns = asyncio.Semaphore(self._decoders_per_request)
                reading = [self._read(image, model, caller, turns) for image in images]
                if task.database is not None:
                    return await self._named(task, began, await _all(*reading))
                # Texts are there already as a rule; new ones are encoded while the images are decoded.
                (classifier, texts_ready), *read = await _all(self._timed_classifier(task), *reading)
            adapting = time.perf_counter()
            good = [image for image in read if not isinstance(image, ClientError)]
            results: Sequence[ImageResult] = ()
            warnings = classifier.warnings
            if good:
                image_features = np.stack([image.features for image in good])
                with stage("adapt", method=task.method, images=len(good)):
                    predicted, results = await self._in_turn(
                        classifier, partial(_classified, model.encoder, task, image_features, classifier)
                    )
                warnings += predicted.warnings
                if task.explain:
                    with stage("explain"):
                        results = await self._explained(task, image_features, predicted, results)
        timing_ms = {
            "text": (texts_ready - began) * 1000,
            **_timing_ms(began, good),
            "adapt": (time.perf_counter() - adapting) * 1000,
        }
        self._metrics.classified(task.model, good=len(good), bad=len(read) - len(good), timing_ms=timing_ms)
        return Classification(
            task,
            _in_order(read, results),
            timing_ms,
            warnings,
            classifier.examples,
            classifier.transductive,
        )

    async def _named(self, task: Task, began: float, read: Sequence["_ReadImage | ClientError"]) -> Classification:
        """Find names for images, whose places are held meanwhile, since words are encoded for them."""
        good = [image for image in read if not isinstance(image, ClientError)]
        named = await self.name(task, np.stack([image.features for image in good])) if good else None
        timing_ms = {**_timing_ms(began, good), **({} if named is None else named.timing_ms)}
        self._metrics.classified(task.model, good=len(good), bad=len(read) - len(good), timing_ms=timing_ms)
        return Classification(
            task,
            _in_order(read, () if named is None else named.results),
            timing_ms,
            warnings=() if named is None else named.warnings,
            transductive=task.together and len(good) > 1,
            database=task.database if named is None else named.database,
            vocabulary=None if named is None else named.vocabulary,
        )

    async def name(self, task: Task, image_features: ImageFeatures) -> NamingResult:
        """Return names found for images whose features (n, d) are there already; raises as ``find_names``."""
        return await find_names(
            task,
            image_features,
            served=self.models[task.model],
            databases=self._databases,
            class_embedding_cache=self._class_embedding_cache,
            within_s=self._request_timeout_s,
        )

    async def text_features(self, model: str, texts: Sequence[str]) -> TextFeatures:
        """Return one unit feature per text (k, d), none of which is looked up or kept.

        Raises:
            OverloadedError: too many requests wait for this model.
            DeadlineExceededError: not done within the request's time.
        """
        served = self.models[model]
        # Texts have no places of their own; a request for some holds one of those for images.
        async with self._in_time():
            with served.images.admit(1, within_s=self._request_timeout_s):
                return await served.encode_new_texts(texts)

    async def image_features(
        self, model: str, images: Sequence[bytes | ClientError], *, in_time: bool = False
    ) -> list[np.ndarray | ClientError]:
        """Return each image's unit features (d,), or why it cannot be read; for whoever tries several methods.

        Args:
            model: one of ``models``.
            images: encoded images, or the error that already kept one from being read.
            in_time: give up after the time of a request.

        Raises:
            OverloadedError: the model's queue has no room for this many images.
            DeadlineExceededError: not done in time.
        """
        served = self.models[model]
        within_s = self._request_timeout_s if in_time else None
        async with self._in_time() if in_time else nullcontext():
            with served.images.admit(len(images), within_s=within_s) as caller:
                turns = asyncio.Semaphore(self._decoders_per_request)
                read = await _all(*(self._read(image, served, caller, turns) for image in images))
        return [image if isinstance(image, ClientError) else image.features for image in read]

    async def predict(self, task: Task, image_features: ImageFeatures) -> Predicted:
        """Return what the task's method says of images whose features (n, d) are there already."""
        classifier = await self.classifier(task)
        encoder = self.models[task.model].encoder
        return await self._in_turn(classifier, partial(predict, encoder, task, image_features, classifier))

    async def _in_turn(self, classifier: Classifier, work: Callable[[], _Result]) -> _Result:
        # What learns from the request itself takes as long as a fit, and its turn among those.
        return await (self.learner.run(work) if classifier.transductive else asyncio.to_thread(work))

    async def classifier(self, task: Task) -> Classifier:
        """Return what a task's method makes of its classes, from the cache or newly made.

        Raises:
            TooLargeError: it would take more memory than there may be of all classifiers.
        """
        method = METHODS[task.method]
        if method.learns:
            return await self._fitted_classifier(task)
        # A version of a label set never changes, and hashing its name takes no time.
        classes: Hashable = task.label_set or task.classes
        key = (task.model, task.method, task.options, task.templates, classes)
        cached = self._classifiers.get(key)
        if cached is not None:
            self._metrics.class_embeddings(task.model, len(cached.first_rows), 0)
            return cached
        encoder = self.models[task.model].encoder
        recipe, names = await self._text(task)
        adapter = method.adapter(dict(task.options))
        text, first_rows = names.rows, names.first_rows
        if method.learner is not None:
            text, first_rows = names.one_per_class(), np.arange(len(task.classes))
        fitted = await asyncio.to_thread(
            adapter.fit, text, logit_scale=encoder.logit_scale, logit_bias=encoder.logit_bias
        )
        classifier = Classifier(
            fitted.predict,
            first_rows,
            sum(len(slot.texts) for row in recipe.rows for slot in row.slots),
            recipe.warnings,
            text.nbytes,
            exclusive=method.learner is not None,
            names=None if method.learner is None else names,
        )
        if method.stateful and key in self._classifiers:
            return self._classifiers[key]  # another request was first, and has left something to remember
        self._classifiers[key] = classifier
        return classifier

    async def _text(self, task: Task) -> tuple[Recipe, ClassNames]:
        """Return what the method reads of the classes, and the rows (r, d), or (r, k, d) if it weighs prompts."""
        served = self.models[task.model]
        recipe = await asyncio.to_thread(_recipe, task)
        self._check_size(recipe, served.encoder.embed_dim)
        text = await self._class_embedding_cache.get(task.model, served.encode_texts, recipe.pooling, recipe.rows)
        class_of_row = [row.class_index for row in recipe.rows]
        return recipe, ClassNames(text, np.searchsorted(class_of_row, range(len(task.classes))))

    async def class_rows(self, task: Task) -> np.ndarray:
        """Return one unit row per class (c, d): the mean of its names' rows, where it has several."""
        _, names = await self._text(task)
        return names.one_per_class()

    async def _fitted_classifier(self, task: Task) -> Classifier:
        """Return a classifier that has learned from example images, stored ones or those of the request itself."""
        method, served = METHODS[task.method], self.models[task.model]
        rows = np.arange(len(task.classes))
        if task.label_set is not None and not dict(task.options).get(TRANSDUCTIVE):
            name = LabelSetReference.parse(task.label_set).name
            model = await served.image_fingerprint()
            subject = FitKey(model, task.method, task.options, task.templates, name, task.label_set)

            async def fit() -> FittedAdapter:
                _, names = await self._text(task)
                most = self._max_pool if Need.POOL in method.learns else 0
                stored = await self._examples.features(name, model, task.classnames, max_pool=most)
                examples = Examples(stored.support_features, stored.support_labels, stored.pool_features)
                adapter = method.example_adapter(dict(task.options))
                learned = await self.learner.run(
                    partial(learn, adapter, names.one_per_class(), examples, served.encoder)
                )
                return replace(learned, revision=stored.revision, names=names)

            learned = await self.learner.learned(subject, task.examples_revision, fit, oldest=task.deletions_revision)
            if learned.unlabelled or Need.POOL not in method.learns:
                used = ExamplesUsed(learned.revision, learned.labelled, learned.unlabelled)
                return Classifier(learned.predict, rows, 0, (), 0, exclusive=True, examples=used, names=learned.names)
        _, names = await self._text(task)
        adapter = method.example_adapter(dict(task.options))
        answer = partial(transduce, adapter, names.one_per_class(), scale=served.encoder)
        return Classifier(answer, rows, 0, (LOOKED_AT_TOGETHER,), 0, exclusive=True, transductive=True, names=names)

    def _check_size(self, recipe: Recipe, dims: int) -> None:
        rows = sum(len(row.slots) if recipe.pooling is Pooling.ALIGNED else 1 for row in recipe.rows)
        needed = rows * dims * 4
        room = self._classifiers.maxsize
        if needed > room:
            raise TooLargeError(
                f"the features of {rows:,} texts take {needed / 2**20:,.0f} MiB, and {room / 2**20:,.0f} are set aside;"
                " give fewer classes or templates, name another method, or raise DEIXIS_CLASS_EMBEDDING_CACHE_MIB"
            )

    async def _explained(
        self, task: Task, image_features: ImageFeatures, predicted: Predicted, results: Sequence[ImageResult]
    ) -> Sequence[ImageResult]:
        """Add to each result which prompts made it; their features are in the store, or encoded again."""
        recipe = await asyncio.to_thread(_recipe, task)
        explained = predicted.ranked[:, : max(2, min(task.top_k, MAX_LABELS))]
        prompts = prompts_to_explain(recipe, np.unique(explained).tolist())
        features = dict(zip(prompts, await self.models[task.model].encode_texts(prompts), strict=True))

        def work() -> list[ImageResult]:
            weights = predicted.prompt_weights
            return [
                replace(
                    result,
                    explanation=explain(
                        recipe,
                        task.classnames,
                        task.merge_synonyms,
                        best=explained[number].tolist(),
                        similarities=predicted.similarities[number],
                        image=image_features[number],
                        features=features,
                        slot_weights=None if weights is None else weights[number],
                    ),
                )
                for number, result in enumerate(results)
            ]

        return await asyncio.to_thread(work)

    @property
    def problem(self) -> str | None:
        """Why a model encodes nothing at the moment; None while all is well."""
        return next((problem for model in self.models.values() if (problem := model.problem) is not None), None)

    async def close(self) -> None:
        """End every thread; what is running finishes first."""
        await self.learner.close()
        await asyncio.to_thread(self._end_threads)

    def _end_threads(self) -> None:
        self.decoders.close()
        for model in self.models.values():
            model.close()

    async def _timed_classifier(self, task: Task) -> tuple[Classifier, float]:
        with stage("text", method=task.method, classes=len(task.classes)):
            classifier = await self.classifier(task)
        return classifier, time.perf_counter()

    async def _read(
        self,
        image: bytes | ClientError,
        model: ServedModel,
        caller: Ticket[Pixels, np.ndarray],
        turns: asyncio.Semaphore,
    ) -> _ReadImage | ClientError:
        """Decode, transform and encode one image; each goes its way without waiting for the others."""
        if isinstance(image, ClientError):
            return image
        encoder = model.encoder
        async with turns:
            try:
                with stage("decode", bytes=len(image)):
                    pixels = await self.decoders.decode(image, encoder.transform, encoder.image_size_px)
            except ClientError as error:
                return error
        decoded = time.perf_counter()
        encoded = await model.images.encode(pixels, caller)
        began = decoded + encoded.queue_s
        past_stage("queue", decoded, began)
        past_stage("encode", began, began + encoded.encode_s)
        return _ReadImage(encoded.row, decoded, began, began + encoded.encode_s)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Give up after the time that a request has."""
        try:
            async with asyncio.timeout(self._request_timeout_s) as deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise  # an encoder's own, such as that of a replica elsewhere
            raise self._too_late() from None
        except DeadlineExceededError:  # the queue noticed first
            raise self._too_late() from None

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"not done within {self._request_timeout_s:g} s; send fewer images or labels, or raise"
            " DEIXIS_REQUEST_TIMEOUT_S; texts that are encoded by now are kept for the next try"
        )


async def _all(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return all results in order; when one fails, or the caller is cancelled, none of the others goes on."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _in_order(read: Sequence[_ReadImage | ClientError], results: Sequence[ImageResult]) -> tuple[ImageResult, ...]:
    """Return a result for every image: of those that could be read the next one, of the others their error."""
    remaining = iter(results)
    return tuple(ImageResult(error=image) if isinstance(image, ClientError) else next(remaining) for image in read)


def _timing_ms(began: float, images: Sequence[_ReadImage]) -> dict[str, float]:
    """Return the milliseconds of each stage up to features; of several images, those of the one that was ready last."""
    last = max(images, key=lambda image: image.encoded, default=None)
    return {
        "decode": (last.decoded - began) * 1000 if last else 0.0,
        "queue": (last.began - last.decoded) * 1000 if last else 0.0,
        "encode": (last.encoded - last.began) * 1000 if last else 0.0,
    }


def _recipe(task: Task) -> Recipe:
    return METHODS[task.method].recipe(task.classes, task.templates, dict(task.options))


def predict(encoder: ModelInfo, task: Task, image_features: ImageFeatures, classifier: Classifier) -> Predicted:
    """Apply the task's method to the features (n, d)."""
    told = classifier.answer(image_features)
    mean = task.merge_synonyms is MergeSynonyms.MEAN
    similarities, first_rows = told.similarities, classifier.first_rows
    if classifier.names is not None and len(classifier.names.rows) != similarities.shape[1]:
        similarities, first_rows = (image_features @ classifier.names.rows.T).clip(-1, 1), classifier.names.first_rows
    logits = merged(told.logits, classifier.first_rows, mean=mean)
    # Labelled examples say that an image is of one class, so that scores are shares then, whatever the encoder's.
    sigmoid = encoder.logit_bias is not None and not classifier.exclusive and not task.scoring.calibrated_on
    return Predicted(
        np.argsort(-logits, axis=1, kind="stable"),
        probabilities(logits / np.float32(task.scoring.temperature), sigmoid=sigmoid),
        logits,
        merged(similarities, first_rows, mean=mean),
        told.prompt_weights,
        told.warnings,
    )


def _classified(
    encoder: ModelInfo, task: Task, image_features: ImageFeatures, classifier: Classifier
) -> tuple[Predicted, list[ImageResult]]:
    predicted = predict(encoder, task, image_features, classifier)
    return predicted, _results(task, predicted)


def _results(task: Task, predicted: Predicted) -> list[ImageResult]:
    """Return each image's ``top_k`` predictions, best first, and what was asked of its scores."""
    scoring = task.scoring
    strangeness = 1 - max_concept_matching(predicted.similarities), energy(predicted.logits)
    sets = rejected = None
    if scoring.calibrated_on:
        # As they were calibrated, in full precision: what lies on a threshold must lie there again.
        shares = tempered_softmax(predicted.logits, scoring.temperature)
        sets = None if scoring.set_quantile is None else prediction_sets(shares, scoring.set_quantile)
    else:
        shares = predicted.scores
    if scoring.reject_below is not None:
        rejected = shares.max(axis=1) < scoring.reject_below
    results = []
    for number, (ranked, scores, similarities) in enumerate(
        zip(predicted.ranked, predicted.scores, predicted.similarities, strict=True)
    ):
        best = ranked[: task.top_k]
        told = zip(best.tolist(), scores[best].tolist(), similarities[best].tolist(), strict=True)
        results.append(
            ImageResult(
                tuple(Prediction(task.classes[index].name, score, similarity) for index, score, similarity in told),
                out_of_vocabulary=OutOfVocabulary(*(float(each[number]) for each in strangeness)),
                rejected=None if rejected is None else bool(rejected[number]),
                prediction_set=None if sets is None else tuple(task.classes[index].name for index in sets[number]),
            )
        )
    return results
