"""Metrics of several replicas in one exposition."""

from prometheus_client.parser import text_string_to_metric_families

from app.cluster.telemetry import join_expositions
from app.observability.metrics import Metrics, TowerMetrics


def exposition(batches):
    metrics = Metrics("1.0")
    tower = TowerMetrics(metrics, "m", "images")
    for size in batches:
        tower.batch(size, 0.01)
    return metrics.exposition()


def test_each_sample_has_the_label_of_its_replica_and_each_name_occurs_once():
    text = join_expositions([("edge/a", exposition([1])), ("encoder/b", exposition([2, 3]))]).decode()
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
    assert {sample.labels["replica"] for sample in infos} == {"edge/a", "encoder/b"}


def test_no_replicas_give_an_empty_exposition():
    assert join_expositions([]) == b""
