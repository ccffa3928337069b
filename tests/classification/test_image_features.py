import numpy as np
import pytest

from app.classification.image_features import ImageFeatureCache, ImageId
from app.errors import UnknownImageError


def test_the_least_recently_used_features_are_dropped_when_the_memory_is_full():
    cache = ImageFeatureCache(max_bytes=3 * (4 * 100 + 500), ttl_s=60)
    batch = np.ones((4, 100), np.float32)
    first, second, third = (cache.keep("model", row) for row in batch[:3])
    cache.get("model", ImageId(first))
    cache.keep("model", batch[3])
    assert cache.get("model", ImageId(first)).base is None, "a view would keep the whole batch in memory"
    cache.get("model", ImageId(third))
    with pytest.raises(UnknownImageError):
        cache.get("model", ImageId(second))


def test_features_that_are_larger_than_the_cache_are_not_kept():
    assert ImageFeatureCache(max_bytes=100, ttl_s=60).keep("model", np.ones(100, np.float32)) is None


def test_features_are_dropped_when_their_time_is_over():
    cache = ImageFeatureCache(max_bytes=1000, ttl_s=0)
    image_id = cache.keep("model", np.ones(10, np.float32))
    with pytest.raises(UnknownImageError, match="send the image again"):
        cache.get("model", ImageId(image_id))
