"""Requests to classify images, and their results."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Literal, NotRequired

from pydantic import BeforeValidator, Field, TypeAdapter, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from app.api.schemas._base import ModelName, Request, Response, split_text
from app.api.schemas.images import ClassifyImageBody
from app.api.schemas.problems import Problem, ProblemOf
from app.classification.method_names import PRIOR_NAMES
from app.classification.request import ClassifyRequest
from app.names.class_names import MAX_ITEMS
from app.names.field_values import Number
from app.names.namespaces import Namespace, own_name
from app.types import (
    Classification,
    ImageResult,
    LabelExplanation,
    OutOfVocabulary,
    Prediction,
    PromptContribution,
    Reject,
    RejectBy,
    Scoring,
)

# More than any method has; every invalid one is reported.
_MAX_OPTIONS = 100

# An integer in JSON may have more digits than a float holds.
_LARGEST_NUMBER = 1e308


def _json_object(value: object) -> object:
    """Parse an object that a form or a query carries as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("json", 'must be a JSON object such as {"beta": 0.7}') from error
    if isinstance(value, Mapping) and len(value) > _MAX_OPTIONS:
        raise PydanticCustomError(
            "too_many_fields", f"has {len(value):,} entries; at most {_MAX_OPTIONS} options are accepted"
        )
    return value


def _priors(value: object) -> object:
    """Check what a field of priors may hold, with one error; a form or a query carries an object as text."""
    if value is None or value in PRIOR_NAMES:
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise PydanticCustomError(
            "priors", "must be an object such as {\"cat\": 120, \"dog\": 40}, or 'estimate' or 'uniform'"
        )
    if len(value) > MAX_ITEMS:
        raise PydanticCustomError("too_many_fields", f"has {len(value):,} entries; at most {MAX_ITEMS} are accepted")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            context = {"name": repr(str(name)[:80]), "given": json.dumps(number)[:80]}
            raise PydanticCustomError("priors", "must have a number for each label; {name} has {given}", context)
        if isinstance(number, int) and number > _LARGEST_NUMBER:
            problem = "has a number above {largest} for {name}; only the ratios matter, so divide all by one number"
            context = {"name": repr(str(name)[:80]), "largest": f"{_LARGEST_NUMBER:.0e}"}
            raise PydanticCustomError("priors", problem, context)
    return value


class ClassifyFields(Request):
    """Everything in a request to classify except the images.

    The form, the query string, the JSON body, the OpenAPI description and ``ClassifyRequest`` are all derived from this
    declaration.
    """

    labels: list[str] | None = Field(
        None,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="The labels to choose from. As text: separated by commas or new lines, or a JSON array.",
        examples=[["cat", "dog", "coffee cup"]],
    )
    label_set: str | None = Field(
        None,
        description="A stored label set instead of `labels`: `name` or `name@version`. Without both, labels are"
        " discovered"
        " in a caption database.",
        examples=["pets"],
    )
    database: str | None = Field(
        None, description="Without labels: the caption database in which labels are discovered; by default `everyday`."
    )
    group: bool = Field(
        default=False, description="Without labels: choose a small set of labels that the images of the request share."
    )
    method: str | None = Field(
        None,
        description="A method of `GET /v1/methods`, or `auto` for the method selected on the example images of the"
        " label"
        " set. Default: `auto` if there are example images, `cased` without labels, otherwise `zero-shot`.",
    )
    model: ModelName | None = Field(None, description="A model of `GET /v1/models`; by default the first.")
    template: str | None = Field(
        None,
        description="A template set (`photo`, `ensemble`, `imagenet`), or one template with `{}` for the label.",
        examples=["a photo of a {}."],
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Number of predictions per image, best first; by default 5. With `multi_label`, at least all"
        " that reach their threshold.",
    )
    explain: bool = Field(
        default=False, description="Also return which prompts support the best labels and which oppose them."
    )
    options: Annotated[dict[str, Number], BeforeValidator(_json_object)] = Field(
        {},
        description="Options of the method, listed by `GET /v1/methods`. In a form or a query string: a JSON object.",
        examples=[{"beta": 0.7}],
    )
    reject_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Images with a best score below this threshold are `rejected`: they show none of the classes. With"
        " `multi_label`, it is the threshold of every label.",
    )
    false_rejection_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of `reject_below`: choose the threshold that wrongly rejects at most this share of"
        " the images of all classes together. Needs labelled example images.",
    )
    reject: Annotated[Reject, WithJsonSchema({"type": "string", "enum": list(Reject)})] | None = Field(
        None,
        description="Instead of `reject_below`: `auto` rejects images that probably show none of the labels. With at"
        " least 19 labelled example images, as `false_rejection_rate` 0.05, else by `out_of_vocabulary.score`.",
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Also return a `prediction_set` that contains the true label with this probability. Needs labelled"
        " example images.",
        examples=[0.95],
    )
    keep_features: bool = Field(
        default=False,
        description="Keep the features of the images in memory for an hour and return an `image_id` for each, so that a"
        " later JSON request can classify them with other labels without sending them again.",
    )
    multi_label: bool | None = Field(
        None,
        description="An image may have several of the labels, or none: each label has a probability of its own, and"
        " `labels` of the result has those that reach their threshold. By default what the label set says, else false.",
    )

    priors: Annotated[dict[str, float] | Literal["estimate", "uniform"] | None, BeforeValidator(_priors)] = Field(
        None,
        description="How often the images show each label, as shares or counts above 0: rare labels need more evidence."
        " `estimate` counts the labelled example images of the label set; `uniform` switches the priors of the label"
        " set off. By default those of the label set. In a form or a query string: a JSON object.",
        examples=[{"cat": 120, "dog": 40, "coffee cup": 5}],
    )

    min_score: float | None = Field(
        None,
        ge=0,
        le=1,
        description="With parents of classes: the `path` stops before the first label with a lower score.",
    )

    _split_labels = field_validator("labels", mode="before")(split_text)

    def request(self, namespace: Namespace) -> ClassifyRequest:
        """Return the request to resolve; its names belong to ``namespace``."""
        return ClassifyRequest(
            **{name: getattr(self, name) for name in ClassifyFields.model_fields}, namespace=namespace
        )


class ClassifyBody(ClassifyFields):
    """A request to classify, as JSON."""

    images: list[ClassifyImageBody] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="One or more images."
    )


class PredictionBody(TypedDict):
    """One label with its score."""

    label: str
    score: Annotated[
        float,
        Field(
            description="Probability in [0, 1]: a softmax over the labels, or an independent sigmoid per label for"
            " sigmoid models and with `multi_label`."
        ),
    ]
    similarity: Annotated[float, Field(description="Cosine similarity of the image and the label, in [-1, 1].")]
    threshold: NotRequired[
        Annotated[float | None, Field(description="With `multi_label`: the threshold of the label.")]
    ]
    above: NotRequired[
        Annotated[bool | None, Field(description="With `multi_label`: whether the score reaches the threshold.")]
    ]


def _prediction(prediction: Prediction) -> PredictionBody:
    body = PredictionBody(label=prediction.label, score=prediction.score, similarity=prediction.similarity)
    # A response may have hundreds of thousands of predictions, so fields of other requests are left out.
    if prediction.threshold is not None:
        body["threshold"], body["above"] = prediction.threshold, prediction.above
    return body


class PathStepBody(Response):
    """A label of a hierarchy."""

    label: str
    score: float = Field(
        description="Of all classes at or below the label: the sum of their scores, or the largest of independent ones."
    )


class PromptContributionBody(Response):
    """The contribution of one prompt to a label's similarity."""

    prompt: str
    source: str = Field(description="`template`, `class prompt`, `description`, `feature` or `random`.")
    cosine: float
    weight: float = Field(description="The sum of weight times cosine over all prompts of a label is its similarity.")


class LabelExplanationBody(Response):
    """The prompts behind a label's similarity, compared with a rival label."""

    label: str
    similarity: float
    rival: str | None = Field(description="For the best label the second best one, for any other label the best one.")
    rival_similarity: float | None
    supporting: list[PromptContributionBody] = Field(
        description="Prompts that are more similar to the image than the rival, largest difference first; at most 10."
    )
    opposing: list[PromptContributionBody] = Field(
        description="Prompts that are not more similar to the image than the rival; at most 10."
    )

    @classmethod
    def of(cls, explanation: LabelExplanation) -> "LabelExplanationBody":
        """Convert a label's explanation."""
        return cls(
            label=explanation.label,
            similarity=explanation.similarity,
            rival=explanation.rival,
            rival_similarity=explanation.rival_similarity,
            supporting=[_contribution(prompt) for prompt in explanation.supporting],
            opposing=[_contribution(prompt) for prompt in explanation.opposing],
        )


def _contribution(prompt: PromptContribution) -> PromptContributionBody:
    return PromptContributionBody(prompt=prompt.text, source=prompt.source, cosine=prompt.cosine, weight=prompt.weight)


class NearCaptionBody(Response):
    """A caption similar to the image."""

    caption: str
    similarity: float = Field(description="Cosine similarity of the image and the caption.")
    suggested: list[str] = Field(description="The predictions, among the ten best, that this caption suggested.")


class ExplanationBody(Response):
    """The prompts that support and oppose the best labels, or the captions in which labels were discovered."""

    labels: list[LabelExplanationBody] = Field(
        description="Best label first; at least two if the request has two. Empty without labels."
    )
    captions: list[NearCaptionBody] = Field(
        [],
        description="Without labels: the captions most similar to the image, best first and without duplicates.",
    )


class NearWordBody(Response):
    """A word that competes with the labels."""

    word: str
    similarity: float = Field(description="Cosine similarity of the image and the word.")


class OutOfVocabularyBody(TypedDict):
    """Unknown-class scores: all are higher for images that show none of the classes."""

    score: Annotated[
        float | None,
        Field(
            description="Probability in [0, 1] that the image shows none of the labels, from its similarities with"
            " 1,159 everyday words except those related to the labels. Null while the words are encoded after the first"
            " start, and if almost all words are kinds of the labels."
        ),
    ]
    nearest: Annotated[
        list[NearWordBody] | None,
        Field(
            description="With `explain`: the words that are more similar to the image than the best label, at most 10."
        ),
    ]
    mcm: Annotated[
        float,
        Field(description="Maximum concept matching: 1 minus the largest softmax of the similarities, in [0, 1)."),
    ]
    energy: Annotated[float, Field(description="Energy score: minus the logsumexp of the logits; any real number.")]


class ResultBody(TypedDict):
    """The result of one image."""

    predictions: list[PredictionBody]
    labels: Annotated[
        list[str] | None,
        Field(
            description="With `multi_label`: all labels whose score reaches their threshold, best first; empty if none"
            " does. Null without it.",
        ),
    ]
    out_of_vocabulary: Annotated[
        OutOfVocabularyBody | None, Field(description="Null without labels, and if the image could not be read.")
    ]
    rejected: Annotated[
        bool | None,
        Field(
            description="True if the image shows none of the classes; null without `reject_below`,"
            " `false_rejection_rate` or `reject`.",
        ),
    ]
    rejection_score: Annotated[
        float | None,
        Field(
            description="The score that was compared with the threshold: `calibration.reject_by` says which one."
            " Without a calibration, the best score, or with `reject` 1 minus `out_of_vocabulary.score`, whose"
            " threshold is 0.5.",
        ),
    ]
    prediction_set: Annotated[
        list[str] | None,
        Field(
            description="Labels that contain the true one with probability `coverage`, best first; null without"
            " `coverage`.",
        ),
    ]
    explanation: Annotated[ExplanationBody | None, Field(description="Null without `explain`.")]
    image_id: Annotated[
        str | None,
        Field(
            description="With `keep_features`: the id under which later requests can name this image; valid for an"
            " hour, with the same model, in the same process.",
        ),
    ]
    weak_match: Annotated[
        bool | None,
        Field(
            description="True if `out_of_vocabulary.score` is above 0.5: probably none of the labels fits. Null where"
            " this is not known, and with methods that learn from images.",
        ),
    ]
    path: Annotated[
        list[PathStepBody] | None,
        Field(
            description="With parents of classes: the labels from a root to where the answer stops: the best class"
            " below the best labels, or with `min_score` the last label whose score reaches it. Empty if no score"
            " reaches it, or the image is `rejected` or has no `labels`. Null without parents.",
        ),
    ]
    warnings: Annotated[
        list[str], Field(description="Conditions that affect this result, such as missing descriptions.")
    ]
    error: Annotated[
        Problem | None, Field(description="Why this image could not be read; the other images have results.")
    ]


def _result(result: ImageResult, problem: ProblemOf, warnings: Sequence[str]) -> ResultBody:
    """Return one image's result; ``problem`` converts its error."""
    scores, path = result.out_of_vocabulary, result.path
    return ResultBody(
        predictions=[_prediction(prediction) for prediction in result.predictions],
        labels=None if result.labels is None else list(result.labels),
        out_of_vocabulary=None if scores is None else _out_of_vocabulary(scores),
        rejected=result.rejected,
        rejection_score=result.rejection_score,
        prediction_set=None if result.prediction_set is None else list(result.prediction_set),
        explanation=_explanation(result),
        image_id=result.image_id,
        weak_match=result.weak_match,
        path=None if path is None else [PathStepBody(label=step.label, score=step.score) for step in path],
        warnings=[*warnings, *result.warnings],
        error=None if result.error is None else Problem(**problem(result.error)),
    )


def _out_of_vocabulary(scores: OutOfVocabulary) -> OutOfVocabularyBody:
    return OutOfVocabularyBody(
        score=scores.score,
        nearest=None
        if scores.nearest is None
        else [NearWordBody(word=near.word, similarity=near.similarity) for near in scores.nearest],
        mcm=scores.mcm,
        energy=scores.energy,
    )


def _explanation(result: ImageResult) -> ExplanationBody | None:
    if result.explanation is None and result.captions is None:
        return None
    return ExplanationBody(
        labels=[LabelExplanationBody.of(label) for label in result.explanation or ()],
        captions=[
            NearCaptionBody(caption=near.caption, similarity=near.similarity, suggested=list(near.suggested))
            for near in result.captions or ()
        ],
    )


class SharedNameBody(Response):
    """A label that several images of a request share."""

    label: str
    images: int = Field(description="Number of images with this label.")


class ExamplesUsedBody(Response):
    """The example images that a result is based on."""

    revision: int = Field(description="Increases with every change of the label set's example images.")
    labelled: int
    unlabelled: int


class CalibrationBody(Response):
    """The calibration of the scores on held-out example images."""

    temperature: float = Field(description="Divides the logits before the softmax.")
    images: int = Field(description="Number of labelled example images it was fitted on.")
    reject_below: float | None = Field(description="The rejection threshold in use; null without one.")
    reject_by: RejectBy | None = Field(
        description="What is compared with the threshold: the best `score`; with `false_rejection_rate` the largest"
        " cosine similarity with the mean of the example images of a class (`class-mean`), or, if not every class has"
        " two and the method has no prompts of its own, with the text of a class (`similarity`); with `reject` and too"
        " few examples 1 minus `out_of_vocabulary.score` (`in-vocabulary`). Null without a threshold."
    )
    false_rejection_rate: float | None = Field(
        description="Share of held-out labelled images that this threshold rejects."
    )
    coverage: float | None = Field(description="The requested coverage of the prediction sets; null without one.")


class ClassifyResponse(TypedDict):
    """One result per image, in the order of the request."""

    model: str
    label_set: Annotated[str | None, Field(description="`name@version`; null for inline labels and without labels.")]
    database: Annotated[
        str | None, Field(description="`name@generation` of the caption database; null with labels or a label set.")
    ]
    vocabulary: Annotated[
        list[SharedNameBody] | None, Field(description="With `group`: the shared labels, the most frequent first.")
    ]
    method: Annotated[str, Field(description="The method used.")]
    reason: Annotated[
        str | None, Field(description="Why this method was selected; null if the request named a method.")
    ]
    examples: Annotated[ExamplesUsedBody | None, Field(description="Null for a method that uses no example images.")]
    calibration: Annotated[CalibrationBody | None, Field(description="Null if the scores use the scale of the model.")]
    priors: Annotated[
        dict[str, float] | None,
        Field(description="The priors that the scores use, divided by their sum; null without priors."),
    ]
    transductive: Annotated[
        bool, Field(description="True if the images of this request influenced each other's results.")
    ]
    multi_label: Annotated[bool, Field(description="Whether an image may have several labels.")]
    results: list[ResultBody]
    timing_ms: Annotated[
        dict[str, float],
        Field(
            description="Milliseconds per stage: text, decode, queue, encode and adapt; without labels also search.",
            examples=[{"text": 0.1, "decode": 4.1, "queue": 0.1, "encode": 12.6, "adapt": 0.2}],
        ),
    ]


_RESPONSE, _RESULT = TypeAdapter(ClassifyResponse), TypeAdapter(ResultBody)


def serialize(classification: Classification, problem: ProblemOf) -> bytes:
    """Return a ``ClassifyResponse`` as JSON; ``problem`` converts the error of an image.

    For use in a thread if there are many predictions: thousands of labels per image take seconds. Only the objects of
    one result exist at a time, so that neither the encoder nor the garbage collector keeps the interpreter from other
    threads for long.
    """
    task = classification.task
    response = ClassifyResponse(
        model=task.model,
        label_set=None if task.label_set is None else own_name(task.label_set.reference),
        database=None if classification.database is None else own_name(classification.database),
        vocabulary=None
        if classification.vocabulary is None
        else [SharedNameBody(label=shared.label, images=shared.images) for shared in classification.vocabulary],
        method=task.method,
        reason=task.reason,
        examples=None if classification.examples is None else ExamplesUsedBody(**asdict(classification.examples)),
        calibration=_calibration(task.scoring),
        priors=_frequencies(classification),
        transductive=classification.transductive,
        multi_label=task.scoring.multi_label,
        results=[],
        timing_ms={stage: round(value, 3) for stage, value in classification.timing_ms.items()},
    )
    fields = _RESPONSE.dump_json(response, exclude={"results"})
    results = b",".join(
        _RESULT.dump_json(_result(result, problem, classification.warnings)) for result in classification.results
    )
    return fields[:-1] + b',"results":[' + results + b"]}"


def _frequencies(classification: Classification) -> dict[str, float] | None:
    priors = classification.priors
    if priors is None or priors.frequencies is None:
        return None
    return dict(zip(classification.task.classnames, priors.frequencies, strict=True))


def _calibration(scoring: Scoring) -> CalibrationBody | None:
    if not scoring.calibrated_on:
        return None
    return CalibrationBody(
        temperature=scoring.temperature,
        images=scoring.calibrated_on,
        reject_below=scoring.reject_below,
        reject_by=None if scoring.reject_below is None else scoring.reject_by,
        false_rejection_rate=scoring.false_rejection_rate,
        coverage=scoring.coverage,
    )
