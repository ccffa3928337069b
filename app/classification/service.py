"""What the HTTP edge and the command line share: names looked up, then images classified."""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from app.adapters._examples import Need
from app.captions.search import CaptionPage, CaptionQuery, CaptionSearch
from app.classification.methods import AUTO, CASED, METHODS, Method
from app.classification.pipeline import Pipeline
from app.describing.chat import Estimate
from app.describing.describer import Advance, Describer, DescribeRequest, Outcome
from app.errors import (
    ClientError,
    FieldProblem,
    InvalidFieldError,
    MalformedRequestError,
    NotConfiguredError,
    NotReadyError,
    StoreError,
    TooLargeError,
    UnknownNameError,
)
from app.fewshot.examples import ExampleImages
from app.images.fetch import Allowance, ImageFetcher, ImageUrl
from app.label_sets.prewarm import Prewarmer
from app.names.class_names import MAX_DESCRIPTIONS_PER_CLASS, MAX_ITEMS, clean_classes, indices_of
from app.names.namespaces import OPEN_NAMESPACE, Namespace, namespace_of, own_name
from app.names.references import LabelSetReference
from app.prompting.templates import TemplateLibrary
from app.scoring.calibration import Calibration
from app.selection.selection import MethodChoice, MethodSelector
from app.store.database import ping
from app.store.drafts import DraftRepository, DraftStatus
from app.store.examples import Selection
from app.store.label_sets import IfMatch, LabelSetRepository
from app.types import ClassEntry, Classification, ImageFeatures, LabelSet, MergeSynonyms, Scoring, Task, TextFeatures

log = structlog.get_logger()

DEFAULT_METHOD = "zero-shot"
DEFAULT_TEMPLATES = "photo"
# Words out of captions are read as they are (Conti et al., NeurIPS 2023).
_TEMPLATE_OF_WORDS = "{}"
# Of a text to be embedded; towers read its first 77 tokens or so.
_MAX_TEXT_CHARS = 10_000
DEFAULT_TOP_K = 5

# Together they read every text of a label set, so that any other method finds the features of its prompts on disk.
_WARMED_IF_DESCRIBED = (DEFAULT_METHOD, "cupl-ensemble", "dclip")


@dataclass(frozen=True, slots=True)
class LabelLimits:
    """How many names a request or a label set may hold, and how long each may be."""

    max_labels: int
    max_classes: int
    max_label_chars: int


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """What a caller asks of some images, in the caller's words; None stands for the default.

    Without ``labels`` and ``label_set`` names are found in the caption database ``database``; with ``group`` for all
    images together. Names are looked up in ``namespace``.
    """

    labels: Sequence[str] | None = None
    label_set: str | None = None
    method: str | None = None
    model: str | None = None
    template: str | None = None
    top_k: int | None = None
    explain: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    reject_below: float | None = None
    false_rejection_rate: float | None = None
    coverage: float | None = None
    database: str | None = None
    group: bool = False
    namespace: Namespace = OPEN_NAMESPACE

    @classmethod
    def about(cls, label_set: LabelSet, *, model: str | None = None, **given: Any) -> "ClassifyRequest":
        """Return a question about one version of a label set."""
        namespace, reference = namespace_of(label_set.name), own_name(label_set.reference)
        return cls(label_set=reference, namespace=namespace, model=model, **given)


class Service:
    """The parts that answer a request, joined; built by ``app.main.open_service``.

    Label sets and caption databases are called here as they are kept, which ``Namespace`` knows; a ``ClassifyRequest``
    alone has them as its caller does.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        label_sets: LabelSetRepository,
        drafts: DraftRepository,
        examples: ExampleImages,
        choices: MethodSelector,
        describer: Describer,
        captions: CaptionSearch,
        image_fetcher: ImageFetcher | None,
        max_fetched_bytes: int,
        templates: TemplateLibrary,
        engine: AsyncEngine,
        label_limits: LabelLimits,
        max_images_per_request: int,
        max_evaluation_images: int,
        max_label_sets: int,
    ) -> None:
        self.pipeline = pipeline
        self.label_sets = label_sets
        self.drafts = drafts
        self.examples = examples
        self.choices = choices
        self.describer = describer
        self.captions = captions
        self._image_fetcher = image_fetcher
        self._max_fetched_bytes = max_fetched_bytes
        self.templates = templates
        self.label_limits = label_limits
        self.max_images_per_request = max_images_per_request
        self.max_evaluation_images = max_evaluation_images
        self._max_label_sets = max_label_sets
        self.engine = engine
        self._warmer = Prewarmer(self._warm)
        self._is_draining = False

    async def classify(self, images: Sequence[bytes | ClientError | ImageUrl], task: Task) -> Classification:
        """Fetch the images that are elsewhere, and classify all of them; raises as ``Pipeline.classify``."""
        return await self.pipeline.classify(await self._fetch_urls(images), task)

    async def search_captions(self, query: CaptionQuery, image: bytes | ClientError | ImageUrl | None) -> CaptionPage:
        """Return the captions near an image, fetched where it is elsewhere, or a text; raises as ``CaptionSearch``."""
        (at_hand,) = (None,) if image is None else await self._fetch_urls([image])
        return await self.captions.search(replace(query, image=at_hand))

    async def embed_texts(
        self, texts: Sequence[str], *, model: str | None, dimensions: int | None
    ) -> tuple[str, TextFeatures]:
        """Return the model and one unit feature per text (k, d); nothing of it is kept.

        Raises:
            UnknownNameError: no such model.
            InvalidFieldError: other dimensions than the model's, or a text that is too long.
            TooLargeError: too many texts.
            OverloadedError, DeadlineExceededError: as ``Pipeline.classify``.
        """
        name = self._embedder(model, dimensions)
        if len(texts) > self.label_limits.max_labels:
            raise TooLargeError(
                f"{len(texts)} texts in one request, at most {self.label_limits.max_labels} are taken; send fewer per"
                " request, or raise DEIXIS_MAX_LABELS"
            )
        for index, text in enumerate(texts):
            if len(text) > _MAX_TEXT_CHARS:
                raise InvalidFieldError.of(
                    f"input.{index}", f"has {len(text):,} characters, at most {_MAX_TEXT_CHARS:,} are taken"
                )
        return name, await self.pipeline.text_features(name, texts)

    async def embed_images(
        self, images: Sequence[bytes | ClientError | ImageUrl], *, model: str | None, dimensions: int | None
    ) -> tuple[str, ImageFeatures]:
        """Return the model and one unit feature per image (n, d), if all can be read.

        Raises:
            UnknownNameError, InvalidFieldError: as ``embed_texts``.
            ClientError: an image cannot be fetched or read.
            OverloadedError, DeadlineExceededError: as ``Pipeline.classify``.
        """
        name = self._embedder(model, dimensions)
        features = await self.pipeline.image_features(name, await self._fetch_urls(images), in_time=True)
        bad = [(index, each) for index, each in enumerate(features) if isinstance(each, ClientError)]
        if bad and len(images) == 1:
            raise bad[0][1]
        if bad:
            raise InvalidFieldError([FieldProblem(f"input.{index}", error.message) for index, error in bad])
        return name, np.stack([each for each in features if not isinstance(each, ClientError)])

    def _embedder(self, model: str | None, dimensions: int | None) -> str:
        name = model or self.pipeline.default_model
        if name not in self.pipeline.models:
            raise UnknownNameError("model", name, self.pipeline.models)
        known = self.pipeline.models[name].encoder.embed_dim
        if dimensions not in {None, known}:
            raise InvalidFieldError.of("dimensions", f"{dimensions}, and those of '{name}' are {known}; leave it out")
        return name

    async def _fetch_urls(self, images: Sequence[bytes | ClientError | ImageUrl]) -> list[bytes | ClientError]:
        """Return images with those fetched that are elsewhere, or the reason why that cannot be done."""
        fetcher = self._image_fetcher
        if fetcher is None:
            refused = InvalidFieldError.of(
                "url", "images are not fetched from URLs here; send the file itself, or set DEIXIS_ALLOW_IMAGE_URLS"
            )
            return [refused if isinstance(image, ImageUrl) else image for image in images]
        allowance = Allowance(self._max_fetched_bytes)
        fetching = {
            index: asyncio.ensure_future(fetcher.fetch(image, allowance))
            for index, image in enumerate(images)
            if isinstance(image, ImageUrl)
        }
        try:
            await asyncio.gather(*fetching.values())
        finally:
            for fetch in fetching.values():
                fetch.cancel()
        return [
            fetching[index].result() if isinstance(image, ImageUrl) else image for index, image in enumerate(images)
        ]

    async def plan(self, question: ClassifyRequest) -> Task:
        """Look up every name of a question.

        Raises:
            InvalidFieldError: labels and label set both or neither, or a name that breaks a rule.
            UnknownNameError: no such model, method, label set, version or template set.
            TooLargeError: more labels than allowed.
        """
        model = question.model or self.pipeline.default_model
        if model not in self.pipeline.models:
            raise UnknownNameError("model", model, self.pipeline.models)
        if question.method not in {None, AUTO, CASED.name} and question.method not in METHODS:
            raise UnknownNameError("method", question.method, (*METHODS, CASED.name, AUTO))
        if question.labels is None and question.label_set is None and question.method in {None, CASED.name}:
            return await self._plan_without_labels(question, model)
        _check_labelled(question)
        label_set: LabelSet | None = None
        if question.labels is not None and question.label_set is not None:
            raise InvalidFieldError.of("labels", "give either labels or label_set, not both")
        if question.label_set is not None:
            label_set = await self.find_label_set(str(question.namespace.reference(question.label_set)))
            classes = label_set.classes
        elif question.labels is not None:
            classes = clean_classes(
                question.labels,
                max_classes=self.label_limits.max_labels,
                max_label_chars=self.label_limits.max_label_chars,
                field="labels",
                setting="DEIXIS_MAX_LABELS",
            )
        else:
            raise InvalidFieldError.of(
                "labels",
                "give labels, a list of words, or label_set, the name of a stored list; without a method, names are"
                " found for the images",
            )
        choice = await self.choices.get(label_set, model) if label_set else None
        method, reason = _chosen(question.method, label_set, choice)
        if reason is not None and question.options:
            raise InvalidFieldError.of("options", "are those of a method; name one in the field method")
        options = METHODS[method].read_options(question.options)
        _check_examples(METHODS[method], label_set)
        calibration = None
        if (
            label_set is not None
            and choice is not None
            and choice.version == label_set.version
            and choice.revision >= label_set.deletions_revision
            and not question.options
            and question.template is None
        ):
            calibration = choice.calibrations.get(method)
        return Task(
            model=model,
            method=method,
            classes=classes,
            templates=self.templates.resolve(
                question.template or (label_set.templates if label_set else DEFAULT_TEMPLATES)
            ),
            top_k=min(question.top_k or DEFAULT_TOP_K, len(classes)),
            label_set=label_set.reference if label_set else None,
            merge_synonyms=label_set.merge_synonyms if label_set else MergeSynonyms.MEAN,
            explain=question.explain,
            options=options,
            examples_revision=label_set.examples_revision if label_set else 0,
            deletions_revision=label_set.deletions_revision if label_set else 0,
            reason=reason,
            scoring=_scoring(question, calibration),
        )

    async def check(self, question: ClassifyRequest) -> None:
        """Refuse a question as ``plan`` does, but for a caption database that cannot be asked yet."""
        try:
            with suppress(NotReadyError, NotConfiguredError, StoreError):
                await self.plan(question)
        except UnknownNameError as error:
            if error.kind != "caption database" or question.database != self.captions.databases.default:
                raise

    async def _plan_without_labels(self, question: ClassifyRequest, model: str) -> Task:
        for field_name in ("false_rejection_rate", "coverage"):
            if getattr(question, field_name) is not None:
                raise InvalidFieldError.of(field_name, "follows from labelled images, which need a label set")
        options = CASED.read_options(question.options)
        templates = self.templates.resolve(question.template or _TEMPLATE_OF_WORDS)
        return Task(
            model=model,
            method=CASED.name,
            classes=(),
            templates=templates,
            top_k=question.top_k or DEFAULT_TOP_K,
            explain=question.explain,
            options=options,
            scoring=Scoring(reject_below=question.reject_below),
            database=await self.captions.choose(question.database, model, question.namespace),
            together=question.group,
        )

    async def selection(self, name: str, model: str | None) -> Selection:
        """Return which method the examples of a label set are evidence for, as it was last found.

        Raises:
            UnknownNameError: no such label set or model, or the methods have not been tried yet.
        """
        await self.label_sets.get(name)
        model = model or self.pipeline.default_model
        if model not in self.pipeline.models:
            raise UnknownNameError("model", model, self.pipeline.models)
        fingerprint = await self.pipeline.models[model].image_fingerprint()
        selection = await self.choices.repository.get(name, fingerprint)
        if selection is None:
            raise UnknownNameError(
                "selection of label set",
                name,
                way_out="add example images, and wait until the methods have been tried on them",
            )
        return selection

    async def class_with_examples(self, name: str, classname: str) -> str:
        """Return a class name as the label set, or else an example image of it, spells it.

        Raises:
            UnknownNameError: no such label set, or no such class of either.
        """
        label_set = await self.label_sets.get(name)
        counts = await self.examples.counts(label_set.name)
        known = list(dict.fromkeys((*label_set.classnames, *counts.labelled)))
        return known[indices_of([classname], known)[0]]

    async def delete_label_set(self, name: str, *, if_match: IfMatch = None) -> None:
        """Delete a label set and all that belongs to it; raises as ``LabelSetRepository.delete``."""
        await self.label_sets.delete(name, if_match=if_match)
        self.pipeline.learner.forget(name)

    async def find_label_set(self, reference: str) -> LabelSet:
        """Return the label set called ``name`` (its latest version) or ``name@version``."""
        return await self.label_sets.get(*LabelSetReference.parse(reference))

    async def put_label_set(
        self,
        name: str,
        classes: Sequence[ClassEntry],
        templates: str,
        *,
        merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN,
        if_match: IfMatch = None,
        if_none_match_any: bool = False,
    ) -> tuple[LabelSet, bool]:
        """Check and write a new version; also return whether the name is new.

        Raises:
            InvalidFieldError: a name breaks a rule.
            UnknownNameError: no such template set.
            TooLargeError: too many classes, or too many label sets of the namespace.
            PreconditionFailedError: the latest version is not one that may be replaced.
        """
        self.templates.resolve(templates, field="templates")
        label_set, created = await self.label_sets.put(
            name,
            # In a thread, because the largest label sets take a second.
            await asyncio.to_thread(self.clean_classes, classes),
            templates,
            merge_synonyms=merge_synonyms,
            if_match=if_match,
            if_none_match_any=if_none_match_any,
            max_label_sets=self._max_label_sets,
        )
        self._warmer.add(label_set)
        return label_set, created

    async def add_classes(self, name: str, classes: Sequence[ClassEntry], *, if_match: IfMatch = None) -> LabelSet:
        """Check and append classes, as a new version; raises as ``put_label_set``, ConflictError for a known class."""
        label_set = await self.label_sets.add_classes(
            name,
            await asyncio.to_thread(self.clean_classes, classes),
            max_classes=self.label_limits.max_classes,
            if_match=if_match,
        )
        self._warmer.add(label_set)
        return label_set

    async def estimate_descriptions(self, reference: str, request: DescribeRequest) -> Estimate:
        """Return the most that ``describe`` would take; raises as it."""
        return await self.describer.estimate(await self.find_label_set(reference), request)

    async def describe(
        self, reference: str, request: DescribeRequest, advance: Advance, *, accept: bool = False
    ) -> Outcome:
        """Ask a language model about the classes of a label set, and keep drafts; raises as ``Describer.run``.

        With ``accept`` every undecided draft goes into a new version, those of earlier runs too.
        """
        described = await self.find_label_set(reference)
        outcome = await self.describer.run(described, request, advance)
        if not (accept and await self.drafts.count(described.name, DraftStatus.DRAFT)):
            return outcome
        label_set, accepted = await self.accept_drafts(described.name)
        return replace(outcome, accepted=accepted, label_set=label_set.reference)

    async def accept_drafts(
        self, name: str, ids: Collection[int] | None = None, *, if_match: IfMatch = None
    ) -> tuple[LabelSet, int]:
        """Put drafts, by default all that are undecided, into a new version; raises as ``DraftRepository.accept``."""
        label_set, accepted = await self.drafts.accept(
            name, ids, max_texts=MAX_DESCRIPTIONS_PER_CLASS, if_match=if_match
        )
        self._warmer.add(label_set)
        return label_set, accepted

    def clean_classes(self, classes: Sequence[ClassEntry]) -> tuple[ClassEntry, ...]:
        """Return the classes of a label set with their texts normalised and checked."""
        return clean_classes(
            classes,
            max_classes=self.label_limits.max_classes,
            max_label_chars=self.label_limits.max_label_chars,
            field="classes",
            setting="DEIXIS_MAX_CLASSES",
        )

    async def warm_all(self) -> None:
        """Warm the latest version of every stored label set, page by page."""
        after = None
        try:
            while page := await self.label_sets.list(limit=100, after=after):
                for summary in page:
                    try:
                        self._warmer.add(await self.label_sets.get(summary.name))
                    except UnknownNameError:
                        continue  # deleted since the page was read
                    await self._warmer.idle()  # so that they are never all in memory
                after = page[-1].name
        except StoreError as error:
            log.warning("warming_stopped", reason=error.message)

    async def _warm(self, label_set: LabelSet) -> None:
        if not self.pipeline.models:
            return  # a command that only reads and writes label sets
        try:
            described = any(entry.descriptions or entry.features for entry in label_set.classes)
            warmed: tuple[str, ...] = _WARMED_IF_DESCRIBED if described else (DEFAULT_METHOD,)
            for method in (*warmed, AUTO) if label_set.examples_revision else warmed:
                await self.pipeline.classifier(await self.plan(ClassifyRequest.about(label_set, method=method)))
        except Exception as error:  # noqa: BLE001 - whatever an encoder raises
            # A request for this label set will meet the same error and tell its caller.
            reason = str(error) or type(error).__name__
            log.warning("label_set_not_warmed", label_set=label_set.reference, reason=reason)

    async def watch(self, every_s: float) -> None:
        """Try every model whenever it did nothing for so long, for ``check_alive``; until it is cancelled."""
        await asyncio.gather(*(model.watch(every_s) for model in self.pipeline.models.values()))

    def begin_draining(self) -> None:
        """Tell whoever asks ``check_ready`` that this process will stop; requests are still answered."""
        self._is_draining = True

    def check_alive(self) -> None:
        """Raise ``NotReadyError`` if a model, or the worker of a caption database, cannot do its work."""
        problem = self.pipeline.problem or self.captions.databases.problem
        if problem is not None:
            raise NotReadyError(problem)

    async def check_ready(self) -> None:
        """Raise ``NotReadyError`` as ``check_alive`` or while it stops, ``StoreError`` without its database."""
        if self._is_draining:
            raise NotReadyError("the service is stopping; ask another copy")
        self.check_alive()
        await ping(self.engine)

    async def close(self) -> None:
        """Stop warming, end the threads, close the database."""
        await self._warmer.close()
        await self.choices.close()
        await self.captions.databases.close()
        if self._image_fetcher is not None:
            self._image_fetcher.close()
        await self.pipeline.close()
        await self.engine.dispose()


def _check_labelled(question: ClassifyRequest) -> None:
    """Refuse, together with labels, what is there to do without them."""
    if question.method == CASED.name:
        problem = f"method '{CASED.name}' finds the names by itself; leave labels and label_set out, or the method"
        raise InvalidFieldError.of("method", problem)
    for field_name, is_given in (("database", question.database is not None), ("group", question.group)):
        if is_given:
            labelled = question.labels is not None or question.label_set is not None
            way_out = "the labels" if labelled else f"the method, which is then '{CASED.name}'"
            raise InvalidFieldError.of(field_name, f"is for images without labels; leave it out, or {way_out}")


def _chosen(method: str | None, label_set: LabelSet | None, choice: MethodChoice | None) -> tuple[str, str | None]:
    """Return the method to use, and why where the caller left it to the evidence.

    Without a method it is left to the evidence where the label set has examples.
    """
    has_examples = label_set is not None and label_set.examples_revision > 0
    if method is None and not has_examples:
        return DEFAULT_METHOD, None
    if method is not None and method != AUTO:
        return method, None
    if not has_examples:
        return DEFAULT_METHOD, "there are no example images, which only a label set can have, to tell the methods apart"
    assert label_set is not None
    if choice is None:
        return DEFAULT_METHOD, "the methods are still to be tried on the label set's example images"
    is_current = (choice.version, choice.revision) == (label_set.version, label_set.examples_revision)
    return (
        choice.method,
        choice.reason if is_current else f"{choice.reason}; the examples or classes have changed since",
    )


def _check_examples(method: Method, label_set: LabelSet | None) -> None:
    if Need.SUPPORT in method.learns and label_set is None:
        problem = f"method '{method.name}' learns from labelled example images, which only a label set has"
        raise InvalidFieldError.of("method", f"{problem}; give label_set, or name another method")
    if method.stateful and label_set is None:
        problem = f"method '{method.name}' remembers images, which it does for a label set"
        raise InvalidFieldError.of("method", f"{problem}; give label_set, or name another method")


def _scoring(question: ClassifyRequest, calibration: Calibration | None) -> Scoring:
    """Return how logits become scores, by held-out examples where there are some.

    Raises:
        InvalidFieldError: a threshold and a rate together, or what only labelled examples can tell.
    """
    threshold = question.reject_below
    if threshold is not None and question.false_rejection_rate is not None:
        raise InvalidFieldError.of("reject_below", "give either reject_below or false_rejection_rate, not both")
    if calibration is None:
        for field_name in ("false_rejection_rate", "coverage"):
            if getattr(question, field_name) is not None:
                raise InvalidFieldError.of(
                    field_name,
                    "follows from labelled example images on which this method was tried: use the newest version of a"
                    " label set that has some, wait until the job of trying the methods is done, and leave options and"
                    " template at their defaults",
                )
        return Scoring(reject_below=threshold)
    if question.false_rejection_rate is not None:
        threshold = calibration.rejection_threshold(question.false_rejection_rate)
    return Scoring(
        temperature=calibration.temperature,
        calibrated_on=calibration.images,
        reject_below=threshold,
        false_rejection_rate=None if threshold is None else calibration.false_rejection_rate(threshold),
        coverage=question.coverage,
        set_quantile=None if question.coverage is None else calibration.set_quantile(question.coverage),
    )


def check_commas(*texts: str) -> None:
    """Refuse labels that would take seconds to split; whether there are too many is found out with their names.

    Raises:
        TooLargeError: more than ``MAX_ITEMS`` commas in all.
    """
    if sum(text.count(",") for text in texts) > MAX_ITEMS:
        raise TooLargeError(f"labels have more than {MAX_ITEMS:,} commas; send fewer labels")


def split_labels(text: str) -> list[str]:
    """Read labels from one string: a JSON array of strings, or comma separated.

    Raises:
        MalformedRequestError: it begins as a JSON array and does not parse.
        InvalidFieldError: not every label is a string.
        TooLargeError: far more commas than there may be labels.
    """
    check_commas(text)
    if not text.lstrip().startswith("["):
        return text.split(",")
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"labels begin with '[' but are no JSON array: {error}") from error
    if not all(isinstance(label, str) for label in labels):
        raise InvalidFieldError.of("labels", "every label must be a string")
    return list(labels)
