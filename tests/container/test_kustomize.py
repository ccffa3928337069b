"""The results of deploy/kustomize match the schemas of Kubernetes, and the service."""

import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kustomize"
OVERLAYS = sorted(file.parent.name for file in FOLDER.glob("overlays/*/kustomization.yaml"))


def documents(file):
    return [item for item in yaml.safe_load_all(file.read_text("utf-8")) if item]


def kustomization(folder):
    (content,) = documents(folder / "kustomization.yaml")
    return content


def with_patch(value, patch):
    """Return the result of a strategic merge: containers and variables are matched by name."""
    if isinstance(value, dict) and isinstance(patch, dict):
        merged = {name: item for name, item in value.items() if not (name in patch and patch[name] is None)}
        for name, item in patch.items():
            if item is not None:
                merged[name] = with_patch(value[name], item) if name in value else item
        return merged
    if isinstance(value, list) and isinstance(patch, list) and all("name" in item for item in (*value, *patch)):
        named = {item["name"]: item for item in value}
        for item in patch:
            if item.get("$patch") == "delete":
                del named[item["name"]]
            else:
                named[item["name"]] = with_patch(named.get(item["name"], {}), item)
        return list(named.values())
    return patch


def resolved(folder):
    """Return the resources of a kustomization by kind and name; supports only the features used by these files."""
    content = kustomization(folder)
    used = {"apiVersion", "kind", "resources", "components", "patches", "images", "labels", "namespace"}
    assert content.keys() <= used
    found = {}
    for name in content.get("resources", []):
        place = folder / name
        some = resolved(place).values() if place.is_dir() else documents(place)
        found |= {(item["kind"], item["metadata"]["name"]): deepcopy(item) for item in some}
    steps = [folder, *(folder / name for name in content.get("components", []))]
    for step in steps:
        described = kustomization(step)
        for patch in described.get("patches", []):
            (told,) = documents(step / patch["path"])
            key = (told["kind"], told["metadata"]["name"])
            assert key in found, f"{step}: {patch['path']} patches what there is not"
            if told.pop("$patch", None) == "delete":
                del found[key]
            else:
                found[key] = with_patch(found[key], told)
        for image in described.get("images", []):
            for container in containers(found):
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        if "namespace" in described:
            for (kind, _), item in found.items():
                if kind != "Namespace":
                    item["metadata"]["namespace"] = described["namespace"]
    return found


def containers(resources):
    for (kind, _), item in resources.items():
        if kind in {"Deployment", "StatefulSet"}:
            yield from item["spec"]["template"]["spec"]["containers"]


def service(overlay):
    """Return the pod of the service, and its container."""
    pod = resolved(FOLDER / "overlays" / overlay)["Deployment", "deixis"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_there_are_overlays_for_cpu_gpu_and_postgresql():
    assert OVERLAYS == ["cpu", "gpu", "postgres"]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
def test_every_resource_matches_its_schema(overlay, version):
    resources = resolved(FOLDER / "overlays" / overlay)
    assert len(resources) >= 6
    for resource in resources.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_patch_of_an_unknown_field_is_detected():
    broken = resolved(FOLDER / "overlays" / "cpu")["Deployment", "deixis"]
    broken = with_patch(broken, {"spec": {"template": {"spec": {"containers": [{"name": "deixis", "cpu": 4}]}}}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_every_file_is_used():
    folders = [file.parent for file in FOLDER.rglob("kustomization.yaml")]
    for folder in folders:
        content = kustomization(folder)
        named = {*content.get("resources", []), *(item["path"] for item in content.get("patches", []))}
        assert {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"} <= named
    assert {file.parent for file in FOLDER.rglob("*.yaml")} == set(folders)


def unlabelled(value):
    """Return a resource without labels and selectors, which kustomize adds, and without empty fields."""
    if isinstance(value, dict):
        left = {
            name: unlabelled(item) for name, item in value.items() if name not in {"labels", "matchLabels", "selector"}
        }
        return {name: item for name, item in left.items() if item not in (None, {})}
    return [unlabelled(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same_resources(overlay):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl, which has kustomize inside")
    done = subprocess.run(
        [kubectl, "kustomize", FOLDER / "overlays" / overlay], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(done.stdout)}
    ours = resolved(FOLDER / "overlays" / overlay)
    assert made.keys() == ours.keys()
    for key, item in made.items():
        assert ordered(unlabelled(item)) == ordered(unlabelled(ours[key])), key


def ordered(value):
    """Return a value with named lists sorted by name."""
    if isinstance(value, dict):
        return {name: ordered(item) for name, item in value.items()}
    if isinstance(value, list):
        items = [ordered(item) for item in value]
        named = all(isinstance(item, dict) and "name" in item for item in items)
        return sorted(items, key=lambda item: item["name"]) if named else items
    return value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_environment_variables_are_settings_with_valid_values(overlay, monkeypatch):
    _, container = service(overlay)
    known = {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    assert {item["name"] for item in container["env"]} <= known
    for item in container["env"]:
        if "value" in item:
            monkeypatch.setenv(item["name"], item["value"])
    assert Settings().keys == "required"


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_a_single_process_has_its_own_volume_and_sqlite(overlay):
    resources = resolved(FOLDER / "overlays" / overlay)
    kinds = {kind for kind, _ in resources}
    assert not kinds & {"HorizontalPodAutoscaler", "PodDisruptionBudget", "StatefulSet"}
    spec = resources["Deployment", "deixis"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert "DEIXIS_DATABASE_URL" not in {item["name"] for item in service(overlay)[1]["env"]}
    assert resources["PersistentVolumeClaim", "deixis-data"]["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_gpu_overlay_requests_a_gpu_and_uses_its_image():
    pod, container = service("gpu")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {item["name"]: item.get("value") for item in container["env"]}["DEIXIS_DEVICE"] == "auto"
    assert container["image"].endswith("-cuda")
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "-cuda" not in service("cpu")[1]["image"]


def test_requests_are_within_limits():
    for overlay in OVERLAYS:
        resources = service(overlay)[1]["resources"]
        assert int(resources["requests"]["cpu"]) <= int(resources["limits"]["cpu"]), overlay
        of_memory = [int(resources[item]["memory"].removesuffix("Gi")) for item in ("requests", "limits")]
        assert of_memory == sorted(of_memory), overlay


def test_only_the_service_reaches_postgresql_which_has_no_privileges():
    resources = resolved(FOLDER / "overlays" / "postgres")
    pod = resources["StatefulSet", "postgres"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    policy = resources["NetworkPolicy", "postgres"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels
    (allowed,) = policy["ingress"][0]["from"]
    server = resources["Deployment", "deixis"]["spec"]["template"]["metadata"]["labels"]
    assert allowed["podSelector"]["matchLabels"].items() <= server.items()
    assert resources["Service", "postgres"]["spec"]["selector"].items() <= labels
    assert resources["StatefulSet", "postgres"]["spec"]["serviceName"] == "postgres"
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert all("value" in item or item["name"] == "POSTGRES_PASSWORD" for item in container["env"])
    mounted = {volumeMount["name"] for volumeMount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]} | {"data"}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    assert container["image"] == compose["services"]["postgres"]["image"]


def test_the_secret_has_the_keys_of_the_guide():
    page = (ROOT / "docs" / "container.md").read_text("utf-8")
    made = set(re.findall(r"--from-(?:file|literal)=([a-z.-]+)", page))
    for overlay in OVERLAYS:
        for container in containers(resolved(FOLDER / "overlays" / overlay)):
            for item in container["env"]:
                if "valueFrom" in item:
                    assert item["valueFrom"]["secretKeyRef"]["key"] in made
