"""The request and response of Hugging Face's zero-shot-image-classification task."""

from pydantic import Field

from app.api.schemas._base import MAX_IMAGE_CHARS, Request, Response
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


class ZeroShotBody(Request):
    """A request of the Hugging Face task zero-shot-image-classification."""

    inputs: str = Field(
        min_length=1,
        max_length=MAX_IMAGE_CHARS,
        description="The image: in base64, as a `data:` URL, or a URL if the operator allows URLs.",
    )
    parameters: ZeroShotParameters
    model: str | None = Field(None, description="A model of `GET /v1/models`; by default the first.")


class ScoredLabelBody(Response):
    """A label and its score."""

    label: str
    score: float = Field(description="Probability in [0, 1].")
