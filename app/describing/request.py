"""The request to describe the classes of a label set."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Questions(StrEnum):
    """The questions of a set to ask."""

    BASE = "base"
    FULL = "full"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class DescribeRequest:
    """The descriptions to generate for the classes of a label set.

    ``question_set`` is the name of a file in ``prompts/questions``. With ``sentences`` each of its questions gets
    ``answers`` answers; with ``features`` each class gets a list of features. ``classes`` are class names; None means
    all classes.
    """

    question_set: str = "general"
    questions: Questions = Questions.BASE
    sentences: bool = True
    features: bool = True
    answers: int = 10
    classes: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON for ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "DescribeRequest":
        """Return the request that ``to_json`` wrote."""
        classes = stored["classes"]
        return cls(
            **{
                **stored,
                "questions": Questions(stored["questions"]),
                "classes": None if classes is None else tuple(classes),
            }
        )
