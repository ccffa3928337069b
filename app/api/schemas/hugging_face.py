"""The requests and responses of Hugging Face's tasks zero-shot-image-classification and feature-extraction."""

from typing import Literal

from pydantic import Field, field_validator

from app.api.schemas._base import MAX_IMAGE_CHARS, ModelName, Request, Response, split_text
from app.api.schemas.embeddings import OneOrMore
from app.names.class_names import MAX_ITEMS


class ZeroShotParameters(Request):
    """The labels and the template."""

    candidate_labels: list[str] = Field(
        min_length=1, max_length=MAX_ITEMS, fail_fast=True, description="The labels to choose from."
    )
    hypothesis_template: str = Field(
        "This is a photo of {}.",
        description="A template with `{}` for the label; by default that of the Hugging Face task.",
    )

    _split_labels = field_validator("candidate_labels", mode="before")(split_text)


class ZeroShotBody(Request):
    """A request of the Hugging Face task zero-shot-image-classification."""

    inputs: str = Field(
        min_length=1,
        max_length=MAX_IMAGE_CHARS,
        description="The image: in base64, as a `data:` URL, or a URL if the operator allows URLs.",
    )
    parameters: ZeroShotParameters
    model: ModelName | None = Field(None, description="A model of `GET /v1/models`; by default the first.")


class TaskBody(Request):
    """A request of a Hugging Face inference endpoint: with ``parameters`` zero-shot, else feature extraction."""

    inputs: OneOrMore = Field(
        description="With `parameters`: the image, in base64, as a `data:` URL, or a URL if the operator allows URLs."
        " Without: one or more texts to embed."
    )
    parameters: ZeroShotParameters | None = Field(None, description="The labels; by default texts are embedded.")
    normalize: Literal[True] | None = Field(None, description="Embeddings always have length 1.")
    truncate: Literal[True] | None = Field(None, description="A text that is too long is always truncated.")
    truncation_direction: Literal["right"] | None = Field(None, description="Texts are cut at their end.")
    dimensions: int | None = Field(None, ge=1, description="If given, it must equal the dimensions of the model.")
    encoding_format: Literal["float"] | None = Field(None, description="Embeddings are arrays of numbers.")


class ScoredLabelBody(Response):
    """A label and its score."""

    label: str
    score: float = Field(description="Probability in [0, 1].")
