"""The number of encoder replicas for a load."""

from types import SimpleNamespace

import pytest

from app.cluster.autoscaling import TARGET_IMAGES, TARGET_WAIT_S, replicas_for_load


def context(replicas, images, waits, queued=0.0, min_replicas=1, max_replicas=10):
    per_replica = {f"r{number}": images / replicas for number in range(replicas)}
    return SimpleNamespace(
        current_num_replicas=replicas,
        aggregated_metrics={"images": per_replica, "wait_s": dict(zip(per_replica, waits, strict=False))},
        total_queued_requests=queued,
        capacity_adjusted_min_replicas=min_replicas,
        capacity_adjusted_max_replicas=max_replicas,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (context(1, 0, [0.0]), 1),
        (context(1, TARGET_IMAGES, [0.0]), 1),
        (context(1, 3 * TARGET_IMAGES, [0.0]), 3),
        (context(2, 0, [2 * TARGET_WAIT_S, 0.0]), 4),
        (context(4, TARGET_IMAGES, [0.01] * 4), 1),
        (context(2, 0, [0.0, 0.0], queued=5.0), 3),
        (context(1, 100 * TARGET_IMAGES, [9.0]), 10),
        (context(3, 0, [0.0], min_replicas=2), 2),
        (SimpleNamespace(**{**vars(context(1, 0, [0.0])), "aggregated_metrics": None}), 1),
    ],
)
def test_the_number_is_proportional_to_images_and_waiting_time(given, expected):
    assert replicas_for_load(given) == (expected, {})
