"""The request and response of Hugging Face's zero-shot-image-classification task."""

from pydantic import Field

from app.api.schemas._base import Request, Response
from app.names.class_names import MAX_ITEMS


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
