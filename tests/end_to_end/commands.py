"""Runs `deixis` as its users do: the console script, in a process of its own."""

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

DEIXIS = Path(sys.executable).with_name("deixis")


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process of ours: none of this machine's settings, and these."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("DEIXIS_", "RAY_ADDRESS"))}
    # Weights that are not on this machine must be an error at once, and not a wait for a network.
    quick = {"HF_HUB_OFFLINE": "1", "DEIXIS_TUNING_SECONDS": "0", "DEIXIS_BUILD_DEFAULT_DATABASE": "false"}
    ours = {"DEIXIS_CONFIG": "", "DEIXIS_SERVER": "local"}  # nothing of the user who runs the tests
    return {**others, **quick, **ours, "DEIXIS_MODEL_CACHE_DIR": str(_shared_models()), "no_proxy": "*", **settings}


def deixis(
    *arguments: object, data_dir: Path, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; ``settings`` are those of the environment, by their whole names."""
    return run_command(DEIXIS, *arguments, data_dir=data_dir, stdin=stdin, **settings)


def run_command(
    program: Path, *arguments: object, data_dir: Path, stdin: str | None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run one command of ``program`` as `deixis` does."""
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        env=environment(DEIXIS_DATA_DIR=str(data_dir), **settings),
        check=False,
    )


@cache
def _shared_models() -> Path:
    """Return a folder in which the first command exports the embedded model; others then load it without torch."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)
