"""Images in JSON bodies."""

from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from app.api.schemas._base import MAX_IMAGE_CHARS, Request
from app.images.data_urls import is_data_url
from app.images.fetch import MAX_URL_CHARS


class ImageBody(Request):
    """An image in a JSON request: either ``base64`` or ``url``."""

    base64: str | None = Field(
        None, max_length=MAX_IMAGE_CHARS, description="The image file in base64, or as a `data:` URL."
    )
    url: str | None = Field(
        None,
        max_length=MAX_URL_CHARS,
        description="The URL of the image, instead of `base64`; requires `DEIXIS_ALLOW_IMAGE_URLS`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_data_url(cls, value: Any) -> Any:
        # A data: URL is a URL too, but nothing has to be fetched.
        if isinstance(value, dict) and value.keys() == {"url"} and isinstance(value["url"], str):
            return {"base64": value["url"]} if is_data_url(value["url"]) else value
        return value

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        *others, last = type(self).model_fields
        if sum(getattr(self, name) is not None for name in (*others, last)) != 1:
            raise PydanticCustomError("image", f"give either {', '.join(others)} or {last}")
        return self


class ClassifyImageBody(ImageBody):
    """An image in a JSON request to classify: either ``base64``, ``url`` or ``id``."""

    id: str | None = Field(
        None,
        max_length=100,
        description="The `image_id` of an image of an earlier request with `keep_features`, instead of `base64`.",
    )
