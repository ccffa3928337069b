"""Properties of the Dockerfile, and of the program that runs its steps without Docker."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app import __version__
from app.settings import Settings
from tests.container.run_dockerfile import Root, context, ignored, inherit, read_dockerfile, remove, substituted

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")
STAGES = read_dockerfile(TEXT)


def instructions(stage, name):
    return [rest for instruction, rest in STAGES[stage].steps if instruction == name]


def test_the_stages_are_those_of_the_guide_and_the_last_is_the_service_on_cpus():
    assert list(STAGES) == ["build", "build-cuda", "export", "runtime", "cpu", "cuda", "baked", "cuda-baked", "8"]
    bases = {name: stage.base for name, stage in STAGES.items()}
    assert (bases["cpu"], bases["cuda"], bases["baked"], bases["8"]) == ("runtime", "runtime", "cpu", "cpu")
    assert STAGES["8"].steps == []


def test_the_base_image_has_a_full_version_and_is_the_same_in_both_stages():
    assert STAGES["build"].base == STAGES["runtime"].base
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", STAGES["runtime"].base)


def test_the_service_runs_as_an_unprivileged_user_and_no_stage_ends_as_root():
    for stage in ("runtime", "cuda-baked"):
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions(stage, "USER")[-1])
    assert not any(instructions(stage, "USER") for stage in ("cpu", "cuda", "baked", "8"))


def test_the_entry_point_receives_signals():
    assert json.loads(instructions("runtime", "ENTRYPOINT")[0]) == ["tini", "--", "deixis"]
    assert json.loads(instructions("runtime", "CMD")[0]) == ["serve"]


def test_the_health_check_requests_the_configured_port_and_fails_without_a_response():
    (check,) = instructions("runtime", "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"DEIXIS_PORT": "1"}, capture_output=True, check=False, timeout=30
    )
    assert done.returncode != 0


def test_the_images_contain_no_build_tools():
    assert instructions("cpu", "COPY") == ["--from=build /opt/deixis /opt/deixis"]
    assert instructions("cuda", "COPY") == ["--from=build-cuda /opt/deixis /opt/deixis"]
    installed = " ".join(instructions("runtime", "RUN"))
    assert not re.search(r"gcc|build-essential|git|curl|pip", installed)
    assert "python -m venv --without-pip /opt/deixis" in instructions("build", "RUN")
    assert "--no-install-recommends" in installed
    assert "rm -rf /var/lib/apt/lists/*" in installed


def test_dependencies_are_installed_before_the_code_is_copied():
    order = [f"{instruction} {rest}" for instruction, rest in STAGES["build"].steps]
    (installs,) = (place for place, step in enumerate(order) if "--requirement" in step)
    assert installs < order.index("COPY app/ app/")
    assert not any("app/" in step for step in order[:installs])


def test_each_image_uses_the_device_that_it_is_for():
    (environment,) = instructions("runtime", "ENV")
    assert "DEIXIS_DEVICE=cpu" in environment
    assert instructions("cuda", "ENV") == ["DEIXIS_DEVICE=auto"]


def test_only_the_stages_for_gpus_and_exports_install_torch():
    extras = project()["optional-dependencies"]
    (names,) = re.findall(r"for name in \(([^)]*)\*", " ".join(instructions("build", "RUN")))
    installed = {requirement for name in re.findall(r"'(\w+)'", names) for requirement in extras[name]}
    assert "openvino>=2025.0" in installed
    assert not any(requirement.startswith(("torch", "timm", "transformers")) for requirement in installed)
    assert "['torch']" in instructions("build-cuda", "RUN")[0]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_build_fails_if_the_image_cannot_classify_as_its_user():
    for stage in ("cpu", "cuda"):
        (tries,) = instructions(stage, "RUN")
        assert "deixis classify" in tries
        assert tries.endswith("rm -rf /tmp/check")
        assert " || " not in tries


def test_environment_variables_are_settings_and_the_version_is_that_of_the_code():
    named = set(re.findall(r"\b(DEIXIS_[A-Z0-9_]+)=", TEXT))
    assert named <= {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    assert f'org.opencontainers.image.version="{__version__}"' in TEXT


def test_the_file_contains_no_secret_and_no_index():
    assert not re.search(r"(?i)password|token=|secret|index-url|://", re.sub(r"^#.*$", "", TEXT, flags=re.MULTILINE))


def test_the_build_context_contains_only_the_copied_files():
    files = context()
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "app/main.py", "deixis/__main__.py"} <= set(
        files
    )
    assert {name.partition("/")[0] for name in files} == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "app", "deixis", "models", "prompts")
    }


@pytest.mark.parametrize(
    ("path", "patterns", "out"),
    [
        ("app/main.py", ["*", "!app"], False),
        ("tests/x.py", ["*", "!app"], True),
        ("app/__pycache__/x.pyc", ["*", "!app", "**/__pycache__"], True),
        ("README.md", [], False),
    ],
)
def test_ignored_files_are_matched_as_by_docker(path, patterns, out):
    assert ignored(path, patterns) is out


def test_stages_and_values_are_parsed_as_by_docker():
    stages = read_dockerfile(
        'ARG BASE=debian:12\n# a comment\nFROM ${BASE} AS one\nRUN a \\\n # inside\n && b\nFROM one\nENV X="1 2" Y=$X\n'
    )
    assert stages["one"].base == "debian:12"
    assert stages["one"].steps == [("RUN", "a   && b")]
    assert stages["1"].base == "one"
    assert substituted("$A/${B}c$D", {"A": "1", "B": "2"}) == "1/2c"


def test_arguments_are_resolved_as_by_docker(tmp_path):
    first = "FROM x AS one\nARG A\nARG B=3\nARG C=4\nARG UNSET\nENV SET=$A$B$C UNSEEN=$D\n"
    text = f"ARG A=1\nARG B=2\n{first}FROM x AS two\nENV SET=$A\n"
    for given, one in (({}, "134"), ({"A": "5", "B": "6", "C": "7"}, "567")):
        stages = read_dockerfile(text, given)
        for stage in stages.values():
            Root(tmp_path, {}).take(stage)
        assert stages["one"].env == {"SET": one, "UNSEEN": ""}
        assert stages["one"].args.keys() == {"A", "B", "C"}  # an empty HF_ENDPOINT would be no endpoint
        assert stages["two"].env == {"SET": ""}


def test_a_stage_inherits_values_and_does_not_change_its_base(tmp_path):
    stages = read_dockerfile('FROM x AS one\nENV A=1\nUSER 1:1\nCMD ["a"]\nFROM one AS two\nENV A=2\n')
    Root(tmp_path, {}).take(stages["one"])
    inherit(stages["two"], stages["one"])
    Root(tmp_path, {}).take(stages["two"])
    assert (stages["two"].env, stages["two"].user, stages["two"].command) == ({"A": "2"}, "1:1", ["a"])
    assert stages["one"].env == {"A": "1"}


def test_commands_run_with_the_home_folder_of_their_user(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nd:x:7:7::/data:/bin/false\n")
    assert [Root(tmp_path, {}).home(user) for user in ("0:0", "7:7", "8:8")] == ["/root", "/data", "/"]


def test_a_root_with_mounts_is_not_removed(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.touch()
    mounts = f"proc /proc proc rw 0 0\n/dev/x {tmp_path.resolve()}/build/dev ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: mounts)
    with pytest.raises(SystemExit, match="build/dev"):
        remove(tmp_path)
    assert kept.exists()
    monkeypatch.setattr(Path, "read_text", lambda _: f"/dev/x {tmp_path.resolve()}-other/dev ext4 rw 0 0\n")
    remove(tmp_path)
    assert not tmp_path.exists()


def test_hadolint_reports_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("there is no hadolint for this platform")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shell_commands_of_the_dockerfile_can_be_parsed():
    sh = shutil.which("bash")
    assert sh is not None
    for stage in STAGES:
        for command in instructions(stage, "RUN"):
            assert subprocess.run([sh, "-n", "-c", command], check=False).returncode == 0
