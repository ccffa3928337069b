"""Every method on the same labelled images, and whether descriptions and examples help."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from app.adapters._base import NO_EXAMPLES, Examples, probabilities
from app.adapters._class_means import ClassMeans
from app.adapters._examples import Need
from app.classification.classifiers import ClassifierCache, texts_of
from app.classification.method_names import DEFAULT_METHOD
from app.classification.methods import METHODS, Method
from app.classification.pipeline import Pipeline
from app.classification.resolve import scoring_of_several, with_method
from app.errors import InvalidFieldError, TooLargeError
from app.fewshot.fitting import FitCache, FittedAdapter, fit, predict, predict_held_out
from app.fewshot.neighbours import NeighbourIndex
from app.models.registry import ModelRegistry
from app.runtime.turns import is_in_background
from app.scoring.calibration import Rejection
from app.scoring.measures import (
    Difference,
    Evaluation,
    bootstrap_interval,
    evaluate,
    holm,
    paired_difference,
)
from app.scoring.numerics import stratified_folds
from app.types import ImageFeatures, Logits, Probabilities, RejectBy, Similarities, Task

Advance = Callable[[int, int], Awaitable[object]]
"""Called with the number of finished steps and the number of all steps."""

_Result = TypeVar("_Result")

CONTROL = "waffle"
# As in the paper of WaffleCLIP.
CONTROL_SEEDS = 7
SIGNIFICANT = 0.05
_FOLDS = 5
# Of each class: one that is held out, and one for the mean.
_IMAGES_FOR_MEANS = 2
# Accuracy among the first five needs five.
_RANKED = 5


@dataclass(frozen=True, slots=True)
class MethodReport:
    """The results of one method.

    ``interval`` is the 95 % bootstrap interval of the accuracy; ``prompts_per_class`` is a mean. ``to_baseline``
    compares with zero-shot, ``to_control`` with the control that has as many prompts per class; both p-values are
    corrected for the number of methods compared. ``ms_per_image`` is the time from features to scores.
    """

    method: str
    prompts_per_class: float
    evaluation: Evaluation
    interval: tuple[float, float]
    to_baseline: Difference | None
    to_control: Difference | None
    ms_per_image: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The reports of all methods, the default method first, and a verdict in sentences.

    ``labelled`` and ``unlabelled`` count the examples that methods could learn from. ``folds`` is the number of parts
    into which the labelled examples were split, each predicted by adapters fitted to the others; 0 if other images were
    predicted.
    """

    images: int
    model: str
    methods: tuple[MethodReport, ...]
    not_run: tuple[str, ...]
    verdict: tuple[str, ...]
    labelled: int = 0
    unlabelled: int = 0
    folds: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Comparison":
        """Return a comparison from what ``to_json`` returned."""
        return TypeAdapter(Comparison).validate_python(content)


@dataclass(frozen=True, slots=True, eq=False)
class MethodScores:
    """One method's logits (n, c) for n images; with ``sigmoid`` each logit becomes a score independently.

    ``similarities`` (n, c) are those with the text, for methods that use only text.
    """

    logits: Logits
    sigmoid: bool
    prompts_per_class: float
    ms_per_image: float
    warnings: tuple[str, ...] = ()
    similarities: Similarities | None = None

    @property
    def ranked(self) -> np.ndarray:
        """Class indices (n, min(5, c)), best first."""
        return np.argsort(-self.logits, axis=1, kind="stable")[:, :_RANKED]

    @property
    def scores(self) -> Probabilities:
        """The probabilities (n, c), before calibration."""
        return probabilities(self.logits, sigmoid=self.sigmoid)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """The examples that methods may learn from.

    With ``folds`` (n,), the n images to predict are the labelled examples themselves: those of a fold are predicted by
    adapters fitted to all other folds. Without, the images to predict are not among the examples.
    """

    examples: Examples = NO_EXAMPLES
    folds: np.ndarray | None = None
    fitted_to_pool: dict[str, FittedAdapter] = field(default_factory=dict)
    """Adapters fitted to the unlabelled pool alone, by method; may be shared by training data with the same pool."""

    @classmethod
    def held_out(
        cls,
        image_features: ImageFeatures,
        labels: np.ndarray,
        pool_features: np.ndarray,
        fitted_to_pool: dict[str, FittedAdapter] | None = None,
    ) -> "TrainingData":
        """Return training data in which labelled images (n, d) are held out fold by fold."""
        return cls(
            Examples(image_features, labels, pool_features),
            stratified_folds(labels, _FOLDS),
            {} if fitted_to_pool is None else fitted_to_pool,
        )


async def no_progress(done: int, total: int) -> None:
    """Report progress to nobody."""


class MethodComparer:
    """Runs every method on the same images.

    Args:
        models: in service.
        classifiers: of the methods that learn from text alone.
        pipeline: predicts with them.
        fits: runs what takes long on few cores.
    """

    def __init__(self, models: ModelRegistry, classifiers: ClassifierCache, pipeline: Pipeline, fits: FitCache) -> None:
        self._models = models
        self._classifiers = classifiers
        self._pipeline = pipeline
        self._fits = fits

    async def compare(
        self,
        task: Task,
        image_features: ImageFeatures,
        labels: Sequence[int],
        advance: Advance = no_progress,
        training: TrainingData | None = None,
    ) -> Comparison:
        """Report on every method of ``METHODS`` for n labelled images.

        The control runs once for each number of prompts per class that a method with descriptions has, with seven
        seeds, whose mean counts.

        Args:
            task: the classes, model and templates; its method does not matter.
            image_features: unit rows (n, d) of the task's model.
            labels: the true class of each image, by index.
            advance: called after each method.
            training: what methods may learn from; without it, methods that need examples do not run.

        Raises:
            InvalidFieldError: no images.
        """
        truth = np.asarray(labels)
        if not len(truth):
            raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")
        training = training or TrainingData()
        scores, not_run = await self.score_all(task, image_features, training, advance)
        controls: dict[int, list[MethodScores]] = {}
        if any(entry.descriptions or entry.features for entry in task.classes):
            counts = sorted(
                {
                    _control_size(each.prompts_per_class)
                    for name, each in scores.items()
                    if METHODS[name].uses_descriptions
                }
            )
            for count in counts:
                controls[count] = [
                    await self._control_scores(task, image_features, count, seed) for seed in range(CONTROL_SEEDS)
                ]
                await advance(len(scores) + len(controls), len(scores) + len(counts))
        return await self.run(partial(_compared, task, truth, scores, controls, not_run, training))

    async def score_all(
        self,
        task: Task,
        image_features: ImageFeatures,
        training: TrainingData,
        advance: Advance = no_progress,
        *,
        only: Need | None = None,
    ) -> tuple[dict[str, MethodScores], tuple[str, ...]]:
        """Return the scores of every method except the control, and which methods did not run and why.

        With ``only``, methods run only if they learn from such examples.
        """
        scores: dict[str, MethodScores] = {}
        not_run = []
        names = [
            name
            for name, method in METHODS.items()
            if not method.is_control and (only is None or only in method.learns)
        ]
        default = with_method(task, DEFAULT_METHOD)
        text = await self.class_rows(task)
        pool = training.examples.pool_features
        # Built once for all methods that use neighbours.
        index = await self.run(partial(NeighbourIndex, pool)) if len(pool) else None
        for number, name in enumerate(names):
            method = METHODS[name]
            missing = method.learns - _available(training.examples)
            if missing:
                if training.examples is not NO_EXAMPLES:
                    not_run.append(f"{name}: there are no {' and no '.join(sorted(missing))}")
                continue
            if method.stateful:
                continue  # its predictions depend on the order of the images, which has no meaning here
            try:
                if method.learns:
                    fitted = await self._fitted_scores(method, default, text, image_features, training, index)
                    prompts = scores[DEFAULT_METHOD].prompts_per_class if DEFAULT_METHOD in scores else 0.0
                    scores[name] = replace(fitted, prompts_per_class=prompts)
                else:
                    scores[name] = await self._text_scores(with_method(task, name), image_features)
            except TooLargeError as error:
                not_run.append(f"{name}: {error.message}")
            await advance(number + 1, len(names))
        await advance(len(names), len(names))
        return scores, tuple(not_run)

    async def class_rows(self, task: Task) -> np.ndarray:
        """Return one unit text row per class (c, d), as zero-shot uses them."""
        return await self._classifiers.class_rows(with_method(task, DEFAULT_METHOD))

    async def label_scores(self, task: Task, image_features: ImageFeatures) -> tuple[Probabilities, Sequence[float]]:
        """Return the scores (n, c) of images that may have several labels, and the thresholds (c,) without examples."""
        several = replace(with_method(task, DEFAULT_METHOD), scoring=scoring_of_several(task.classes))
        classes = await self._pipeline.predict(several, image_features)
        return classes.scores, several.scoring.thresholds

    async def rejection(self, task: Task, zero_shot: MethodScores, training: TrainingData) -> Rejection:
        """Return how images of none of the classes are rejected, from the labelled images, each held out in turn.

        By the largest cosine with a class mean if each class has two images, so that one is left when the other is held
        out; otherwise by the largest similarity with the text.
        """
        labels, folds = training.examples.support_labels, training.folds
        if folds is None or zero_shot.similarities is None:
            raise ValueError("rejection needs held-out images and the similarities of zero-shot")
        if np.bincount(labels, minlength=len(task.classes)).min() < _IMAGES_FOR_MEANS:
            return Rejection.of_held_out(RejectBy.SIMILARITY, zero_shot.similarities.max(axis=1))
        encoder, text = self._models.get(task.model).encoder, await self.class_rows(task)
        held_out = await self.run(partial(predict_held_out, ClassMeans, text, training.examples, folds, encoder))
        return Rejection.of_held_out(RejectBy.CLASS_MEAN, held_out.logits.max(axis=1))

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Run work that takes long on few cores."""
        return await self._fits.run(work)

    async def _text_scores(self, task: Task, image_features: ImageFeatures) -> MethodScores:
        if is_in_background():  # the classifier is built as for requests, which may need the same texts
            await self._models.store_texts(task.model, await asyncio.to_thread(texts_of, task))
        classifier = await self._classifiers.get(task)
        began = time.perf_counter()
        classes = await self._pipeline.predict(task, image_features)
        seconds = time.perf_counter() - began
        return MethodScores(
            classes.logits,
            self._models.get(task.model).encoder.logit_bias is not None,
            round(classifier.prompt_count / len(task.classes), 1),
            1000 * seconds / len(image_features),
            classes.warnings,
            classes.similarities,
        )

    async def _fitted_scores(
        self,
        method: Method,
        task: Task,
        text: np.ndarray,
        image_features: ImageFeatures,
        training: TrainingData,
        index: NeighbourIndex | None,
    ) -> MethodScores:
        encoder = self._models.get(task.model).encoder
        make = partial(method.example_adapter, dict(method.read_options({})))
        if training.folds is not None and Need.SUPPORT in method.learns:
            timed = await self.run(
                partial(predict_held_out, make, text, training.examples, training.folds, encoder, index)
            )
        else:
            fitted = training.fitted_to_pool.get(method.name)
            if fitted is None:
                fitted = await self.run(partial(fit, make(), text, training.examples, encoder, index))
            if Need.SUPPORT not in method.learns:
                training.fitted_to_pool[method.name] = fitted
            timed = await self.run(partial(predict, fitted, image_features))
        return MethodScores(
            timed.logits,
            sigmoid=False,  # methods that learn from examples assume that an image belongs to one class
            prompts_per_class=0.0,
            ms_per_image=1000 * timed.seconds / len(image_features),
            warnings=timed.warnings,
        )

    async def _control_scores(self, task: Task, image_features: ImageFeatures, count: int, seed: int) -> MethodScores:
        options = {"descriptors": float(count), "seed": float(seed)}
        return await self._text_scores(with_method(task, CONTROL, options), image_features)


def report_methods(
    scores: Mapping[str, MethodScores], classnames: Sequence[str], truth: np.ndarray, *, per_class: bool = True
) -> list[MethodReport]:
    """Return each method's report, compared with zero-shot; p-values are not corrected yet.

    Args:
        scores: by method, zero-shot among them.
        classnames: c names.
        truth: the true class of each image (n,).
        per_class: include the rows of the classes and the confusion matrix.
    """
    ranked = {name: method.ranked for name, method in scores.items()}
    correct = {name: (rows[:, 0] == truth).astype(np.float64) for name, rows in ranked.items()}
    return [
        MethodReport(
            name,
            method.prompts_per_class,
            evaluate(classnames, truth, ranked[name], method.scores, per_class=per_class),
            bootstrap_interval(correct[name]),
            None if name == DEFAULT_METHOD else paired_difference(correct[name], correct[DEFAULT_METHOD]),
            None,
            method.ms_per_image,
            method.warnings,
        )
        for name, method in scores.items()
    ]


def _compared(
    task: Task,
    truth: np.ndarray,
    scores: Mapping[str, MethodScores],
    controls: Mapping[int, Sequence[MethodScores]],
    not_run: tuple[str, ...],
    training: TrainingData,
) -> Comparison:
    """Return the comparison of the methods with zero-shot and with the controls, by their number of prompts."""
    reports = report_methods(scores, task.classnames, truth)
    control_accuracy = {
        count: np.mean([draw.ranked[:, 0] == truth for draw in draws], axis=0) for count, draws in controls.items()
    }
    baseline = (scores[DEFAULT_METHOD].ranked[:, 0] == truth).astype(np.float64)
    for number, report in enumerate(reports):
        accuracy = control_accuracy.get(_control_size(report.prompts_per_class))
        if METHODS[report.method].uses_descriptions and accuracy is not None:
            correct = (scores[report.method].ranked[:, 0] == truth).astype(np.float64)
            reports[number] = replace(report, to_control=paired_difference(correct, accuracy))
    for count, accuracy in control_accuracy.items():
        draw = controls[count][0]
        evaluation = evaluate(task.classnames, truth, draw.ranked, draw.scores)
        reports.append(
            MethodReport(
                f"{CONTROL} ({count} random, mean of {CONTROL_SEEDS})",
                count,
                replace(evaluation, top1=float(accuracy.mean())),
                bootstrap_interval(accuracy),
                paired_difference(accuracy, baseline),
                None,
                draw.ms_per_image,
            )
        )
    methods = corrected(reports)
    examples = training.examples
    verdict = _verdict(methods, described=bool(controls))
    if examples is not NO_EXAMPLES:
        verdict += (_verdict_on_examples(methods),)
    return Comparison(
        len(truth),
        task.model,
        methods,
        not_run,
        verdict,
        len(examples.support_features),
        len(examples.pool_features),
        0 if training.folds is None else int(training.folds.max()) + 1,
    )


def _available(examples: Examples) -> frozenset[Need]:
    kinds = ((Need.SUPPORT, examples.support_features), (Need.POOL, examples.pool_features))
    return frozenset(need for need, features in kinds if len(features))


def _control_size(prompts_per_class: float) -> int:
    largest = METHODS[CONTROL].options["descriptors"].maximum
    return int(min(max(2, round(prompts_per_class)), largest))


def corrected(reports: Sequence[MethodReport]) -> tuple[MethodReport, ...]:
    """Return the reports with p-values corrected for the number of comparisons (Holm).

    A method that is right on exactly the same images as the other is not a comparison, and keeps its p-value of 1.
    """
    to_baseline = _corrected([report.to_baseline for report in reports])
    to_control = _corrected([report.to_control for report in reports])
    return tuple(
        replace(report, to_baseline=baseline, to_control=control)
        for report, baseline, control in zip(reports, to_baseline, to_control, strict=True)
    )


def _corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    compared = [each for each in differences if each is not None and (each.low, each.high) != (0, 0)]
    p_values = dict(zip(map(id, compared), holm([each.p for each in compared]), strict=True))
    return [each and replace(each, p=p_values.get(id(each), 1.0)) for each in differences]


def _verdict(methods: Sequence[MethodReport], *, described: bool) -> tuple[str, ...]:
    if not described:
        return ("No class of this label set has descriptions; only the use of templates is compared.",)
    candidates = [report for report in methods if report.to_baseline is not None and report.to_control is not None]
    if not candidates:
        return ("No method with descriptions could be run.",)
    best = max(candidates, key=lambda report: report.evaluation.top1)
    baseline, control = best.to_baseline, best.to_control
    assert baseline is not None
    assert control is not None
    summary = (
        f"The best method with descriptions is {best.method}: {points(baseline)} compared with {DEFAULT_METHOD},"
        f" and {points(control)} compared with {CONTROL} with as many prompts."
    )
    if baseline.p < SIGNIFICANT and baseline.mean < 0:
        conclusion = f"Descriptions lower the accuracy on these images. Use {DEFAULT_METHOD}."
    elif baseline.p >= SIGNIFICANT:
        conclusion = (
            "The difference may be due to chance on these images: keep"
            f" {DEFAULT_METHOD}, or evaluate on more labelled images."
        )
    elif control.p < SIGNIFICANT and control.mean > 0:
        conclusion = f"The content of the descriptions helps: use {best.method}."
    else:
        conclusion = (
            f"{best.method} is better than {DEFAULT_METHOD}, but random words do as well within chance: the number of"
            " prompts helps, not the content of the descriptions."
        )
    return summary, conclusion


def _verdict_on_examples(methods: Sequence[MethodReport]) -> str:
    learning = [report for report in methods if report.method in METHODS and METHODS[report.method].learns]
    if not learning:
        return "No method that learns from examples could be run."
    best = max(learning, key=lambda report: report.evaluation.top1)
    assert best.to_baseline is not None
    summary = (
        f"The best method with examples is {best.method}: {points(best.to_baseline)} compared with {DEFAULT_METHOD}."
    )
    if best.to_baseline.p >= SIGNIFICANT:
        return f"{summary} The difference may be due to chance on these images."
    return summary if best.to_baseline.mean > 0 else f"{summary} The examples lower the accuracy on these images."


def points(difference: Difference) -> str:
    """Return a difference of accuracies in words."""
    interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.mean:+.1f} points (95 % interval {interval}, p = {difference.p:.2g})"
