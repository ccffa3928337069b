"""Reads request bodies with images in three forms: multipart form data, JSON with base64, or an image as the body."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams

from app.api.errors import from_pydantic
from app.api.multipart_forms import Form, parse_form
from app.api.schemas._base import unknown_field
from app.api.schemas.classification import ClassifyBody, ClassifyFields
from app.api.schemas.databases import SearchBody, SearchFields
from app.api.schemas.embeddings import EmbeddingsBody
from app.api.schemas.hugging_face import TaskBody, ZeroShotBody
from app.api.schemas.images import ImageBody
from app.classification.image_features import ImageId
from app.errors import (
    BodyTooLargeError,
    ClientError,
    InvalidFieldError,
    NotAnImageError,
    TooLargeError,
    UnsupportedMediaTypeError,
)
from app.images.data_urls import read_image_text
from app.images.fetch import ImageUrl
from app.images.formats import is_image
from app.names.class_names import MAX_ITEMS
from app.names.labels import split_labels

_Body = TypeVar("_Body", bound=BaseModel)

_MAX_FIELDS = 1_100
# A search takes one image; the parser accepts more so that the error can say how many were sent.
_MAX_SEARCH_IMAGES = 16
# For JSON bodies of routes that take images as a form; such a body names only a folder or a model.
_MAX_SMALL_JSON_BYTES = 64 * 1024
# Ten per item, because names and captions may contain commas too.
_MAX_JSON_COMMAS = 10 * MAX_ITEMS
_URL = re.compile(r"\s*https?://", re.IGNORECASE)

# Content types of programs that do not know what they send; the last one is the default of curl.
_UNTYPED = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"})

FORM = "multipart/form-data"
JSON = "application/json"

IMAGE_FILES: Mapping[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "format": "binary"},
    "description": "One or more image files.",
}
"""The parts named ``image`` of a form, as OpenAPI describes them."""

ImageInput = bytes | ClientError | ImageUrl
"""An image's bytes, the URL to fetch it from, or the error that prevented reading it."""


@dataclass(frozen=True, slots=True)
class ImageCountLimits:
    """The maximum number of images in a request, and in one that evaluates methods or adds example images."""

    max_images: int
    max_evaluation_images: int


@dataclass(frozen=True, slots=True)
class ClassifyInput:
    """The images of a request to classify, and its other fields."""

    images: Sequence[ImageInput | ImageId]
    fields: ClassifyFields


def media_type_of(request: Request) -> str:
    """Return the content type in lower case and without parameters; empty if the header is missing."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_classify_input(request: Request, *, max_images: int) -> ClassifyInput:
    """Read a request to classify, by its content type.

    Raises:
        UnsupportedMediaTypeError: the content type is none of the three forms.
        MalformedRequestError: the body cannot be parsed.
        InvalidFieldError: a field is unknown, missing or invalid.
        TooLargeError: the request has more than ``max_images`` images.
    """
    media_type = media_type_of(request)
    if await _is_image(request, media_type):
        return ClassifyInput([await request.body()], _validated(ClassifyFields, _query_fields(request.query_params)))
    _check_media_type(request, media_type)
    if media_type == FORM:
        form, fields = await read_form(request, max_images, _MAX_FIELDS, "DEIXIS_MAX_IMAGES_PER_REQUEST")
        return ClassifyInput(form.images, _validated(ClassifyFields, fields))
    # Parsing a large body and its base64 takes as long as decoding an image, so it runs in a thread.
    return await asyncio.to_thread(_classify_input_from_json, await request.body(), max_images)


def _classify_input_from_json(content: bytes, max_images: int) -> ClassifyInput:
    body = validate_json(ClassifyBody, content)
    if len(body.images) > max_images:
        raise _too_many_images(max_images, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    images = [_image_input(image) if image.id is None else ImageId(image.id) for image in body.images]
    return ClassifyInput(images, _part_of(body, ClassifyFields))


async def read_search_input(request: Request) -> tuple[SearchFields, ImageInput | None]:
    """Read a caption search, by its content type, and its image if it has one.

    Raises the errors of ``read_classify_input``.
    """
    media_type = media_type_of(request)
    if await _is_image(request, media_type):
        return _validated(SearchFields, _query_fields(request.query_params)), await request.body()
    _check_media_type(request, media_type)
    if media_type == FORM:
        form, fields = await read_form(request, _MAX_SEARCH_IMAGES, _MAX_FIELDS, "")
        if len(form.images) > 1:
            raise InvalidFieldError.of("image", f"{len(form.images)} images are given; a caption search takes one")
        return _validated(SearchFields, fields), form.images[0]
    return await asyncio.to_thread(_search_input_from_json, await request.body())


def _search_input_from_json(content: bytes) -> tuple[SearchFields, ImageInput | None]:
    body = validate_json(SearchBody, content)
    return _part_of(body, SearchFields), None if body.image is None else _image_input(body.image)


async def read_zero_shot_input(request: Request) -> tuple[ZeroShotBody, ImageInput]:
    """Read a request in Hugging Face's form, and its image; raises the errors of ``read_classify_input``."""
    check_is_json(request)
    return await asyncio.to_thread(_zero_shot_input_from_json, await request.body())


def _zero_shot_input_from_json(content: bytes) -> tuple[ZeroShotBody, ImageInput]:
    body = validate_json(ZeroShotBody, content)
    return body, _image_input_from_text(body.inputs)


async def read_task_input(request: Request) -> tuple[TaskBody, ImageInput | None]:
    """Read a request of a Hugging Face endpoint, and the image to classify if it has labels.

    Raises the errors of ``read_classify_input``.
    """
    check_is_json(request)
    return await asyncio.to_thread(_task_input_from_json, await request.body())


def _task_input_from_json(content: bytes) -> tuple[TaskBody, ImageInput | None]:
    body = validate_json(TaskBody, content)
    if body.parameters is None:
        return body, None
    if len(body.inputs) > 1:
        raise InvalidFieldError.of("inputs", f"{len(body.inputs)} images are given; send one for each request")
    return body, _image_input_from_text(body.inputs[0])


async def read_embeddings_input(request: Request, *, max_images: int) -> tuple[EmbeddingsBody, list[ImageInput] | None]:
    """Read a request for embeddings, and its images if its modality is image.

    Raises the errors of ``read_classify_input``.
    """
    check_is_json(request)
    return await asyncio.to_thread(_embeddings_input_from_json, await request.body(), max_images)


def _embeddings_input_from_json(content: bytes, max_images: int) -> tuple[EmbeddingsBody, list[ImageInput] | None]:
    body = validate_json(EmbeddingsBody, content)
    if body.modality == "text":
        return body, None
    if len(body.input) > max_images:
        raise _too_many_images(max_images, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    return body, [_image_input_from_text(text) for text in body.input]


def check_is_json(request: Request) -> None:
    """Refuse other content types, such as the default of curl."""
    media_type = media_type_of(request)
    if media_type != JSON:
        raise UnsupportedMediaTypeError(
            f"content type '{media_type}' is not supported; send JSON with 'Content-Type: {JSON}'"
        )


def validate_json(kind: type[_Body], content: bytes) -> _Body:
    """Return a JSON body; large ones take long, so call it in a thread.

    Raises:
        MalformedRequestError: the body is not JSON.
        InvalidFieldError: a field is unknown, missing or invalid.
        TooLargeError: the body has more items than any request needs.
    """
    # Counted before parsing, which would hold the interpreter for seconds; base64 contains no commas.
    if content.count(b",") > _MAX_JSON_COMMAS:
        raise TooLargeError(f"the body has more than {_MAX_JSON_COMMAS:,} commas; send fewer items")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _client_error(error) from error


def parse_json(kind: type[_Body], content: bytes) -> _Body:
    """Return the JSON body of a route that also takes a form.

    Raises:
        BodyTooLargeError: the body is larger than such a body needs to be.
        MalformedRequestError: the body is not JSON.
        InvalidFieldError: a field is unknown, missing or invalid.
    """
    if len(content) > _MAX_SMALL_JSON_BYTES:
        raise BodyTooLargeError(
            f"the JSON body has {len(content):,} bytes, more than the limit of {_MAX_SMALL_JSON_BYTES // 1024} KiB;"
            " send a smaller body"
        )
    return validate_json(kind, content)


def check_field_names(names: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise ``InvalidFieldError`` for the first name that is not allowed."""
    if unknown := sorted(set(names) - set(allowed)):
        raise InvalidFieldError.of(unknown[0], unknown_field(unknown[0], allowed))


async def read_form(request: Request, max_images: int, max_fields: int, setting: str) -> tuple[Form, dict[str, Any]]:
    """Read a form, and return it with its fields, labels and classes as lists.

    Args:
        request: a request with multipart/form-data.
        max_images: limit on parts named ``image``.
        max_fields: limit on all other parts.
        setting: the name of the setting that holds ``max_images``; empty if there is none.

    Raises:
        MalformedRequestError: the form cannot be parsed.
        InvalidFieldError: there is no image, another part is a file, or a field is repeated.
        TooLargeError: the form exceeds a limit.
    """
    too_many_images = _too_many_images(max_images, setting)
    form = await parse_form(request, max_images=max_images, max_fields=max_fields, too_many_images=too_many_images)
    return form, _field_values(form.fields)


def _query_fields(query: QueryParams) -> dict[str, Any]:
    return _field_values({name: query.getlist(name) for name in query})


def _field_values(text: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return one value per field, with labels split; only labels and classes may be repeated."""
    fields: dict[str, Any] = {}
    for name, values in text.items():
        if name == "labels":
            fields[name] = split_labels(*values) if values != [""] else []
        elif name == "class":
            fields[name] = values
        elif len(values) > 1:
            raise InvalidFieldError.of(name, f"is given {len(values)} times; give it once")
        else:
            fields[name] = values[0]
    return fields


async def _is_image(request: Request, media_type: str) -> bool:
    """Return whether the body is an image: its content type says so, or says nothing and the bytes do."""
    return media_type.startswith("image/") or (media_type in _UNTYPED and is_image(await request.body()))


def _check_media_type(request: Request, media_type: str) -> None:
    """Refuse a content type other than a form and JSON, and query fields beside either."""
    if media_type not in {FORM, JSON}:
        raise UnsupportedMediaTypeError(
            f"content type '{media_type}' is not supported; send multipart/form-data with parts named image, "
            "application/json with images in base64, or the image itself as image/jpeg, image/png, ..."
        )
    if request.query_params:
        raise InvalidFieldError.of(
            next(iter(request.query_params)),
            "query fields are allowed only with an image as the body; put this field into the body",
        )


def _validated(kind: type[_Body], fields: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _client_error(error) from error


def _client_error(error: ValidationError) -> ClientError:
    return from_pydantic(error.errors(include_url=False, include_input=False))


def _part_of(body: BaseModel, kind: type[_Body]) -> _Body:
    """Return the fields of a base class of the body, so that its base64 can be freed."""
    return kind.model_construct(**{name: getattr(body, name) for name in kind.model_fields})


def _image_input(body: ImageBody) -> ImageInput:
    if body.url is not None:
        return ImageUrl(body.url)
    assert body.base64 is not None
    return _from_text(body.base64)


def _image_input_from_text(text: str) -> ImageInput:
    # White space around a URL is not a part of it.
    return ImageUrl(text.strip()) if _URL.match(text) else _from_text(text)


def _from_text(text: str) -> bytes | ClientError:
    try:
        return read_image_text(text)
    except NotAnImageError as error:
        return error.with_traceback(None)  # the traceback references the text


def _too_many_images(limit: int, setting: str) -> TooLargeError:
    way_out = f", or raise {setting}" if setting else ""
    return TooLargeError(f"more than {limit} images in one request; send fewer per request{way_out}")
