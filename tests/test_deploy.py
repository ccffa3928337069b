"""The files of deploy/ name existing metrics and files."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "deixis.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

_METRIC = re.compile(r"\b((?:deixis|process|python)_\w+)")
_SERIES = re.compile(r"_(bucket|sum|count)$")


@pytest.fixture(scope="module")
def rules():
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.fixture
def exposed(client):
    client.get("/v1/models")
    types = re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE)
    return {name for name in types if not name.endswith("_created")}


def expressions():
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def test_alerts_and_the_dashboard_use_existing_metrics(exposed):
    for where, expression in expressions():
        metrics = {_SERIES.sub("", name) for name in _METRIC.findall(expression)}
        assert metrics <= exposed, where
        assert metrics or expression.startswith("up{"), where


def test_expressions_have_balanced_brackets():
    for where, expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), where
        assert expression.count('"') % 2 == 0, where


def test_the_dashboard_shows_every_metric_of_failures(exposed):
    shown = {name for _, expression in expressions() for name in _METRIC.findall(expression)}
    for name in exposed:
        if name.endswith(("_failures_total", "_rejected_total", "_dropped_total", "_restarts_total", "_jobs_total")):
            assert name in shown


def test_every_alert_has_a_severity_a_summary_and_a_description(rules):
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert all(rule["annotations"][part] for part in ("summary", "description"))


def test_every_metric_of_the_service_is_documented(exposed):
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page[page.index("## Metrics") : page.index("## Behind a proxy")]
    ours = {name for name in exposed if name.startswith("deixis_")}
    assert {name for name in ours if f"`{name}`" not in table} == set()
    documented = set(re.findall(r"`(deixis_[a-z_]+)`", table))
    assert documented <= exposed


def test_panels_have_unique_ids_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (column, row)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert all(column < 24 for column, _ in places)


def test_compose_mounts_existing_files_and_named_volumes():
    for name, service in COMPOSE["services"].items():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], name


def test_compose_publishes_ports_on_the_loopback_interface_only():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_images_of_compose_have_a_version():
    others = {name: item for name, item in COMPOSE["services"].items() if not {"build", "extends"} & item.keys()}
    images = {name: item["image"] for name, item in others.items()}
    assert images
    assert all(re.search(r":v?\d", image) and not image.endswith(":latest") for image in images.values())
