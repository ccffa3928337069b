"""The load generator: a separate process with raw HTTP/1.1 over persistent connections, which uses little CPU time.

    python -m benchmarks.load URL closed --connections 32 --images 1 --seconds 10
    python -m benchmarks.load URL open --rate 120 --seconds 10

In a closed loop, each connection sends its next request after the response to the last. An open loop sends at a fixed
rate, and measures latency from the time at which a request was due, so a stall of the server is visible. Prints one
JSON object. With ``--commands`` alone, it reads such arguments from each line, as a JSON list.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("cat", "dog", "coffee cup", "tree", "car", "shoe", "hat", "boat", "bird", "house")
PHOTO_PX = (450, 300)
MAX_OUTSTANDING = 2000
_BOUNDARY = "3ad2c0ffee"


def photographs(count: int = 8, size: tuple[int, int] = PHOTO_PX) -> list[bytes]:
    """Return synthetic JPEG photographs; every call returns the same files."""
    rng = np.random.default_rng(7)
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    files = []
    for _ in range(count):
        waves = rng.uniform(8, 60, (2, 3))
        shade = 127 + 70 * np.sin(columns[..., None] / waves[0] + rows[..., None] / waves[1])
        middle = rng.uniform(0, 1, 2) * (height, width)
        inside = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < rng.uniform(40, 120) ** 2
        shade[inside] = 0.4 * shade[inside] + rng.uniform(0, 150, 3)
        file = BytesIO()
        noisy = (shade + rng.normal(0, 10, shade.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def form_request(path: str, images: Sequence[bytes], fields: dict[str, str], field: str = "image") -> bytes:
    """Return the bytes of a POST request with a multipart form."""
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for number, image in enumerate(images):
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{number}.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        parts.append(head.encode() + image + b"\r\n")
    return _post(path, f"multipart/form-data; boundary={_BOUNDARY}", b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode())


def json_request(path: str, body: object) -> bytes:
    """Return the bytes of a POST request with a JSON body."""
    return _post(path, "application/json", json.dumps(body).encode())


def _post(path: str, content_type: str, body: bytes) -> bytes:
    head = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", f"Content-Length: {len(body)}")
    return "\r\n".join((*head, "\r\n")).encode() + body


@cache
def classify_requests(images_per_request: int) -> list[bytes]:
    """Return classification requests with different photographs."""
    photos = photographs()
    fields = {"labels": json.dumps(LABELS)}
    return [
        form_request(
            "/v1/classify", [photos[(first + step) % len(photos)] for step in range(images_per_request)], fields
        )
        for first in range(len(photos))
    ]


class Connection:
    """A persistent connection, reopened after the server closed it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> int:
        """Send a request, read the response, and return its status; 0 without a response."""
        try:
            if self._streams is not None and self._streams[0].at_eof():
                self.close()
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._address)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0
        if b"connection: close" in head:
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        """Close the connection if it is open."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Tally:
    """The statuses of responses, and the latencies in seconds of those with status 200."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []

    def add(self, status: int, seconds: float) -> None:
        """Count a response."""
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(seconds)


async def closed_loop(address: tuple[str, int], requests: Sequence[bytes], connections: int, seconds: float) -> Tally:
    """Send requests on each connection, one after the other."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def run(number: int) -> None:
        connection = Connection(*address)
        while (started := time.perf_counter()) < end:
            number += 1
            status = await connection.send(requests[number % len(requests)])
            tally.add(status, time.perf_counter() - started)
            if status in {0, 503}:
                await asyncio.sleep(0.05)
        connection.close()

    await asyncio.gather(*(run(number) for number in range(connections)))
    return tally


async def open_loop(address: tuple[str, int], requests: Sequence[bytes], rate: float, seconds: float) -> Tally:
    """Send at the times of a Poisson process; requests above ``MAX_OUTSTANDING`` are counted as -1."""
    tally = Tally()
    due = np.cumsum(np.random.default_rng(3).exponential(1 / rate, int(rate * seconds)))
    idle: list[Connection] = []
    running: set[asyncio.Task[None]] = set()
    started = time.perf_counter()

    async def run(number: int, at: float) -> None:
        connection = idle.pop() if idle else Connection(*address)
        status = await connection.send(requests[number % len(requests)])
        tally.add(status, time.perf_counter() - at)
        idle.append(connection)

    for number, offset in enumerate(due):
        at = started + offset
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if len(running) >= MAX_OUTSTANDING:
            tally.statuses[-1] += 1
            continue
        task = asyncio.create_task(run(number, at))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    for connection in idle:
        connection.close()
    return tally


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """Return the nearest-rank percentile in milliseconds; None without values."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    return round(1000 * ordered[max(0, -int(-len(ordered) * percent // 100) - 1)], 2)


def summary(tally: Tally, images_per_request: int, seconds: float, cpu_s: float) -> dict[str, object]:
    """Return the figures of a run with a duration of ``seconds``."""
    return {
        "seconds": round(seconds, 2),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "images_per_s": round(len(tally.latencies) * images_per_request / seconds, 2),
        "p50_ms": percentile_ms(tally.latencies, 50),
        "p95_ms": percentile_ms(tally.latencies, 95),
        "p99_ms": percentile_ms(tally.latencies, 99),
        "generator_cpu_s": round(cpu_s, 3),
    }


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Run one loop and return its figures."""
    host, _, port = arguments.url.rpartition("//")[2].partition(":")
    requests = read_requests(arguments.requests) if arguments.requests else classify_requests(arguments.images)
    address = (host, int(port))
    if arguments.loop == "closed":
        running = closed_loop(address, requests, arguments.connections, arguments.seconds)
    else:
        running = open_loop(address, requests, arguments.rate, arguments.seconds)
    started, used_s = time.perf_counter(), time.process_time()
    tally = asyncio.run(running)
    return summary(tally, arguments.images, time.perf_counter() - started, time.process_time() - used_s)


@cache
def read_requests(file: str) -> list[bytes]:
    """Return the complete requests in a file, JSON strings in latin-1."""
    return [text.encode("latin-1") for text in json.loads(Path(file).read_text(encoding="utf-8"))]


def main() -> None:
    """Run one loop, or those of the commands, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("loop", choices=["closed", "open"])
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--images", type=int, default=1, help="images per request")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second of an open loop")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--requests", help="file of complete requests to send instead, as JSON strings in latin-1")
    commands = (json.loads(line) for line in sys.stdin) if sys.argv[1:] == ["--commands"] else [sys.argv[1:]]
    for command in commands:
        print(json.dumps(run(parser.parse_args(command))), flush=True)  # noqa: T201 - the output of the command


if __name__ == "__main__":
    main()
