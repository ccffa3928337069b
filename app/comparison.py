"""Every method on the same labelled images, and in words whether descriptions help."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from app.errors import TooLargeError
from app.evaluation import Difference, Evaluation, bootstrap_interval, evaluate, holm, paired_difference
from app.methods import METHODS
from app.service import DEFAULT_METHOD, Question, Service
from app.task import ImageFeatures, Task

CONTROL = "waffle"
# As in the paper of WaffleCLIP.
CONTROL_SEEDS = 7
_SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class MethodReport:
    """One method's row.

    ``prompts_per_class`` is a mean; ``to_baseline`` and ``to_control`` compare with zero-shot, and with the control of
    as many prompts per class; their p-values are corrected for the number of methods compared.
    """

    method: str
    prompts_per_class: float
    evaluation: Evaluation
    interval: tuple[float, float]
    to_baseline: Difference | None
    to_control: Difference | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every method, the default first, and what follows from that."""

    images: int
    model: str
    methods: tuple[MethodReport, ...]
    not_run: tuple[str, ...]
    verdict: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, tuples, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Comparison":
        """Return the comparison that was told as ``to_json`` does."""
        return TypeAdapter(Comparison).validate_python(told)


async def _unheard(done: int, total: int) -> None:
    """Tell nobody."""


async def compare(
    service: Service,
    question: Question,
    image_features: ImageFeatures,
    labels: Sequence[int],
    advance: Callable[[int, int], Awaitable[object]] = _unheard,
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
    """
    truth = np.asarray(labels)
    ranked: dict[str, np.ndarray] = {}
    prompts: dict[str, float] = {}
    not_run = []
    names = [name for name, method in METHODS.items() if not method.is_control]
    for name in names:
        task = await service.plan(replace(question, method=name))
        try:
            ranked[name] = await service.pipeline.rank(task, image_features)
        except TooLargeError as error:
            not_run.append(f"{name}: {error.message}")
            continue
        prompts[name] = await _prompts_per_class(service, task)
        await advance(len(ranked), len(names))
    described = any(entry.descriptions or entry.features for entry in task.classes)
    correct = {name: (order[:, 0] == truth).astype(np.float64) for name, order in ranked.items()}
    control: dict[int, np.ndarray] = {}
    control_orders: dict[int, np.ndarray] = {}
    if described:
        counts = sorted({_control_size(prompts[name]) for name in ranked if METHODS[name].uses_descriptions})
        for count in counts:
            orders = [await _control(service, question, image_features, count, seed) for seed in range(CONTROL_SEEDS)]
            control[count] = np.mean([order[:, 0] == truth for order in orders], axis=0)
            control_orders[count] = orders[0]
            await advance(len(names) + len(control), len(names) + len(counts))
    reports = []
    for name, order in ranked.items():
        counterpart = control.get(_control_size(prompts[name])) if METHODS[name].uses_descriptions else None
        reports.append(
            MethodReport(
                name,
                prompts[name],
                evaluate(task.classnames, truth, order),
                bootstrap_interval(correct[name]),
                None if name == DEFAULT_METHOD else paired_difference(correct[name], correct[DEFAULT_METHOD]),
                None if counterpart is None else paired_difference(correct[name], counterpart),
            )
        )
    for count, share in control.items():
        evaluation = evaluate(task.classnames, truth, control_orders[count])
        reports.append(
            MethodReport(
                f"{CONTROL} ({count} random, mean of {CONTROL_SEEDS})",
                count,
                replace(evaluation, top1=float(share.mean())),
                bootstrap_interval(share),
                paired_difference(share, correct[DEFAULT_METHOD]),
                None,
            )
        )
    methods = _corrected(reports)
    return Comparison(len(truth), task.model, methods, tuple(not_run), _verdict(methods, described=described))


async def _prompts_per_class(service: Service, task: Task) -> float:
    classifier = await service.pipeline.classifier(task)
    return round(classifier.prompt_count / len(task.classes), 1)


def _control_size(prompts_per_class: float) -> int:
    most = METHODS[CONTROL].options["descriptors"].most
    return int(min(max(2, round(prompts_per_class)), most))


async def _control(
    service: Service, question: Question, image_features: ImageFeatures, count: int, seed: int
) -> np.ndarray:
    options = {"descriptors": float(count), "seed": float(seed)}
    task = await service.plan(replace(question, method=CONTROL, options=options))
    return await service.pipeline.rank(task, image_features)


def _corrected(reports: Sequence[MethodReport]) -> tuple[MethodReport, ...]:
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
        f"The best method with descriptions is {best.method}: {_points(baseline)} against {DEFAULT_METHOD}, and"
        f" {_points(control)} against {CONTROL} with as many prompts."
    )
    if baseline.p < _SIGNIFICANT and baseline.mean < 0:
        conclusion = f"Descriptions hurt here: even the best use of them is worse. Use {DEFAULT_METHOD}."
    elif baseline.p >= _SIGNIFICANT:
        conclusion = (
            f"That is no difference beyond chance on these images: keep {DEFAULT_METHOD}, or bring more labelled ones."
        )
    elif control.p < _SIGNIFICANT and control.mean > 0:
        conclusion = f"The descriptions help, by what they say: use {best.method}."
    else:
        conclusion = (
            f"{best.method} is better than {DEFAULT_METHOD}, but random words do as well within chance: it is the"
            " number of prompts that helps, not what the descriptions say."
        )
    return told, conclusion


def _points(difference: Difference) -> str:
    interval = f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
    return f"{100 * difference.mean:+.1f} points (95 % interval {interval}, p = {difference.p:.2g})"
