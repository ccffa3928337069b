"""Runs the steps of the Dockerfile without a container engine, and tests the service in the result.

    sudo python -m tests.container.run_dockerfile [--target STAGE] [--build-arg NAME=VALUE]... [--root FOLDER] [--keep]

debootstrap creates a Debian of the release of the base image, with Debian's Python in place of the image's. The steps
of the target, by default ``cpu``, and of the stages that it needs run in separate roots: ``COPY`` copies the files that
.dockerignore includes, ``RUN`` runs the shell in the root, and ``ENV``, ``WORKDIR`` and ``USER`` have the effect that
Docker gives them. Then the program starts the entry point as the user of the target and as process 1 of a new
namespace. The root is mounted read-only, and ``/data`` and ``/tmp`` are separate file systems. It checks that

- without keys, the service does not listen on an address that other machines can reach,
- the HEALTHCHECK succeeds,
- a drawing of a clock is classified as a clock,
- the user can write to ``/data`` and ``/tmp`` and nowhere else,
- torch cannot be imported, unless the target is for a GPU,
- SIGTERM, sent to the entry point, ends it with status 143.

The program requires root, debootstrap, and the pip index and the apt mirror of this machine. It takes two minutes
and 2 GB, and seven minutes and 25 GB for a GPU or other models. All mounts are in a new namespace, so they end with the
program.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUITE = "bookworm"
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
PORT = "8765"
START_TIMEOUT_S = 240
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass
class Stage:
    """A stage of a Dockerfile: its instructions, and the values that they set.

    ``given`` are the build arguments, and ``before`` those before the first stage, which ``ARG NAME`` makes available.
    """

    name: str
    base: str
    given: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def read_dockerfile(text: str, given: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """Return the stages by name, or by number if they have no name.

    Args:
        text: the content of the Dockerfile.
        given: values of arguments that replace defaults, like --build-arg.
    """
    given = given or {}
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, joined.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            base = substituted(base.strip(), arguments)
            current = Stage(name.strip() or str(len(stages)), base, given, arguments)
            stages[current.name] = current
        elif current is None:
            name, _, value = rest.partition("=")
            arguments[name] = given.get(name, value.strip('"'))
        else:
            current.steps.append((instruction, rest.strip()))
    return stages


def substituted(text: str, values: Mapping[str, str]) -> str:
    """Replace ``$NAME`` and ``${NAME}`` with their values, as Docker does outside RUN."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Return whether .dockerignore excludes a path of the repository; the last matching pattern decides."""
    out = False
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for pattern in patterns:
        bare = pattern.removeprefix("!").strip("/")
        anywhere = bare.removeprefix("**/")
        hit = any(
            fnmatch.fnmatchcase(item, bare) or (anywhere != bare and fnmatch.fnmatchcase(Path(item).name, anywhere))
            for item in parents
        )
        if hit:
            out = not pattern.startswith("!")
    return out


def context() -> list[str]:
    """Return the build context: the files of the repository that .dockerignore includes."""
    result = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    patterns = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    return [name for name in result if not ignored(name, patterns) and (REPOSITORY / name).is_file()]


class Root:
    """A file system in which the steps of a stage run."""

    def __init__(self, place: Path, stages: Mapping[str, "Root"]) -> None:
        self.place = place
        self.stages = stages

    def take(self, stage: Stage) -> None:
        """Run the steps of a stage, and print the growth of the root after each."""
        size = disk_usage(self.place)
        for instruction, rest in stage.steps:
            started = time.monotonic()
            getattr(self, f"_{instruction.lower()}")(stage, rest)
            if instruction in {"RUN", "COPY"}:
                took_s = time.monotonic() - started
                before, size = size, disk_usage(self.place)
                report(
                    f"  {(size - before) / 1e6:+9.1f} MB  {took_s:6.1f} s  {instruction} {' '.join(rest.split())[:90]}"
                )

    def _arg(self, stage: Stage, rest: str) -> None:
        name, default, value = rest.partition("=")
        value = stage.given.get(name, value.strip('"') if default else stage.before.get(name))
        if value is not None:  # without a default, Docker sets no variable
            stage.args[name] = value

    def _env(self, stage: Stage, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            stage.env[name] = substituted(value, {"PATH": DEFAULT_PATH, **stage.args, **stage.env})

    def _workdir(self, stage: Stage, rest: str) -> None:
        stage.workdir = substituted(rest, stage.env)
        (self.place / stage.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, stage: Stage, rest: str) -> None:
        stage.user = rest

    def _copy(self, stage: Stage, rest: str) -> None:
        words = shlex.split(rest)
        if words[0].startswith("--from="):
            source = self.stages[words[0].partition("=")[2]].place
            for name in words[1:-1]:
                target = self.place / words[-1].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "--archive", source / name.lstrip("/"), target], check=True)
            return
        into = self.place / stage.workdir.lstrip("/") / words[-1].lstrip("/")
        files = context()
        for name in words[:-1]:
            chosen = [file for file in files if file == name.rstrip("/") or file.startswith(name.rstrip("/") + "/")]
            if not chosen:
                sys.exit(f"COPY {rest}: '{name}' is not in the build context")
            for item in chosen:
                below = item.removeprefix(name.rstrip("/") + "/") if item != name else item
                target = into / below
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / item, target)

    def _run(self, stage: Stage, rest: str) -> None:
        self.run([*stage.shell, rest], stage, {**stage.args, **stage.env, **pip_settings()})

    def _shell(self, stage: Stage, rest: str) -> None:
        stage.shell = json.loads(rest)

    def _healthcheck(self, stage: Stage, rest: str) -> None:
        stage.healthcheck = json.loads(rest.partition("CMD ")[2])

    def _entrypoint(self, stage: Stage, rest: str) -> None:
        stage.entrypoint = json.loads(rest)

    def _cmd(self, stage: Stage, rest: str) -> None:
        stage.command = json.loads(rest)

    def _nothing(self, stage: Stage, rest: str) -> None:
        """Ignore an instruction that has no effect here."""

    _label = _volume = _expose = _nothing

    def run(self, command: Sequence[str], stage: Stage, more: Mapping[str, str] | None = None) -> None:
        """Run a command in the root as the user of the stage, and exit if it fails."""
        done = subprocess.run(self.chrooted(command, stage, more or {}), check=False)
        if done.returncode:
            sys.exit(f"status {done.returncode}: {shlex.join(command)}")

    def chrooted(self, command: Sequence[str], stage: Stage, more: Mapping[str, str]) -> list[str]:
        """Return the command line that runs a command in the root with an empty environment."""
        env = {"PATH": DEFAULT_PATH, "HOME": self.home(stage.user), **stage.env, **more}
        return [
            *("env", "--ignore-environment", *(f"{name}={value}" for name, value in env.items())),
            *("chroot", f"--userspec={stage.user}", str(self.place)),
            *("/bin/sh", "-c", f'cd {shlex.quote(stage.workdir)} && exec "$@"', "sh", *command),
        ]

    def home(self, user: str) -> str:
        """Return the home folder of a user, given by number, which Docker sets for its commands."""
        number = user.partition(":")[0]
        lines = (self.place / "etc/passwd").read_text().splitlines()
        return next((item[5] for item in (line.split(":") for line in lines) if item[2] == number), "/")


def inherit(stage: Stage, base: Stage) -> None:
    """Copy the values of the base stage to a stage."""
    stage.env, stage.workdir, stage.user = dict(base.env), base.workdir, base.user
    stage.healthcheck, stage.entrypoint, stage.command = base.healthcheck, base.entrypoint, base.command


def report(*what: object) -> None:
    """Print the progress."""
    print(*what, flush=True)  # noqa: T201 - a command


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@cache
def pip_settings() -> Mapping[str, str]:
    """Return the pip index of this machine, which the root uses too."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    found = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
    for line in result.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in {"global", "install"}:
            found[f"PIP_{name.upper().replace('-', '_')}"] = value.strip("'\"").replace("\\n", " ")
    # A certificate that this machine trusts is copied with the others.
    found["PIP_CERT"] = str(CERTIFICATES)
    return {name: value for name, value in found.items() if "CONSTRAINT" not in name}


def pip_folders(pip: Mapping[str, str]) -> list[Path]:
    """Return the folders in the settings of pip, which the root must contain too."""
    found = [Path(item) for item in re.findall(r"(?:file://)?(/[^\s'\"]+)", " ".join(pip.values()))]
    # Files that an index links to may be next to it.
    return sorted({Path(*item.parts[:3]) for item in found if item.is_dir() and len(item.parts) > 2})


def disk_usage(place: Path) -> int:
    """Return the number of bytes below a folder, without mounts."""
    excluded = [f"--exclude={place}{item}" for item in (*pip_folders(pip_settings()), "/proc", "/dev")]
    result = subprocess.run(["du", "-sB1", *excluded, place], capture_output=True, text=True, check=False).stdout
    return int(result.split()[0])


@contextmanager
def mounted(*mounts: Sequence[str | Path]) -> Iterator[None]:
    """Mount, and unmount at the end in any case."""
    with ExitStack() as stack:
        for mount in mounts:
            Path(mount[-1]).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", *map(str, mount)], check=True)
            if "remount" not in str(mount[1]):
                stack.callback(subprocess.run, ["umount", "--lazy", str(mount[-1])], check=True)
        yield


def remove(folder: Path) -> None:
    """Remove the roots unless something of this machine is still mounted in them, which would be deleted too."""
    held = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    held = [item for item in held if item.startswith(f"{folder.resolve()}/")]
    if held:
        sys.exit(f"{folder} is not removed because of the mounts: {', '.join(held)}")
    shutil.rmtree(folder, ignore_errors=True)


def host_mounts(place: Path) -> list[list[str | Path]]:
    """Return the mounts that programs require in a root, and those of pip."""
    pip = [
        ["-o", "bind,ro", pip_folder, place / str(pip_folder).lstrip("/")] for pip_folder in pip_folders(pip_settings())
    ]
    return [["-t", "proc", "proc", place / "proc"], ["--bind", "/dev", place / "dev"], *pip]


def make_base(place: Path) -> None:
    """Create the root that replaces the base image."""
    mirror = next(
        (
            line.split()[1]
            for file in ("sources.list", "sources.list.d/debian.sources")
            if (Path("/etc/apt") / file).exists()
            for line in (Path("/etc/apt") / file).read_text().splitlines()
            if line.startswith("URIs:") or re.match(r"deb \S+debian/? ", line)
        ),
        None,
    )
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, place, *([mirror] if mirror else [])],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.copy("/etc/resolv.conf", place / "etc/resolv.conf")
    for name in ("apt.conf", "apt.conf.d"):  # the configuration of the mirror
        source = Path("/etc/apt") / name
        if source.is_dir():
            shutil.copytree(source, place / "etc/apt" / name, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, place / "etc/apt" / name)
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, place / str(CERTIFICATES).lstrip("/"))
    (place / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    (place / "usr/local/bin/python").symlink_to("/usr/bin/python3")


# A process with the number 1, as in a container, which ends with this one.
FIRST_PROCESS = ("unshare", "--fork", "--pid", "--kill-child")


def first_process(unshare: subprocess.Popen[bytes]) -> int:
    """Return the number of the entry point's process on this machine."""
    return int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()[0])


def check_service(root: Root, stage: Stage) -> None:
    """Start the service as the image would, and test it."""
    place = root.place
    serve = [*stage.entrypoint, *stage.command]
    refused = subprocess.run(
        [*FIRST_PROCESS, *root.chrooted(serve, stage, {"DEIXIS_PORT": PORT})],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    report("without keys:", refused.returncode, refused.stderr.strip()[:150])
    assert refused.returncode == 2
    assert "there are no API keys" in refused.stderr
    assert "Tini is not running as PID 1" not in refused.stderr
    extra = {
        "DEIXIS_PORT": PORT,
        "DEIXIS_KEYS": "off",
        "DEIXIS_BUILD_DEFAULT_DATABASE": "false",
        "DEIXIS_TUNING_SECONDS": "0",
    }
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below, with the service
    started = time.monotonic()
    service = subprocess.Popen([*FIRST_PROCESS, *root.chrooted(serve, stage, extra)], stdout=log, stderr=log)
    try:
        while subprocess.run(
            root.chrooted(stage.healthcheck, stage, extra), check=False, capture_output=True
        ).returncode:
            if service.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                log.seek(0)
                sys.exit(f"the service is not healthy: {log.read()}")
            time.sleep(1)
        report(f"healthy after {time.monotonic() - started:.0f} s, as user {stage.user}, the root read-only")
        result = subprocess.run(
            root.chrooted(["python", "-c", CLASSIFIES], stage, extra), capture_output=True, text=True, check=True
        )
        torch = subprocess.run(
            root.chrooted(["python", "-c", "import torch"], stage, extra), capture_output=True, check=False
        )
        report("without torch:", torch.returncode != 0)
        assert (torch.returncode != 0) == (stage.env["DEIXIS_DEVICE"] == "cpu")
        report("classified:", result.stdout.strip())
        assert json.loads(result.stdout)["label"] == "clock", result.stdout
        wrote = subprocess.run(
            root.chrooted(["/bin/sh", "-c", WRITES], stage, extra), capture_output=True, text=True, check=False
        )
        report("can write to:", wrote.stdout.split())
        assert wrote.stdout.split() == ["/data", "/tmp"], wrote.stdout
        started = time.monotonic()
        os.kill(first_process(service), signal.SIGTERM)
        status = service.wait(60)
        report(f"ended with status {status} in {time.monotonic() - started:.1f} s after SIGTERM")
        assert status in {143, -signal.SIGTERM}
        assert (place / "data/deixis.sqlite3").exists()
    finally:
        service.kill()
        service.wait()
        log.close()


CLASSIFIES = f"""
import http.client, io, json
from math import cos, pi, sin
from PIL import Image, ImageDraw
image = Image.new("RGB", (256, 256), "white")
draw = ImageDraw.Draw(image)
draw.ellipse((20, 20, 236, 236), outline="black", width=8)
for hour in range(12):
    x, y = sin(hour * pi / 6), -cos(hour * pi / 6)
    draw.line((128 + 85 * x, 128 + 85 * y, 128 + 100 * x, 128 + 100 * y), fill="black", width=6)
draw.line((128, 128, 128, 50), fill="black", width=6)
draw.line((128, 128, 185, 128), fill="black", width=8)
file = io.BytesIO()
image.save(file, "PNG")
connection = http.client.HTTPConnection("127.0.0.1", {PORT})
connection.request("POST", "/v1/classify?labels=dog,clock,rocket", file.getvalue(), {{"Content-Type": "image/png"}})
print(json.dumps(json.loads(connection.getresponse().read())["results"][0]["predictions"][0]))
"""
WRITES = """
for place in / /data /etc /home /opt/deixis /root /tmp /usr /var; do
    (: > $place/x) 2>/dev/null && echo $place
done
true
"""


def main() -> None:
    """Create the roots, run the steps, and test the service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="the stage to build, as --target of Docker")
    parser.add_argument("--root", type=Path, help="an empty folder for the roots; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the roots")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="like --build-arg of Docker"
    )
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        sys.exit("this program requires root and debootstrap")
    if not arguments.apart:
        again = [sys.executable, "-m", "tests.container.run_dockerfile", "--apart", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", *again])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    build_arguments = dict(item.split("=", 1) for item in arguments.build_arg)
    stages = read_dockerfile((REPOSITORY / "Dockerfile").read_text("utf-8"), build_arguments)
    folder = arguments.root or Path(tempfile.mkdtemp(prefix="deixis-image-"))
    try:
        started = time.monotonic()
        make_base(folder / "base")
        base = disk_usage(folder / "base")
        report(f"base: Debian {SUITE} with Python, {base / 1e6:.0f} MB, {time.monotonic() - started:.0f} s")
        roots: dict[str, Root] = {}
        build(arguments.target, stages, folder, roots)
        image = roots[arguments.target].place
        size = disk_usage(image)
        report(
            f"the image: {size / 1e6:,.0f} MB, {(size - base) / 1e6:,.0f} MB more than its base; the largest packages:"
        )
        report_largest_packages(image / "opt/deixis")
        check_read_only(roots[arguments.target], stages[arguments.target])
    finally:
        if not arguments.keep:
            remove(folder)


def build(name: str, stages: Mapping[str, Stage], folder: Path, roots: dict[str, Root]) -> None:
    """Run the steps of a stage, after those of the stages that it begins with or copies from."""
    stage = stages[name]
    sources = re.findall(r"--from=(\S+)", " ".join(rest for instruction, rest in stage.steps if instruction == "COPY"))
    for needed in (stage.base, *sources):
        if needed in stages and needed not in roots:
            build(needed, stages, folder, roots)
    if stage.base in stages:
        inherit(stage, stages[stage.base])
    origin = roots[stage.base].place if stage.base in stages else folder / "base"
    subprocess.run(["cp", "--archive", origin, folder / name], check=True)
    roots[name] = Root(folder / name, roots)
    report(f"{name}:")
    with mounted(*host_mounts(folder / name)):
        roots[name].take(stage)


def report_largest_packages(environment: Path) -> None:
    """Print the largest packages of the environment."""
    (packages,) = environment.glob("lib/python3.*/site-packages")
    sizes = sorted(((disk_usage(path), path.name) for path in packages.iterdir() if path.is_dir()), reverse=True)
    for size, name in [*sizes[:6], *((size, name) for size, name in sizes if name == "app")]:
        report(f"  {size / 1e6:9.1f} MB  {name}")


def check_read_only(root: Root, stage: Stage) -> None:
    """Mount a root like a container with --read-only and a volume, and test the service in it."""
    place = root.place
    with mounted(
        *(["--bind", place, place], ["-o", "remount,ro,bind", place]),
        *(["-t", "proc", "proc", place / "proc"], ["--bind", "/dev", place / "dev"]),
        *(
            ["-t", "tmpfs", "-o", "uid=10001,gid=10001", "tmpfs", place / "data"],
            ["-t", "tmpfs", "tmpfs", place / "tmp"],
        ),
    ):
        check_service(root, stage)


if __name__ == "__main__":
    main()
