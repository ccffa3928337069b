"""How many encoder replicas there should be."""

import math
from typing import Any

# A replica has so many images admitted when it is busy and nobody waits long.
TARGET_IMAGES = 32.0
# An image that comes now should not wait longer than this for its batch.
TARGET_WAIT_S = 0.5


def replicas_for_load(seen: Any) -> tuple[int, dict[str, Any]]:
    """Return how many replicas suit the images that are admitted, and how long they wait; called by Ray.

    Both are in proportion: twice the images, or twice the wait, ask for twice the replicas.

    Args:
        seen: Ray's ``AutoscalingContext``; its metrics are those of ``record_autoscaling_stats``, by replica.
    """
    replicas = max(1, seen.current_num_replicas)
    metrics = seen.aggregated_metrics or {}
    images = sum(metrics.get("images", {}).values())
    wait_s = max(metrics.get("wait_s", {}).values(), default=0.0)
    wanted = max(images / TARGET_IMAGES, replicas * wait_s / TARGET_WAIT_S)
    # Calls that wait at the edges are of replicas that have no more room for them.
    if seen.total_queued_requests:
        wanted = max(wanted, replicas + 1)
    bounded = min(max(math.ceil(wanted), seen.capacity_adjusted_min_replicas), seen.capacity_adjusted_max_replicas)
    return bounded, {}
