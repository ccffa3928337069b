"""What matters of the Dockerfile, and that the program which takes its steps reads it as Docker does."""

import json
import re
import shutil
import subprocess
import sys
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


def test_the_stages_are_those_that_the_guide_names_and_the_last_is_the_service():
    assert list(STAGES) == ["build", "service", "baked", "3"]
    assert STAGES["baked"].base == STAGES["3"].base == "service"
    assert STAGES["3"].steps == []


def test_the_base_has_a_whole_version_and_is_the_same_for_building_and_running():
    assert STAGES["build"].base == STAGES["service"].base
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", STAGES["service"].base)


def test_the_service_runs_as_a_user_without_rights_and_no_stage_ends_as_root():
    for stage in ("service", "baked"):
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions(stage, "USER")[-1])


def test_what_starts_the_service_gets_its_signals():
    assert json.loads(instructions("service", "ENTRYPOINT")[0]) == ["tini", "--", "deixis"]
    assert json.loads(instructions("service", "CMD")[0]) == ["serve"]


def test_the_health_check_asks_the_port_that_is_set_and_fails_where_nobody_answers():
    (check,) = instructions("service", "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], env={"DEIXIS_PORT": "1"}, capture_output=True, check=False, timeout=30
    )
    assert done.returncode != 0


def test_no_tool_for_building_is_in_the_image():
    assert instructions("service", "COPY") == ["--from=build /opt/deixis /opt/deixis"]
    installed = " ".join(instructions("service", "RUN"))
    assert not re.search(r"gcc|build-essential|git|curl|pip", installed)
    assert "pip uninstall --yes pip" in instructions("build", "RUN")[-1]
    assert "--no-install-recommends" in installed
    assert "rm -rf /var/lib/apt/lists/*" in installed


def test_dependencies_are_installed_before_the_code_is_copied():
    order = [f"{instruction} {rest}" for instruction, rest in STAGES["build"].steps]
    (installs,) = (place for place, step in enumerate(order) if "--requirement" in step)
    assert installs < order.index("COPY app/ app/")
    assert not any("app/" in step for step in order[:installs])


def test_the_image_is_for_processors_unless_it_is_built_for_a_gpu():
    assert STAGES["service"].before["DEIXIS_DEVICE"] == "cpu"
    assert read_dockerfile(TEXT, {"DEIXIS_DEVICE": "auto"})["service"].before["DEIXIS_DEVICE"] == "auto"
    (environment,) = (rest for rest in instructions("service", "ENV") if "DEIXIS_HOST" in rest)
    assert "DEIXIS_DEVICE=${DEIXIS_DEVICE}" in environment
    assert "ARG DEIXIS_DEVICE\n" in TEXT.partition(" AS service")[2].partition("ENV PATH")[0]


def test_what_is_left_out_for_processors_are_packages_that_are_pinned():
    (removes,) = (rest for rest in instructions("build", "RUN") if '"${DEIXIS_DEVICE}" = cpu' in rest)
    names = removes.partition("--yes ")[2].partition(";")[0].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert "triton" in names
    assert set(names) <= pinned
    assert not {"torch", "nvidia-cudnn-cu13", "nvidia-cublas"} & set(names)


def test_the_build_ends_where_the_image_does_not_encode_as_its_user():
    steps = [f"{instruction} {rest}" for instruction, rest in STAGES["service"].steps]
    (tries,) = (place for place, step in enumerate(steps) if "deixis classify" in step)
    (becomes,) = (place for place, step in enumerate(steps) if step.startswith("USER"))
    assert becomes < tries
    assert steps[tries].endswith("rm -rf /tmp/check")
    assert " || " not in steps[tries]


def test_what_is_set_are_settings_and_the_version_is_that_of_the_code():
    named = set(re.findall(r"\b(DEIXIS_[A-Z0-9_]+)=", TEXT))
    assert named <= {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    assert f'org.opencontainers.image.version="{__version__}"' in TEXT


def test_no_secret_and_no_index_is_in_it():
    assert not re.search(r"(?i)password|token=|secret|index-url|://", re.sub(r"^#.*$", "", TEXT, flags=re.MULTILINE))


def test_the_build_sees_what_it_copies_and_nothing_else():
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
def test_ignored_files_are_found_as_docker_finds_them(path, patterns, out):
    assert ignored(path, patterns) is out


def test_stages_and_values_are_read_as_docker_reads_them():
    stages = read_dockerfile(
        'ARG BASE=debian:12\n# a comment\nFROM ${BASE} AS one\nRUN a \\\n # inside\n && b\nFROM one\nENV X="1 2" Y=$X\n'
    )
    assert stages["one"].base == "debian:12"
    assert stages["one"].steps == [("RUN", "a   && b")]
    assert stages["1"].base == "one"
    assert substituted("$A/${B}c$D", {"A": "1", "B": "2"}) == "1/2c"


def test_arguments_are_taken_up_as_docker_takes_them_up(tmp_path):
    first = "FROM x AS one\nARG A\nARG B=3\nARG C=4\nENV SET=$A$B$C UNSEEN=$D\n"
    text = f"ARG A=1\nARG B=2\n{first}FROM x AS two\nENV SET=$A\n"
    for given, one in (({}, "134"), ({"A": "5", "B": "6", "C": "7"}, "567")):
        stages = read_dockerfile(text, given)
        for stage in stages.values():
            Root(tmp_path, {}).take(stage)
        assert stages["one"].env == {"SET": one, "UNSEEN": ""}
        assert stages["two"].env == {"SET": ""}


def test_a_stage_has_what_its_base_has_set_and_keeps_its_own_apart(tmp_path):
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


def test_a_root_with_something_mounted_in_it_is_not_removed(tmp_path, monkeypatch):
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


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("there is no hadolint for this platform")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shells_of_the_dockerfile_can_be_parsed():
    sh = shutil.which("bash")
    assert sh is not None
    for stage in STAGES:
        for command in instructions(stage, "RUN"):
            assert subprocess.run([sh, "-n", "-c", command], check=False).returncode == 0
