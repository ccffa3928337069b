"""Thresholds of several labels per image, and their precision and recall on the example images."""

from typing import Annotated

from pydantic import Field

from app.api.schemas._base import FailFast, Request, Response
from app.names.class_names import MAX_ITEMS
from app.names.namespaces import own_name
from app.selection.threshold_curves import LabelThresholds


class CurveBody(Response):
    """The example images that each threshold selects: a step function.

    A threshold between two of these selects the images of the next higher one; one above the last selects none. A
    sample is exact at the thresholds in use and suggested; elsewhere, steps of the recall are about 1 %.
    """

    thresholds: list[float] = Field(description="Scores of images, ascending; of more than 200, a sample.")
    predicted: list[int] = Field(description="Images with at least this score.")
    correct: list[int] = Field(description="Of these, images with the label.")


class LabelThresholdBody(Response):
    """The threshold of a label."""

    label: str
    images: int = Field(description="Example images with the label.")
    average_precision: float | None = Field(description="Null without images.")
    threshold: float = Field(description="In use: `own`, or else `automatic`.")
    own: float | None = Field(description="The threshold of the class in the label set; null for none.")
    automatic: float = Field(description="Fitted to the example images, or 0.5; used if the class has none of its own.")
    suggested: float | None = Field(description="Meets the goal; null if no threshold does.")
    reason: str | None = Field(description="Why there is no suggestion.")
    curve: CurveBody


class ThresholdsResponse(Response):
    """The thresholds of the labels of a label set."""

    label_set: str = Field(description="`name@version`.")
    version: int
    multi_label: bool = Field(description="Whether requests with the label set have several labels by default.")
    model: str
    images: int = Field(description="Labelled example images that were used.")
    calibrated: bool = Field(description="Whether the example images calibrate the scores.")
    labels: list[LabelThresholdBody] = Field(
        description="In the order of the classes; of more than 1,000, those with the most images."
    )

    @classmethod
    def of(cls, measured: LabelThresholds) -> "ThresholdsResponse":
        """Convert measured thresholds."""
        return cls(
            label_set=own_name(measured.label_set.reference),
            version=measured.label_set.version,
            multi_label=measured.label_set.multi_label,
            model=measured.model,
            images=measured.images,
            calibrated=measured.is_calibrated,
            labels=[LabelThresholdBody.model_validate(label, from_attributes=True) for label in measured.labels],
        )


class ThresholdsBody(Request):
    """Thresholds to store."""

    thresholds: Annotated[
        dict[str, Annotated[float, Field(ge=0, le=1)] | None], Field(min_length=1, max_length=MAX_ITEMS), FailFast
    ] = Field(
        description="By class; null removes that of a class, which then has the automatic one. Other classes keep"
        " theirs.",
        examples=[{"car": 0.7, "bicycle": None}],
    )
