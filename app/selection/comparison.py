"""Every method on the same labelled images, and in words whether descriptions and examples help."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from app.adapters._base import NO_EXAMPLES, Examples, probabilities
from app.adapters._examples import Need
from app.classification.methods import METHODS, Method
from app.classification.service import DEFAULT_METHOD, ClassifyRequest, Service
from app.errors import InvalidFieldError, TooLargeError
from app.fewshot.fitting import FittedAdapter, answer, learn, predict_held_out
from app.fewshot.neighbours import NeighbourIndex
from app.scoring.measures import (
    Difference,
    Evaluation,
    bootstrap_interval,
    evaluate,
    holm,
    paired_difference,
)
from app.scoring.numerics import stratified_folds
from app.types import ImageFeatures, Logits, Probabilities, Task

CONTROL = "waffle"
# As in the paper of WaffleCLIP.
CONTROL_SEEDS = 7
SIGNIFICANT = 0.05
_FOLDS = 5
# As many as accuracy among the first five needs.
_RANKED = 5


@dataclass(frozen=True, slots=True)
class MethodReport:
    """One method's row.

    ``prompts_per_class`` is a mean; ``to_baseline`` and ``to_control`` compare with zero-shot, and with the control of
    as many prompts per class; their p-values are corrected for the number of methods compared. ``ms_per_image`` is the
    time that scores took once the features were there; ``warnings`` are those of the answers.
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
    """Every method, the default first, and what follows from that.

    ``labelled`` and ``unlabelled`` count the examples that methods could learn from; ``folds`` into which the labelled
    ones were split, each being answered by what was learned from the others, or 0 where other images were answered.
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
    def from_json(cls, told: Mapping[str, Any]) -> "Comparison":
        """Return the comparison that was told as ``to_json`` does."""
        return TypeAdapter(Comparison).validate_python(told)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What one method says of n images: logits (n, c), and ``sigmoid`` where each becomes a score by itself."""

    logits: Logits
    sigmoid: bool
    prompts_per_class: float
    ms_per_image: float
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> np.ndarray:
        """Class indices (n, min(5, c)), best first."""
        return np.argsort(-self.logits, axis=1, kind="stable")[:, :_RANKED]

    @property
    def scores(self) -> Probabilities:
        """The probabilities (n, c), before calibration."""
        return probabilities(self.logits, sigmoid=self.sigmoid)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """What methods may learn from, and which of the images they are asked about.

    Either ``folds`` (n,) is given, the n images themselves being the labelled ones: those of a fold are answered by
    what was learned from all other folds. Or they are other images than the examples.
    """

    examples: Examples = NO_EXAMPLES
    folds: np.ndarray | None = None
    of_pool: dict[str, FittedAdapter] = field(default_factory=dict)
    """What methods have learned from the pool alone; may be shared between lessons with the same pool."""

    @classmethod
    def held_out(
        cls,
        image_features: ImageFeatures,
        labels: np.ndarray,
        pool_features: np.ndarray,
        of_pool: dict[str, FittedAdapter] | None = None,
    ) -> "TrainingData":
        """Return the lessons in which labelled images (n, d) are asked about by turns."""
        return cls(
            Examples(image_features, labels, pool_features),
            stratified_folds(labels, _FOLDS),
            {} if of_pool is None else of_pool,
        )


async def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


async def compare(
    service: Service,
    question: ClassifyRequest,
    image_features: ImageFeatures,
    labels: Sequence[int],
    advance: Callable[[int, int], Awaitable[object]] = no_progress,
    lessons: TrainingData | None = None,
) -> Comparison:
    """Run every method of ``METHODS`` on n images.

    The control is run for each number of prompts per class that a method with descriptions has, and with seven seeds,
    the mean of which counts.

    Args:
        service: to plan and classify with.
        question: the classes, model and templates; its method does not count.
        image_features: unit rows (n, d) of the question's model.
        labels: the true class of each image, by index.
        advance: called after each method with how many were run, and how many there are as far as is known.
        lessons: what methods may learn from; by default nothing, and those that need examples are not run.

    Raises:
        InvalidFieldError: no images.
    """
    truth = np.asarray(labels)
    if not len(truth):
        raise InvalidFieldError.of("labels", "there are no labelled images to evaluate; give at least one")
    lessons = lessons or TrainingData()
    answers, not_run, task = await answer_all(service, question, image_features, lessons, advance)
    controls: dict[int, list[Answers]] = {}
    if any(entry.descriptions or entry.features for entry in task.classes):
        counts = sorted(
            {_control_size(each.prompts_per_class) for name, each in answers.items() if METHODS[name].uses_descriptions}
        )
        for count in counts:
            controls[count] = [
                await _control(service, question, image_features, count, seed) for seed in range(CONTROL_SEEDS)
            ]
            await advance(len(answers) + len(controls), len(answers) + len(counts))
    return await service.pipeline.learner.run(partial(_compared, task, truth, answers, controls, not_run, lessons))


def _compared(
    task: Task,
    truth: np.ndarray,
    answers: Mapping[str, Answers],
    controls: Mapping[int, Sequence[Answers]],
    not_run: tuple[str, ...],
    lessons: TrainingData,
) -> Comparison:
    """Return every figure of what the methods, and the controls by their number of prompts, have answered."""
    best = {name: each.best for name, each in answers.items()}
    correct = {name: (each[:, 0] == truth).astype(np.float64) for name, each in best.items()}
    shares = {count: np.mean([each.best[:, 0] == truth for each in draws], axis=0) for count, draws in controls.items()}
    reports = []
    for name, told in answers.items():
        uses_descriptions = METHODS[name].uses_descriptions
        counterpart = shares.get(_control_size(told.prompts_per_class)) if uses_descriptions else None
        reports.append(
            MethodReport(
                name,
                told.prompts_per_class,
                evaluate(task.classnames, truth, best[name], told.scores),
                bootstrap_interval(correct[name]),
                None if name == DEFAULT_METHOD else paired_difference(correct[name], correct[DEFAULT_METHOD]),
                None if counterpart is None else paired_difference(correct[name], counterpart),
                told.ms_per_image,
                told.warnings,
            )
        )
    for count, share in shares.items():
        told = controls[count][0]
        evaluation = evaluate(task.classnames, truth, told.best, told.scores)
        reports.append(
            MethodReport(
                f"{CONTROL} ({count} random, mean of {CONTROL_SEEDS})",
                count,
                replace(evaluation, top1=float(share.mean())),
                bootstrap_interval(share),
                paired_difference(share, correct[DEFAULT_METHOD]),
                None,
                told.ms_per_image,
            )
        )
    methods = corrected(reports)
    examples = lessons.examples
    verdict = _verdict(methods, described=bool(controls))
    if examples is not NO_EXAMPLES:
        verdict += (_of_examples(methods),)
    return Comparison(
        len(truth),
        task.model,
        methods,
        not_run,
        verdict,
        len(examples.support_features),
        len(examples.pool_features),
        0 if lessons.folds is None else int(lessons.folds.max()) + 1,
    )


async def answer_all(
    service: Service,
    question: ClassifyRequest,
    image_features: ImageFeatures,
    lessons: TrainingData,
    advance: Callable[[int, int], Awaitable[object]] = no_progress,
    *,
    only: Need | None = None,
) -> tuple[dict[str, Answers], tuple[str, ...], Task]:
    """Return what every method but the control says of n images, which were not run and why, and the default's task.

    With ``only``, no other methods are run than those that learn from such examples.
    """
    answers: dict[str, Answers] = {}
    not_run = []
    names = [
        name for name, method in METHODS.items() if not method.is_control and (only is None or only in method.learns)
    ]
    default = await service.plan(replace(question, method=DEFAULT_METHOD))
    text = await service.pipeline.class_rows(default)
    pool = lessons.examples.pool_features
    # Made once for all methods that look at neighbours.
    index = await service.pipeline.learner.run(partial(NeighbourIndex, pool)) if len(pool) else None
    for number, name in enumerate(names):
        method = METHODS[name]
        missing = method.learns - _available(lessons.examples)
        if missing:
            if lessons.examples is not NO_EXAMPLES:
                not_run.append(f"{name}: there are no {' and no '.join(sorted(missing))}")
            continue
        if method.stateful:
            continue  # its answers depend on the order of the images, which means nothing here
        try:
            if method.learns:
                told = await _learned_answers(service, method, default, text, image_features, lessons, index)
                prompts = answers[DEFAULT_METHOD].prompts_per_class if DEFAULT_METHOD in answers else 0.0
                answers[name] = replace(told, prompts_per_class=prompts)
            else:
                task = await service.plan(replace(question, method=name))
                answers[name] = await _text_answers(service, task, image_features)
        except TooLargeError as error:
            not_run.append(f"{name}: {error.message}")
        await advance(number + 1, len(names))
    await advance(len(names), len(names))
    return answers, tuple(not_run), default


def _available(examples: Examples) -> frozenset[Need]:
    kinds = ((Need.SUPPORT, examples.support_features), (Need.POOL, examples.pool_features))
    return frozenset(need for need, features in kinds if len(features))


async def _text_answers(service: Service, task: Task, image_features: ImageFeatures) -> Answers:
    classifier = await service.pipeline.classifier(task)
    began = time.perf_counter()
    predicted = await service.pipeline.predict(task, image_features)
    taken = time.perf_counter() - began
    return Answers(
        predicted.logits,
        service.pipeline.models[task.model].encoder.logit_bias is not None,
        round(classifier.prompt_count / len(task.classes), 1),
        1000 * taken / len(image_features),
        predicted.warnings,
    )


async def _learned_answers(
    service: Service,
    method: Method,
    task: Task,
    text: np.ndarray,
    image_features: ImageFeatures,
    lessons: TrainingData,
    index: NeighbourIndex | None,
) -> Answers:
    encoder = service.pipeline.models[task.model].encoder
    make = partial(method.example_adapter, dict(method.read_options({})))
    run = service.pipeline.learner.run
    if lessons.folds is not None and Need.SUPPORT in method.learns:
        told = await run(partial(predict_held_out, make, text, lessons.examples, lessons.folds, encoder, index))
    else:
        learned = lessons.of_pool.get(method.name)
        if learned is None:
            learned = await run(partial(learn, make(), text, lessons.examples, encoder, index))
        if Need.SUPPORT not in method.learns:
            lessons.of_pool[method.name] = learned
        told = await run(partial(answer, learned, image_features))
    return Answers(
        told.logits,
        False,  # noqa: FBT003 - an image is of one class to methods that learn
        0.0,
        1000 * told.seconds / len(image_features),
        told.warnings,
    )


def _control_size(prompts_per_class: float) -> int:
    most = METHODS[CONTROL].options["descriptors"].maximum
    return int(min(max(2, round(prompts_per_class)), most))


async def _control(
    service: Service, question: ClassifyRequest, image_features: ImageFeatures, count: int, seed: int
) -> Answers:
    options = {"descriptors": float(count), "seed": float(seed)}
    return await _text_answers(
        service, await service.plan(replace(question, method=CONTROL, options=options)), image_features
    )


def corrected(reports: Sequence[MethodReport]) -> tuple[MethodReport, ...]:
    """Return the reports with p-values corrected for their number."""
    to_baseline = iter(holm([each.to_baseline.p for each in reports if each.to_baseline is not None]))
    to_control = iter(holm([each.to_control.p for each in reports if each.to_control is not None]))
    return tuple(
        replace(
            each,
            to_baseline=each.to_baseline and replace(each.to_baseline, p=next(to_baseline)),
            to_control=each.to_control and replace(each.to_control, p=next(to_control)),
        )
        for each in reports
    )


def _verdict(methods: Sequence[MethodReport], *, described: bool) -> tuple[str, ...]:
    if not described:
        return ("No class of this label set has descriptions; what is compared is how templates are used.",)
    candidates = [each for each in methods if each.to_baseline is not None and each.to_control is not None]
    if not candidates:
        return ("No method with descriptions could be run.",)
    best = max(candidates, key=lambda each: each.evaluation.top1)
    baseline, control = best.to_baseline, best.to_control
    assert baseline is not None
    assert control is not None
    told = (
        f"The best method with descriptions is {best.method}: {points(baseline)} against {DEFAULT_METHOD}, and"
        f" {points(control)} against {CONTROL} with as many prompts."
    )
    if baseline.p < SIGNIFICANT and baseline.mean < 0:
        conclusion = f"Descriptions hurt here: even the best use of them is worse. Use {DEFAULT_METHOD}."
    elif baseline.p >= SIGNIFICANT:
        conclusion = (
            f"That is no difference beyond chance on these images: keep {DEFAULT_METHOD}, or bring more labelled ones."
        )
    elif control.p < SIGNIFICANT and control.mean > 0:
        conclusion = f"The descriptions help, by what they say: use {best.method}."
    else:
        conclusion = (
            f"{best.method} is better than {DEFAULT_METHOD}, but random words do as well within chance: it is the"
            " number of prompts that helps, not what the descriptions say."
        )
    return told, conclusion


def _of_examples(methods: Sequence[MethodReport]) -> str:
    taught = [each for each in methods if each.method in METHODS and METHODS[each.method].learns]
    if not taught:
        return "No method that learns from examples could be run."
    best = max(taught, key=lambda each: each.evaluation.top1)
    assert best.to_baseline is not None
    told = f"The best method with examples is {best.method}: {points(best.to_baseline)} against {DEFAULT_METHOD}."
    if best.to_baseline.p >= SIGNIFICANT:
        return f"{told} That is no difference beyond chance on these images."
    return told if best.to_baseline.mean > 0 else f"{told} The examples hurt here."


def points(difference: Difference) -> str:
    """Return a difference of accuracies in words."""
    interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.mean:+.1f} points (95 % interval {interval}, p = {difference.p:.2g})"
