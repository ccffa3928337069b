"""How many encoders are wanted."""

from types import SimpleNamespace

import pytest

from app.cluster.autoscaling import TARGET_IMAGES, TARGET_WAIT_S, replicas_for_load


def seen(replicas, images, waits, queued=0.0, least=1, most=10):
    per_replica = {f"r{number}": images / replicas for number in range(replicas)}
    return SimpleNamespace(
        current_num_replicas=replicas,
        aggregated_metrics={"images": per_replica, "wait_s": dict(zip(per_replica, waits, strict=False))},
        total_queued_requests=queued,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (seen(1, 0, [0.0]), 1),
        (seen(1, TARGET_IMAGES, [0.0]), 1),
        (seen(1, 3 * TARGET_IMAGES, [0.0]), 3),
        (seen(2, 0, [2 * TARGET_WAIT_S, 0.0]), 4),
        (seen(4, TARGET_IMAGES, [0.01] * 4), 1),
        (seen(2, 0, [0.0, 0.0], queued=5.0), 3),
        (seen(1, 100 * TARGET_IMAGES, [9.0]), 10),
        (seen(3, 0, [0.0], least=2), 2),
        (SimpleNamespace(**{**vars(seen(1, 0, [0.0])), "aggregated_metrics": None}), 1),
    ],
)
def test_images_and_waits_ask_for_replicas_in_proportion(given, wanted):
    assert replicas_for_load(given) == (wanted, {})
