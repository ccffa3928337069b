"""README.md and docs/tutorial.md by the letter: a reader with a fresh clone gets every answer that the pages print.

After a change of the default model, `python -m tests.end_to_end.test_first_hour` writes the new answers into the pages.

The blocks run in their order: `make serve` as printed in one terminal, everything else in a second one. Only the port
differs. A block `text` or `json` is the answer of the block before it.
"""

import json
import math
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import tempfile
import threading
import time
import venv
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.commands import environment
from tests.end_to_end.test_documents import ADDRESS, FIRST_HOUR, ROOT, blocks_of

START = "make serve\n"
TIMEOUT_S = 300
# Scores differ by less between processors and precisions.
TOLERANCE = 0.05
_NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e-?\d+)?")
# Durations and dates differ in every run, and between processors which of many images are just below a threshold.
_VARIES = re.compile(r"[\d.]+ images/s|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\S+, \S+, \S+ and \d+ more: ")


# --- the clone and its two terminals ---------------------------------------------------------------------------------


def wait_for_default_database(client):
    """Wait until the database has all of its captions; its job may not exist yet."""
    give_up_at = time.monotonic() + TIMEOUT_S
    while not any(
        each["name"] == "everyday" and each["counts"] is not None and not each["counts"].get("to_come")
        for each in client.get("/v1/databases").json()["databases"]
    ):
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def wait_for_weak_matches(client):
    give_up_at = time.monotonic() + TIMEOUT_S
    image = (ROOT / "examples" / "photos" / "cat.jpg").read_bytes()
    while True:
        answer = client.post("/v1/classify", files={"image": image}, data={"labels": "cat, dog"})
        if answer.json()["results"][0]["weak_match"] is not None:
            return
        assert time.monotonic() < give_up_at
        time.sleep(1)  # while requests come, background work gets little of the time


def clone(folder):
    """Copy the files of the repository, with an environment in which `make` has nothing to install."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    venv.create(folder / ".venv", symlinks=True)
    (packages,) = folder.glob(".venv/lib/python*/site-packages")
    (packages / "clone.pth").write_text("\n".join([str(folder), *site.getsitepackages()]))
    command = folder / ".venv" / "bin" / "deixis"
    command.write_text(f"#!{folder}/.venv/bin/python\nfrom deixis.__main__ import main\n\nmain()\n")
    command.chmod(0o755)
    (folder / ".venv" / ".serve").touch()


@contextmanager
def terminal(folder, settings, *, stdin=None):
    """Start a shell, and end it with everything that runs in it."""
    shell = subprocess.Popen(
        ["bash", "--norc"],
        cwd=folder,
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, os.killpg, [shell.pid, signal.SIGKILL])
    watchdog.start()
    try:
        yield shell
    finally:
        watchdog.cancel()
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGTERM)
        shell.stdin.close()
        shell.wait()


@dataclass
class Reader:
    """A person with a clone, whose server runs in one terminal, and who works in the other one."""

    folder: Path
    url: str
    shell: subprocess.Popen

    def run(self, block):
        """Run a block in the second terminal, and return what it prints."""
        code = block.code.replace(ADDRESS, self.url)
        if block.language == "python":
            code = f"python - <<'END_OF_PROGRAM'\n{code}END_OF_PROGRAM\n"
        self.shell.stdin.write(f"{{\n{code}}} < /dev/null; printf '\\n%s\\n' END_OF_BLOCK:$?\n")
        self.shell.stdin.flush()
        printed = []
        for line in iter(self.shell.stdout.readline, ""):
            if line.startswith("END_OF_BLOCK:"):
                assert line == "END_OF_BLOCK:0\n", shown(block, printed)
                return "".join(printed)
            printed.append(line)
        raise AssertionError(shown(block, printed))


def shown(block, printed):
    return f"{block.page.relative_to(ROOT)}:{block.line}\n{block.code}\n--- printed:\n{''.join(printed)}"


@contextmanager
def reading(place):
    """Clone the repository into a folder, start its server, and open the second terminal."""
    clone(place / "deixis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = place / "tools"
    tools.mkdir()
    # A response that is an error fails its block.
    (tools / "curl").write_text(f'#!/bin/sh\nexec {shutil.which("curl")} --silent --show-error --fail-with-body "$@"\n')
    (tools / "curl").chmod(0o755)
    settings = environment(
        DEIXIS_BUILD_DEFAULT_DATABASE="true",
        DEIXIS_DATA_DIR=str(place / "data"),
        DEIXIS_PORT=str(port),
        DEIXIS_SERVER=f"http://127.0.0.1:{port}",  # on the default port, it would be found
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    with terminal(place / "deixis", settings) as first, terminal(place / "deixis", settings) as second:
        first.stdin.write(START)
        first.stdin.close()
        log = []
        for line in iter(first.stdout.readline, ""):
            log.append(line)
            if "listens on" in line:
                break
        else:
            raise AssertionError("".join(log))
        drain = threading.Thread(target=lambda: log.extend(first.stdout))
        drain.start()
        # A person takes longer than the index of the everyday names, and their features that compete with labels.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_for_default_database(client)
            wait_for_weak_matches(client)
        yield Reader(place / "deixis", f"http://127.0.0.1:{port}", second)
    drain.join()  # until the server has ended
    first.stdout.close()
    second.stdout.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with reading(tmp_path_factory.mktemp("first-hour")) as opened:
        yield opened


# --- what is compared ------------------------------------------------------------------------------------------------


def difference(expected, actual):
    """Return where two values of JSON differ by more than the tolerance; None if they do not."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        if expected.keys() != actual.keys():
            return f"the keys {sorted(expected.keys() ^ actual.keys())}"
        pairs = [(expected[key], actual[key]) for key in expected if key != "timing_ms"]
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = list(zip(expected, actual, strict=True))
    elif isinstance(expected, float) and isinstance(actual, (int, float)):
        is_close = math.isclose(expected, actual, abs_tol=TOLERANCE, rel_tol=TOLERANCE)
        return None if is_close else f"{expected} and {actual}"
    elif isinstance(expected, str) and isinstance(actual, str):
        return text_difference(expected, actual)
    else:
        return None if expected == actual else f"{expected!r} and {actual!r}"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def text_difference(expected, actual):
    """Return the first lines that differ by more than the tolerance of their numbers and the width of columns.

    The line `...` at the end stands for more lines.
    """
    lines, others = compared(expected), compared(actual)
    if lines and lines[-1] == "...":
        lines, others = lines[:-1], others[: len(lines) - 1]
    for line, other in zip_longest(lines, others, fillvalue=""):
        if _NUMBER.sub("#", line) != _NUMBER.sub("#", other):
            return f"{line!r} and {other!r}"
        numbers = ([float(number) for number in _NUMBER.findall(each)] for each in (line, other))
        if found := difference(*numbers):
            return f"{found} in {line!r} and {other!r}"
    return None


def compared(text):
    """Return the lines of a text that are not empty, without durations, dates and the width of columns."""
    lines = [" ".join(_VARIES.sub("*", line).split()) for line in text.splitlines() if line.strip()]
    header = next((place for place, line in enumerate(lines) if line.endswith(" ms/image")), len(lines))
    return [line if place < header or line == "..." else line.rpartition(" ")[0] for place, line in enumerate(lines)]


def steps_of(page):
    """Yield each block that is run with the block of its answer, or None."""
    blocks = [*blocks_of(page)]
    programs = [place for place, block in enumerate(blocks) if block.language in {"sh", "python"}]
    for place in programs:
        block = blocks[place]
        answers = [*takewhile(lambda other: other.language in {"json", "text"}, blocks[place + 1 :])]
        assert len(answers) <= 1, f"{page}:{block.line} has two answers"
        if block.mark != "not run" and block.code != START:
            yield block, answers[0] if answers else None


def check_page(reader, page):
    for block, answer in steps_of(page):
        printed = reader.run(block)
        if answer is None:
            continue
        found = (
            difference(json.loads(answer.code), json.loads(printed))
            if answer.language == "json"
            else text_difference(answer.code, printed)
        )
        assert found is None, f"{found}\n{shown(block, [printed])}"


def test_every_command_of_the_readme_and_of_the_tutorial_gives_its_printed_answer(reader):
    for page in FIRST_HOUR:
        check_page(reader, page)


def test_both_pages_start_the_server_and_leave_out_only_what_cannot_run_here():
    reasons = {
        "it downloads a gigabyte",
        "it downloads several gigabytes",
        "needs an engine for containers",
    }
    for page in FIRST_HOUR:
        blocks = [*blocks_of(page)]
        assert [block.code for block in blocks].count(START) == 1
        assert {block.note for block in blocks if block.mark == "not run"} - {"it does not end by itself"} <= reasons


def test_an_answer_that_differs_in_a_label_a_number_or_a_line_is_found():
    table = "path     label  score\ncat.jpg  cat    0.987\n"
    assert text_difference(table, table.replace("  ", " ").replace("0.987", "0.95")) is None
    assert text_difference("path label score\n...\n", table) is None
    assert text_difference("method NLL ms/image\ngda 0.6 0.04", "method NLL ms/image\ngda 0.6 0.9") is None
    for other in (table.replace("cat  ", "dog"), table.replace("0.987", "0.8"), table + "dog.jpg dog 0.9\n"):
        assert text_difference(table, other)
    answer = {"label": "cat", "score": 0.9, "warnings": [], "timing_ms": {"text": 1.0}}
    assert difference(answer, {**answer, "score": 0.91, "timing_ms": {}}) is None
    for other in ({"label": "dog"}, {"score": 0.5}, {"warnings": ["a"]}, {"more": 1}):
        assert difference(answer, {**answer, **other})


def rewrite(page, reader):
    """Write the answers of today into the blocks `text` of a page; the line `...` stays the last one."""
    lines = page.read_text("utf-8").split("\n")
    for answer, printed in reversed([(answer, reader.run(block)) for block, answer in steps_of(page)]):
        if answer is not None and answer.language == "text":
            old = answer.code.splitlines()
            new = [line.rstrip() for line in printed.splitlines() if line.strip()]
            lines[answer.line : answer.line + len(old)] = [*new[: len(old) - 1], "..."] if "..." in old else new
    page.write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, reading(Path(folder)) as opened:
        for each in FIRST_HOUR:
            rewrite(each, opened)
