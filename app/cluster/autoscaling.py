"""The autoscaling policy of encoder replicas."""

import math
from typing import Any

# Images in progress of a replica that is busy without long waiting times.
TARGET_IMAGES = 32.0
# Maximum time that a new image should wait for its batch.
TARGET_WAIT_S = 0.5


def replicas_for_load(context: Any) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas for the images in progress and their waiting time; called by Ray.

    The number is proportional to both: twice the images, or twice the wait, need twice the replicas.

    Args:
        context: Ray's ``AutoscalingContext``; its metrics are those of ``record_autoscaling_stats``, by replica.
    """
    replicas = max(1, context.current_num_replicas)
    metrics = context.aggregated_metrics or {}
    images = sum(metrics.get("images", {}).values())
    wait_s = max(metrics.get("wait_s", {}).values(), default=0.0)
    needed = max(images / TARGET_IMAGES, replicas * wait_s / TARGET_WAIT_S)
    # Calls wait in the edges if all replicas are full.
    if context.total_queued_requests:
        needed = max(needed, replicas + 1)
    bounded = min(
        max(math.ceil(needed), context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas
    )
    return bounded, {}
