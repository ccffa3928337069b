"""The evaluation of methods on example images, and the method it selects."""

from datetime import datetime

from pydantic import Field

from app.api.schemas._base import Request, Response
from app.store.examples import Selection


class EvaluateStoredBody(Request):
    """What to evaluate the methods on the stored examples with."""

    model: str | None = Field(None, description="The first served by default.")
    template: str | None = Field(None, description="Those of the label set by default.")


class LeaderboardRow(Response):
    """One method, tried on labelled images that it had not learned from."""

    method: str
    accuracy: float
    interval: list[float] = Field(description="95 % bootstrap interval of the accuracy: its two ends.")
    macro_f1: float
    nll: float = Field(description="Negative log-likelihood of the true class, before calibration.")
    ece: float = Field(description="Expected calibration error of the best score, before calibration.")
    calibrated_nll: float = Field(description="As `nll`, by the scores that answers have.")
    calibrated_ece: float = Field(description="As `ece`, by the scores that answers have.")
    temperature: float = Field(description="By which its logits are divided once it is calibrated.")
    ms_per_image: float = Field(description="For scores, once the features are there.")
    to_zero_shot: dict[str, float] | None = Field(
        description="Difference in accuracy: `mean`, `low`, `high`, and `p` corrected for the number of methods."
    )
    warnings: list[str]


class SelectionResponse(Response):
    """Which method the example images are evidence for."""

    method: str
    reason: str
    version: int = Field(description="Of the label set, that was tried.")
    examples_revision: int = Field(description="Of its example images, that were tried.")
    current: bool = Field(description="Whether neither has changed since.")
    created_at: datetime
    labelled: int
    unlabelled: int
    folds: int = Field(description="Into which the labelled images were split; 0 if methods could not be tried.")
    leaderboard: list[LeaderboardRow] = Field(description="The best first.")
    not_run: list[str]

    @classmethod
    def of(cls, selection: Selection) -> "SelectionResponse":
        """Return the selection as it is told to callers."""
        told = {key: value for key, value in selection.result.items() if key != "calibrations"}
        return cls(
            version=selection.version,
            examples_revision=selection.revision,
            current=selection.is_current,
            created_at=selection.created_at,
            **told,
        )
