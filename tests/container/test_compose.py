"""The Compose file fits Compose's own schema, the service's settings, and the Dockerfile."""

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
# Values of ours that name others, as ${NAME:-default}.
DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def checked(file):
    """Hold a file against the schema of Compose."""
    # A command of the environment that may not be active.
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = shutil.which("check-jsonschema", path=places)
    if command is None:
        pytest.skip("there is no check-jsonschema, which has the schema of Compose")
    return subprocess.run(
        [command, "--builtin-schema", "vendor.compose-spec", file], capture_output=True, text=True, check=False
    )


def test_it_fits_the_schema_of_compose():
    done = checked(FILE)
    assert done.returncode == 0, done.stdout


def test_a_key_that_there_is_not_would_be_found(tmp_path):
    broken = tmp_path / "docker-compose.yml"
    broken.write_text("services:\n  deixis:\n    image: deixis\n    memory_limit: 8g\n")
    done = checked(broken)
    assert done.returncode == 1
    assert "memory_limit" in done.stdout


def test_what_is_set_are_settings_with_values_that_they_take(monkeypatch):
    named = SERVICE["environment"]
    assert named.keys() <= {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    for name, value in named.items():
        monkeypatch.setenv(name, DEFAULT.sub(r"\1", value))
    settings = Settings()
    grace_s = int(SERVICE["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.drain_s + settings.shutdown_timeout_s


def test_the_service_is_bounded_and_has_no_rights():
    assert SERVICE["read_only"] is True
    assert SERVICE["tmpfs"] == ["/tmp"]
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= SERVICE.keys()


def test_the_service_for_a_gpu_is_the_same_with_a_gpu_and_the_image_for_it():
    gpu = SERVICES["deixis-gpu"]
    assert gpu["extends"] == {"service": "deixis"}
    assert gpu["profiles"] == ["gpu"]
    assert gpu["build"]["args"] == {"DEIXIS_DEVICE": "auto"}
    assert gpu["image"] != SERVICE["image"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert gpu.keys() <= {"extends", "profiles", "build", "image", "deploy"}


def test_only_the_service_itself_starts_without_a_profile():
    assert [name for name, each in SERVICES.items() if "profiles" not in each] == ["deixis"]
