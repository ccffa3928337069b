"""Measures what background work takes from requests: `python -m benchmarks.background`.

Two servers stay loaded. One is idle; the other always has background work of one kind, and is stopped (SIGSTOP) while
the idle one is measured. A closed loop of 1, 8 or 32 connections takes turns with both. Each measurement checks that
the work went on: that it was running before and after, and that it advanced meanwhile.

The goals for each kind of work: a median time of 1.3 times that without it for one connection, and 0.9 of the
throughput for 8 and 32.

Writes a table and JSON. Exits with 1 if other processes used the cores too often for a ratio. On a machine that is
never idle, run it with ``--max-cpu-by-others 1`` at a higher priority than the others (``nice -n -10``).
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np

from app.captions.everyday import everyday_names
from app.encoders._base import LoadOptions
from app.encoders.loading import load_encoder
from app.main import open_service
from app.scoring.numerics import unit_rows
from app.settings import load_settings
from app.store.examples import NewExample
from app.types import ClassEntry
from benchmarks.load import photographs
from benchmarks.processes import Server, Worker, cpu_s_by_thread, say, serving, working
from benchmarks.rounds import (
    BUSY,
    MAX_CPU_BY_OTHERS,
    Part,
    Rounds,
    alternate,
    cell,
    end_if_busy,
    table,
    write_results,
)
from benchmarks.service import tune

GOALS = {"p50_ms": 1.3, "images_per_s": 0.9}
SHAPES = (1, 8, 32)
"""Connections; each request has one image."""

_WARM_S = 1.0
"""Before a measurement, so that the work has its pace under load, and not that of a pause."""

_SET = "things"
_CLASSES, _LABELLED, _UNLABELLED = 100, 4000, 4000
_PREWARMED = 1000
_FILES = 2000
_CAPTIONS = 1_000_000
_POSTED = 4


class Work(ABC):
    """One kind of background work, kept going in a server."""

    kind: ClassVar[str]
    title: ClassVar[str]
    has_examples: ClassVar[bool] = False
    encodes_images: ClassVar[bool] = False

    def __init__(self, server: Server, import_dir: Path) -> None:
        self.server = server
        self.import_dir = import_dir
        self.http = httpx.Client(base_url=server.url, timeout=600)
        self.numbers = count()

    def send(self, method: str, path: str, **request: Any) -> Any:
        """Send a request, and return the JSON of its response."""
        response = self.http.request(method, path, **request)
        if response.is_error:
            sys.exit(f"{method} {path}: {response.status_code} {response.text}")
        return response.json() if response.content else None

    @abstractmethod
    def keep(self) -> None:
        """Start more work unless there is enough for a measurement."""

    @abstractmethod
    def is_running(self) -> bool:
        """Return whether there is unfinished work."""

    @abstractmethod
    def done(self) -> float:
        """Return how much was done, in any unit."""

    def texts(self) -> float:
        """Return the number of texts that the server has encoded."""
        return self.server.batches("texts")[0]

    def fit_cpu_s(self) -> float:
        """Return the CPU time of the threads that fit."""
        used = cpu_s_by_thread(self.server.process.pid)
        return used["fit"] + used["background-fit"]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the work going while something else runs."""
        self.keep()
        yield


class JobWork(Work):
    """Work that runs as jobs of one kind."""

    job_kind: ClassVar[str]

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        self.jobs: list[str] = []

    @abstractmethod
    def add(self, number: int) -> str:
        """Add a job, and return its id."""

    def unfinished(self) -> list[dict[str, Any]]:
        """Return the jobs that have not ended; ends the program if one failed."""
        found = [self.send("GET", f"/v1/jobs/{each}") for each in self.jobs]
        for job in found:
            if job["status"] in {"failed", "cancelled"}:
                sys.exit(f"{self.kind}: a job {job['status']}: {job['error']}")
        self.jobs = [job["id"] for job in found if job["status"] in {"queued", "running"}]
        return [job for job in found if job["status"] in {"queued", "running"}]

    def keep(self) -> None:
        """Keep one job queued behind the running one."""
        while len(self.unfinished()) < 2:
            self.jobs.append(self.add(next(self.numbers)))

    def is_running(self) -> bool:
        """Return whether there is a job; the next one starts when one ends."""
        return bool(self.unfinished())


class Build(JobWork):
    """Builds of a caption database."""

    body: ClassVar[dict[str, Any]]

    def add(self, number: int) -> str:
        """Build it again."""
        job: str = self.send("PUT", f"/v1/databases/{self.kind}-{number % 2}", json=self.body)["id"]
        return job

    def done(self) -> float:
        """Return the number of encoded texts."""
        return self.texts()


class Everyday(Build):
    """The default database."""

    kind, title, body = "everyday", "building the caption database of everyday names", {"source": "everyday"}


class WordNet(Build):
    """The large database that comes with Deixis."""

    kind, title, body = "wordnet", "building the caption database of WordNet", {"source": "wordnet"}


class CaptionFile(Build):
    """The captions of a large file are read and counted, and then read again and encoded."""

    kind, title = "caption-file", f"reading a file of {_CAPTIONS:,} captions into a database"
    body: ClassVar = {"files": ["captions.txt"]}

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        names = everyday_names()
        rng = np.random.default_rng(0)
        first, second = rng.integers(0, len(names), (2, _CAPTIONS)).tolist()
        lines = [f"{names[one]} and {names[two]} {at}" for at, (one, two) in enumerate(zip(first, second, strict=True))]
        (import_dir / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def done(self) -> float:
        """Return the CPU time of the thread that builds."""
        return cpu_s_by_thread(self.server.process.pid)["captions"]


class Prewarm(Work):
    """A label set is written, and its texts are encoded."""

    kind, title = "prewarm", f"pre-encoding label sets of {_PREWARMED:,} classes"

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        self.wanted = self.texts()

    def keep(self) -> None:
        """Write a version with new classes."""
        number = next(self.numbers)
        classes = [f"{name} {number}" for name in everyday_names()[:_PREWARMED]]
        self.wanted = self.texts() + _PREWARMED
        self.send("PUT", "/v1/label-sets/many", json={"classes": classes})

    def is_running(self) -> bool:
        """Return whether texts are missing."""
        return self.texts() < self.wanted

    def done(self) -> float:
        """Return the number of encoded texts."""
        return self.texts()


class Compare(JobWork):
    """Jobs that compare all methods on the stored examples."""

    kind, title, has_examples = "compare", f"comparing the methods on {_LABELLED + _UNLABELLED:,} examples", True

    def add(self, _number: int) -> str:
        """Compare the methods."""
        job: str = self.send("POST", f"/v1/label-sets/{_SET}:evaluate", json={})["id"]
        return job

    def done(self) -> float:
        """Return the CPU time of the threads of the fits."""
        return self.fit_cpu_s()


class Select(JobWork):
    """Jobs that select a method after a change of the examples, and fit it."""

    kind, title, has_examples = "select", f"selecting a method on {_LABELLED + _UNLABELLED:,} examples", True

    def add(self, _number: int) -> str:
        """Delete an example."""
        listed = self.send("GET", f"/v1/label-sets/{_SET}/images", params={"limit": 1})
        deleted = self.send("DELETE", f"/v1/label-sets/{_SET}/images/{listed['images'][0]['id']}")
        job: str = deleted["job"]
        return job

    def done(self) -> float:
        """Return the CPU time of the threads of the fits."""
        return self.fit_cpu_s()


class ImportFolder(JobWork):
    """Jobs that add the images of a folder to the examples."""

    kind, title, encodes_images = "import", f"importing a folder of {_FILES:,} examples", True

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        self.send("PUT", f"/v1/label-sets/{_SET}", json={"classes": list(everyday_names()[:_CLASSES])})

    def add(self, number: int) -> str:
        """Import a folder with new images."""
        folder = self.import_dir / f"images-{number}"
        folder.mkdir()
        for at, photo in zip(range(_FILES), cycle(photographs()), strict=False):
            (folder / f"{at}.jpg").write_bytes(distinct(photo, number * _FILES + at))
        job: str = self.send("POST", f"/v1/label-sets/{_SET}/images", json={"folder": folder.name})["id"]
        return job

    def done(self) -> float:
        """Return the number of encoded images."""
        return self.server.batches()[0]


class Repeated(Work):
    """Requests of another caller, one after the other."""

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        self.thread: threading.Thread | None = None
        self.ending = threading.Event()

    @abstractmethod
    def ask(self, number: int) -> None:
        """Send one request."""

    def run(self) -> None:
        """Send one request after the other."""
        while not self.ending.is_set():
            self.ask(next(self.numbers))

    def keep(self) -> None:
        """Nothing: ``kept`` does."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Send requests meanwhile. The last one may end later, when the server runs again."""
        if self.thread is not None:
            self.thread.join()
        self.ending.clear()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        try:
            yield
        finally:
            self.ending.set()

    def is_running(self) -> bool:
        """Return whether requests are sent."""
        return self.thread is not None and self.thread.is_alive()


class PostExamples(Repeated):
    """Examples are sent by a client."""

    kind, title, encodes_images = "post", f"adding examples in requests of {_POSTED} images", True

    def __init__(self, server: Server, import_dir: Path) -> None:
        super().__init__(server, import_dir)
        self.photos = photographs()
        self.send("PUT", f"/v1/label-sets/{_SET}", json={"classes": list(everyday_names()[:_CLASSES])})

    def ask(self, number: int) -> None:
        """Add images."""
        files = [
            ("image", ("photo.jpg", distinct(self.photos[at % len(self.photos)], number * _POSTED + at), "image/jpeg"))
            for at in range(_POSTED)
        ]
        self.send("POST", f"/v1/label-sets/{_SET}/images", files=files)

    def done(self) -> float:
        """Return the number of encoded images."""
        return self.server.batches()[0]


class Fit(Repeated):
    """Another caller asks for methods with options that nobody has used, and waits for their fits."""

    kind, title, has_examples = "fit", f"fitting methods to {_LABELLED + _UNLABELLED:,} examples", True
    options: ClassVar = (("gda", "alpha"), ("tip-adapter", "beta"), ("gda-em", "alpha"), ("zlap", "gamma"))

    def ask(self, number: int) -> None:
        """Classify an image with a method that must be fitted."""
        method, option = self.options[number % len(self.options)]
        fields = {"label_set": _SET, "method": method, "options": json.dumps({option: 0.5 + number / 1000})}
        response = self.http.post("/v1/classify", files={"image": photographs()[0]}, data=fields)
        if response.status_code not in {200, 503, 504}:
            sys.exit(f"{self.kind}: {response.status_code} {response.text}")

    def done(self) -> float:
        """Return the CPU time of the threads of the fits."""
        return self.fit_cpu_s()


KINDS: dict[str, type[Work]] = {
    work.kind: work
    for work in (Everyday, WordNet, CaptionFile, Prewarm, Compare, Select, Fit, ImportFolder, PostExamples)
}


def distinct(photo: bytes, number: int) -> bytes:
    """Return a JPEG file with a comment that makes it another file."""
    return photo[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + photo[2:]


def add_examples(model: str, data_dir: Path) -> None:
    """Store a label set with examples: clusters near the text features of the classes, as methods assume."""
    settings = load_settings(data_dir=data_dir, models=(model,), build_default_database=False)
    encoder = load_encoder(model, LoadOptions(data_dir=data_dir))
    names = everyday_names()[:_CLASSES]
    rng = np.random.default_rng(0)
    text = encoder.encode_texts([f"a photo of a {name}." for name in names])
    labels = np.repeat(np.arange(_CLASSES), (_LABELLED + _UNLABELLED) // _CLASSES)
    noise = rng.standard_normal((len(labels), text.shape[1])) / text.shape[1] ** 0.5
    rows = unit_rows(text[labels] + noise).astype(np.float32)
    fingerprint = encoder.image_fingerprint()
    examples = [
        NewExample(at.to_bytes(32, "big"), (names[label],) if at % 2 else (), {fingerprint: row})
        for at, (label, row) in enumerate(zip(labels.tolist(), rows, strict=True))
    ]

    async def store() -> None:
        async with open_service(settings, []) as service:
            await service.label_sets.put(_SET, [ClassEntry(name) for name in names], "photo")
            for first in range(0, len(examples), 1000):
                await service.examples.repository.add(_SET, examples[first : first + 1000])

    asyncio.run(store())


def under_load(server: Server, load: Worker, connections: int, seconds: float) -> dict[str, Any]:
    """Run a closed loop, and return its figures."""
    before = cpu_s_by_thread(server.process.pid)
    figures = load.ask(server.url, "closed", "--connections", connections, "--seconds", seconds)
    used = cpu_s_by_thread(server.process.pid) - before
    if set(figures["statuses"]) != {"200"}:
        sys.exit(f"the server answered with other statuses than 200: {figures['statuses']}")
    return {**figures, "threads_cpu_s": {kind: round(used_s, 2) for kind, used_s in used.items()}}


def beside(work: Work, load: Worker, connections: int, seconds: float) -> dict[str, Any]:
    """Measure a server that is doing background work, and stop it afterwards."""
    process = work.server.process
    process.send_signal(signal.SIGCONT)
    try:
        with work.kept():
            under_load(work.server, load, connections, _WARM_S)
            running, before = work.is_running(), work.done()
            figures = under_load(work.server, load, connections, seconds)
            after, still_running = work.done(), work.is_running()
        # No request is in progress at either time, so all other images are those of the work.
        answered = sum(figures["statuses"].values()) if work.encodes_images else 0
        done = after - before - answered
        if not (running and still_running and done > 0):
            sys.exit(f"{work.kind}: the work did not go on while it was measured: {running}, {done}, {still_running}")
        return {**figures, "work_done": round(done, 3)}
    finally:
        process.send_signal(signal.SIGSTOP)


def measure(
    kind: str,
    model: str,
    work_dir: Path,
    shapes: Sequence[int],
    rounds: int,
    seconds: float,
    max_cpu_by_others: float,
) -> dict[str, Any]:
    """Return the figures of one kind of work."""
    import_dir = work_dir / "import"
    shutil.rmtree(import_dir, ignore_errors=True)
    import_dir.mkdir()
    data_dirs = [work_dir / name for name in ("idle", "busy")]
    for data_dir in data_dirs:
        shutil.rmtree(data_dir, ignore_errors=True)
        shutil.copytree(work_dir / "tuned", data_dir)
    if KINDS[kind].has_examples:
        add_examples(model, data_dirs[1])
    flags = ("--tuning-seconds", "0", "--import-dir", str(import_dir))
    with ExitStack() as stack:
        load = stack.enter_context(working("benchmarks.load"))
        idle, busy = (stack.enter_context(serving(model, data_dir, *flags)) for data_dir in data_dirs)
        # A stopped process does not see SIGTERM.
        stack.callback(busy.process.send_signal, signal.SIGCONT)
        work = KINDS[kind](busy, import_dir)
        for server in (idle, busy):
            under_load(server, load, max(shapes), 2)  # fills the caches
        busy.process.send_signal(signal.SIGSTOP)
        idle.wait_until_idle()
        found = {}
        for shape in shapes:
            say(f"{kind}: {shape} connections")
            parts = {
                "idle": Part(
                    lambda at=shape: under_load(idle, load, at, seconds), [idle.process.pid, load.process.pid]
                ),
                "busy": Part(lambda at=shape: beside(work, load, at, seconds), [busy.process.pid, load.process.pid]),
            }
            found[str(shape)] = compared(alternate(parts, rounds, max_cpu_by_others=max_cpu_by_others))
    return {"kind": kind, "title": KINDS[kind].title, "shapes": found}


def compared(rounds: Rounds) -> dict[str, Any]:
    """Return the rounds, the spreads of their figures, and those of the ratios to the idle server."""
    return {
        "is_busy": rounds.is_busy,
        "refused": rounds.refused,
        **{
            part: {name: rounds.spread(part, name) for name in ("images_per_s", "p50_ms", "p99_ms")}
            for part in ("idle", "busy")
        },
        "of_idle": {
            name: rounds.spread("busy", name, over=("idle", name)) for name in ("images_per_s", "p50_ms", "p99_ms")
        },
        "rounds": rounds.accepted,
    }


def report(found: Sequence[dict[str, Any]]) -> str:
    """Return the ratios of every kind in Markdown; those that miss a goal are bold."""
    shapes = list(found[0]["shapes"])
    columns = ["background work"]
    columns += [f"p50 of {shape}" for shape in shapes[:1]] + [f"p99 of {shape}" for shape in shapes[:1]]
    columns += [f"images/s of {shape}" for shape in shapes[1:]]
    rows = []
    for each in found:
        first, *others = (shape["of_idle"] for shape in each["shapes"].values())
        cells = [marked(cell(first["p50_ms"]), first["p50_ms"], "p50_ms"), cell(first["p99_ms"])]
        cells += [marked(cell(ratio["images_per_s"]), ratio["images_per_s"], "images_per_s") for ratio in others]
        rows.append([each["title"], *cells])
    return "\n".join(table(columns, rows)) + "\n"


def marked(text: str, spread: Any, figure: str) -> str:
    """Return the text in bold if the median misses the goal."""
    if spread is None or text == BUSY:
        return text
    goal = GOALS[figure]
    misses = spread.median > goal if figure == "p50_ms" else spread.median < goal
    return f"**{text}**" if misses else text


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--shapes", nargs="+", type=int, default=SHAPES, help="connections")
    parser.add_argument("--rounds", type=int, default=5, help="for each shape")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each part of a round")
    parser.add_argument(
        "--max-cpu-by-others",
        type=float,
        default=MAX_CPU_BY_OTHERS,
        help="share of the cores that other processes may use in a round; with 1, run this at a higher priority",
    )
    parser.add_argument("--output", type=Path, help="folder for JSON and table; the table is always printed")
    parser.add_argument("--work-dir", type=Path, help="folder for data and measurements; temporary by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = (arguments.work_dir or Path(temporary)).absolute()
        if not (work_dir / "tuned").exists():
            tune(arguments.model, work_dir / "tuned")
        found = [
            measure(
                kind,
                arguments.model,
                work_dir,
                arguments.shapes,
                arguments.rounds,
                arguments.seconds,
                arguments.max_cpu_by_others,
            )
            for kind in arguments.kinds
        ]
    text = report(found)
    print(text)  # noqa: T201 - the output of the command
    if arguments.output:
        results = {"kinds": found, "max_cpu_by_others": arguments.max_cpu_by_others}
        write_results("background", results, text, arguments.output)
    end_if_busy(shape for each in found for shape in each["shapes"].values())


if __name__ == "__main__":
    main()
