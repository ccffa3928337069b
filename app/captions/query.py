"""The query for captions near a text or an image, and its bounds."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import ClientError

if TYPE_CHECKING:
    from app.images.fetch import ImageUrl

MAX_LIMIT = 100
"""The largest number of captions on a page."""

MAX_OFFSET = 900
"""The largest offset of a page."""

MAX_CONTAINS_CHARS = 200


@dataclass(frozen=True, slots=True)
class CaptionQuery:
    """A query for captions of ``database`` near a ``text`` or an ``image``; one of the two is given.

    ``contains`` is a text that a caption must contain, ignoring case; ``min_score`` is the lowest cosine. ``offset``
    and ``limit`` select a page of the captions that pass these filters.
    """

    database: str
    text: str | None = None
    image: "bytes | ClientError | ImageUrl | None" = None
    model: str | None = None
    limit: int = 10
    offset: int = 0
    contains: str | None = None
    min_score: float | None = None
