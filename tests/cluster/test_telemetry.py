"""Metrics of several processes under one name."""

from prometheus_client.parser import text_string_to_metric_families

from app.cluster.telemetry import joined_expositions
from app.observability.metrics import Metrics, TowerMetrics


def counted(batches):
    metrics = Metrics("1.0")
    told = TowerMetrics(metrics, "m", "images")
    for size in batches:
        told.batch(size, 0.01)
    return metrics.exposition()


def test_each_sample_says_whose_it_is_and_each_name_is_there_once():
    text = joined_expositions([("edge/a", counted([1])), ("encoder/b", counted([2, 3]))]).decode()
    names = [line for line in text.splitlines() if line.startswith("# TYPE deixis_batch_size ")]
    assert names == ["# TYPE deixis_batch_size histogram"]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {
        sample.labels["replica"]: sample.value
        for sample in families["deixis_batch_size"].samples
        if sample.name == "deixis_batch_size_count"
    }
    assert counts == {"edge/a": 1.0, "encoder/b": 2.0}
    infos = families["deixis_build_info"].samples
    assert {each.labels["replica"] for each in infos} == {"edge/a", "encoder/b"}


def test_of_nobody_there_is_nothing():
    assert joined_expositions([]) == b""
