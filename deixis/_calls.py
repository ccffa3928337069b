"""Every request to the service as a value that both clients send; this module does no input or output."""

import base64
import difflib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from deixis import answers
from deixis._images import ImageId, ImageLike, ImageUrl, SentImage, Upload
from deixis.answers import Answer
from deixis.errors import InvalidNameError, JobFailedError

T = TypeVar("T")
A = TypeVar("A", bound=Answer)

ClassLike = str | answers.LabelClass | Mapping[str, Any]
"""A class: its name, or an object with the fields of ``LabelClass``."""

FIRST_POLL_S, LONGEST_POLL_S = 0.1, 2.0
"""Seconds between two requests for the state of a job: the first, and the limit to which they grow."""

PAGE_SIZE = 1000
"""Items that are requested per page of a list."""


class ClassifyOptions(TypedDict, total=False):
    """How images are classified: the fields of ``POST /v1/classify``, which docs/http-api.md describes."""

    labels: Sequence[str] | str
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
    reject: Literal["auto"]
    coverage: float
    keep_features: bool
    multi_label: bool
    priors: Mapping[str, float] | Literal["estimate", "uniform"]
    min_score: float


class LabelSetSettings(TypedDict):
    """Everything in a label set except its classes; None is the default of the service."""

    templates: str | None
    merge_synonyms: Literal["max", "mean"] | None
    multi_label: bool | None
    priors: dict[str, float] | None


class DescribeOptions(TypedDict, total=False):
    """Which descriptions of the classes of a label set a language model writes."""

    question_set: str
    questions: Literal["base", "full", "all"]
    sentences: bool
    features: bool
    answers: int
    classes: Sequence[str]


class BuildPlan(TypedDict, total=False):
    """How a caption database is built; exactly one of ``source``, ``files`` and ``captions`` is required."""

    source: Literal["everyday", "wordnet"]
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
    """Which captions a search returns, and with which model."""

    model: str
    limit: int
    offset: int
    contains: str
    min_score: float


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how to parse its response.

    Args:
        method: HTTP method.
        path: path below the URL of the service.
        read: parses the body of a successful response.
        params: query parameters.
        json: JSON body.
        data: form fields.
        files: form files.
        headers: headers in addition to those of every request.
        repeatable: whether a second copy of the request does no harm, so that it is sent again if its response is lost.
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


def checked_fields(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not None.

    Args:
        kind: the ``TypedDict`` that declares the fields.
        fields: the values, by field.

    Raises:
        TypeError: an unknown field, or a string in place of a list of strings.
    """
    known = kind.__annotations__
    if unknown := [f"{name}{_did_you_mean(name, known)}" for name in fields if name not in known]:
        raise TypeError(f"unknown argument {', '.join(unknown)}; known: {', '.join(known)}")
    for name in ("classes", "captions", "files"):
        if isinstance(fields.get(name), str):
            raise TypeError(f"{name} must be a list of strings, not one string")
    return {name: value for name, value in fields.items() if value is not None}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


def _model(kind: type[A]) -> Callable[[bytes], A]:
    return kind.model_validate_json


def _member(name: str, kind: Any) -> Callable[[bytes], Any]:
    adapter = TypeAdapter(kind)

    def read(body: bytes) -> Any:
        return adapter.validate_python(json.loads(body)[name])

    return read


def _nothing(_: bytes) -> None:
    return None


def _path(*segments: str) -> str:
    """Return the path below ``/v1`` whose segments are these texts, with every reserved character encoded.

    Raises:
        InvalidNameError: a text is empty, or contains a segment ``.`` or ``..``. Programs on the way, among them httpx,
            remove such segments, so the request would reach another resource, such as the whole label set.
    """
    for text in segments:
        if not text:
            raise InvalidNameError("the name is empty; pass a name with at least one character")
        if not {".", ".."}.isdisjoint(_SEPARATORS.split(text)):
            raise InvalidNameError(
                f"the name {text[:80]!r} cannot be part of a URL, because '.' and '..' between slashes are removed from"
                " it; to remove such a class, write the label set again without it"
            )
    return "/".join(["/v1", *(quote(text, safe="") for text in segments)])


# Proxies decode %2F and %5C, and take both for the separator of a path.
_SEPARATORS = re.compile(r"[/\\]")


def _label_set(name: str, *more: str) -> str:
    return _path("label-sets", name, *more)


def _database(name: str) -> str:
    return _path("databases", name)


def _job(job_id: str) -> str:
    return _path("jobs", job_id)


def _if_match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}


def _files(images: Sequence[Upload]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (image.name, image.content)) for image in images]


def _json_image(image: SentImage) -> dict[str, str]:
    if isinstance(image, ImageUrl):
        return {"url": image.url}
    if isinstance(image, ImageId):
        return {"id": image.id}
    return {"base64": base64.b64encode(image.content).decode()}


def _form_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def classify_arguments(
    arguments: Sequence[ImageLike | Sequence[ImageLike]], request: ClassifyOptions
) -> tuple[Sequence[ImageLike], ClassifyOptions]:
    """Return the images and the fields of ``classify``: one or more images, or a list of them, and maybe labels.

    Raises:
        TypeError: the labels are given twice, or an argument is unknown.
        ValueError: there is no image.
    """
    checked_fields(ClassifyOptions, request)  # before files are read
    given: list[Any] = list(arguments)
    if len(given) > 1 and isinstance(given[-1], list | tuple):
        if request.get("labels") is not None:
            raise TypeError("the labels are given twice: as the last argument and as labels; leave out one of them")
        request = {**request, "labels": given.pop()}
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    if not given:
        raise ValueError("pass one or more images")
    return given, request


def classify(images: Sequence[SentImage], request: Mapping[str, Any]) -> Call[answers.Classification]:
    """Classify images: sent as a form, or as JSON if an image is a URL or an id."""
    fields = {name: _json_value(value) for name, value in checked_fields(ClassifyOptions, request).items()}
    uploads = [image for image in images if isinstance(image, Upload)]
    read = _model(answers.Classification)
    if len(uploads) < len(images):
        body = {**fields, "images": [_json_image(image) for image in images]}
        return Call("POST", "/v1/classify", read, json=body, repeatable=True)
    data = {name: _form_value(value) for name, value in fields.items()}
    return Call("POST", "/v1/classify", read, data=data, files=_files(uploads), repeatable=True)


def embed(inputs: Sequence[str], modality: str, model: str | None) -> Call[list[list[float]]]:
    """Return the embeddings of texts, or of images as URLs or in base64."""
    body = {"input": list(inputs), "modality": modality, "encoding_format": "base64", "model": model}
    return Call("POST", "/v1/embeddings", _vectors, json=body, repeatable=True)


def embed_images(images: Sequence[SentImage], model: str | None) -> Call[list[list[float]]]:
    """Return the embeddings of images; raises ``TypeError`` for an ``ImageId``."""
    if any(isinstance(image, ImageId) for image in images):
        raise TypeError("an ImageId can only be classified; pass the image itself")
    inputs = [next(iter(_json_image(image).values())) for image in images]
    return embed(inputs, "image", model)


def _vectors(body: bytes) -> list[list[float]]:
    vectors = []
    for item in json.loads(body)["data"]:
        numbers = array("f", base64.b64decode(item["embedding"]))
        if _BIG_ENDIAN:
            numbers.byteswap()
        vectors.append(numbers.tolist())
    return vectors


_BIG_ENDIAN = array("H", b"\x01\x00")[0] != 1


def models() -> Call[list[answers.Model]]:
    """List the models."""
    return Call("GET", "/v1/models", _member("models", list[answers.Model]), repeatable=True)


def methods() -> Call[list[answers.Method]]:
    """List the methods."""
    return Call("GET", "/v1/methods", _member("methods", list[answers.Method]), repeatable=True)


# --- label sets ------------------------------------------------------------------------------------------------------


class Page(Answer):
    """One page of a list; ``next_after`` is the cursor of the next page, or None on the last one."""

    next_after: str | int | None


class LabelSetPage(Page):
    """One page of label sets."""

    label_sets: list[answers.LabelSetSummary]


def label_sets(after: str | int | None) -> Call[LabelSetPage]:
    """List label sets."""
    return Call("GET", "/v1/label-sets", _model(LabelSetPage), params=_page_params(after), repeatable=True)


def shipped_label_sets() -> Call[list[answers.ShippedLabelSetSummary]]:
    """List the label sets that come with the service."""
    read = _member("label_sets", list[answers.ShippedLabelSetSummary])
    return Call("GET", "/v1/shipped-label-sets", read, repeatable=True)


def shipped_label_set(name: str) -> Call[answers.ShippedLabelSet]:
    """Return the content of a label set that comes with the service."""
    return Call("GET", _path("shipped-label-sets", name), _model(answers.ShippedLabelSet), repeatable=True)


def _page_params(after: str | int | None, **more: str | None) -> dict[str, str]:
    params = {"limit": str(PAGE_SIZE), "after": None if after is None else str(after), **more}
    return {name: value for name, value in params.items() if value is not None}


def label_set(reference: str) -> Call[answers.LabelSet]:
    """Return a version of a label set: ``name`` or ``name@version``."""
    name, at, version = reference.partition("@")
    params = {"version": version} if at else {}
    return Call("GET", _label_set(name), _model(answers.LabelSet), params=params, repeatable=True)


def put_label_set(
    name: str, classes: Sequence[ClassLike], settings: LabelSetSettings, version: int | None
) -> Call[answers.LabelSet]:
    """Write a version of a label set."""
    body = {"classes": [_json_class(entry) for entry in classes], **settings}
    body = {field: value for field, value in body.items() if value is not None}
    headers = {"If-None-Match": "*"} if version == 0 else _if_match(version)
    return Call("PUT", _label_set(name), _model(answers.LabelSet), json=body, headers=headers)


def settings_of(content: answers.ShippedLabelSet) -> LabelSetSettings:
    """Return the settings of a label set that comes with the service."""
    return {
        "templates": content.templates,
        "merge_synonyms": content.merge_synonyms,
        "multi_label": content.multi_label or None,  # an older service does not know it
        "priors": None,
    }


def _json_class(entry: ClassLike) -> Any:
    return entry.model_dump() if isinstance(entry, Answer) else _json_value(entry)


def add_classes(
    name: str, classes: Sequence[ClassLike], priors: Mapping[str, float] | None, version: int | None
) -> Call[answers.LabelSet]:
    """Write a version with additional classes."""
    body: dict[str, Any] = {"classes": [_json_class(entry) for entry in classes]}
    if priors is not None:
        body["priors"] = dict(priors)
    path = _label_set(name, "classes")
    return Call("POST", path, _model(answers.LabelSet), json=body, headers=_if_match(version))


def remove_class(name: str, label: str, version: int | None) -> Call[answers.LabelSet]:
    """Write a version without one of the classes."""
    path = _label_set(name, "classes", label)
    return Call("DELETE", path, _model(answers.LabelSet), headers=_if_match(version))


def delete_label_set(name: str, version: int | None) -> Call[None]:
    """Delete a label set."""
    return Call("DELETE", _label_set(name), _nothing, headers=_if_match(version))


def labelled_pairs(
    images: Mapping[str, Iterable[ImageLike]] | Iterable[tuple[ImageLike, Sequence[str]]] | None,
) -> list[tuple[str | Sequence[str], ImageLike]]:
    """Return each image with its class or classes."""
    if isinstance(images, Mapping):
        return [(label, image) for label, group in images.items() for image in group]
    return [([labels] if isinstance(labels, str) else labels, image) for image, labels in images or ()]


def evaluate(
    name: str,
    images: Sequence[tuple[str | Sequence[str], Upload]],
    model: str | None,
    template: str | None,
    *,
    multi_label: bool | None,
) -> Call[answers.JobState]:
    """Compare all methods on labelled images or, without images, on the stored example images."""
    given = {"model": model, "template": template}
    fields: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    path, read = f"{_label_set(name)}:evaluate", _model(answers.JobState)
    if not images:
        return Call("POST", path, read, json=fields if multi_label is None else {**fields, "multi_label": multi_label})
    data: dict[str, str | list[str]] = {**fields, "class": [_class_field(label) for label, _ in images]}
    if multi_label is not None:
        data["multi_label"] = "true" if multi_label else "false"
    return Call("POST", path, read, data=data, files=_files([image for _, image in images]))


def selection(name: str, model: str | None) -> Call[answers.Selection]:
    """Return the selected method and its evidence."""
    params = {} if model is None else {"model": model}
    return Call("GET", _label_set(name, "selection"), _model(answers.Selection), params=params, repeatable=True)


def thresholds(name: str, model: str | None, precision: float | None, recall: float | None) -> Call[answers.Thresholds]:
    """Return the threshold and the curve of each label."""
    given = {"model": model, "precision": precision, "recall": recall}
    params = {key: str(value) for key, value in given.items() if value is not None}
    return Call("GET", _label_set(name, "thresholds"), _model(answers.Thresholds), params=params, repeatable=True)


def set_thresholds(name: str, given: Mapping[str, float | None], version: int | None) -> Call[answers.LabelSet]:
    """Store thresholds of classes."""
    content = {"thresholds": dict(given)}
    path = _label_set(name, "thresholds")
    return Call("PATCH", path, _model(answers.LabelSet), json=content, headers=_if_match(version))


# --- example images --------------------------------------------------------------------------------------------------


class ExamplePage(Page):
    """One page of example images."""

    images: list[answers.Example]
    counts: answers.ExampleCounts


def examples(name: str, label: str | None, after: str | int | None) -> Call[ExamplePage]:
    """List the example images of one class or of all classes."""
    params = _page_params(after, **{"class": label})
    return Call("GET", _label_set(name, "images"), _model(ExamplePage), params=params, repeatable=True)


def add_examples(
    name: str, images: Sequence[Upload], labels: str | Sequence[str | Sequence[str] | None] | None
) -> Call[answers.AddedExamples]:
    """Add example images. ``labels`` is the class of all images, or the class or classes of each; None for none.

    Repeatable, because an image that is stored already is not stored again.
    """
    data: dict[str, str | list[str]] = {}
    if isinstance(labels, str):
        data["class"] = labels
    elif labels is not None and any(labels):
        data["class"] = [_class_field(label) for label in labels]
    path, read = _label_set(name, "images"), _model(answers.AddedExamples)
    return Call("POST", path, read, data=data, files=_files(images), repeatable=True)


def labels_of(
    label: str | Sequence[str | Sequence[str] | None] | None, classes: Sequence[str] | None, images: int
) -> str | Sequence[str | Sequence[str] | None] | None:
    """Return ``label``, or ``classes`` once per image.

    Raises:
        ValueError: both are given, or ``classes`` is a text.
    """
    if classes is None:
        return label
    if label is not None or isinstance(classes, str):
        raise ValueError("give either label, or classes as a list of the classes that every image has")
    return [list(classes)] * images


def _class_field(label: str | Sequence[str] | None) -> str:
    """Return the classes of an image as the service reads them: one as it is, several as a JSON array."""
    if label is None or isinstance(label, str):
        return label or ""
    return label[0] if len(label) == 1 else json.dumps(list(label), ensure_ascii=False) if label else ""


def import_examples(
    name: str, folder: str, label: str | Sequence[str] | None, *, by_subfolder: bool | None
) -> Call[answers.JobState]:
    """Add a folder on the machine of the service."""
    name_of_field = "class" if label is None or isinstance(label, str) else "classes"
    fields = {"folder": folder, name_of_field: label, "by_subfolder": by_subfolder}
    body = {key: value for key, value in fields.items() if value is not None}
    return Call("POST", _label_set(name, "images"), _model(answers.JobState), json=body)


def delete_example(name: str, image_id: int) -> Call[answers.DeletedExamples]:
    """Delete one example image."""
    return Call("DELETE", _label_set(name, "images", str(image_id)), _model(answers.DeletedExamples))


def delete_examples(
    name: str, label: str | None, *, unlabelled: bool, everything: bool
) -> Call[answers.DeletedExamples]:
    """Delete the example images of a class, the unlabelled ones, or all."""
    params = {} if label is None else {"class": label}
    params |= {flag: "true" for flag, is_set in (("unlabelled", unlabelled), ("all", everything)) if is_set}
    return Call("DELETE", _label_set(name, "images"), _model(answers.DeletedExamples), params=params)


# --- descriptions ----------------------------------------------------------------------------------------------------


class DraftPage(Page):
    """One page of drafts."""

    drafts: list[answers.Draft]


def estimate(name: str, request: Mapping[str, Any]) -> Call[answers.DescribeEstimate]:
    """Return an upper bound of the requests and tokens that ``describe`` uses."""
    path = f"{_label_set(name)}/descriptions:estimate"
    body = {key: _json_value(value) for key, value in checked_fields(DescribeOptions, request).items()}
    return Call("POST", path, _model(answers.DescribeEstimate), json=body, repeatable=True)


def describe(name: str, request: Mapping[str, Any], *, accept: bool) -> Call[answers.JobState]:
    """Start a job in which a language model describes the classes."""
    body = {key: _json_value(value) for key, value in checked_fields(DescribeOptions, request).items()}
    path = f"{_label_set(name)}/descriptions:generate"
    return Call("POST", path, _model(answers.JobState), json={**body, "accept": accept})


def drafts(name: str, status: str | None, label: str | None, after: str | int | None) -> Call[DraftPage]:
    """List the drafts of a label set."""
    params = _page_params(after, status=status, **{"class": label})
    return Call("GET", _label_set(name, "descriptions"), _model(DraftPage), params=params, repeatable=True)


def accept_drafts(name: str, ids: Sequence[int] | None, version: int | None) -> Call[answers.AcceptedDrafts]:
    """Write drafts into a new version of the label set."""
    body = {} if ids is None else {"ids": list(ids)}
    path = f"{_label_set(name)}/descriptions:accept"
    return Call("POST", path, _model(answers.AcceptedDrafts), json=body, headers=_if_match(version))


def reject_drafts(name: str, ids: Sequence[int] | None) -> Call[int]:
    """Reject drafts, and return their number."""
    body = {} if ids is None else {"ids": list(ids)}
    return Call("POST", f"{_label_set(name)}/descriptions:reject", _member("rejected", int), json=body)


# --- caption databases and jobs --------------------------------------------------------------------------------------


def databases() -> Call[list[answers.Database]]:
    """List caption databases."""
    return Call("GET", "/v1/databases", _member("databases", list[answers.Database]), repeatable=True)


def database(name: str) -> Call[answers.Database]:
    """Return a caption database."""
    return Call("GET", _database(name), _model(answers.Database), repeatable=True)


def build_database(name: str, plan: Mapping[str, Any]) -> Call[answers.JobState]:
    """Start a job that builds a caption database."""
    body = {key: _json_value(value) for key, value in checked_fields(BuildPlan, plan).items()}
    return Call("PUT", _database(name), _model(answers.JobState), json=body)


def search_captions(
    name: str, text: str | None, image: SentImage | None, options: Mapping[str, Any]
) -> Call[answers.FoundCaptions]:
    """Search a caption database."""
    body = {
        "text": text,
        "image": None if image is None else _json_image(image),
        **checked_fields(CaptionFilter, options),
    }
    body = {key: value for key, value in body.items() if value is not None}
    return Call("POST", f"{_database(name)}/search", _model(answers.FoundCaptions), json=body, repeatable=True)


def delete_database(name: str) -> Call[None]:
    """Delete a caption database."""
    return Call("DELETE", _database(name), _nothing)


class JobPage(Page):
    """One page of jobs."""

    jobs: list[answers.JobState]


def jobs(after: str | int | None) -> Call[JobPage]:
    """List jobs."""
    return Call("GET", "/v1/jobs", _model(JobPage), params=_page_params(after), repeatable=True)


def job(job_id: str) -> Call[answers.JobState]:
    """Return a job."""
    return Call("GET", _job(job_id), _model(answers.JobState), repeatable=True)


def cancel_job(job_id: str) -> Call[answers.JobState]:
    """Cancel a job."""
    return Call("DELETE", _job(job_id), _model(answers.JobState))


def check_succeeded(job: answers.JobState) -> None:
    """Validate the end of a job.

    Raises:
        JobFailedError: the job failed or was cancelled.
    """
    if job.status in {"failed", "cancelled"}:
        raise JobFailedError(f"the job {job.id} {job.status}{f': {job.error}' if job.error else ''}")
