"""Bodies of requests and responses, as the HTTP contract promises them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.captions.catalogue import DatabaseState
from app.captions.plan import BuildPlan
from app.captions.search import MAX_CONTAINS_CHARS, MAX_LIMIT, MAX_OFFSET, CaptionPage
from app.describing.describer import DescribeRequest, Questions
from app.errors import ClientError, DeixisError, InvalidFieldError
from app.images.fetch import MAX_URL_CHARS
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import namespace_of, own_name
from app.store.drafts import Draft, DraftKind, DraftStatus
from app.store.examples import Added, Example, ExampleCounts, NewExample, Selection
from app.store.jobs import BUILD_CAPTIONS, Job, JobStatus
from app.store.label_sets import LabelSetSummary
from app.types import (
    ClassEntry,
    Classification,
    ImageResult,
    LabelExplanation,
    LabelSet,
    MergeSynonyms,
    PromptContribution,
    Scoring,
)

# Of any method; each wrong one is told.
_MAX_OPTIONS = 100

ProblemOf = Callable[[DeixisError], dict[str, Any]]
"""Tells an error as the members of a problem."""


class Request(BaseModel):
    """Unknown fields are refused: a mistyped one must not be ignored.

    Each fault costs more to tell than to send. So more fields than there are make one, and lists are read up to their
    first.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, given: object) -> object:
        # There may be as many unknown fields as known ones, so that each is told by name.
        if isinstance(given, Mapping) and len(given) > (most := 2 * len(cls.model_fields)):
            raise PydanticCustomError("too_many_fields", f"has {len(given):,} fields; {most} are more than it needs")
        return given


class Response(BaseModel):
    """Answers."""

    model_config = ConfigDict(protected_namespaces=())


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


class ImageBody(Request):
    """One image of a JSON request: one of ``base64`` and ``url``."""

    base64: str | None = Field(None, description="The encoded image file in base64, or a `data:` URL of it.")
    url: str | None = Field(
        None,
        max_length=MAX_URL_CHARS,
        description="Or where to fetch it, if the operator lets images be fetched (`DEIXIS_ALLOW_IMAGE_URLS`).",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.base64 is None) == (self.url is None):
            raise PydanticCustomError("image", "give either base64 or url")
        return self


class ClassifyBody(ClassifyFields):
    """A JSON request."""

    images: list[ImageBody] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="One or more images."
    )


class Problem(Response):
    """RFC 9457 problem details."""

    type: str = Field(
        description="A stable URN; docs/problems.md explains each.", examples=["urn:deixis:problem:too-large"]
    )
    title: str
    status: int
    detail: str = Field(description="Names the bad value, the rule and the way out.")
    request_id: str | None = None
    # Left out where there are none, as in an answer that is a problem as a whole.
    errors: list[dict[str, str]] | None = Field(
        None, exclude_if=lambda errors: errors is None, description="For 422: each field and what is wrong with it."
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
    warnings: list[str] = []
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
            label_set=None if task.label_set is None else own_name(task.label_set),
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


class ClassBody(Request):
    """A class with what helps to recognise it."""

    name: str
    descriptions: list[str] = Field(
        [], max_length=MAX_ITEMS, fail_fast=True, description="Sentences about how it looks."
    )
    synonyms: list[str] = Field(
        [], max_length=MAX_ITEMS, fail_fast=True, description="Other names; each is filled into the templates."
    )
    features: list[str] = Field(
        [],
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Short phrases, read as `NAME, which has ...`.",
        examples=[["stripes"]],
    )
    prompt: str | None = Field(
        None,
        description="Stands in the place of the filled templates; `{}` is the name.",
        examples=["a photo of a crane, the bird."],
    )

    @classmethod
    def of(cls, entry: ClassEntry) -> "ClassBody":
        """Return the class as it is told to callers."""
        return cls(
            name=entry.name,
            descriptions=list(entry.descriptions),
            synonyms=list(entry.synonyms),
            features=list(entry.features),
            prompt=entry.prompt,
        )

    def entry(self) -> ClassEntry:
        """Return the class as it came, texts not cleaned yet."""
        return ClassEntry(self.name, tuple(self.descriptions), tuple(self.synonyms), tuple(self.features), self.prompt)


def _class_of(given: object) -> object:
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, (Mapping, ClassBody)):
        return given
    raise PydanticCustomError("class_type", "must be a name, or an object with a name")


NameOrClass = Annotated[ClassBody, BeforeValidator(_class_of, json_schema_input_type=str | ClassBody)]
"""A class; a name alone will do. Not a union, which would tell what is wrong once for each of its types."""


class ClassesBody(Request):
    """Classes to add."""

    classes: list[NameOrClass] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, examples=[["lynx", {"name": "puma"}]]
    )

    def entries(self) -> list[ClassEntry]:
        """Return the classes as they came, texts not cleaned yet."""
        return [each.entry() for each in self.classes]


class LabelSetBody(ClassesBody):
    """A whole label set."""

    templates: str = Field("photo", description="A template set, or one template with `{}` for the class name.")
    merge_synonyms: MergeSynonyms = Field(
        MergeSynonyms.MEAN, description="Whether a class scores as its best name, or as the mean of its names."
    )


class LabelSetResponse(Response):
    """One version of a label set."""

    name: str
    version: int
    classes: list[ClassBody]
    templates: str
    merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN
    created_at: datetime

    @classmethod
    def of(cls, label_set: LabelSet) -> "LabelSetResponse":
        """Return the label set as it is told to callers."""
        return cls(
            name=own_name(label_set.name),
            version=label_set.version,
            classes=[ClassBody.of(entry) for entry in label_set.classes],
            templates=label_set.templates,
            merge_synonyms=label_set.merge_synonyms,
            created_at=label_set.created_at,
        )


class LabelSetSummaryBody(Response):
    """One line of the list of label sets."""

    name: str
    version: int
    classes: int = Field(description="How many.")
    created_at: datetime

    @classmethod
    def of(cls, summary: LabelSetSummary) -> "LabelSetSummaryBody":
        """Return the summary as it is told to callers."""
        return cls(
            name=own_name(summary.name),
            version=summary.version,
            classes=summary.class_count,
            created_at=summary.created_at,
        )


class LabelSetList(Response):
    """A page of label sets, by name."""

    label_sets: list[LabelSetSummaryBody]
    next_after: str | None = Field(description="Pass as `after` for the next page; null on the last.")


class ImagePathBody(Response):
    """How a model's image tower is run on this machine."""

    backend: str = Field(description="`torch` or `openvino`.")
    device: str
    precision: str = Field(description="`fp32`, `fp16` or `bf16`.")
    threads: int = Field(description="For the arithmetic on a CPU, 0 elsewhere.")
    image_batch: int = Field(description="Most images in one forward pass.")
    images_per_s: float | None = Field(description="As measured when the model was first loaded here; null if not.")


class ModelBody(Response):
    """A model that is being served."""

    name: str
    default: bool
    embed_dim: int
    image_size_px: int
    logit_scale: float
    logit_bias: float | None
    queued_images: int = Field(description="Images admitted to its queue and not done yet.")
    image_path: ImagePathBody
    probability: str = Field(description="`softmax` or `sigmoid`: what makes a score of logits.")


class ModelList(Response):
    """The models served, the default first."""

    models: list[ModelBody]


class OptionBody(Response):
    """A number that a method takes."""

    default: float
    least: float
    most: float
    description: str


class MethodBody(Response):
    """A method that callers may name."""

    name: str
    summary: str
    transductive: bool = Field(description="Whether an image's answer always depends on other images.")
    learns_from: list[str] = Field(
        description="The example images that it needs: `labelled images` or `unlabelled images`."
    )
    stateful: bool = Field(description="Whether an answer depends on the images that were asked about before.")
    default: bool
    uses_descriptions: bool = Field(description="Whether descriptions of the classes change its answers.")
    control: bool = Field(description="Whether it is there to be compared with, and not for use.")
    vocabulary_free: bool = Field(description="Whether it is given no labels, and finds names in captions.")
    options: dict[str, OptionBody]


class MethodList(Response):
    """Every method."""

    methods: list[MethodBody]


class Health(Response):
    """The answer of a probe."""

    status: str


class DescribeBody(Request):
    """What to ask a language model about the classes of a label set."""

    question_set: str = Field("general", description="A set of `GET /v1/question-sets`.", examples=["birds"])
    questions: Questions = Field(
        Questions.BASE, description="`base`: three that suit every class; `full`: those of the domain; `all`: both."
    )
    sentences: bool = Field(default=True, description="Ask for sentences, for `cupl` and `cupl-ensemble`.")
    features: bool = Field(default=True, description="Ask for a list of features, for `dclip`.")
    answers: int = Field(10, ge=1, le=50, description="Answers to each question for sentences.")
    classes: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="Names of the label set; all by default."
    )

    def request(self) -> DescribeRequest:
        """Return what is asked."""
        return DescribeRequest(
            question_set=self.question_set,
            questions=self.questions,
            sentences=self.sentences,
            features=self.features,
            answers=self.answers,
            classes=None if self.classes is None else tuple(self.classes),
        )


class GenerateBody(DescribeBody):
    """What to ask, and what to do with the answers."""

    accept: bool = Field(
        default=False, description="Put every draft into a new version at the end; else they wait for a review."
    )


class EstimateBody(Response):
    """The most that a run would take; what was answered before is not asked again."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class DraftBody(Response):
    """A text that a language model wrote about a class."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    id: int
    class_: str = Field(alias="class")
    kind: DraftKind
    text: str
    status: DraftStatus
    model: str = Field(description="What answered, in the endpoint's words.")
    question: str
    asked_at: datetime
    decided_at: datetime | None

    @classmethod
    def of(cls, draft: Draft) -> "DraftBody":
        """Return the draft as it is told to callers."""
        return cls(
            id=draft.id,
            class_=draft.classname,
            kind=draft.kind,
            text=draft.text,
            status=draft.status,
            model=draft.model,
            question=draft.question,
            asked_at=draft.asked_at,
            decided_at=draft.decided_at,
        )


class DraftList(Response):
    """A page of drafts, in the order they were made."""

    drafts: list[DraftBody]
    next_after: int | None = Field(description="`after` of the next page; null on the last.")


class DecisionBody(Request):
    """Which drafts are decided about."""

    ids: list[int] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Of undecided drafts; all of them by default.",
    )


class AcceptedResponse(Response):
    """The version that the drafts went into."""

    accepted: int
    label_set: LabelSetResponse


class RejectedResponse(Response):
    """How many drafts will not be used, nor made again."""

    rejected: int


class QuestionSetBody(Response):
    """Questions about classes of one domain; `{name}` and `{a_name}` are filled with the class name."""

    name: str
    summary: str
    base: list[str]
    full: list[str]


class QuestionSetList(Response):
    """Every set of questions."""

    question_sets: list[QuestionSetBody]


class JobBody(Response):
    """Work that goes on after its request was answered."""

    id: str
    kind: str = Field(description="`describe`, `evaluate`, `try-methods`, `import-images` or `build-captions`.")
    label_set: str | None = Field(description="That it is about; null for `build-captions`.")
    database: str | None = Field(description="That is built; null for others.")
    status: JobStatus
    done: int = Field(description="RemoteSteps that are done.")
    total: int = Field(description="Of so many; 0 before they are counted.")
    result: dict[str, Any] | None = Field(description="Of a job that succeeded; docs/http-api.md shows it.")
    error: str | None = Field(description="Of a job that failed.")
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Job) -> "JobBody":
        """Return the job as it is told to callers."""
        return cls(
            id=job.id,
            kind=job.kind,
            label_set=None if job.kind == BUILD_CAPTIONS else own_name(job.subject),
            database=own_name(job.subject) if job.kind == BUILD_CAPTIONS else None,
            status=job.status,
            done=job.done,
            total=job.total,
            result=None if job.result is None else dict(job.result),
            error=None if job.error is None else namespace_of(job.subject).hide(job.error),
            created_at=job.created_at,
            finished_at=job.finished_at,
        )


class JobList(Response):
    """A page of jobs, the newest first."""

    jobs: list[JobBody]
    next_after: str | None = Field(description="`after` of the next page; null on the last.")


class ExampleBody(Response):
    """An example image, without its pixels."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    id: int
    sha256: str = Field(description="Of the file.")
    class_: str | None = Field(alias="class", description="Null for an unlabelled one.")
    created_at: datetime
    kept: bool = Field(description="Whether the file is kept too (`DEIXIS_KEEP_IMAGES`).")
    models: int = Field(description="How many models have features of it.")

    @classmethod
    def of(cls, example: Example) -> "ExampleBody":
        """Return the example as it is told to callers."""
        return cls(
            id=example.id,
            sha256=example.digest,
            class_=example.classname,
            created_at=example.created_at,
            kept=example.kept,
            models=len(example.models),
        )


class ExampleCountsBody(Response):
    """How many example images a label set has."""

    revision: int = Field(description="Counts the changes of these images.")
    labelled: dict[str, int] = Field(description="By class, also by classes that the newest version does not have.")
    unlabelled: int
    without_features: int = Field(description="Of all these, so many are of no use to the default model.")

    @classmethod
    def of(cls, counts: ExampleCounts) -> "ExampleCountsBody":
        """Return the counts as they are told to callers."""
        return cls(
            revision=counts.revision,
            labelled=dict(counts.labelled),
            unlabelled=counts.unlabelled,
            without_features=counts.without_features,
        )


class ExampleList(Response):
    """A page of example images, in the order they were added, and how many there are in all."""

    images: list[ExampleBody]
    counts: ExampleCountsBody
    next_after: int | None = Field(description="`after` of the next page; null on the last.")


class SkippedImageBody(Response):
    """An image that was left out."""

    image: int = Field(description="Its place in the request, from 0.")
    problem: str


class AddedExamplesResponse(Response):
    """What became of images that were added, once they are stored."""

    added: int
    relabelled: int = Field(description="Images that were there and took on the class that was given.")
    duplicates: int = Field(description="Images that were there with the same class, or were given twice.")
    skipped: list[SkippedImageBody] = Field(description="Images that could not be read; the others are stored.")
    counts: ExampleCountsBody
    job: str | None = Field(
        description="Tries the methods on the images, `GET /v1/jobs/{id}`; null if nothing changed."
    )

    @classmethod
    def of(
        cls, added: Added, prepared: Sequence[NewExample | ClientError], counts: ExampleCounts, job: str | None
    ) -> "AddedExamplesResponse":
        """Return what became of the images that were prepared."""
        return cls(
            added=added.added,
            relabelled=added.relabelled,
            duplicates=added.duplicates,
            skipped=[
                SkippedImageBody(image=at, problem=each.message)
                for at, each in enumerate(prepared)
                if isinstance(each, ClientError)
            ],
            counts=ExampleCountsBody.of(counts),
            job=job,
        )


class DeletedExamplesResponse(Response):
    """How many images were deleted, and how many are left."""

    deleted: int
    counts: ExampleCountsBody
    job: str | None = Field(description="Tries the methods on what is left; null if nothing changed.")


class ImportBody(Request):
    """A folder of the server, and how its images are labelled."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    folder: str = Field(min_length=1, max_length=4096, description="Below `DEIXIS_IMPORT_DIR`.", examples=["clothes"])
    by_subfolder: bool = Field(
        default=False, description="Each subfolder is called like the class of its images; underscores read as spaces."
    )
    class_: str | None = Field(
        None, alias="class", pattern=r"\S", description="Of all images; without it they are unlabelled."
    )


class EvaluateStoredBody(Request):
    """What to evaluate the methods on the stored examples with."""

    model: str | None = Field(None, description="The first served by default.")
    template: str | None = Field(None, description="Those of the label set by default.")


class LeaderboardRow(Response):
    """One method, tried on labelled images that it had not learned from."""

    method: str
    accuracy: float
    interval: list[float] = Field(description="95 % bootstrap interval of the accuracy: its two ends.")
    macro_f1: float
    nll: float = Field(description="Negative log-likelihood of the true class, before calibration.")
    ece: float = Field(description="Expected calibration error of the best score, before calibration.")
    calibrated_nll: float = Field(description="As `nll`, by the scores that answers have.")
    calibrated_ece: float = Field(description="As `ece`, by the scores that answers have.")
    temperature: float = Field(description="By which its logits are divided once it is calibrated.")
    ms_per_image: float = Field(description="For scores, once the features are there.")
    to_zero_shot: dict[str, float] | None = Field(
        description="Difference in accuracy: `mean`, `low`, `high`, and `p` corrected for the number of methods."
    )
    warnings: list[str]


class SelectionResponse(Response):
    """Which method the example images are evidence for."""

    method: str
    reason: str
    version: int = Field(description="Of the label set, that was tried.")
    examples_revision: int = Field(description="Of its example images, that were tried.")
    current: bool = Field(description="Whether neither has changed since.")
    created_at: datetime
    labelled: int
    unlabelled: int
    folds: int = Field(description="Into which the labelled images were split; 0 if methods could not be tried.")
    leaderboard: list[LeaderboardRow] = Field(description="The best first.")
    not_run: list[str]

    @classmethod
    def of(cls, selection: Selection) -> "SelectionResponse":
        """Return the selection as it is told to callers."""
        told = {key: value for key, value in selection.result.items() if key != "calibrations"}
        return cls(
            version=selection.version,
            examples_revision=selection.revision,
            current=selection.is_current,
            created_at=selection.created_at,
            **told,
        )


class BuildDatabaseBody(Request):
    """What a caption database is to be built of: one of source, files and captions."""

    source: Literal["wordnet"] | None = Field(None, description="The nouns of WordNet.")
    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ITEMS,
        fail_fast=True,
        description="Below `DEIXIS_IMPORT_DIR`: text, CSV, TSV, JSON, JSON lines or Parquet, also `.gz` and `.zst`.",
        examples=[["products.csv.gz"]],
    )
    captions: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="The captions themselves."
    )
    model: str | None = Field(None, description="Whose text tower encodes them; the first served by default.")
    column: str | None = Field(
        None, min_length=1, max_length=200, description="Of CSV, TSV, JSON or Parquet; found by its name by default."
    )
    min_chars: int = Field(3, ge=1, le=10_000, description="Shorter captions are left out.")
    max_chars: int = Field(500, ge=1, le=10_000, description="Longer ones are cut.")
    latin_only: bool = Field(default=False, description="Leave out captions whose letters are not mostly Latin.")
    near_duplicates: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Leave out captions whose cosine with one shortly before them is above this, as 0.97.",
    )
    recall: float = Field(
        0.95, gt=0, le=1, description="Share of the nearest captions that a search of a large database should find."
    )
    source_notes: str = Field("", max_length=2000, description="Where the captions are from.")
    licence: str = Field("", max_length=2000, description="Of the captions.")

    def plan(self, default_model: str) -> BuildPlan:
        """Return what is asked.

        Raises:
            InvalidFieldError: not one of source, files and captions.
        """
        given = {"source": self.source, "files": self.files, "captions": self.captions}
        if sum(each is not None for each in given.values()) != 1:
            raise InvalidFieldError.of("source", "give one of source, files and captions, to say what it is built of")
        return BuildPlan(
            model=self.model or default_model,
            files=tuple(self.files or ()),
            captions=tuple(self.captions or ()),
            **self.model_dump(exclude={"model", "files", "captions"}),
        )


class IndexBody(Response):
    """How a caption database is searched."""

    kind: str = Field(description="`flat`: every caption is compared; `ivf-pq`: those of some lists, by their codes.")
    lists: int
    probes: int = Field(description="Lists that a search reads.")
    code_bytes: int


class DatabaseBody(Response):
    """A caption database; what cannot be told of a damaged one is null."""

    name: str
    default: bool = Field(description="Whether it is asked where none is named.")
    model: str | None = Field(description="That encoded the captions.")
    models: list[str] = Field(description="Served models that it can be asked with.")
    captions: int | None
    dims: int | None
    index: IndexBody | None
    recall: dict[str, float] | None = Field(
        description="Share of the nearest captions that a search finds, by what was asked with: `near` and `far`"
        " captions, or `images`."
    )
    recall_at: int | None
    recall_target: float | None
    counts: dict[str, int] | None = Field(description="What became of the captions of the source.")
    source_notes: str | None
    licence: str | None
    bytes: int
    generation: str | None
    created_at: str | None
    problem: str | None = Field(description="Why it cannot be asked.")

    @classmethod
    def of(cls, state: DatabaseState, models: Sequence[str], *, default: bool) -> "DatabaseBody":
        """Return the database as it is told to callers."""
        manifest, problem = state.manifest, state.problem
        if manifest is not None and problem is None and not models:
            problem = f"it was made by '{manifest.model}', which is not served; serve it, or build it again"
        return cls(
            name=own_name(state.name),
            default=default,
            model=None if manifest is None else manifest.model,
            models=list(models),
            captions=None if manifest is None else manifest.captions,
            dims=None if manifest is None else manifest.dims,
            index=None if manifest is None else IndexBody(**asdict(manifest.index)),
            recall=None if manifest is None else dict(manifest.recall),
            recall_at=None if manifest is None else manifest.recall_at,
            recall_target=None if manifest is None else manifest.recall_target,
            counts=None if manifest is None else dict(manifest.counts),
            source_notes=None if manifest is None else manifest.source_notes,
            licence=None if manifest is None else manifest.licence,
            bytes=state.nbytes,
            generation=state.generation,
            created_at=None if manifest is None else manifest.created_at,
            problem=None if problem is None else namespace_of(state.name).hide(problem),
        )


class DatabaseList(Response):
    """Every caption database, by name."""

    databases: list[DatabaseBody]


class SearchFields(Request):
    """Which captions to return; the same fields in a form, in JSON and in a query string."""

    text: str | None = Field(None, description="Captions near this text.", examples=["a dog on a beach"])
    model: str | None = Field(None, description="The first served that the database can be asked with, by default.")
    limit: int = Field(10, ge=1, le=MAX_LIMIT, description="Captions on a page.")
    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="`next_offset` of the page before.")
    contains: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CONTAINS_CHARS,
        description="Only captions with this in them, whatever the case; of the 1,000 nearest.",
    )
    min_score: float | None = Field(
        None, ge=-1, le=1, description="Only captions with at least this cosine; of the 1,000 nearest."
    )


class SearchBody(SearchFields):
    """A JSON request for captions."""

    image: ImageBody | None = Field(None, description="Or captions near this image.")


class ZeroShotParameters(Request):
    """What to choose from."""

    candidate_labels: list[str] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="Words to choose from."
    )
    hypothesis_template: str = Field(
        "This is a photo of {}.", description="A template with `{}` for the label; that task's own by default."
    )


class ZeroShotBody(Request):
    """A request in the form of Hugging Face's task zero-shot-image-classification."""

    inputs: str = Field(min_length=1, description="In base64, as a `data:` URL, or a URL where these are allowed.")
    parameters: ZeroShotParameters
    model: str | None = Field(None, description="A model of `GET /v1/models`; the first by default.")


class ScoredLabelBody(Response):
    """A label and its score."""

    label: str
    score: float = Field(description="Probability, in [0, 1].")


class EmbeddingsBody(Request):
    """Texts, or images, of which features are wanted; the form of OpenAI's embeddings."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
    ) = Field(description="One or more texts; or images in base64, as `data:` URLs, or URLs where these are allowed.")
    model: str | None = Field(None, description="A model of `GET /v1/models`; the first by default.")
    modality: Literal["text", "image"] = Field("text", description="What `input` holds.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or the base64 of little-endian float32."
    )
    dimensions: int | None = Field(None, ge=1, description="Must be the model's, where it is given.")
    user: str | None = Field(None, description="Taken, and not looked at.")


class EmbeddingBody(Response):
    """The feature of one text or image."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Its place in the request, from 0.")
    embedding: list[float] | str = Field(description="Of length 1; a string where base64 was asked for.")


class EmbeddingsUsage(Response):
    """What OpenAI's clients expect; tokens are not counted here."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(Response):
    """Features in the order of the request."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingsUsage


class FoundCaptionBody(Response):
    """A caption."""

    caption: str
    score: float = Field(description="Cosine with what was asked, in [-1, 1].")


class SearchResponse(Response):
    """A page of captions, the nearest first."""

    database: str = Field(description="`name@generation`.")
    model: str
    results: list[FoundCaptionBody]
    next_offset: int | None = Field(description="Pass as `offset` for the next page; null where there are no more.")
    searched: int = Field(description="The nearest captions that were looked through: 1,000, or as many as there are.")
    warnings: list[str] = Field([], description="Parts of the database that could not be searched.")

    @classmethod
    def of(cls, page: CaptionPage) -> "SearchResponse":
        """Return the page as it is told to callers."""
        return cls(
            database=own_name(page.database),
            warnings=list(page.warnings),
            model=page.model,
            results=[FoundCaptionBody(caption=caption, score=score) for caption, score in page.captions],
            next_offset=page.next_offset,
            searched=page.searched,
        )
