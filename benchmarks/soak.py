"""Sends mixed traffic with faults to a server, and checks that nothing accumulates.

    python -m benchmarks.soak [--minutes 20] [--model embedded]

Each of eight workers sends at random, with pauses: single photographs, several at once, bad files, unknown names, new
labels and large images. It also writes and deletes label sets, and disconnects during a body or before the response.
Prints a line per minute. Exits with status 1 if

- a response has an unexpected status (503 and 504 are expected for requests with images),
- a request has no response within two minutes,
- the memory grows by more than 5 % from the median of the second quarter to that of the last,
- places in the queue are occupied without requests, or the server is not ready,
- the server does not stop after SIGTERM.
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
from benchmarks.processes import Server, say, serving

WORKERS = 8
TIMEOUT_S = 120.0
MAX_GROWTH = 0.05
BUSY = {503, 504}


class Soak:
    """A worker: the requests that it sends, with their expected statuses."""

    def __init__(self, server: Server, client: httpx.AsyncClient, seed: int) -> None:
        self.address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self.client = client
        self.rng = random.Random(seed)
        self.name = f"soak-{seed}"
        self.photos = photographs(4)
        self.large = photographs(1, (2400, 1800))[0]
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, until: float) -> None:
        """Send requests until a time."""
        requests: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (8, self.one),
            (3, self.several),
            (1, self.large_image),
            (3, self.bad_image),
            (2, self.mixed_images),
            (2, self.unknown_names),
            (2, self.new_labels),
            (3, self.label_sets),
            (3, self.disconnect_during_the_body),
            (3, self.disconnect_before_the_response),
        ]
        weights = [weight for weight, _ in requests]
        while time.monotonic() < until:
            ((_, request),) = self.rng.choices(requests, weights)
            try:
                await asyncio.wait_for(request(), TIMEOUT_S)
            except TimeoutError:
                self.faults.append(f"{request.__name__}: no response within {TIMEOUT_S:g} s")
            except httpx.HTTPError as error:
                self.faults.append(f"{request.__name__}: {type(error).__name__} {error}")
            await asyncio.sleep(self.rng.random() * 0.1)

    def expect(self, name: str, response: httpx.Response, *expected: int) -> None:
        """Record a response, and a fault if its status is not expected."""
        self.outcomes[f"{name} {response.status_code}"] += 1
        if response.status_code not in expected:
            self.faults.append(f"{name}: {response.status_code} {response.text[:200]}")

    async def classify(self, *images: bytes, labels: str | None = None, **fields: str) -> httpx.Response:
        """Send a classification request."""
        data = {"labels": labels or json.dumps(LABELS), **fields}
        return await self.client.post("/v1/classify", files=[("image", image) for image in images], data=data)

    async def one(self) -> None:
        """Send one photograph."""
        self.expect("one", await self.classify(self.rng.choice(self.photos)), 200, *BUSY)

    async def several(self) -> None:
        """Send several photographs in one request."""
        count = self.rng.randint(2, 32)
        self.expect("several", await self.classify(*self.rng.choices(self.photos, k=count)), 200, *BUSY)

    async def large_image(self) -> None:
        """Send a large image, which is decoded at a reduced size."""
        self.expect("large", await self.classify(self.large), 200, *BUSY)

    async def bad_image(self) -> None:
        """Send a file that is not an image, or half of an image."""
        photo = self.rng.choice(self.photos)
        bad = self.rng.choice([b"", b"text", self.rng.randbytes(2000), photo[: len(photo) // 2], b"\x89PNG\r\n\x1a\n"])
        self.expect("bad", await self.classify(bad), 415, *BUSY)

    async def mixed_images(self) -> None:
        """Send a bad image among good ones."""
        response = await self.classify(self.photos[0], b"not an image", self.photos[1])
        self.expect("mixed", response, 200, *BUSY)
        if response.status_code == 200:
            errors = [result["error"] is not None for result in response.json()["results"]]
            if errors != [False, True, False]:
                self.faults.append(f"mixed: errors at {errors}")

    async def unknown_names(self) -> None:
        """Name an unknown model or method."""
        field = self.rng.choice(["model", "method"])
        self.expect("unknown", await self.classify(self.photos[0], **{field: "no-such-thing"}), 404)

    async def new_labels(self) -> None:
        """Send labels that are not in the cache."""
        labels = json.dumps([f"thing {self.rng.getrandbits(40)}" for _ in range(20)])
        self.expect("new labels", await self.classify(self.photos[0], labels=labels), 200, *BUSY)

    async def label_sets(self) -> None:
        """Write a label set, classify with it, and sometimes delete it."""
        path = f"/v1/label-sets/{self.name}"
        classes = [f"class {self.rng.randint(0, 500)}-{step}" for step in range(10)]
        self.expect("put", await self.client.put(path, json={"classes": classes}), 200, 201)
        fields = {"label_set": self.name}
        response = await self.client.post("/v1/classify", files={"image": self.photos[0]}, data=fields)
        self.expect("by label set", response, 200, *BUSY)
        if self.rng.random() < 0.3:
            self.expect("delete", await self.client.delete(path), 204)

    async def disconnect_during_the_body(self) -> None:
        """Disconnect during the body."""
        _, writer = await asyncio.open_connection(*self.address)
        writer.write(
            b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: image/jpeg\r\nContent-Length: 90000\r\n\r\n"
        )
        writer.write(self.photos[0][:20000])
        await writer.drain()
        await asyncio.sleep(self.rng.random() * 0.05)
        writer.close()
        self.outcomes["disconnected during the body"] += 1

    async def disconnect_before_the_response(self) -> None:
        """Send photographs, and disconnect before the response."""
        request = asyncio.create_task(self.classify(*self.rng.choices(self.photos, k=self.rng.randint(1, 16))))
        await asyncio.sleep(self.rng.random() * 0.2)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        self.outcomes["disconnected before the response"] += 1


async def soak(server: Server, minutes: float) -> tuple[Counter[str], list[str], list[float]]:
    """Return the outcomes, the faults, and the memory in MiB, sampled every two seconds."""
    until = time.monotonic() + 60 * minutes
    memory: list[float] = []
    limits = httpx.Limits(max_connections=4 * WORKERS)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
        workers = [Soak(server, client, seed) for seed in range(WORKERS)]
        running = [asyncio.create_task(worker.run(until)) for worker in workers]
        printed_at = time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(2)
            memory.append(server.rss_mib())
            if time.monotonic() - printed_at > 60:
                printed_at = time.monotonic()
                done = sum(sum(worker.outcomes.values()) for worker in workers)
                faults = sum(len(worker.faults) for worker in workers)
                say(
                    f"{(until - printed_at) / 60:4.1f} minutes left: {done} done, {faults} faults, {memory[-1]:.0f} MiB"
                )
        await asyncio.gather(*running)
    outcomes = sum((worker.outcomes for worker in workers), Counter[str]())
    return outcomes, [fault for worker in workers for fault in worker.faults], memory


def growth(memory: list[float]) -> float:
    """Return the growth from the median of the second quarter to that of the last; the first quarter warms up."""
    quarter = max(1, len(memory) // 4)
    return statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter] or memory) - 1


def remaining_faults(server: Server) -> list[str]:
    """Return the faults after the traffic has ended."""
    time.sleep(2)
    (model,) = httpx.get(f"{server.url}/v1/models").json()["models"]
    found = (
        [f"{model['queued_images']} places of the queue are occupied without requests"]
        if model["queued_images"]
        else []
    )
    statuses = {probe: httpx.get(server.url + probe).status_code for probe in ("/healthz", "/readyz")}
    found += [f"{probe} responds with {status}" for probe, status in statuses.items() if status != 200]
    counted = httpx.get(f"{server.url}/metrics").text.splitlines()
    found += [line for line in counted if "worker_restarts_total{" in line and not line.endswith(" 0.0")]
    server.process.terminate()
    try:
        server.process.wait(60)
    except subprocess.TimeoutExpired:
        found.append("the server does not stop after SIGTERM")
    return found


def main() -> None:
    """Run the test, and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--model", default="embedded")
    arguments = parser.parse_args()
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # as in the container image
    # A small cache is full after a minute, so its growth is not mistaken for a leak.
    cache = ("--cache-mib", "32")
    with tempfile.TemporaryDirectory() as folder, serving(arguments.model, Path(folder), *cache) as server:
        outcomes, faults, memory = asyncio.run(soak(server, arguments.minutes))
        faults += remaining_faults(server)
    grown = growth(memory)
    if grown > MAX_GROWTH:
        faults.append(f"the memory grew by {grown:.1%}")
    for outcome, count in sorted(outcomes.items()):
        say(f"{count:8} {outcome}")
    say(f"memory, MiB: {memory[0]:.0f} at start, {max(memory):.0f} maximum, {memory[-1]:.0f} at end, {grown:+.1%}")
    for fault, count in Counter(faults).most_common(20):
        say(f"FAULT {count} times: {fault}")
    say("FAIL" if faults else "PASS")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
