"""The Compose file matches the schema of Compose, the settings of the service, and the Dockerfile."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
SERVICES = yaml.safe_load(FILE.read_text("utf-8"))["services"]
SERVICE = SERVICES["deixis"]
# Values that name others, as ${NAME:-default}.
DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def checked(file):
    """Validate a file with the schema of Compose."""
    # A command of the environment, which may not be activated.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = shutil.which("check-jsonschema", path=places)
    if command is None:
        pytest.skip("there is no check-jsonschema, which has the schema of Compose")
    return subprocess.run(
        [command, "--builtin-schema", "vendor.compose-spec", file], capture_output=True, text=True, check=False
    )


def test_the_file_matches_the_schema_of_compose():
    done = checked(FILE)
    assert done.returncode == 0, done.stdout


def test_an_unknown_key_is_detected(tmp_path):
    broken = tmp_path / "docker-compose.yml"
    broken.write_text("services:\n  deixis:\n    image: deixis\n    memory_limit: 8g\n")
    done = checked(broken)
    assert done.returncode == 1
    assert "memory_limit" in done.stdout


def test_environment_variables_are_settings_with_valid_values(monkeypatch):
    named = SERVICE["environment"]
    assert named.keys() <= {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    for name, value in named.items():
        monkeypatch.setenv(name, DEFAULT.sub(r"\1", value))
    settings = Settings()
    grace_s = int(SERVICE["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_s + settings.shutdown_timeout_s


def test_the_service_has_resource_limits_and_no_privileges():
    assert SERVICE["read_only"] is True
    assert SERVICE["tmpfs"] == ["/tmp"]
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= SERVICE.keys()


def test_the_gpu_service_differs_only_in_its_gpu_and_image():
    gpu = SERVICES["deixis-gpu"]
    assert gpu["extends"] == {"service": "deixis"}
    assert gpu["profiles"] == ["gpu"]
    assert gpu["build"]["target"] == "cuda"
    assert gpu["image"] != SERVICE["image"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert gpu.keys() <= {"extends", "profiles", "build", "image", "deploy"}


def test_only_the_service_starts_without_a_profile():
    assert [name for name, item in SERVICES.items() if "profiles" not in item] == ["deixis"]
