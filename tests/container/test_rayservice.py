"""deploy/ray/rayservice.yaml: valid pods, a valid Serve config, sufficient resources, and security settings.

No package has the schema of KubeRay's own fields, so they are compared with the list below, which was taken from the
types of ray.io/v1.
"""

import importlib
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
SERVICE, POLICY = yaml.safe_load_all((ROOT / "deploy" / "ray" / "rayservice.yaml").read_text("utf-8"))
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
(APPLICATION,) = SERVE["applications"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
TEMPLATES = {"head": CLUSTER["headGroupSpec"]["template"]} | {name: group["template"] for name, group in GROUPS.items()}
of_every_pod = pytest.mark.parametrize("name", TEMPLATES)

FIELDS = {
    "service": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
    "cluster": {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "auth": {"mode"},
    "autoscaler": {"resources", "securityContext", "idleTimeoutSeconds", "upscalingMode", "env", "envFrom", "image"},
    "head": {"rayStartParams", "template", "serviceType"},
    "group": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def test_all_fields_of_kuberay_are_known():
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert SERVICE["spec"].keys() <= FIELDS["service"]
    assert CLUSTER.keys() <= FIELDS["cluster"]
    assert CLUSTER["autoscalerOptions"].keys() <= FIELDS["autoscaler"]
    assert CLUSTER["headGroupSpec"].keys() <= FIELDS["head"]
    assert CLUSTER["authOptions"].keys() <= FIELDS["auth"]
    for group in GROUPS.values():
        assert group.keys() <= FIELDS["group"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (CLUSTER["headGroupSpec"], *GROUPS.values()):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@of_every_pod
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_every_pod_matches_its_schema(name, version):
    template = TEMPLATES[name]
    metadata = {"name": name, **template["metadata"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(pod, version, strict=True)
    pod["spec"] = {**template["spec"], "gpus": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, version, strict=True)


def test_ray_accepts_the_config():
    schema = pytest.importorskip("ray.serve.schema", reason="the extra ray is not installed")
    config = schema.ServeDeploySchema.model_validate(SERVE)
    assert config.applications[0].import_path == "app.cluster.application:build"
    assert SERVE["http_options"]["port"] == 8000


def test_the_proxy_callback_can_be_imported():
    pytest.importorskip("ray.serve", reason="the extra ray is not installed")
    env = {item["name"]: item.get("value") for item in TEMPLATES["head"]["spec"]["containers"][0]["env"]}
    module, _, name = env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_config_differs_from_serve_yaml_only_in_its_arguments():
    plain = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text("utf-8"))
    ours = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    for config in (plain, ours):
        del config["applications"][0]["args"]
    assert ours == plain


def test_the_version_of_ray_is_the_pinned_one():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert CLUSTER["rayVersion"] == pinned[1]


def test_arguments_are_valid_settings():
    application = pytest.importorskip("app.cluster.application", reason="the extra ray is not installed")
    arguments = APPLICATION["args"]
    assert arguments.keys() <= Settings.model_fields.keys()
    built = application.application(load_settings(**arguments))
    assert built._bound_deployment.name == "edge"


def resource(name, kind):
    return float(GROUPS[name]["rayStartParams"].get(kind, "0"))


def with_one_more(replicas):
    """Return the maximum number of replicas during a rolling update."""
    return replicas.max + (replicas.min == 1)


def test_the_groups_have_room_for_all_replicas_during_an_update():
    settings = load_settings(**APPLICATION["args"])
    processors, gpus = (GROUPS[name]["maxReplicas"] for name in ("processors", "gpus"))
    layout = settings.ray_layout
    narrow = with_one_more(layout.edges) + layout.shards * with_one_more(layout.shard_replicas)
    assert narrow <= processors * resource("processors", "num-cpus")
    encoders = len(settings.models) * with_one_more(layout.encoders)
    assert encoders * layout.encoder_gpus <= gpus * resource("gpus", "num-gpus")
    assert layout.encoder_cpus <= resource("gpus", "num-cpus") < layout.encoder_cpus + 1
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_resources_do_not_exceed_those_of_the_pods():
    for group in GROUPS.values():
        (container,) = group["template"]["spec"]["containers"]
        limits, params = container["resources"]["limits"], group["rayStartParams"]
        assert float(params["num-cpus"]) <= float(limits["cpu"])
        assert params.get("num-gpus", "0") == limits.get("nvidia.com/gpu", "0")


@of_every_pod
def test_all_pods_have_the_same_settings_secrets_and_volumes_and_no_privileges(name, monkeypatch):
    spec = TEMPLATES[name]["spec"]
    (container,) = spec["containers"]
    ours = {item["name"]: item for item in container["env"] if item["name"].startswith("DEIXIS_")}
    assert ours.keys() <= {f"DEIXIS_{field.upper()}" for field in Settings.model_fields}
    assert ours["DEIXIS_DATABASE_URL"]["valueFrom"]["secretKeyRef"] == {"name": "deixis", "key": "database-url"}
    for our in ours.values():
        if "value" in our:
            monkeypatch.setenv(our["name"], our["value"])
    assert Settings().keys == "required"
    assert spec.get("terminationGracePeriodSeconds", 60) > Settings().shutdown_timeout_s
    assert container["env"] == TEMPLATES["head"]["spec"]["containers"][0]["env"]
    assert {volumeMount["name"] for volumeMount in container["volumeMounts"]} == {
        volume["name"] for volume in spec["volumes"]
    }
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    ]
    storage = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "storage.yaml").read_text("utf-8"))
    assert claims == [storage["metadata"]["name"]]
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_ray_requires_a_token_that_the_operator_creates():
    assert CLUSTER["authOptions"] == {"mode": "token"}
    # Rejected by the operator; see below.
    assert tuple(map(int, CLUSTER["rayVersion"].split("."))) >= (2, 52, 0)
    # As an environment variable only, the operator would not know it and could not deploy anything.
    for template in TEMPLATES.values():
        (container,) = template["spec"]["containers"]
        assert not {item["name"] for item in container["env"]} & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_the_network_policy_matches_its_schema(version):
    kubernetes_validate.validate(POLICY, version, strict=True)


def test_only_pods_of_the_cluster_reach_every_port_and_others_only_the_service():
    spec = POLICY["spec"]
    assert POLICY["metadata"]["namespace"] == SERVICE["metadata"]["namespace"]
    (chosen,) = spec["podSelector"]["matchExpressions"]
    assert (chosen["key"], chosen["operator"]) == ("app.kubernetes.io/component", "In")
    assert set(chosen["values"]) == {template["metadata"]["labels"][chosen["key"]] for template in TEMPLATES.values()}
    assert spec["policyTypes"] == ["Ingress"]
    own, operator, anybody = spec["ingress"]
    assert own == {"from": [{"podSelector": spec["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265}]
    assert all("kuberay-operator" in item["podSelector"]["matchLabels"].values() for item in operator["from"])
    assert anybody == {"ports": [{"port": SERVE["http_options"]["port"]}]}
