"""Classifiers: a method applied to a list of classes, built once and cached."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from cachetools import LRUCache

from app.adapters._base import Examples, Scores, merge_rows
from app.adapters._class_means import ClassMeans
from app.adapters._examples import ExampleAdapter, Need
from app.adapters.cosine import Cosine
from app.captions.cased.pipeline import CLASSIFIED_TOGETHER
from app.classification.methods import METHODS, TRANSDUCTIVE
from app.classification.priors import MAX_REFERENCE_IMAGES, weighted
from app.errors import TooLargeError
from app.fewshot.fitting import ClassNames, FitCache, FitKey, FittedAdapter, fit, transduce
from app.models.negative_words import NegativeVocabulary
from app.models.registry import ModelRegistry
from app.names.hierarchy import Forest, forest_of
from app.names.text import quoted
from app.observability.metrics import Metrics
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.recipes import Pooling, Recipe, templates_only
from app.scoring.negative_labels import NegativeLabels
from app.scoring.numerics import unit_rows
from app.store.examples import StoredFeatures
from app.types import (
    ClassEntry,
    ExamplesUsed,
    ImageFeatures,
    LabelSet,
    Logits,
    MergeSynonyms,
    Priors,
    RejectBy,
    Task,
)

# Different things have cosines up to 0.87 with the embedded model, "cat" and "a cat" 0.999, "defective" and "not
# defective" 0.971.
_NEAR_COSINE = 0.97
# All pairs of as many rows take milliseconds; among more rows, only equal ones are found.
_MAX_COMPARED = 1024
# Distance of unit rows that count as equal: far below that of any two words, above the noise of a batch.
_EQUAL = 1e-4
_COMPARED_AT_ONCE = 1024
# Of a set of templates; more would take a minute to encode with every word.
_MAX_WORD_TEMPLATES = 8
# Of these words, 500 separate unknown images nearly as well as 2,300; fewer were not tried.
_MIN_NEGATIVES = 500
# Lists of classes for which the negative words are cached; one takes 9 kB, and the names of labels of a request.
_CACHED_NEGATIVES = 256
_NO_NEGATIVES = ("no image is rejected, because too few words have nothing to do with the labels; use reject_below",)
_MAX_SHOWN = 6
_CACHED_PRIORS = 256
_CACHED_FORESTS = 64
# Lists of templates for which the rows of the common words are cached; one takes 0.8 MB at 512 dimensions.
_CACHED_WORD_ROWS = 16
_MAX_SHOWN_GROUPS = 3


class ExampleSource(Protocol):
    """Where the features of example images are read from."""

    async def features(
        self, name: str, model: str, classnames: Sequence[str], *, max_pool: int | None = None
    ) -> StoredFeatures:
        """Return the examples of a label set with these classes, as features of one model."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A method fitted to a list of classes.

    ``predict`` takes unit rows (n, d) and returns scores (n, r); ``first_rows`` (c,) are the first rows of the classes,
    ascending. ``exclusive`` means that each image is taken to belong to exactly one class, even if the encoder scores
    every class independently. ``examples`` and ``transductive`` are as in ``Classification``. ``names`` are the rows
    that similarities are computed with, if ``predict`` returns only one row per class. ``class_means`` returns cosines
    with the mean of each class's labelled images as logits; None unless images are rejected by them. ``word_logits``
    returns the logits (n, w) of common words; None unless images may have several labels. ``negatives`` are words that
    compete with the classes; None while they are not encoded, if there are too few, or with several labels per image.
    ``priors`` have weights; None unless the task has priors. ``forest`` is the hierarchy of the classes; None without
    parents.
    """

    predict: Callable[[ImageFeatures], Scores]
    first_rows: np.ndarray
    prompt_count: int
    warnings: tuple[str, ...]
    nbytes: int
    exclusive: bool = False
    examples: ExamplesUsed | None = None
    transductive: bool = False
    names: ClassNames | None = None
    class_means: Callable[[ImageFeatures], Scores] | None = None
    word_logits: Callable[[ImageFeatures], Logits] | None = None
    negatives: NegativeLabels | None = None
    priors: Priors | None = None
    forest: Forest | None = None

    def class_logits(self, rows: Logits, merge_synonyms: MergeSynonyms) -> Logits:
        """Return the logits of classes (n, c) from those of rows (n, r)."""
        return merge_rows(rows, self.first_rows, mean=merge_synonyms is MergeSynonyms.MEAN)


class ClassifierCache:
    """Builds classifiers and keeps them.

    Args:
        models: encode the prompts.
        negative_words: compete with the classes.
        class_embedding_cache: holds the rows that classifiers are made of.
        cache_bytes: limit on the text rows of all cached classifiers; a single larger classifier is refused.
        fits: fits adapters to example images and keeps the result.
        examples: where example images are read from.
        max_pool: number of unlabelled images that a method learns from; a larger pool is sampled evenly.
        metrics: counts cached and computed class embeddings.
        words: names of many things, which tell whether a label fits an image that may have several.
    """

    def __init__(
        self,
        models: ModelRegistry,
        *,
        negative_words: NegativeVocabulary,
        class_embedding_cache: ClassEmbeddingCache,
        cache_bytes: int,
        fits: FitCache,
        examples: ExampleSource,
        max_pool: int,
        metrics: Metrics,
        words: Sequence[str],
    ) -> None:
        self._models = models
        self.negative_words = negative_words
        self._negatives: LRUCache[Hashable, NegativeLabels | None] = LRUCache(_CACHED_NEGATIVES)
        self._class_embedding_cache = class_embedding_cache
        self._cached: LRUCache[Hashable, Classifier] = LRUCache(
            cache_bytes, getsizeof=lambda classifier: classifier.nbytes
        )
        self._fits = fits
        self._examples = examples
        self._max_pool = max_pool
        self._known_priors: LRUCache[Hashable, tuple[Priors, tuple[str, ...]]] = LRUCache(_CACHED_PRIORS)
        self._forests: LRUCache[str, Forest | None] = LRUCache(_CACHED_FORESTS)
        self._word_rows: LRUCache[Hashable, np.ndarray] = LRUCache(_CACHED_WORD_ROWS)
        self._metrics = metrics
        self._words = words

    async def get(self, task: Task) -> Classifier:
        """Return the classifier of a task, from the cache or newly built.

        Raises:
            TooLargeError: its text rows need more memory than the cache has in all.
        """
        classifier = await self._of_method(task)
        if (forest := await self._forest(task)) is not None:
            classifier = replace(classifier, forest=forest)
        if task.scoring.multi_label:
            words = await self._rows_of_words(task)
            encoder = self._models.get(task.model).encoder
            adapter = Cosine().fit(words, logit_scale=encoder.logit_scale, logit_bias=encoder.logit_bias)
            return replace(classifier, word_logits=lambda features: adapter.predict(features).logits)
        negatives = await self._negatives_of(task)
        missing = negatives is None and task.scoring.reject_by is RejectBy.IN_VOCABULARY
        warnings = classifier.warnings + (_NO_NEGATIVES if missing else ())
        classifier = replace(classifier, negatives=negatives, warnings=warnings)
        if task.priors is not None:
            priors, warnings = await self._weighted(task, task.priors, classifier)
            classifier = replace(classifier, priors=priors, warnings=classifier.warnings + warnings)
        if task.scoring.reject_by is not RejectBy.CLASS_MEAN or task.label_set is None:
            return classifier
        means = await self._fit_stored(task, task.label_set, "class-means", ClassMeans, max_pool=0)
        return replace(classifier, class_means=means.predict)

    async def _forest(self, task: Task) -> Forest | None:
        """Return the hierarchy of the label set, which takes 30 ms to make for ten thousand classes."""
        reference = task.label_set_reference
        if reference is None:
            return None
        if reference not in self._forests:
            self._forests[reference] = await asyncio.to_thread(forest_of, task.classes)
        return self._forests[reference]

    async def _weighted(self, task: Task, priors: Priors, classifier: Classifier) -> tuple[Priors, tuple[str, ...]]:
        """Return the task's priors with their weights, and warnings; those of a label set with examples are kept."""
        classes, temperature, label_set = len(task.classes), task.scoring.temperature, task.label_set
        if priors.weights is not None:
            return priors, ()
        if label_set is None or not label_set.examples_revision:
            return weighted(priors, classes, temperature)
        # While a method learns from new examples, requests get predictions of what it learned before.
        revisions = (label_set.examples_revision, classifier.examples and classifier.examples.revision)
        asked = (task.model, task.method, task.options, task.templates, label_set.reference, temperature, priors)
        key = (asked, revisions)
        if (known := self._known_priors.get(key)) is not None:
            return known
        fingerprint = await self._models.get(task.model).image_fingerprint()
        stored = await self._examples.features(
            label_set.name, fingerprint, task.classnames, max_pool=MAX_REFERENCE_IMAGES
        )

        def class_logits(image_features: ImageFeatures) -> Logits:
            return classifier.class_logits(classifier.predict(image_features).logits, task.merge_synonyms)

        # Neither a method that learns from the request nor one with state has predictions for other images.
        independent = not (classifier.transductive or METHODS[task.method].stateful)
        found = await self._fits.run(
            partial(
                weighted,
                priors,
                classes,
                temperature,
                label_set=label_set,
                stored=stored,
                class_logits=class_logits if independent else None,
            )
        )
        if stored.revision == label_set.examples_revision:
            self._known_priors[key] = found
        return found

    async def _of_method(self, task: Task) -> Classifier:
        method = METHODS[task.method]
        if method.learns:
            return await self._fitted_classifier(task)
        # A version of a label set never changes, and its reference hashes faster than its classes.
        classes: Hashable = task.label_set_reference or task.classes
        key = (task.model, task.method, task.options, task.templates, classes)
        cached = self._cached.get(key)
        if cached is not None:
            self._metrics.class_embeddings(task.model, len(cached.first_rows), 0)
            return cached
        encoder = self._models.get(task.model).encoder
        recipe, names = await self._text_rows(task)
        adapter = method.adapter(dict(task.options))
        warnings = await asyncio.to_thread(_indistinct_labels, task, names)
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
            recipe.warnings + warnings,
            text.nbytes,
            exclusive=method.learner is not None,
            names=None if method.learner is None else names,
        )
        if method.stateful and key in self._cached:
            return self._cached[key]  # another request built it first, and it already holds state
        self._cached[key] = classifier
        return classifier

    async def _rows_of_words(self, task: Task) -> np.ndarray:
        """Return unit rows (w, d) of common words, in the templates of the task."""
        templates = task.templates[:_MAX_WORD_TEMPLATES]
        key = (task.model, templates)
        if (known := self._word_rows.get(key)) is not None:
            return known
        words = [ClassEntry(word) for word in self._words]
        recipe = await asyncio.to_thread(templates_only, words, templates, {})
        encode = self._models.get(task.model).encode_texts
        rows = await self._class_embedding_cache.get(task.model, encode, recipe.pooling, recipe.rows)
        self._word_rows[key] = rows
        return rows

    async def _negatives_of(self, task: Task) -> NegativeLabels | None:
        """Return the words that compete with the classes, chosen once for each list of classes."""
        vocabulary = self.negative_words.get(task.model)
        if vocabulary is None:
            return None
        key = (task.model, task.label_set_reference or task.classnames)
        if key not in self._negatives:
            names = [name for entry in task.classes for name in (entry.name, *entry.synonyms)]
            used = np.array(await asyncio.to_thread(vocabulary.kinds.unrelated, names), np.int64)
            enough = len(used) >= _MIN_NEGATIVES
            self._negatives[key] = NegativeLabels(vocabulary.words, vocabulary.features, used) if enough else None
        return self._negatives[key]

    async def class_rows(self, task: Task) -> np.ndarray:
        """Return one unit row per class (c, d): the mean over the rows of the class's names."""
        _, names = await self._text_rows(task)
        return names.one_per_class()

    async def _text_rows(self, task: Task) -> tuple[Recipe, ClassNames]:
        """Return the prompts of a method and their rows: (r, d), or (r, k, d) if the method weighs prompts."""
        served = self._models.get(task.model)
        recipe = await asyncio.to_thread(recipe_of, task)
        self._check_size(recipe, served.encoder.embed_dim)
        text = await self._class_embedding_cache.get(task.model, served.encode_texts, recipe.pooling, recipe.rows)
        class_of_row = [row.class_index for row in recipe.rows]
        return recipe, ClassNames(text, np.searchsorted(class_of_row, range(len(task.classes))))

    async def _fitted_classifier(self, task: Task) -> Classifier:
        """Return a classifier fitted to stored example images, or to the images of the request itself."""
        method, served = METHODS[task.method], self._models.get(task.model)
        rows = np.arange(len(task.classes))
        if task.label_set is not None and not dict(task.options).get(TRANSDUCTIVE):
            fitted = await self._fitted(task, task.label_set)
            if fitted.unlabelled or Need.POOL not in method.learns:
                used = ExamplesUsed(fitted.revision, fitted.labelled, fitted.unlabelled)
                return Classifier(fitted.predict, rows, 0, (), 0, exclusive=True, examples=used, names=fitted.names)
        _, names = await self._text_rows(task)
        adapter = method.example_adapter(dict(task.options))
        predict = partial(transduce, adapter, names.one_per_class(), scale=served.encoder)
        warnings = (CLASSIFIED_TOGETHER, *await asyncio.to_thread(_indistinct_labels, task, names))
        return Classifier(predict, rows, 0, warnings, 0, exclusive=True, transductive=True, names=names)

    async def _fitted(self, task: Task, label_set: LabelSet) -> FittedAdapter:
        method = METHODS[task.method]
        make = partial(method.example_adapter, dict(task.options))
        max_pool = self._max_pool if Need.POOL in method.learns else 0
        return await self._fit_stored(task, label_set, method.name, make, task.options, max_pool=max_pool)

    async def _fit_stored(
        self,
        task: Task,
        label_set: LabelSet,
        kind: str,
        make: Callable[[], ExampleAdapter],
        options: tuple[tuple[str, float], ...] = (),
        *,
        max_pool: int,
    ) -> FittedAdapter:
        """Return an adapter fitted to the stored examples of a label set, newly fitted if they have changed."""
        served = self._models.get(task.model)
        fingerprint = await served.image_fingerprint()
        key = FitKey(fingerprint, kind, options, task.templates, label_set.name, label_set.reference)

        async def fit_stored() -> FittedAdapter:
            _, names = await self._text_rows(task)
            stored = await self._examples.features(label_set.name, fingerprint, task.classnames, max_pool=max_pool)
            examples = Examples(stored.support_features, stored.support_labels, stored.pool_features)
            fitted = await self._fits.run(partial(fit, make(), names.one_per_class(), examples, served.encoder))
            return replace(fitted, revision=stored.revision, names=names)

        return await self._fits.get(
            key, label_set.examples_revision, fit_stored, min_revision=label_set.deletions_revision
        )

    def _check_size(self, recipe: Recipe, dims: int) -> None:
        rows = sum(len(row.slots) if recipe.pooling is Pooling.ALIGNED else 1 for row in recipe.rows)
        needed = rows * dims * 4
        room = self._cached.maxsize
        if needed > room:
            raise TooLargeError(
                f"the features of {rows:,} texts take {needed / 2**20:,.0f} MiB, more than the {room / 2**20:,.0f} MiB"
                " of the cache; send fewer classes or templates, use another method, or raise"
                " DEIXIS_CACHE_MIB"
            )


def _indistinct_labels(task: Task, names: ClassNames) -> tuple[str, ...]:
    """Return a warning if classes have nearly the same text features, so that little more than noise ranks them."""
    # The means of a method that weighs prompts: all of its rows may take hundreds of megabytes.
    rows = unit_rows(names.rows if names.rows.ndim == 2 else names.rows.mean(axis=1))
    pairs = _near_rows(rows) if len(rows) <= _MAX_COMPARED else _equal_rows(rows)
    first, second = np.sort(np.searchsorted(names.first_rows, pairs, side="right") - 1).T
    # Groups, because a pair of almost equal labels rarely comes alone: "cat", "a cat", "cats".
    leaders = np.arange(len(task.classes))
    np.minimum.at(leaders, second, first)
    followers = np.flatnonzero(leaders < np.arange(len(leaders)))
    if not len(followers):
        return ()
    groups = [(leader, *followers[leaders[followers] == leader]) for leader in np.unique(leaders[followers])]
    shown = " and ".join(_listed(task, group) for group in groups[:_MAX_SHOWN_GROUPS])
    more = f", and {len(groups) - _MAX_SHOWN_GROUPS:,} more groups" if len(groups) > _MAX_SHOWN_GROUPS else ""
    problem = f"the model hardly tells these labels apart, because their text features are almost equal: {shown}{more}"
    cause = (
        "they may mean the same, differ only behind the longest text of the model, or be in a script it does not know"
    )
    return (f"{problem}; {cause}",)


def _listed(task: Task, group: Sequence[int]) -> str:
    shown = ", ".join(quoted(task.classes[index].name) for index in group[:_MAX_SHOWN])
    return f"{shown} and {len(group) - _MAX_SHOWN:,} more" if len(group) > _MAX_SHOWN else shown


def _near_rows(rows: np.ndarray) -> np.ndarray:
    """Return the pairs (p, 2) of unit rows (r, d) with a cosine above ``_NEAR_COSINE``."""
    first, second = np.nonzero(np.triu(rows @ rows.T > _NEAR_COSINE, 1))
    return np.stack([first, second], axis=1)


def _equal_rows(rows: np.ndarray) -> np.ndarray:
    """Return pairs (p, 2) of equal unit rows (r, d), found in time that grows with their number only.

    Equal rows have equal projections, so only neighbours in the order of a projection are compared.
    """
    projections = rows @ np.cos(np.arange(rows.shape[1], dtype=np.float32) ** 2)
    order = np.argsort(projections, kind="stable")
    found: list[np.ndarray] = []
    for first in range(0, len(order) - 1, _COMPARED_AT_ONCE):
        some = rows[order[first : first + _COMPARED_AT_ONCE + 1]]
        found.append(first + np.flatnonzero(np.linalg.norm(some[1:] - some[:-1], axis=1) < _EQUAL))
    places = np.concatenate(found)
    return np.stack([order[places], order[places + 1]], axis=1)


def recipe_of(task: Task) -> Recipe:
    """Return the prompts that the task's method reads for its classes."""
    return METHODS[task.method].recipe(task.classes, task.templates, dict(task.options))


def texts_of(task: Task) -> list[str]:
    """Return the different texts of these prompts."""
    return list(dict.fromkeys(text for row in recipe_of(task).rows for text in row.texts))
