"""From a request to a task: every name in it is looked up once."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import ceil
from typing import Protocol

from app.adapters._examples import Need
from app.captions.search import CaptionSearch
from app.classification.method_names import AUTO, DEFAULT_METHOD, UNIFORM
from app.classification.methods import CASED, METHODS, Method
from app.classification.priors import read_priors
from app.classification.request import ClassifyRequest
from app.errors import (
    InvalidFieldError,
    NotConfiguredError,
    NotReadyError,
    StoreError,
    UnknownNameError,
)
from app.label_sets.service import DEFAULT_TEMPLATES, LabelLimits, LabelSets
from app.models.negative_words import NegativeVocabulary
from app.models.registry import ModelRegistry
from app.names.class_names import clean_classes
from app.names.namespaces import own_name
from app.prompting.templates import TemplateLibrary
from app.scoring.calibration import Calibration, Rejection
from app.scoring.multi_label import DEFAULT_THRESHOLD
from app.scoring.negative_labels import KNOWN_ABOVE
from app.types import ClassEntry, LabelSet, Priors, Reject, RejectBy, Scoring, Task

# Words from captions are used as they are, without a template (Conti et al., NeurIPS 2023).
_TEMPLATE_OF_WORDS = "{}"
DEFAULT_TOP_K = 5
# Characters of labels that take a millisecond to clean; more are cleaned in a thread, and not cached.
_CHARS_CLEANED_AT_ONCE = 2_000
_CACHED_LABEL_LISTS = 64
# Classes whose priors take a millisecond to read.
_CLASSES_READ_AT_ONCE = 500
# The false rejection rate of requests that leave the threshold to the service.
_AUTO_RATE = 0.05
_NOT_COMPARED = (
    "needs the methods to be compared on the current classes and example images, which a job of the service does after"
    " each change"
)


@dataclass(frozen=True, slots=True)
class SelectedMethod:
    """The method that the examples of a label set favour, and the calibration of each method on held-out examples.

    ``rejection`` is how images of none of the classes are rejected; None if an earlier release compared the methods.
    ``version`` and ``revision`` are those of the label set and of its examples when the methods were compared.
    ``thresholds`` are those of labels where images may have several, by name, fitted to the examples; other labels have
    ``shared_threshold``. ``scalings`` calibrate the log odds of the labels: a slope and an intercept each.
    """

    method: str
    reason: str
    calibrations: Mapping[str, Calibration]
    rejection: Rejection | None
    version: int
    revision: int
    thresholds: Mapping[str, float] = field(default_factory=dict)
    shared_threshold: float | None = None
    scalings: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def label_scalings(self, classes: Sequence[ClassEntry]) -> tuple[tuple[float, float], ...]:
        """Return the slope and intercept of each class; none unless all classes have them."""
        found = [self.scalings.get(entry.name) for entry in classes]
        return tuple((each[0], each[1]) for each in found if each is not None) if all(found) else ()

    def label_thresholds(self, classes: Sequence[ClassEntry], default: float) -> tuple[float, ...]:
        """Return the threshold of each class where images may have several: its own, the shared one, or a default."""
        other = default if self.shared_threshold is None else self.shared_threshold
        return tuple(self.thresholds.get(entry.name, other) for entry in classes)


class SelectionSource(Protocol):
    """Where the selected method of a label set is read from."""

    @property
    def is_kept_current(self) -> bool:
        """Whether a job compares the methods again after each change."""

    async def get(self, label_set: LabelSet, model: str) -> SelectedMethod | None:
        """Return the latest selection; None if the label set has no examples or the methods were never compared."""


class Resolver:
    """Turns requests into tasks.

    Args:
        models: in service.
        label_sets: by name.
        selections: the method that the examples of each label set favour.
        templates: by name.
        captions: caption databases, for requests without labels.
        label_limits: on the labels of a request.
        negative_words: compete with the labels of a request.
    """

    def __init__(
        self,
        models: ModelRegistry,
        label_sets: LabelSets,
        selections: SelectionSource,
        templates: TemplateLibrary,
        captions: CaptionSearch,
        label_limits: LabelLimits,
        negative_words: NegativeVocabulary,
    ) -> None:
        self._models = models
        self._negative_words = negative_words
        self._label_sets = label_sets
        self._selections = selections
        self._templates = templates
        self._captions = captions
        # Most requests repeat the labels of another one.
        self._clean_labels = partial(
            clean_classes,
            max_classes=label_limits.max_labels,
            max_label_chars=label_limits.max_label_chars,
            field="labels",
            setting="DEIXIS_MAX_LABELS",
        )
        self._clean_few_labels = lru_cache(_CACHED_LABEL_LISTS)(self._clean_labels)

    async def resolve(self, request: ClassifyRequest) -> Task:
        """Look up every name of a request.

        Raises:
            InvalidFieldError: both labels and label set, or a field that breaks a rule.
            UnknownNameError: no such model, method, label set, version or template set.
            TooLargeError: more labels than allowed.
        """
        model = self._models.get(request.model).name
        if request.method not in {None, AUTO, CASED.name} and request.method not in METHODS:
            raise UnknownNameError("method", request.method, (*METHODS, CASED.name, AUTO))
        if request.labels is None and request.label_set is None and request.method in {None, CASED.name}:
            return await self._without_labels(request, model)
        _refuse_fields_of_discovery(request)
        if request.labels is not None and request.label_set is not None:
            raise InvalidFieldError.of("labels", "give either labels or label_set, not both")
        if request.label_set is not None:
            label_set = await self._label_sets.find(request.namespace.reference(request.label_set))
            return await self._with_labels(request, model, label_set.classes, label_set)
        if request.labels is None:
            raise InvalidFieldError.of(
                "labels",
                "give labels, or label_set with the name of a stored list; to discover labels, leave out method too",
            )
        if sum(map(len, request.labels)) < _CHARS_CLEANED_AT_ONCE:
            classes = self._clean_few_labels(tuple(request.labels))
        else:
            classes = await asyncio.to_thread(self._clean_labels, request.labels)
        return await self._with_labels(request, model, classes, None)

    async def resolve_label_set(
        self,
        label_set: LabelSet,
        *,
        model: str | None = None,
        method: str | None = None,
        template: str | None = None,
        multi_label: bool | None = None,
    ) -> Task:
        """Return the task of classifying with one version of a label set, without its priors; raises as ``resolve``."""
        request = ClassifyRequest(method=method, template=template, priors=UNIFORM, multi_label=multi_label)
        return await self._with_labels(request, self._models.get(model).name, label_set.classes, label_set)

    async def validate(self, request: ClassifyRequest) -> None:
        """Raise as ``resolve``, except for a caption database that is not ready yet."""
        try:
            with suppress(NotReadyError, NotConfiguredError, StoreError):
                await self.resolve(request)
        except UnknownNameError as error:
            if error.kind != "caption database" or request.database != self._captions.catalogue.default:
                raise

    async def _with_labels(
        self, request: ClassifyRequest, model: str, classes: tuple[ClassEntry, ...], label_set: LabelSet | None
    ) -> Task:
        multi_label = request.multi_label
        if multi_label is None:
            multi_label = label_set is not None and label_set.multi_label
        selected = None if label_set is None else await self._selections.get(label_set, model)
        method, reason = _choose(request.method, label_set, selected, multi_label=multi_label)
        if reason is not None and request.options:
            raise InvalidFieldError.of("options", "belong to a method; name the method in the field method")
        options = METHODS[method].read_options(request.options)
        _check_has_examples(METHODS[method], label_set)
        if multi_label:
            _refuse_fields_of_one_label(request)
        # The frequencies of a label set are those of images with one label.
        asked = request.priors if request.priors is not None or not multi_label else UNIFORM
        priors = await _priors(asked, classes, label_set)
        if request.min_score is not None and all(entry.parent is None for entry in classes):
            problem = "stops at a level of a hierarchy, and no class has a parent"
            raise InvalidFieldError.of("min_score", f"{problem}; leave it out, or give the classes parents")
        if priors is not None:
            _refuse_guarantees(request)
        default_templates = DEFAULT_TEMPLATES if label_set is None else label_set.templates
        if multi_label:
            scoring = _scoring_of_several(request, method, classes, label_set, selected)
        else:
            scoring = _scoring(
                request,
                method,
                label_set,
                selected,
                waits=self._selections.is_kept_current,
                has_priors=priors is not None,
            )
        if scoring.reject_by is RejectBy.IN_VOCABULARY:
            await self._prepare_negative_words(model)
        return Task(
            model=model,
            method=method,
            classes=classes,
            templates=await self._templates.load(request.template or default_templates),
            top_k=min(request.top_k or DEFAULT_TOP_K, len(classes)),
            label_set=label_set,
            explain=request.explain,
            options=options,
            reason=reason,
            scoring=scoring,
            keep_features=request.keep_features,
            priors=priors,
            min_score=request.min_score,
        )

    async def _prepare_negative_words(self, model: str) -> None:
        """Encode the negative words of a model, which a service does in the background."""
        if self._selections.is_kept_current and self._negative_words.get(model) is None:
            problem = f"reject '{Reject.AUTO}' needs words to compare the labels with, which are being encoded"
            raise NotReadyError(f"{problem}; try again in some seconds, or use reject_below")
        await self._negative_words.prepare(model)

    async def _without_labels(self, request: ClassifyRequest, model: str) -> Task:
        for field_name in ("false_rejection_rate", "coverage"):
            if getattr(request, field_name) is not None:
                raise InvalidFieldError.of(field_name, "needs labelled example images, which only a label set has")
        if request.multi_label:
            problem = "needs labels or a label_set; labels that are discovered are compared with each other"
            raise InvalidFieldError.of("multi_label", f"{problem}; leave it out, or give labels")
        if request.reject is not None:
            raise InvalidFieldError.of("reject", "needs labels; give labels or label_set, or use reject_below")
        if request.min_score is not None:
            raise InvalidFieldError.of("min_score", "needs a label set with parents of classes")
        if request.priors is not None:
            raise InvalidFieldError.of("priors", "belong to labels; give labels or label_set, or leave priors out")
        return Task(
            model=model,
            method=CASED.name,
            classes=(),
            templates=await self._templates.load(request.template or _TEMPLATE_OF_WORDS),
            top_k=request.top_k or DEFAULT_TOP_K,
            explain=request.explain,
            options=CASED.read_options(request.options),
            scoring=Scoring(reject_below=request.reject_below),
            database=await self._captions.choose(request.database, model, request.namespace),
            together=request.group,
            keep_features=request.keep_features,
        )


def with_method(task: Task, method: str, options: Mapping[str, float] | None = None) -> Task:
    """Return the task with another method, its default options and uncalibrated scores, and without priors."""
    return replace(
        task,
        method=method,
        options=METHODS[method].read_options(options or {}),
        reason=None,
        scoring=Scoring(),
        priors=None,
    )


async def _priors(
    given: Mapping[str, float] | str | None, classes: Sequence[ClassEntry], label_set: LabelSet | None
) -> Priors | None:
    """Return the priors of a request; raises as ``read_priors``, which takes 16 ms for ten thousand classes."""
    if given is None and (label_set is None or label_set.priors is None):
        return None
    names = [entry.name for entry in classes]
    if len(names) < _CLASSES_READ_AT_ONCE:
        return read_priors(given, names, label_set)
    return await asyncio.to_thread(read_priors, given, names, label_set)


def _refuse_guarantees(request: ClassifyRequest) -> None:
    """Raise ``InvalidFieldError`` for a field whose guarantee is computed from scores without priors."""
    for field_name in ("false_rejection_rate", "coverage"):
        if getattr(request, field_name) is not None:
            problem = f"is calibrated on scores without priors; leave it out, or give priors '{UNIFORM}'"
            raise InvalidFieldError.of(field_name, problem)


def _refuse_fields_of_one_label(request: ClassifyRequest) -> None:
    """Raise ``InvalidFieldError`` for a field that assumes that each image has one label."""
    for field_name in ("false_rejection_rate", "reject", "coverage", "priors"):
        value = getattr(request, field_name)
        if value is not None and value != UNIFORM:
            problem = "assumes that each image has one label, and multi_label allows several"
            raise InvalidFieldError.of(field_name, f"{problem}; leave it out, or set multi_label to false")


def _refuse_fields_of_discovery(request: ClassifyRequest) -> None:
    """Raise ``InvalidFieldError`` for a field that is only for requests without labels."""
    if request.method == CASED.name:
        problem = f"method '{CASED.name}' discovers the labels; leave out labels and label_set, or the method"
        raise InvalidFieldError.of("method", problem)
    for field_name, is_given in (("database", request.database is not None), ("group", request.group)):
        if is_given:
            labelled = request.labels is not None or request.label_set is not None
            way_out = "the labels" if labelled else f"the method, which is then '{CASED.name}'"
            raise InvalidFieldError.of(field_name, f"is for requests without labels; leave it out, or {way_out}")


def _choose(
    method: str | None, label_set: LabelSet | None, selected: SelectedMethod | None, *, multi_label: bool
) -> tuple[str, str | None]:
    """Return the method to use, and the reason if the request leaves the choice to the evidence.

    A request without a method leaves it to the evidence if the label set has examples.
    """
    if multi_label and method in {None, AUTO}:
        return DEFAULT_METHOD, None if method is None else "methods are not compared for images with several labels"
    has_examples = label_set is not None and label_set.examples_revision > 0
    if method is None and not has_examples:
        return DEFAULT_METHOD, None
    if method is not None and method != AUTO:
        return method, None
    if not has_examples:
        return DEFAULT_METHOD, "methods are compared on the example images of a label set, and there are none"
    assert label_set is not None
    if selected is None:
        return DEFAULT_METHOD, "the methods have not been compared on the label set's example images yet"
    is_current = (selected.version, selected.revision) == (label_set.version, label_set.examples_revision)
    return (
        selected.method,
        selected.reason if is_current else f"{selected.reason}; the examples or classes have changed since",
    )


def _check_has_examples(method: Method, label_set: LabelSet | None) -> None:
    if label_set is not None:
        return
    if Need.SUPPORT in method.learns:
        problem = f"method '{method.name}' learns from labelled example images, which only a label set has"
        raise InvalidFieldError.of("method", f"{problem}; give label_set, or name another method")
    if method.stateful:
        problem = f"method '{method.name}' keeps images of earlier requests, which it does for a label set only"
        raise InvalidFieldError.of("method", f"{problem}; give label_set, or name another method")


def _why_not_calibrated(
    request: ClassifyRequest, method: str, label_set: LabelSet | None, selected: SelectedMethod | None
) -> str | None:
    """Return why the scores are not calibrated, or None if they are; ``_NOT_COMPARED`` if they will be."""
    if label_set is None:
        return "needs labelled example images, which only a label set has"
    if not label_set.examples_revision:
        return f"needs labelled example images; add some to '{own_name(label_set.name)}'"
    if field_name := next((name for name in ("options", "template") if getattr(request, name)), None):
        return f"needs the defaults that the methods were compared with; leave out {field_name}"
    if selected is None or selected.version < label_set.version or selected.revision < label_set.deletions_revision:
        return _NOT_COMPARED
    problem = None
    if selected.version > label_set.version:
        problem = f"needs the newest version of the label set, which is {selected.version}; leave out the version"
    elif not selected.calibrations:
        problem = f"needs labelled example images that can be held out: {selected.reason}"
    elif method not in selected.calibrations:
        problem = (
            f"needs a method that was compared on the example images, which '{method}' was not; compared:"
            f" {', '.join(sorted(selected.calibrations))}"
        )
    return problem


def _has_scores_of(rejection: Rejection, method: str) -> bool:
    """Return whether a method gives images the scores of a rejection: its similarities may be with other texts."""
    return rejection.by is not RejectBy.SIMILARITY or method == DEFAULT_METHOD or bool(METHODS[method].learns)


def scoring_of_several(classes: Sequence[ClassEntry], fitted: SelectedMethod | None = None) -> Scoring:
    """Return how the labels of an image are found that may have several: at the thresholds of the classes.

    A class without a threshold has the one that was fitted to examples, or else the default.
    """
    scalings = () if fitted is None else fitted.label_scalings(classes)
    others = (DEFAULT_THRESHOLD,) * len(classes)
    # A fitted threshold is one of a calibrated score.
    if fitted is not None and scalings:
        others = fitted.label_thresholds(classes, DEFAULT_THRESHOLD)
    thresholds = (
        other if entry.threshold is None else entry.threshold for entry, other in zip(classes, others, strict=True)
    )
    return Scoring(multi_label=True, thresholds=tuple(thresholds), label_scalings=scalings)


def _scoring_of_several(
    request: ClassifyRequest,
    method: str,
    classes: Sequence[ClassEntry],
    label_set: LabelSet | None,
    selected: SelectedMethod | None,
) -> Scoring:
    """Return the scoring of a request for several labels per image.

    ``reject_below`` is the threshold of all labels, so an image is rejected if it has none of them.

    Raises:
        InvalidFieldError: a method that assumes that each image has one label.
    """
    if METHODS[method].learner is not None:
        problem = f"method '{method}' assumes that each image has one label, and multi_label allows several"
        raise InvalidFieldError.of("method", f"{problem}; name 'zero-shot', or set multi_label to false")
    # Both are fitted to scores of zero-shot with the prompts of one version, and not to deleted examples.
    is_fitted = method == DEFAULT_METHOD and not (request.options or request.template)
    is_valid = (
        label_set is not None
        and selected is not None
        and selected.version == label_set.version
        and selected.revision >= label_set.deletions_revision
    )
    scoring = scoring_of_several(classes, selected if is_fitted and is_valid else None)
    if request.reject_below is None:
        return scoring
    thresholds = (request.reject_below,) * len(classes)
    return replace(scoring, reject_below=request.reject_below, thresholds=thresholds)


def _without_examples(request: ClassifyRequest) -> Scoring:
    if request.reject is None:
        return Scoring(reject_below=request.reject_below)
    return Scoring(reject_below=KNOWN_ABOVE, reject_by=RejectBy.IN_VOCABULARY)


def _scoring(
    request: ClassifyRequest,
    method: str,
    label_set: LabelSet | None,
    selected: SelectedMethod | None,
    *,
    waits: bool,
    has_priors: bool,
) -> Scoring:
    """Return how logits become scores, calibrated if the method was compared on held-out examples.

    Args:
        request: as it came.
        method: that is used.
        label_set: that is used; None for labels of the request.
        selected: for the label set.
        waits: a service compares the methods after each change.
        has_priors: the scores are not those of the calibration, so they reject no known share of the images.

    Raises:
        InvalidFieldError: both a threshold and a rate, or a field that needs a calibration that is missing.
        NotReadyError: the calibration is not there yet.
    """
    given = [name for name in ("reject_below", "false_rejection_rate", "reject") if getattr(request, name) is not None]
    if len(given) > 1:
        raise InvalidFieldError.of(given[0], f"give either {given[0]} or {given[1]}, not both")
    problem = _why_not_calibrated(request, method, label_set, selected)
    if problem is not None or selected is None:
        for field_name in ("false_rejection_rate", "coverage"):
            if getattr(request, field_name) is not None and problem is not None:
                if problem is _NOT_COMPARED and waits:
                    raise NotReadyError(f"{field_name} {problem}; try again in some seconds")
                raise InvalidFieldError.of(field_name, problem)
        return _without_examples(request)
    calibration, rejection = selected.calibrations[method], selected.rejection
    rate = request.false_rejection_rate if request.reject is None else _AUTO_RATE
    if rate is None or rejection is None or not _has_scores_of(rejection, method):
        rejection = calibration.rejection
    scoring = Scoring(
        temperature=calibration.temperature,
        calibrated_on=calibration.images,
        coverage=request.coverage,
        set_quantile=None if request.coverage is None else calibration.set_quantile(request.coverage),
    )
    if rate is None:
        threshold = request.reject_below
    elif rejection.images >= (needed := ceil(1 / rate) - 1) and not has_priors:
        threshold = rejection.threshold(rate)
    elif request.reject is not None:
        return replace(scoring, reject_below=KNOWN_ABOVE, reject_by=RejectBy.IN_VOCABULARY)
    else:
        threshold = rejection.threshold(rate)  # the lowest
        problem = f"a false rejection rate of {rate:g} needs at least {needed:,} labelled images"
        warning = f"{problem}, and there are {rejection.images:,}; no image is rejected"
        scoring = replace(scoring, warnings=(warning,))
    return replace(
        scoring,
        reject_below=threshold,
        reject_by=rejection.by,
        # Priors change the scores whose rate was measured; a class mean or a similarity stays as it is.
        false_rejection_rate=None
        if threshold is None or (has_priors and rejection.by is RejectBy.SCORE)
        else rejection.false_rejection_rate(threshold),
    )
