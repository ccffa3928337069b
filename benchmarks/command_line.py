"""The processor time of short commands: `python -m benchmarks.command_line [--runs 5] [--server URL]`.

Each command runs several times; the table has the medians of its user and system time together,
and of its elapsed time. With a server, it also classifies a picture there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from PIL import Image

_DEIXIS = Path(sys.executable).with_name("deixis")
_COMMANDS = ("--version", "--help", "classify --help", "serve --help", "models list")
# Words of a command line whose last one is completed.
_COMPLETIONS = ("deixis cla", "deixis classify --tem")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--server", metavar="URL")
    options = parser.parse_args()
    rows = [_row(f"deixis {command}", command.split(), options.runs) for command in _COMMANDS]
    for words in _COMPLETIONS:
        request = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_DEIXIS_COMPLETE": "complete_bash"}
        rows.append(_row(f"{words}<TAB>", [], options.runs, **request))
    if options.server is not None:
        with tempfile.TemporaryDirectory() as folder:
            photo = Path(folder) / "photo.jpg"
            Image.new("RGB", (320, 240), "red").save(photo)
            command = ["classify", str(photo), "-l", "red, blue", "--server", options.server]
            rows.append(_row("deixis classify photo.jpg --server URL", command, options.runs))
    table = ["| command | processor time, s | elapsed, s |", "|---|--:|--:|", *rows]
    print("\n".join(table))  # noqa: T201 - the output of the command


def _row(name: str, arguments: Sequence[str], runs: int, **variables: str) -> str:
    times = [_times(arguments, variables) for _ in range(runs)]
    processor, elapsed = (median(column) for column in zip(*times, strict=True))
    return f"| `{name}` | {processor:.2f} | {elapsed:.2f} |"


def _times(arguments: Sequence[str], variables: dict[str, str]) -> tuple[float, float]:
    """Return the processor time and the elapsed time of a command, in seconds."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([_DEIXIS, *arguments], env=os.environ | variables, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return processor, time.perf_counter() - began


if __name__ == "__main__":
    main()
