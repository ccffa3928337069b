"""Each request to the service as a value, which the two clients send; no input or output here."""

import base64
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from deixis import answers
from deixis._images import Address, Upload
from deixis.answers import Answer
from deixis.errors import ClientError, JobFailedError, ProblemError

T = TypeVar("T")
A = TypeVar("A", bound=Answer)

ClassLike = str | answers.LabelClass | Mapping[str, Any]
"""A class: its name, or with what helps to recognise it."""

FIRST_POLL_S, LONGEST_POLL_S = 0.1, 2.0
"""Between two looks at a job: the first wait, and the longest of those that follow."""

IMAGE_FAULTS = frozenset(
    {"not-an-image", "image-too-large", "image-not-fetched", "body-too-large", "too-large", "unsupported-media-type"}
)
"""Problems of images, also of their number or their bytes together, rather than of the question."""

PAGE = 1000
"""Items of a list that are asked for at a time."""


class Question(TypedDict, total=False):
    """What to ask about images; the fields of ``/v1/classify``, which its documentation describes."""

    labels: Sequence[str]
    label_set: str
    database: str
    group: bool
    method: str
    model: str
    template: str
    top_k: int
    explain: bool
    options: Mapping[str, float]
    reject_below: float
    false_rejection_rate: float
    coverage: float


class DescribeQuestion(TypedDict, total=False):
    """What to ask a language model about the classes of a label set."""

    question_set: str
    questions: Literal["base", "full", "all"]
    sentences: bool
    features: bool
    answers: int
    classes: Sequence[str]


class BuildPlan(TypedDict, total=False):
    """What a caption database is to be built of: one of source, files and captions."""

    source: Literal["wordnet"]
    files: Sequence[str]
    captions: Sequence[str]
    model: str
    column: str
    min_chars: int
    max_chars: int
    latin_only: bool
    near_duplicates: float
    recall: float
    source_notes: str
    licence: str


class CaptionFilter(TypedDict, total=False):
    """Which captions a search returns."""

    model: str
    limit: int
    offset: int
    contains: str
    min_score: float


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how to read its answer.

    Args:
        method: of HTTP.
        path: below the address of the service.
        read: makes the answer of a body.
        params: the query.
        json: the body as JSON.
        data: the fields of a form.
        files: the files of a form.
        headers: besides those of every request.
        repeatable: whether to ask twice is as good as once, so that it is sent again where the answer was lost.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    data: Mapping[str, str | list[str]] | None = None
    files: list[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False


def known(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are given and not None.

    Raises:
        TypeError: there is no such field, or labels are one text.
    """
    if unknown := given.keys() - kind.__annotations__.keys():
        raise TypeError(f"there is no {', '.join(sorted(unknown))}; known: {', '.join(kind.__annotations__)}")
    for name in ("labels", "classes", "captions", "files"):
        if isinstance(given.get(name), str):
            raise TypeError(f"{name} must be a list of texts; a text alone would be read letter by letter")
    return {name: value for name, value in given.items() if value is not None}


def _model(kind: type[A]) -> Callable[[bytes], A]:
    return kind.model_validate_json


def _member(name: str, kind: Any) -> Callable[[bytes], Any]:
    adapter = TypeAdapter(kind)

    def read(body: bytes) -> Any:
        return adapter.validate_python(json.loads(body)[name])

    return read


def _nothing(_: bytes) -> None:
    return None


def _label_set(name: str, *more: str) -> str:
    return "/".join([f"/v1/label-sets/{quote(name, safe='')}", *(quote(each, safe="") for each in more)])


def _database(name: str) -> str:
    return f"/v1/databases/{quote(name, safe='')}"


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}


def _files(images: Sequence[Upload]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (each.name, each.content)) for each in images]


def _in_json(image: Upload | Address) -> dict[str, str]:
    if isinstance(image, Address):
        return {"url": image.url}
    return {"base64": base64.b64encode(image.content).decode()}


def _in_form(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def classify(images: Sequence[Upload | Address], question: Mapping[str, Any]) -> Call[answers.Classification]:
    """Classify images: as a form, or as JSON where the service is to fetch one."""
    fields = {name: _listed(value) for name, value in known(Question, question).items()}
    uploads = [each for each in images if isinstance(each, Upload)]
    read = _model(answers.Classification)
    if len(uploads) < len(images):
        body = {**fields, "images": [_in_json(each) for each in images]}
        return Call("POST", "/v1/classify", read, json=body, repeatable=True)
    data = {name: _in_form(value) for name, value in fields.items()}
    return Call("POST", "/v1/classify", read, data=data, files=_files(uploads), repeatable=True)


def embed(inputs: Sequence[str], modality: str, model: str | None) -> Call[list[list[float]]]:
    """Return features of texts, or of images in base64."""
    body = {"input": list(inputs), "modality": modality, "encoding_format": "base64", "model": model}
    return Call("POST", "/v1/embeddings", _vectors, json=body, repeatable=True)


def embed_images(images: Sequence[Upload | Address], model: str | None) -> Call[list[list[float]]]:
    """Return features of images."""
    inputs = [each.url if isinstance(each, Address) else _in_json(each)["base64"] for each in images]
    return embed(inputs, "image", model)


def _vectors(body: bytes) -> list[list[float]]:
    found = []
    for each in json.loads(body)["data"]:
        numbers = array("f", base64.b64decode(each["embedding"]))
        if _BIG_ENDIAN:
            numbers.byteswap()
        found.append(numbers.tolist())
    return found


_BIG_ENDIAN = array("H", b"\x01\x00")[0] != 1


def models() -> Call[list[answers.Model]]:
    """List the models."""
    return Call("GET", "/v1/models", _member("models", list[answers.Model]), repeatable=True)


def methods() -> Call[list[answers.Method]]:
    """List the methods."""
    return Call("GET", "/v1/methods", _member("methods", list[answers.Method]), repeatable=True)


def ready() -> Call[str]:
    """Ask whether requests are answered."""
    return Call("GET", "/readyz", _member("status", str), repeatable=True)


# --- label sets ------------------------------------------------------------------------------------------------------


class Page(Answer):
    """A page of a list; ``next_after`` is where the next one begins."""

    next_after: str | int | None


class LabelSetPage(Page):
    """Label sets."""

    label_sets: list[answers.LabelSetSummary]


def label_sets(after: str | int | None) -> Call[LabelSetPage]:
    """List label sets."""
    return Call("GET", "/v1/label-sets", _model(LabelSetPage), params=_from(after), repeatable=True)


def _from(after: str | int | None, **more: str | None) -> dict[str, str]:
    given = {"limit": str(PAGE), "after": None if after is None else str(after), **more}
    return {name: value for name, value in given.items() if value is not None}


def label_set(reference: str) -> Call[answers.LabelSet]:
    """Return a version of a label set: ``name`` or ``name@version``."""
    name, at, version = reference.partition("@")
    params = {"version": version} if at else {}
    return Call("GET", _label_set(name), _model(answers.LabelSet), params=params, repeatable=True)


def put_label_set(
    name: str, classes: Sequence[ClassLike], templates: str | None, merge_synonyms: str | None, version: int | None
) -> Call[answers.LabelSet]:
    """Make a version of a label set."""
    body = {"classes": [_class(each) for each in classes], "templates": templates, "merge_synonyms": merge_synonyms}
    body = {field: value for field, value in body.items() if value is not None}
    headers = {"If-None-Match": "*"} if version == 0 else _if_match(version)
    return Call("PUT", _label_set(name), _model(answers.LabelSet), json=body, headers=headers)


def _class(given: ClassLike) -> Any:
    return given.model_dump() if isinstance(given, Answer) else _listed(given)


def add_classes(name: str, classes: Sequence[ClassLike], version: int | None) -> Call[answers.LabelSet]:
    """Make a version with more classes."""
    body = {"classes": [_class(each) for each in classes]}
    path = _label_set(name, "classes")
    return Call("POST", path, _model(answers.LabelSet), json=body, headers=_if_match(version))


def remove_class(name: str, label: str, version: int | None) -> Call[answers.LabelSet]:
    """Make a version without a class."""
    path = _label_set(name, "classes", label)
    return Call("DELETE", path, _model(answers.LabelSet), headers=_if_match(version))


def delete_label_set(name: str, version: int | None) -> Call[None]:
    """Delete a label set."""
    return Call("DELETE", _label_set(name), _nothing, headers=_if_match(version))


def evaluate(
    name: str, images: Sequence[tuple[str, Upload]], model: str | None, template: str | None
) -> Call[answers.JobState]:
    """Try every method on labelled images; without any, on the stored example images."""
    fields = {key: value for key, value in {"model": model, "template": template}.items() if value is not None}
    path, read = f"{_label_set(name)}:evaluate", _model(answers.JobState)
    if not images:
        return Call("POST", path, read, json=fields)
    data: dict[str, str | list[str]] = {**fields, "class": [label for label, _ in images]}
    return Call("POST", path, read, data=data, files=_files([image for _, image in images]))


def selection(name: str, model: str | None) -> Call[answers.Selection]:
    """Return which method was chosen, and why."""
    params = {} if model is None else {"model": model}
    return Call("GET", _label_set(name, "selection"), _model(answers.Selection), params=params, repeatable=True)


# --- example images --------------------------------------------------------------------------------------------------


class ExamplePage(Page):
    """Example images."""

    images: list[answers.Example]
    counts: answers.ExampleCounts


def examples(name: str, label: str | None, after: str | int | None) -> Call[ExamplePage]:
    """List example images, of a class or of all."""
    params = _from(after, **{"class": label})
    return Call("GET", _label_set(name, "images"), _model(ExamplePage), params=params, repeatable=True)


def add_examples(name: str, images: Sequence[Upload], label: str | None) -> Call[answers.AddedExamples]:
    """Add example images of a class, or without one. The same picture twice is stored once."""
    data: dict[str, str | list[str]] = {} if label is None else {"class": label}
    path, read = _label_set(name, "images"), _model(answers.AddedExamples)
    return Call("POST", path, read, data=data, files=_files(images), repeatable=True)


def import_examples(name: str, folder: str, label: str | None, *, by_subfolder: bool | None) -> Call[answers.JobState]:
    """Add a folder of the service's machine."""
    given = {"folder": folder, "class": label, "by_subfolder": by_subfolder}
    body = {key: value for key, value in given.items() if value is not None}
    return Call("POST", _label_set(name, "images"), _model(answers.JobState), json=body)


def delete_example(name: str, image_id: int) -> Call[answers.DeletedExamples]:
    """Delete one example image."""
    return Call("DELETE", _label_set(name, "images", str(image_id)), _model(answers.DeletedExamples))


def delete_examples(
    name: str, label: str | None, *, unlabelled: bool, everything: bool
) -> Call[answers.DeletedExamples]:
    """Delete example images: those of a class, the unlabelled, or all."""
    which = {} if label is None else {"class": label}
    which |= {each: "true" for each, is_meant in (("unlabelled", unlabelled), ("all", everything)) if is_meant}
    return Call("DELETE", _label_set(name, "images"), _model(answers.DeletedExamples), params=which)


# --- descriptions ----------------------------------------------------------------------------------------------------


class DraftPage(Page):
    """Drafts."""

    drafts: list[answers.Draft]


def estimate(name: str, question: Mapping[str, Any]) -> Call[answers.DescribeEstimate]:
    """Tell what describing takes."""
    path = f"{_label_set(name)}/descriptions:estimate"
    body = {key: _listed(value) for key, value in known(DescribeQuestion, question).items()}
    return Call("POST", path, _model(answers.DescribeEstimate), json=body, repeatable=True)


def describe(name: str, question: Mapping[str, Any], *, accept: bool) -> Call[answers.JobState]:
    """Have a language model describe the classes."""
    body = {key: _listed(value) for key, value in known(DescribeQuestion, question).items()}
    path = f"{_label_set(name)}/descriptions:generate"
    return Call("POST", path, _model(answers.JobState), json={**body, "accept": accept})


def drafts(name: str, status: str | None, label: str | None, after: str | int | None) -> Call[DraftPage]:
    """List drafts."""
    params = _from(after, status=status, **{"class": label})
    return Call("GET", _label_set(name, "descriptions"), _model(DraftPage), params=params, repeatable=True)


def accept_drafts(name: str, ids: Sequence[int] | None, version: int | None) -> Call[answers.AcceptedDrafts]:
    """Put drafts into a new version."""
    body = {} if ids is None else {"ids": list(ids)}
    path = f"{_label_set(name)}/descriptions:accept"
    return Call("POST", path, _model(answers.AcceptedDrafts), json=body, headers=_if_match(version))


def reject_drafts(name: str, ids: Sequence[int] | None) -> Call[int]:
    """Decide against drafts."""
    body = {} if ids is None else {"ids": list(ids)}
    return Call("POST", f"{_label_set(name)}/descriptions:reject", _member("rejected", int), json=body)


# --- caption databases and jobs --------------------------------------------------------------------------------------


def databases() -> Call[list[answers.Database]]:
    """List caption databases."""
    return Call("GET", "/v1/databases", _member("databases", list[answers.Database]), repeatable=True)


def database(name: str) -> Call[answers.Database]:
    """Return one."""
    return Call("GET", _database(name), _model(answers.Database), repeatable=True)


def build_database(name: str, plan: Mapping[str, Any]) -> Call[answers.JobState]:
    """Build one."""
    body = {key: _listed(value) for key, value in known(BuildPlan, plan).items()}
    return Call("PUT", _database(name), _model(answers.JobState), json=body)


def search_captions(
    name: str, text: str | None, image: Upload | Address | None, which: Mapping[str, Any]
) -> Call[answers.FoundCaptions]:
    """Search one."""
    body = {"text": text, "image": None if image is None else _in_json(image), **known(CaptionFilter, which)}
    body = {key: value for key, value in body.items() if value is not None}
    return Call("POST", f"{_database(name)}/search", _model(answers.FoundCaptions), json=body, repeatable=True)


def delete_database(name: str) -> Call[None]:
    """Delete one."""
    return Call("DELETE", _database(name), _nothing)


class JobPage(Page):
    """Jobs."""

    jobs: list[answers.JobState]


def jobs(after: str | int | None) -> Call[JobPage]:
    """List jobs."""
    return Call("GET", "/v1/jobs", _model(JobPage), params=_from(after), repeatable=True)


def job(job_id: str) -> Call[answers.JobState]:
    """Return a job."""
    return Call("GET", _job(job_id), _model(answers.JobState), repeatable=True)


def cancel_job(job_id: str) -> Call[answers.JobState]:
    """End a job."""
    return Call("DELETE", _job(job_id), _model(answers.JobState))


def check_succeeded(job: answers.JobState) -> None:
    """Raise ``JobFailedError`` where a job failed, or was cancelled."""
    if job.status in {"failed", "cancelled"}:
        raise JobFailedError(f"the job {job.id} {job.status}{f': {job.error}' if job.error else ''}")


# --- what is wrong with an image alone -------------------------------------------------------------------------------


def is_of_images(error: ClientError) -> bool:
    """Tell whether a request was refused for its images and not for its question."""
    if not isinstance(error, ProblemError):
        return False
    fields = [each.get("field", "") for each in error.problem.errors or ()]
    return error.kind in IMAGE_FAULTS or (
        bool(fields) and all(each.startswith(("image.", "images.")) for each in fields)
    )
