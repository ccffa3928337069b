"""Features of images of earlier requests, so that other labels can be tried without sending the images again."""

import secrets
from dataclasses import dataclass

import numpy as np
from cachetools import TTLCache

from app.errors import UnknownImageError

_PREFIX = "img_"

# Per image: the id, and the objects around the features.
_OVERHEAD_BYTES = 500


@dataclass(frozen=True, slots=True)
class ImageId:
    """The id of an image whose features were kept, as in the request."""

    id: str


class ImageFeatureCache:
    """Keeps image features in memory under random ids; a caller needs nothing but the id to use them.

    Args:
        max_bytes: the least recently used features are dropped above it.
        ttl_s: seconds for which features are kept.
    """

    def __init__(self, *, max_bytes: int, ttl_s: float) -> None:
        self._kept: TTLCache[str, tuple[str, np.ndarray]] = TTLCache(
            max_bytes, ttl_s, getsizeof=lambda kept: kept[1].nbytes + _OVERHEAD_BYTES
        )

    def keep(self, model: str, features: np.ndarray, image: ImageId | None = None) -> str | None:
        """Keep a copy of the features (d,) of one image and return its id; None if the cache is too small for it.

        Args:
            model: that encoded the image.
            features: of the image.
            image: the id under which they are kept already; their time begins again.
        """
        image_id = _PREFIX + secrets.token_urlsafe(16) if image is None else image.id
        try:
            # A row of a batch would keep the whole batch in memory.
            self._kept[image_id] = model, features.copy() if image is None else features
        except ValueError:
            return None
        return image_id

    def get(self, model: str, image: ImageId) -> np.ndarray:
        """Return the features (d,) of an image.

        Raises:
            UnknownImageError: the id is unknown, its features are no longer kept, or are those of another model.
        """
        kept = self._kept.get(image.id)
        if kept is None or kept[0] != model:
            raise UnknownImageError(
                f"no features of the model '{model}' are kept under the image id '{image.id[:100]}'; send the image"
                " again"
            )
        return kept[1]
