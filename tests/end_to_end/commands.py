"""Runs `deixis` as its users do: the console script, in a process of its own."""

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

DEIXIS = Path(sys.executable).with_name("deixis")


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process of ours: none of this machine's settings, and these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("DEIXIS_", "RAY_ADDRESS"))}
    # Weights that are not on this machine must be an error at once, and not a wait for a network.
    quick = {"HF_HUB_OFFLINE": "1", "DEIXIS_TUNING_SECONDS": "0", "DEIXIS_BUILD_DEFAULT_DATABASE": "false"}
    return {**others, **quick, "no_proxy": "*", **settings}


def deixis(
    *arguments: object, data_dir: Path, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; ``settings`` are those of the environment, by their whole names."""
    return run_command(DEIXIS, *arguments, data_dir=data_dir, stdin=stdin, **settings)


def run_command(
    program: Path, *arguments: object, data_dir: Path, stdin: str | None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command of ``program`` as `deixis` does."""
    with converted_towers(data_dir):
        return subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            input=stdin,
            timeout=300,
            env=environment(DEIXIS_DATA_DIR=str(data_dir), **settings),
            check=False,
        )


@contextmanager
def converted_towers(data_dir: Path) -> Iterator[None]:
    """Give a data folder the image towers that were converted for others; converting one takes five seconds."""
    _link_files(_shared_towers(), data_dir / "openvino")
    yield
    _link_files(data_dir / "openvino", _shared_towers())


def _link_files(source: Path, target: Path) -> None:
    for file in source.glob("*.*"):
        if not (target / file.name).exists() and len(file.stem) > 32:  # shorter names are those of unfinished files
            target.mkdir(parents=True, exist_ok=True)
            (target / file.name).hardlink_to(file)


@cache
def _shared_towers() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)
