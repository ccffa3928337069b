"""Kills a server during writes repeatedly, and checks that acknowledged writes are complete.

    python -m benchmarks.durability [--rounds 50] [--databases sqlite postgresql] [--output benchmarks/results]

In each round, six writers put label sets of 30 classes, add classes, delete and recreate label sets, and add example
images, until the server gets SIGKILL after 0.2 to 1.5 seconds. Then SQLite checks a copy of its file and log, the
server restarts, and the acknowledged writes are read: after each round the newest and a sample of the others, after the
last round all of them.

- **lost**: an acknowledged version, class, image or deletion that is missing,
- **refused**: a write with an error response,
- **torn**: content that differs from the content sent, or an image without features,
- **unacknowledged**: a write that exists although its response was lost; this is allowed.

*Restart* is a median. Exits with status 1 if a write was lost, refused or torn. PostgreSQL must be installed; the
program starts its own server.
"""

import argparse
import hashlib
import io
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.processes import about_this_run, say, serving
from tests.postgres import postgres_binaries, running_postgres

DATABASES = ("sqlite", "postgresql")
CLASSES = 30
QUICK = ("--tuning-seconds", "0", "--build-default-database", "false")
RECREATED = (1, 0, 2)  # versions of a label set that is put, deleted (0) and recreated


@dataclass
class Written:
    """The writes that were sent and acknowledged; each writer has its own names.

    Args:
        sent: all classes sent, by label set.
        versions: the classes of each version.
        grown: the classes of each label set that grows.
        remade: number of steps of ``RECREATED`` of each label set.
        images: the SHA-256 of the images of each label set.
        refused: writes with an error response.
        acknowledged: the number of writes.
    """

    sent: dict[str, list[list[str]]] = field(default_factory=dict)
    versions: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    grown: dict[str, list[str]] = field(default_factory=dict)
    remade: dict[str, int] = field(default_factory=dict)
    images: dict[str, set[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    acknowledged: int = 0


@dataclass
class Outcome:
    """The results of all rounds with one database."""

    database: str
    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    torn: int = 0
    refused: int = 0
    unacknowledged_and_there: int = 0
    restart_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Writers:
    """Clients that write until the server is killed.

    Args:
        written: records the writes.
        round_number: makes the content of each round different.
    """

    def __init__(self, written: Written, round_number: int) -> None:
        self.written = written
        self.round_number = round_number

    def run(self, url: str, kill: Callable[[], None]) -> None:
        """Start the writers, call ``kill``, and wait until every writer has lost its connection."""
        writes = [self.put, self.put, self.put, self.grow, self.delete_and_recreate, self.images]
        threads = [
            threading.Thread(target=self._write_until_killed, args=(url, *numbered)) for numbered in enumerate(writes)
        ]
        for thread in threads:
            thread.start()
        kill()
        for thread in threads:
            thread.join()

    def _write_until_killed(self, url: str, writer: int, write: Callable[[httpx.Client, int], Iterator[None]]) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            try:
                for _ in write(client, writer):
                    self.written.acknowledged += 1
            except httpx.TransportError:
                return
            except Exception as error:  # noqa: BLE001 - a wrong response may raise anything
                self.written.refused.append(f"{write.__name__}: {error!r}")

    def put(self, client: httpx.Client, writer: int) -> Iterator[None]:
        """Put versions of a label set."""
        name = f"put-{writer}"
        for number in range(100_000):
            classes = [f"{name} {self.round_number} {number} {index}" for index in range(CLASSES)]
            self.written.sent.setdefault(name, []).append(classes)
            version = _ok(client.put(f"/v1/label-sets/{name}", json={"classes": classes}))["version"]
            self.written.versions[name, version] = classes
            yield

    def grow(self, client: httpx.Client, writer: int) -> Iterator[None]:
        """Add classes to one label set per round."""
        name = f"grow-{writer}-{self.round_number}"
        _ok(client.put(f"/v1/label-sets/{name}", json={"classes": ["seed"]}))
        grown = self.written.grown.setdefault(name, ["seed"])
        yield
        for number in range(100_000):
            _ok(client.post(f"/v1/label-sets/{name}/classes", json={"classes": [f"leaf {number}"]}))
            grown.append(f"leaf {number}")
            yield

    def delete_and_recreate(self, client: httpx.Client, writer: int) -> Iterator[None]:
        """Put label sets, delete them, and recreate every second one."""
        for number in range(100_000):
            name = f"gone-{writer}-{self.round_number}-{number}"
            for step, version in enumerate(RECREATED[: 3 if number % 2 else 2], 1):
                if version:
                    _ok(client.put(f"/v1/label-sets/{name}", json={"classes": _remade(version)}))
                else:
                    client.delete(f"/v1/label-sets/{name}").raise_for_status()
                self.written.remade[name] = step
                yield

    def images(self, client: httpx.Client, writer: int) -> Iterator[None]:
        """Add example images to one label set per round."""
        name = f"seen-{writer}-{self.round_number}"
        _ok(client.put(f"/v1/label-sets/{name}", json={"classes": ["a", "b"]}))
        seen = self.written.images.setdefault(name, set())
        yield
        for number in range(100_000):
            pictures = [_picture(100_000 * self.round_number + 10 * number + index) for index in range(3)]
            files = [("image", ("x.png", picture)) for picture in pictures]
            _ok(client.post(f"/v1/label-sets/{name}/images", files=files, data={"class": ["a", "b", "a"]}))
            seen.update(hashlib.sha256(picture).hexdigest() for picture in pictures)
            yield


def _remade(version: int) -> list[str]:
    return [f"{version} {index}" for index in range(CLASSES)]


def _ok(response: httpx.Response) -> Any:
    response.raise_for_status()
    return response.json()


def check(client: httpx.Client, written: Written, outcome: Outcome, rng: random.Random, *, everything: bool) -> None:
    """Read the newest acknowledged writes and a sample of the earlier ones, or all of them."""
    found: dict[str, int] = {}
    for name, sent in written.sent.items():
        latest = client.get(f"/v1/label-sets/{name}")
        newest = _ok(latest)["version"] if latest.status_code == 200 else 0
        found[name] = newest
        known = max((version for kept, version in written.versions if kept == name), default=0)
        for version in range(newest + 1, known + 1):
            _fault(outcome, "lost", f"{name}@{version}")
        for version in range(known + 1, newest + 1):
            classes = _classes(client, name, version)
            outcome.unacknowledged_and_there += 1
            if classes not in sent:
                _fault(outcome, "torn", f"{name}@{version} was never sent")
            written.versions[name, version] = classes
    recent = list(written.versions.items())[-200:]
    older = list(written.versions.items())[:-200]
    checked = recent + (older if everything else rng.sample(older, min(len(older), 100)))
    for (name, version), classes in checked:
        if version <= found[name] and _classes(client, name, version) != classes:
            _fault(outcome, "torn", f"{name}@{version}")
    _check_remade(client, written, outcome, everything=everything)
    _check_the_rest(client, written, outcome, everything=everything)


def _check_remade(client: httpx.Client, written: Written, outcome: Outcome, *, everything: bool) -> None:
    """Check recreated label sets; each may be one step further than its acknowledged writes."""
    for name, step in list(written.remade.items())[0 if everything else -100 :]:
        latest = client.get(f"/v1/label-sets/{name}")
        stored = _ok(latest) if latest.status_code == 200 else {"version": 0, "classes": []}
        version = stored["version"]
        if version not in RECREATED[step - 1 : step + 1]:
            _fault(outcome, "lost", f"{name}: step {step}, found version {version}")
        elif version != RECREATED[step - 1]:
            outcome.unacknowledged_and_there += 1
            written.remade[name] = step + 1
        if version and [item["name"] for item in stored["classes"]] != _remade(version):
            _fault(outcome, "torn", f"{name}@{version}")


def _check_the_rest(client: httpx.Client, written: Written, outcome: Outcome, *, everything: bool) -> None:
    newest = slice(0 if everything else -3, None)
    for name, grown in list(written.grown.items())[newest]:
        latest = client.get(f"/v1/label-sets/{name}")
        there = [item["name"] for item in _ok(latest)["classes"]] if latest.status_code == 200 else []
        # One more addition may be written without an acknowledgement.
        if there[: len(grown)] != grown:
            _fault(outcome, "lost", f"{name}: classes")
        elif there[len(grown) :] == [f"leaf {len(grown) - 1}"]:
            outcome.unacknowledged_and_there += 1
            written.grown[name] = there
        elif there != grown:
            _fault(outcome, "torn", f"{name}: classes that were not sent")
    for name, seen in list(written.images.items())[newest]:
        listed = _images(client, name)
        if missing := seen - listed.keys():
            _fault(outcome, "lost", f"{name}: {len(missing)} images")
        if bare := [key for key, models in listed.items() if not models]:
            _fault(outcome, "torn", f"{name}: {len(bare)} images without features")
        outcome.unacknowledged_and_there += len(listed.keys() - seen)
        written.images[name] = seen | listed.keys()


def _fault(outcome: Outcome, kind: str, what: str) -> None:
    setattr(outcome, kind, getattr(outcome, kind) + 1)
    outcome.faults.append(f"{kind} after round {outcome.rounds}: {what}")


def _classes(client: httpx.Client, name: str, version: int) -> list[str]:
    found = client.get(f"/v1/label-sets/{name}", params={"version": version})
    return [item["name"] for item in found.json()["classes"]] if found.status_code == 200 else []


def _images(client: httpx.Client, name: str) -> dict[str, int]:
    listed: dict[str, int] = {}
    after: dict[str, Any] = {}
    while True:
        page = client.get(f"/v1/label-sets/{name}/images", params=after)
        if page.status_code == 404:
            return listed
        body = _ok(page)
        listed |= {item["sha256"]: item["models"] for item in body["images"]}
        if body["next_after"] is None:
            return listed
        after = {"after": body["next_after"]}


def integrity(file: Path) -> str:
    """Return the result of SQLite's check of a copy; opening the file itself would empty its log."""
    with tempfile.TemporaryDirectory() as place:
        for part in file.parent.glob(f"{file.name}*"):
            if not part.name.endswith("-shm"):  # rebuilt from the log
                shutil.copy(part, place)
        with closing(sqlite3.connect(Path(place) / file.name)) as connection:
            result: str = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return result


def measure(database: str, rounds: int, folder: Path, seed: int) -> Outcome:
    """Kill a server with one kind of database, and check its data."""
    rng = random.Random(seed)
    written, outcome = Written(), Outcome(database)
    with ExitStack() as stack:
        flags = list(QUICK)
        if database == "postgresql":
            binaries = postgres_binaries()
            if binaries is None:
                sys.exit("PostgreSQL is not installed: there is no initdb")
            flags += ["--database-url", stack.enter_context(running_postgres(binaries))]
        for number in range(rounds):
            with serving("embedded", folder, *flags) as server:

                def kill(server: Any = server) -> None:
                    time.sleep(rng.uniform(0.2, 1.5))
                    server.process.send_signal(signal.SIGKILL)

                Writers(written, number).run(server.url, kill)
                server.process.wait()
            if database == "sqlite" and (result := integrity(folder / "deixis.sqlite3")) != "ok":
                _fault(outcome, "torn", f"the file: {result}")
            began = time.perf_counter()
            with (
                serving("embedded", folder, *flags) as server,
                httpx.Client(base_url=server.url, timeout=60) as client,
            ):
                outcome.restart_s.append(round(time.perf_counter() - began, 2))
                outcome.rounds += 1
                check(client, written, outcome, rng, everything=number == rounds - 1)
            outcome.acknowledged = written.acknowledged
            while written.refused:
                _fault(outcome, "refused", written.refused.pop())
            say(
                f"{database} {number + 1}/{rounds}: {outcome.acknowledged} acknowledged, {outcome.lost} lost,"
                f" {outcome.torn} torn"
            )
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Return the figures in Markdown."""
    lines = [
        "| database | kill -9 | acknowledged writes | lost | refused | torn | unacknowledged | restart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {outcome.database} | {outcome.rounds} | {outcome.acknowledged:,} | {outcome.lost} | {outcome.refused} |"
        f" {outcome.torn} | {outcome.unacknowledged_and_there} | {float(np.median(outcome.restart_s)):.1f} s |"
        for outcome in outcomes
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for JSON; the table is always printed")
    arguments = parser.parse_args()
    outcomes = []
    for database in arguments.databases:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(measure(database, arguments.rounds, Path(folder), arguments.seed))
    print(table(outcomes))  # noqa: T201 - the output of the command
    for outcome in outcomes:
        for fault in outcome.faults:
            say(f"{outcome.database}: {fault}")
    if arguments.output:
        about = about_this_run()
        file = arguments.output / f"{about['date']}-durability.json"
        found = [asdict(outcome) for outcome in outcomes]
        file.write_text(json.dumps({**about, "databases": found}, indent=1) + "\n", encoding="utf-8")
    if any(outcome.lost or outcome.refused or outcome.torn for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
