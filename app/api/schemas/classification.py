"""Requests to classify images, and their results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.api.schemas._base import Request, Response
from app.api.schemas.images import ImageBody
from app.api.schemas.problems import Problem, ProblemOf
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import own_name
from app.types import (
    Classification,
    ImageResult,
    LabelExplanation,
    PromptContribution,
    Scoring,
)

# Of any method; each wrong one is told.
_MAX_OPTIONS = 100


def _parsed(given: object) -> object:
    """Read what a form or a query can only hold as text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("json", 'must be a JSON object such as {{"beta": 0.7}}') from error
    if isinstance(given, Mapping) and len(given) > _MAX_OPTIONS:
        raise PydanticCustomError("too_many_fields", f"has {len(given):,} entries; no method has so many options")
    return given


class ClassifyFields(Request):
    """What to do with the images; the same fields in a form, in JSON and in a query string."""

    labels: list[str] | None = Field(
        None,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Words to choose from. In a form or a query: a JSON array, or comma separated.",
        examples=[["cat", "dog", "coffee cup"]],
    )
    label_set: str | None = Field(
        None,
        description="Or a stored label set: `name` or `name@version`. Without it and without labels, names are found in"
        " a caption database.",
        examples=["pets"],
    )
    database: str | None = Field(
        None, description="Without labels: the caption database in which names are found; by default `wordnet`."
    )
    group: bool = Field(
        default=False, description="Without labels: find few names that the images of the request share."
    )
    method: str | None = Field(
        None,
        description="A method of `GET /v1/methods`, or `auto` for the one that the label set's example images are"
        " evidence for; by default `auto` where there are such images, else `zero-shot`, and `cased` without labels.",
    )
    model: str | None = Field(None, description="A model of `GET /v1/models`; the first by default.")
    template: str | None = Field(
        None,
        description="A template set (`photo`, `ensemble`, `imagenet`) or one template with `{}` for the class name.",
        examples=["a photo of a {}."],
    )
    top_k: int | None = Field(None, ge=1, le=100_000, description="Predictions per image, best first; 5 by default.")
    explain: bool = Field(
        default=False, description="Also tell which prompts spoke for the best labels, and which against them."
    )
    options: Annotated[dict[str, float], BeforeValidator(_parsed)] = Field(
        {},
        description="The method's own, as `GET /v1/methods` lists them; in a form or a query, a JSON object.",
        examples=[{"beta": 0.7}],
    )
    reject_below: float | None = Field(
        None, ge=0, le=1, description="An image whose best score is below this is `rejected`: none of the classes."
    )
    false_rejection_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Or: reject as many as keeps the rate at which images of a class are rejected at most at this;"
        " needs labelled example images.",
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Also return the set of labels that holds the true one with this probability; needs labelled"
        " example images.",
        examples=[0.95],
    )


class ClassifyBody(ClassifyFields):
    """A JSON request."""

    images: list[ImageBody] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="One or more images."
    )


class PredictionBody(Response):
    """One class for one image."""

    label: str
    score: float = Field(
        description="Probability in [0, 1]: a softmax over the labels, or each by itself for sigmoid models."
    )
    similarity: float = Field(description="Cosine between the image and the class, in [-1, 1].")


class PromptContributionBody(Response):
    """What one prompt said of an image."""

    prompt: str
    source: str = Field(description="`template`, `class prompt`, `description`, `feature` or `random`.")
    cosine: float
    weight: float = Field(description="Weights times cosines of all prompts of a label add up to its similarity.")


class LabelExplanationBody(Response):
    """Why a label got its similarity."""

    label: str
    similarity: float
    rival: str | None = Field(description="The second best label for the best one, the best for any other.")
    rival_similarity: float | None
    supporting: list[PromptContributionBody] = Field(
        description="Prompts nearer to the image than the rival, those that make the most difference first; at most 10."
    )
    opposing: list[PromptContributionBody] = Field(
        description="Prompts that are not nearer than the rival; at most 10."
    )

    @classmethod
    def of(cls, explanation: LabelExplanation) -> "LabelExplanationBody":
        """Return the explanation as it is told to callers."""
        return cls(
            label=explanation.label,
            similarity=explanation.similarity,
            rival=explanation.rival,
            rival_similarity=explanation.rival_similarity,
            supporting=[_spoken(each) for each in explanation.supporting],
            opposing=[_spoken(each) for each in explanation.opposing],
        )


def _spoken(prompt: PromptContribution) -> PromptContributionBody:
    return PromptContributionBody(prompt=prompt.text, source=prompt.source, cosine=prompt.cosine, weight=prompt.weight)


class NearCaptionBody(Response):
    """A caption near the image."""

    caption: str
    similarity: float = Field(description="Cosine between the image and the caption.")
    suggested: list[str] = Field(description="Which of the ten best predictions it suggested.")


class ExplanationBody(Response):
    """Which prompts spoke for the best labels, and which against them; or which captions the names were found in."""

    labels: list[LabelExplanationBody] = Field(
        description="The best first; at least two where there are two. None where names were found."
    )
    captions: list[NearCaptionBody] = Field(
        [],
        description="Where names were found: the captions near the image, the nearest first, each once.",
    )


class OutOfVocabularyBody(Response):
    """How little an image looks like any of the classes; both are higher for images of something else."""

    mcm: float = Field(
        description="1 less the largest softmax of the similarities, in [0, 1): maximum concept matching."
    )
    energy: float = Field(description="Minus the logsumexp of the logits, which may have any value.")


class ResultBody(Response):
    """What became of one image."""

    predictions: list[PredictionBody]
    out_of_vocabulary: OutOfVocabularyBody | None = Field(
        None, description="Null where the image could not be read, and where names were found."
    )
    rejected: bool | None = Field(
        None, description="Whether the image is taken for none of the classes, where a threshold or a rate was given."
    )
    prediction_set: list[str] | None = Field(
        None, description="The labels that the true one is among, best first, where `coverage` was given."
    )
    explanation: ExplanationBody | None = Field(None, description="Where `explain` asked for it.")
    warnings: list[str] = Field([])
    error: Problem | None = Field(None, description="Why this image could not be read; the others are answered.")

    @classmethod
    def of(cls, result: ImageResult, problem: ProblemOf, warnings: Sequence[str]) -> "ResultBody":
        """Return one image's result, with its error as a problem."""
        return cls(
            predictions=[
                PredictionBody(label=each.label, score=each.score, similarity=each.similarity)
                for each in result.predictions
            ],
            out_of_vocabulary=None
            if result.out_of_vocabulary is None
            else OutOfVocabularyBody(mcm=result.out_of_vocabulary.mcm, energy=result.out_of_vocabulary.energy),
            rejected=result.rejected,
            prediction_set=None if result.prediction_set is None else list(result.prediction_set),
            explanation=_explanation(result),
            warnings=list(warnings),
            error=None if result.error is None else Problem(**problem(result.error)),
        )

    @classmethod
    def failed(cls, problem: Problem) -> "ResultBody":
        """Return the result of an image that could not be read."""
        return cls(predictions=[], error=problem)


def _explanation(result: ImageResult) -> ExplanationBody | None:
    if result.explanation is None and result.captions is None:
        return None
    return ExplanationBody(
        labels=[LabelExplanationBody.of(each) for each in result.explanation or ()],
        captions=[
            NearCaptionBody(caption=each.caption, similarity=each.similarity, suggested=list(each.suggested))
            for each in result.captions or ()
        ],
    )


class SharedNameBody(Response):
    """A name that was found for several images together."""

    label: str
    images: int = Field(description="How many of the images have it.")


class ExamplesUsedBody(Response):
    """Which example images an answer rests on."""

    revision: int = Field(description="Counts the changes of the label set's example images.")
    labelled: int
    unlabelled: int


class CalibrationBody(Response):
    """What held-out example images say of the scores."""

    temperature: float = Field(description="Divides the logits before the softmax.")
    images: int = Field(description="Labelled ones that it was fitted on.")
    reject_below: float | None = Field(description="The threshold in use, where one was asked for.")
    false_rejection_rate: float | None = Field(
        description="Share of labelled images that this threshold would reject, each held out."
    )
    coverage: float | None = Field(description="Of the prediction sets, where they were asked for.")


class ClassifyResponse(Response):
    """One result per image, in order."""

    model: str
    label_set: str | None = Field(description="`name@version`; null for inline labels, and without labels.")
    database: str | None = Field(None, description="`name@generation` of the caption database; null with labels.")
    vocabulary: list[SharedNameBody] | None = Field(
        None, description="With `group`: the names in use, those of the most images first."
    )
    method: str = Field(description="The one that was used.")
    reason: str | None = Field(None, description="Why this method, where it was left to the evidence.")
    examples: ExamplesUsedBody | None = Field(None, description="Null for a method that learns from none.")
    calibration: CalibrationBody | None = Field(None, description="Null where scores are by the model's own scale.")
    transductive: bool = Field(default=False, description="Whether the images of this request were looked at together.")
    results: list[ResultBody]
    timing_ms: dict[str, float] = Field(
        description="Milliseconds per stage: text, decode, queue, encode, adapt; without labels also search.",
        examples=[{"text": 0.1, "decode": 4.1, "queue": 0.1, "encode": 12.6, "adapt": 0.2}],
    )

    @classmethod
    def of(cls, classification: Classification, problem: ProblemOf) -> "ClassifyResponse":
        """Return the answer to a task; ``problem`` tells an image's error."""
        task = classification.task
        return cls(
            model=task.model,
            label_set=None if task.label_set is None else own_name(task.label_set.reference),
            database=None if classification.database is None else own_name(classification.database),
            vocabulary=None
            if classification.vocabulary is None
            else [SharedNameBody(label=each.label, images=each.images) for each in classification.vocabulary],
            method=task.method,
            reason=task.reason,
            examples=None if classification.examples is None else ExamplesUsedBody(**asdict(classification.examples)),
            calibration=_calibration(task.scoring),
            transductive=classification.transductive,
            results=[ResultBody.of(result, problem, classification.warnings) for result in classification.results],
            timing_ms={stage: round(value, 3) for stage, value in classification.timing_ms.items()},
        )


def _calibration(scoring: Scoring) -> CalibrationBody | None:
    if not scoring.calibrated_on:
        return None
    return CalibrationBody(
        temperature=scoring.temperature,
        images=scoring.calibrated_on,
        reject_below=scoring.reject_below,
        false_rejection_rate=scoring.false_rejection_rate,
        coverage=scoring.coverage,
    )
