"""The manifests of deploy/kubernetes match the schemas of Kubernetes, each other, and the service."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
FILES = sorted(FOLDER.glob("*.yaml"))
MANIFESTS = {
    manifest["kind"]: manifest
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / name).read_text())
}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENV = {item["name"]: item for item in CONTAINER["env"]}


def test_every_file_is_listed_as_a_resource():
    assert {file.name for file in FILES} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}


# The oldest version that is supported anywhere, and the newest one that the package knows.
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_each_manifest_matches_its_schema(kind, version):
    kubernetes_validate.validate(MANIFESTS[kind], version, strict=True)


def test_an_unknown_field_is_detected():
    broken = {**MANIFESTS["Service"], "spec": {**MANIFESTS["Service"]["spec"], "port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_environment_variables_are_settings_with_valid_values(monkeypatch):
    known = {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    assert ENV.keys() <= known
    for name, item in ENV.items():
        if "value" in item:
            monkeypatch.setenv(name, item["value"])
    settings = Settings()
    assert settings.keys == "required"
    assert POD["terminationGracePeriodSeconds"] > settings.drain_s + settings.shutdown_timeout_s
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes["tmp"]["emptyDir"]["sizeLimit"] == "2Gi"
    mounts = {mount["mountPath"]: mount["name"] for mount in POD["containers"][0]["volumeMounts"]}
    # SQLite files belong to one pod; all other data is shared.
    assert "emptyDir" in volumes[mounts[str(settings.data_dir)]]
    assert "persistentVolumeClaim" in volumes[mounts[str(settings.effective_captions_dir.parent)]]
    assert settings.max_total_body_bytes <= 2 * 2**30


def test_no_container_runs_as_root_or_can_become_root():
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is MANIFESTS["ServiceAccount"]["automountServiceAccountToken"] is False
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    context = POD["securityContext"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user.groups()


def test_the_number_of_threads_is_limited():
    resources = CONTAINER["resources"]
    assert int(resources["limits"]["cpu"]) >= int(resources["requests"]["cpu"])
    assert {"cpu", "memory"} <= resources["limits"].keys() & resources["requests"].keys()


def test_secrets_are_referenced_and_not_contained():
    assert "valueFrom" in ENV["DEIXIS_DATABASE_URL"]
    assert "Secret" not in MANIFESTS
    (keys,) = (volume for volume in POD["volumes"] if "secret" in volume)
    mount = next(volumeMount for volumeMount in CONTAINER["volumeMounts"] if volumeMount["name"] == keys["name"])
    assert ENV["DEIXIS_API_KEYS_FILE"]["value"] == f"{mount['mountPath']}/{keys['secret']['items'][0]['path']}"


def test_ports_probes_and_selectors_match(client):
    assert {port["name"] for port in CONTAINER["ports"]} == {MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        request = CONTAINER[probe]["httpGet"]
        assert request["port"] == "http"
        assert client.get(request["path"]).status_code == 200
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment"):
        spec = MANIFESTS[kind]["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        assert selector.get("matchLabels", selector).items() <= labels
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])
    mounted = {volumeMount["name"] for volumeMount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}
    claim = POD["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == MANIFESTS["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_metric_of_the_autoscaler_exists(client):
    metrics = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metrics[0]["pods"]["metric"]["name"]
    page = (ROOT / "docs" / "container.md").read_text("utf-8")
    (rule,) = (
        yaml.safe_load(block)["rules"][0]
        for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
        if "seriesQuery" in block
    )
    assert rule["name"]["as"] == name
    exposed = client.get("/metrics").text
    for series in re.findall(r"deixis_queue_wait_seconds_\w+", rule["seriesQuery"] + rule["metricsQuery"]):
        assert f"# TYPE {series.rpartition('_')[0]} histogram" in exposed


def test_rolling_updates_keep_an_available_copy():
    assert MANIFESTS["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert (
        MANIFESTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"]
        > MANIFESTS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    )
    assert POD["enableServiceLinks"] is False
