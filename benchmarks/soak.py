"""Mixed traffic with faults against a server of its own, for a while: does anything pile up?

    python -m benchmarks.soak [--minutes 20] [--model embedded]

Eight workers each send, at random and with pauses: photographs, several at once, bad files, unknown names, labels that
were never seen, large pictures; write and delete label sets; and hang up in the middle of a body or before the answer.
One line a minute. At the end it fails, with status 1, if

- an answer was not what its request deserved (503 and 504 are deserved by whoever brings images),
- a request had no answer within two minutes,
- the memory grew by more than 5 % from the second quarter's median to the last quarter's,
- a place in the queue is taken although nobody waits, or the server is not ready,
- the server does not end by itself on SIGTERM.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from benchmarks.load import LABELS, photographs
from benchmarks.service import Server, say, serving

WORKERS = 8
PATIENCE_S = 120.0
MAX_GROWTH = 0.05
BUSY = {503, 504}


class Soak:
    """One worker's ways to ask, each with the statuses that it deserves."""

    def __init__(self, server: Server, client: httpx.AsyncClient, seed: int) -> None:
        self.address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self.client = client
        self.chance = random.Random(seed)
        self.name = f"soak-{seed}"
        self.photos = photographs(4)
        self.large = photographs(1, (2400, 1800))[0]
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, until: float) -> None:
        """Ask until the time has come."""
        ways: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (8, self.one),
            (3, self.several),
            (1, self.large_picture),
            (3, self.bad_picture),
            (2, self.mixed_pictures),
            (2, self.unknown_names),
            (2, self.new_labels),
            (3, self.label_sets),
            (3, self.hang_up_in_the_body),
            (3, self.hang_up_before_the_answer),
        ]
        weights = [weight for weight, _ in ways]
        while time.monotonic() < until:
            ((_, way),) = self.chance.choices(ways, weights)
            try:
                await asyncio.wait_for(way(), PATIENCE_S)
            except TimeoutError:
                self.faults.append(f"{way.__name__}: no answer within {PATIENCE_S:g} s")
            except httpx.HTTPError as error:
                self.faults.append(f"{way.__name__}: {type(error).__name__} {error}")
            await asyncio.sleep(self.chance.random() * 0.1)

    def expect(self, way: str, answer: httpx.Response, *deserved: int) -> None:
        """Note an answer, and a fault if it is not deserved."""
        self.outcomes[f"{way} {answer.status_code}"] += 1
        if answer.status_code not in deserved:
            self.faults.append(f"{way}: {answer.status_code} {answer.text[:200]}")

    async def ask(self, *images: bytes, labels: str | None = None, **fields: str) -> httpx.Response:
        """Classify."""
        data = {"labels": labels or json.dumps(LABELS), **fields}
        return await self.client.post("/v1/classify", files=[("image", image) for image in images], data=data)

    async def one(self) -> None:
        """Send one photograph."""
        self.expect("one", await self.ask(self.chance.choice(self.photos)), 200, *BUSY)

    async def several(self) -> None:
        """Send many."""
        count = self.chance.randint(2, 32)
        self.expect("several", await self.ask(*self.chance.choices(self.photos, k=count)), 200, *BUSY)

    async def large_picture(self) -> None:
        """Send one that is decoded at a fraction of its size."""
        self.expect("large", await self.ask(self.large), 200, *BUSY)

    async def bad_picture(self) -> None:
        """Send what is no picture, or half of one."""
        photo = self.chance.choice(self.photos)
        bad = self.chance.choice(
            [b"", b"text", self.chance.randbytes(2000), photo[: len(photo) // 2], b"\x89PNG\r\n\x1a\n"]
        )
        self.expect("bad", await self.ask(bad), 415, *BUSY)

    async def mixed_pictures(self) -> None:
        """Send a bad one among good ones."""
        answer = await self.ask(self.photos[0], b"no picture", self.photos[1])
        self.expect("mixed", answer, 200, *BUSY)
        if answer.status_code == 200:
            errors = [result["error"] is not None for result in answer.json()["results"]]
            if errors != [False, True, False]:
                self.faults.append(f"mixed: errors at {errors}")

    async def unknown_names(self) -> None:
        """Name what is not there."""
        field = self.chance.choice(["model", "method"])
        self.expect("unknown", await self.ask(self.photos[0], **{field: "no-such-thing"}), 404)

    async def new_labels(self) -> None:
        """Bring words that were never seen."""
        labels = json.dumps([f"thing {self.chance.getrandbits(40)}" for _ in range(20)])
        self.expect("new labels", await self.ask(self.photos[0], labels=labels), 200, *BUSY)

    async def label_sets(self) -> None:
        """Write a label set, ask by it, and sometimes delete it."""
        path = f"/v1/label-sets/{self.name}"
        classes = [f"class {self.chance.randint(0, 500)}-{step}" for step in range(10)]
        self.expect("put", await self.client.put(path, json={"classes": classes}), 200, 201)
        fields = {"label_set": self.name}
        asked = await self.client.post("/v1/classify", files={"image": self.photos[0]}, data=fields)
        self.expect("by label set", asked, 200, *BUSY)
        if self.chance.random() < 0.3:
            self.expect("delete", await self.client.delete(path), 204)

    async def hang_up_in_the_body(self) -> None:
        """Promise a body and leave."""
        _, writer = await asyncio.open_connection(*self.address)
        writer.write(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 90000\r\n\r\n"
        )
        writer.write(self.photos[0][:20000])
        await writer.drain()
        await asyncio.sleep(self.chance.random() * 0.05)
        writer.close()
        self.outcomes["hung up in the body"] += 1

    async def hang_up_before_the_answer(self) -> None:
        """Send many photographs and leave while they are worked on."""
        asking = asyncio.create_task(self.ask(*self.chance.choices(self.photos, k=self.chance.randint(1, 16))))
        await asyncio.sleep(self.chance.random() * 0.2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self.outcomes["hung up before the answer"] += 1


async def soak(server: Server, minutes: float) -> tuple[Counter[str], list[str], list[float]]:
    """Return the outcomes, the faults, and the memory in MiB, taken every two seconds."""
    until = time.monotonic() + 60 * minutes
    memory: list[float] = []
    limits = httpx.Limits(max_connections=4 * WORKERS)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
        workers = [Soak(server, client, seed) for seed in range(WORKERS)]
        running = [asyncio.create_task(worker.run(until)) for worker in workers]
        told = time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(2)
            memory.append(server.rss_mib())
            if time.monotonic() - told > 60:
                told = time.monotonic()
                done = sum(sum(worker.outcomes.values()) for worker in workers)
                faults = sum(len(worker.faults) for worker in workers)
                say(f"{(until - told) / 60:4.1f} minutes left: {done} done, {faults} faults, {memory[-1]:.0f} MiB")
        await asyncio.gather(*running)
    outcomes = sum((worker.outcomes for worker in workers), Counter[str]())
    return outcomes, [fault for worker in workers for fault in worker.faults], memory


def growth(memory: list[float]) -> float:
    """Return by which share the last quarter's median is above the second quarter's; the first warms up."""
    quarter = max(1, len(memory) // 4)
    return statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter] or memory) - 1


def afterwards(server: Server) -> list[str]:
    """Return what is not as it was before."""
    time.sleep(2)
    (model,) = httpx.get(f"{server.url}/v1/models").json()["models"]
    left = [f"{model['queued_images']} places are taken although nobody waits"] if model["queued_images"] else []
    statuses = {probe: httpx.get(server.url + probe).status_code for probe in ("/healthz", "/readyz")}
    left += [f"{probe} answers {status}" for probe, status in statuses.items() if status != 200]
    counted = httpx.get(f"{server.url}/metrics").text.splitlines()
    left += [line for line in counted if "worker_restarts_total{" in line and not line.endswith(" 0.0")]
    server.process.terminate()
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        left.append("it does not end on SIGTERM")
    return left


def main() -> None:
    """Soak, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", default="embedded")
    arguments = parser.parse_args()
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # as the container has it
    # Small enough to be full from the first minute: a cache that fills is no leak, and hides one.
    cache = ("--cache-mib", "32")
    with tempfile.TemporaryDirectory() as folder, serving(arguments.model, Path(folder), *cache) as server:
        outcomes, faults, memory = asyncio.run(soak(server, arguments.minutes))
        faults += afterwards(server)
    grown = growth(memory)
    if grown > MAX_GROWTH:
        faults.append(f"the memory grew by {grown:.1%}")
    for outcome, count in sorted(outcomes.items()):
        say(f"{count:8} {outcome}")
    say(f"memory: {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {memory[-1]:.0f} at last, {grown:+.1%}")
    for fault, count in Counter(faults).most_common(20):
        say(f"FAULT {count} times: {fault}")
    say("FAIL" if faults else "PASS")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
