"""Reads requests with images in their three forms: a form with files, JSON with base64, or the image as the body."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.exceptions import HTTPException

from app.api.errors import field_problems
from app.api.schemas.classification import ClassifyBody, ClassifyFields
from app.api.schemas.databases import SearchBody, SearchFields
from app.api.schemas.embeddings import EmbeddingsBody
from app.api.schemas.hugging_face import ZeroShotBody
from app.api.schemas.images import ImageBody
from app.errors import (
    BodyTooLargeError,
    ClientError,
    InvalidFieldError,
    MalformedRequestError,
    NotAnImageError,
    TooLargeError,
    UnsupportedMediaTypeError,
)
from app.images.fetch import ImageUrl
from app.names.class_names import MAX_ITEMS
from app.names.labels import check_commas, split_labels

_Body = TypeVar("_Body", bound=BaseModel)

# Of one form field that is not a file: a thousand labels of 200 characters take up to 0.8 MB.
_MAX_FIELD_BYTES = 4 * 1024 * 1024
_MAX_FIELDS = 1_100
# One, and room to say that it is one.
_MAX_SEARCH_IMAGES = 16
# Where images come as a form, and JSON names a folder or a model.
_MAX_SMALL_JSON_BYTES = 64 * 1024
# Names may have commas too.
_MAX_JSON_COMMAS = 5 * MAX_ITEMS
_URL = re.compile(r"https?://", re.IGNORECASE)


IMAGE_FILES: Mapping[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "string", "format": "binary"},
    "description": "One or more files.",
}
"""The parts named ``image`` of a form, as OpenAPI describes them."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How many images one request may have, and how many if it evaluates or adds examples."""

    max_images: int
    max_evaluation_images: int


@dataclass(frozen=True, slots=True)
class ClassifyInput:
    """The images, where to fetch them, or the error that kept one from being read, and what to do with them."""

    images: Sequence[bytes | ClientError | ImageUrl]
    fields: ClassifyFields


def media_type_of(request: Request) -> str:
    """Return the content type in lower case, without parameters; empty where there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_classify_input(request: Request, *, max_images: int) -> ClassifyInput:
    """Read a request by its content type.

    Raises:
        UnsupportedMediaTypeError: none of the three forms.
        MalformedRequestError: a body that does not parse.
        InvalidFieldError: unknown, missing or wrong fields.
        TooLargeError: more than ``max_images`` images.
    """
    content_type = media_type_of(request)
    if content_type.startswith("image/"):
        return ClassifyInput([await request.body()], _fields_of(ClassifyFields, _query_fields(request.query_params)))
    _check_kind(request, content_type)
    if content_type == "multipart/form-data":
        return await _read_form(request, max_images)
    # Parsing and base64 of a large body take as long as decoding a picture.
    return await asyncio.to_thread(_read_json, await request.body(), max_images)


async def read_search_input(request: Request) -> tuple[SearchFields, bytes | ClientError | ImageUrl | None]:
    """Read a search by its content type, and the image, if there is one; raises as ``read_classify_input``."""
    content_type = media_type_of(request)
    if content_type.startswith("image/"):
        return _fields_of(SearchFields, _query_fields(request.query_params)), await request.body()
    _check_kind(request, content_type)
    if content_type == "multipart/form-data":
        async with opened_form(request, _MAX_SEARCH_IMAGES, _MAX_FIELDS, "") as form:
            fields = _fields_of(SearchFields, form_fields(form))
            images = form.getlist("image")
            if len(images) > 1:
                raise InvalidFieldError.of("image", f"{len(images)} are given; captions are searched by one")
            return fields, await read_part(images[0])
    return await asyncio.to_thread(_read_search_json, await request.body())


async def read_zero_shot_input(request: Request) -> tuple[ZeroShotBody, bytes | ClientError | ImageUrl]:
    """Read a request in Hugging Face's form, and its image; raises as ``read_classify_input``."""
    _check_is_json(request)
    return await asyncio.to_thread(_read_zero_shot_json, await request.body())


def _read_zero_shot_json(body: bytes) -> tuple[ZeroShotBody, bytes | ClientError | ImageUrl]:
    _check_commas_of(body)
    try:
        given = ZeroShotBody.model_validate_json(body)
    except ValidationError as error:
        raise _told(error, ZeroShotBody) from error
    return given, _image_in(given.inputs)


async def read_embeddings_input(
    request: Request, *, max_images: int
) -> tuple[EmbeddingsBody, list[bytes | ClientError | ImageUrl] | None]:
    """Read a request for features, and its images where it is about some; raises as ``read_classify_input``."""
    _check_is_json(request)
    return await asyncio.to_thread(_read_embeddings_json, await request.body(), max_images)


def _read_embeddings_json(
    body: bytes, max_images: int
) -> tuple[EmbeddingsBody, list[bytes | ClientError | ImageUrl] | None]:
    _check_commas_of(body)
    try:
        given = EmbeddingsBody.model_validate_json(body)
    except ValidationError as error:
        raise _told(error, EmbeddingsBody) from error
    if given.modality == "text":
        return given, None
    inputs = [given.input] if isinstance(given.input, str) else given.input
    if len(inputs) > max_images:
        raise _too_many_images(max_images, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    return given, [_image_in(each) for each in inputs]


def _read_search_json(body: bytes) -> tuple[SearchFields, bytes | ClientError | ImageUrl | None]:
    _check_commas_of(body)
    try:
        given = SearchBody.model_validate_json(body)
    except ValidationError as error:
        raise _told(error, SearchFields) from error
    image = None if given.image is None else _image_of(given.image)
    return SearchFields.model_construct(**given.model_dump(exclude={"image"})), image


def _check_is_json(request: Request) -> None:
    content_type = media_type_of(request)
    if content_type != "application/json":
        raise UnsupportedMediaTypeError(f"content type '{content_type}' is not supported; send application/json")


def _check_kind(request: Request, content_type: str) -> None:
    """Refuse all but a form and JSON, and query fields beside these."""
    if content_type not in {"multipart/form-data", "application/json"}:
        raise UnsupportedMediaTypeError(
            f"content type '{content_type}' is not supported; send multipart/form-data with parts named image, "
            "application/json with images in base64, or the image itself as image/jpeg, image/png, ..."
        )
    if request.query_params:
        raise InvalidFieldError.of(
            next(iter(request.query_params)),
            "query fields go with an image as the body; here they belong into the body",
        )


async def _read_form(request: Request, max_images: int) -> ClassifyInput:
    async with opened_form(request, max_images, _MAX_FIELDS, "DEIXIS_MAX_IMAGES_PER_REQUEST") as form:
        fields = _fields_of(ClassifyFields, form_fields(form))
        return ClassifyInput([await read_part(part) for part in form.getlist("image")], fields)


@asynccontextmanager
async def opened_form(request: Request, max_images: int, max_fields: int, setting: str) -> AsyncIterator[FormData]:
    """Yield a form whose number of images is within the limit; its files go at the end.

    Args:
        request: multipart/form-data.
        max_images: parts named ``image``.
        max_fields: all other parts.
        setting: the name of the setting that holds ``max_images``.

    Raises:
        MalformedRequestError: it does not parse.
        TooLargeError: a limit is passed.
    """
    try:
        async with request.form(
            max_files=max_images + 1, max_fields=max_fields, max_part_size=_MAX_FIELD_BYTES
        ) as form:
            if len(form.getlist("image")) > max_images:
                raise _too_many_images(max_images, setting)
            yield form
    except HTTPException as error:
        # Starlette tells every fault of a form in this way, limits too.
        if "files" in str(error.detail):
            raise _too_many_images(max_images, setting) from error
        if "exceeded" in str(error.detail) or "Too many" in str(error.detail):
            raise TooLargeError(f"the form passes a limit: {error.detail}") from error
        raise MalformedRequestError(f"the form does not parse: {error.detail}") from error
    except UnicodeError as error:
        raise MalformedRequestError(f"the form is not in the charset that its content type names: {error}") from error


async def read_part(part: UploadFile | str) -> bytes:
    """Return the bytes of a part named ``image``; raises ``InvalidFieldError`` where it is no file."""
    if isinstance(part, str):
        raise InvalidFieldError.of("image", "must be a file, with a filename in its part's Content-Disposition")
    return await part.read()


def parsed(kind: type[_Body], body: bytes) -> _Body:
    """Return a JSON body, for routes that take other kinds of bodies too.

    Raises:
        BodyTooLargeError: more than any such body needs.
        MalformedRequestError: no JSON.
        InvalidFieldError: unknown, missing or wrong fields.
    """
    if len(body) > _MAX_SMALL_JSON_BYTES:
        limit = f"{_MAX_SMALL_JSON_BYTES // 1024} KiB"
        raise BodyTooLargeError(f"the JSON body has {len(body):,} bytes, and {limit} are more than it needs; send less")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        told = field_problems(list(found))
        assert isinstance(told, ClientError)
        raise told from error


def form_fields(form: FormData) -> dict[str, Any]:
    """Return all that is no image, with labels and classes as lists.

    Raises:
        InvalidFieldError: there is no image, another part is a file, or a field is repeated.
    """
    if not form.getlist("image"):
        raise InvalidFieldError.of("image", "is missing; send one or more file parts named image")
    text: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if name == "image":
            continue
        if not isinstance(value, str):
            raise InvalidFieldError.of(name, "is a file; file parts must be named image")
        text.setdefault(name, []).append(value)
    return _single_values(text)


def _query_fields(query: QueryParams) -> dict[str, Any]:
    return _single_values({name: query.getlist(name) for name in query})


def _single_values(text: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the fields with labels split; labels and classes may be repeated, other fields may not."""
    fields: dict[str, Any] = {}
    for name, values in text.items():
        if name == "labels":
            check_commas(*values)
            fields[name] = [label for value in values for label in split_labels(value)] if values != [""] else []
        elif name == "class":
            fields[name] = values
        elif len(values) > 1:
            raise InvalidFieldError.of(name, f"is given {len(values)} times")
        else:
            fields[name] = values[0]
    return fields


def _fields_of(kind: type[_Body], fields: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _told(error, kind) from error


def _read_json(body: bytes, max_images: int) -> ClassifyInput:
    _check_commas_of(body)
    try:
        parsed = ClassifyBody.model_validate_json(body)
    except ValidationError as error:
        raise _told(error, ClassifyFields) from error
    if len(parsed.images) > max_images:
        raise _too_many_images(max_images, "DEIXIS_MAX_IMAGES_PER_REQUEST")
    fields = ClassifyFields.model_construct(**parsed.model_dump(exclude={"images"}))
    return ClassifyInput([_image_of(image) for image in parsed.images], fields)


def _check_commas_of(body: bytes) -> None:
    # Counted before parsing, which would hold the interpreter for seconds; base64 has no commas.
    if body.count(b",") > _MAX_JSON_COMMAS:
        raise TooLargeError(f"the body has more than {_MAX_JSON_COMMAS:,} commas; send fewer labels or images")


def _image_of(given: ImageBody) -> bytes | ClientError | ImageUrl:
    if given.url is not None:
        return ImageUrl(given.url)
    assert given.base64 is not None
    return _from_base64(given.base64)


def _image_in(text: str) -> bytes | ClientError | ImageUrl:
    """Return what a text means that is a URL or base64."""
    return ImageUrl(text) if _URL.match(text) else _from_base64(text)


def _from_base64(text: str) -> bytes | ClientError:
    if text.startswith("data:"):
        _, _, text = text.partition(",")
    try:
        # Without white space, since the base64 command breaks its lines.
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return NotAnImageError(f"the image's base64 does not decode: {error}")


def _told(error: ValidationError, kind: type[BaseModel]) -> ClientError:
    found = error.errors(include_url=False, include_input=False)
    for each in found:
        if each["type"] == "extra_forbidden":
            known = ", ".join(sorted(kind.model_fields))
            each["msg"] = f"there is no such field; known: {known}"
    told = field_problems(list(found))
    assert isinstance(told, ClientError)
    return told


def _too_many_images(limit: int, setting: str) -> TooLargeError:
    way_out = f", or raise {setting}" if setting else ""
    return TooLargeError(f"more than {limit} images in one request; send fewer per request{way_out}")
