"""The evaluation of methods on example images, and the method it selects."""

from datetime import datetime

from pydantic import Field

from app.api.schemas._base import ModelName, Request, Response
from app.selection.selection_reader import evidence_of
from app.store.examples import StoredSelection


class EvaluateStoredBody(Request):
    """The model and the templates for an evaluation on the stored example images."""

    model: ModelName | None = Field(None, description="A model of `GET /v1/models`; by default the first.")
    template: str | None = Field(None, description="A template set or one template; by default those of the label set.")
    multi_label: bool | None = Field(
        None,
        description="Images may have several classes: measure how well zero-shot finds them. Otherwise images with one"
        " class are used, and all methods are compared. By default as the label set says.",
    )


class LeaderboardRow(Response):
    """The measures of one method on held-out labelled images."""

    method: str
    accuracy: float
    interval: list[float] = Field(description="95 % bootstrap interval of the accuracy: lower and upper end.")
    macro_f1: float
    nll: float = Field(description="Negative log-likelihood of the true class, before calibration.")
    ece: float = Field(description="Expected calibration error of the best score, before calibration.")
    calibrated_nll: float = Field(description="As `nll`, after calibration.")
    calibrated_ece: float = Field(description="As `ece`, after calibration.")
    temperature: float = Field(description="The calibration divides the logits by this.")
    ms_per_image: float = Field(description="Time to compute scores from image features.")
    to_zero_shot: dict[str, float] | None = Field(
        description="Difference in accuracy to `zero-shot`: `mean`, `low`, `high`, and `p` corrected for the number of"
        " methods; null for `zero-shot` itself."
    )
    warnings: list[str]


class SelectionResponse(Response):
    """The method selected for a label set, and the comparison it is based on."""

    method: str
    reason: str
    version: int = Field(description="The version of the label set that was compared.")
    examples_revision: int = Field(description="The revision of the example images that were compared.")
    current: bool = Field(description="True if neither has changed since.")
    created_at: datetime
    labelled: int
    unlabelled: int
    folds: int = Field(description="Number of cross-validation folds; 0 if the methods could not be compared.")
    leaderboard: list[LeaderboardRow] = Field(description="Best method first.")
    not_run: list[str]
    thresholds: dict[str, float] = Field(
        {}, description="Where images may have several classes: the score from which an image has each, fitted to them."
    )
    shared_threshold: float | None = Field(
        None, description="The threshold of the classes that have none of their own."
    )

    @classmethod
    def of(cls, selection: StoredSelection) -> "SelectionResponse":
        """Convert a stored selection."""
        return cls(
            version=selection.version,
            examples_revision=selection.revision,
            current=selection.is_current,
            created_at=selection.created_at,
            **evidence_of(selection.result),
        )
