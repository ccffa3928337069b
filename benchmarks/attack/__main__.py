"""Attacks a server and checks its responses and its memory.

    python -m benchmarks.attack [--images 2000] [--schemathesis PATH] [--only NAME ...] [--output benchmarks/results]

Prints a line for each attack: the number of requests, the responses, the slowest response, and the memory of the server
before and after. Exits with status 1 if

- a response has a status 5xx other than 503 and 504, or one of these without ``Retry-After``,
- an error of a route is not ``application/problem+json``,
- a request has neither a response nor a closed connection within its time,
- the memory exceeds its previous maximum by more than 64 MiB; attacks with high memory use run once before, as warm-up,
- an ordinary request fails before, during or after an attack.

All traffic stays on loopback and is limited in number and time. schemathesis runs only if it is named; install it in a
separate environment (``pip install schemathesis``). Its check that valid data are accepted is skipped: the rules for
names in Unicode cannot be expressed in a schema.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.settings import Settings
from benchmarks.attack.corpus import hostile_images, mutants
from benchmarks.load import photographs
from benchmarks.processes import Server, about_this_run, say, serving

TIMEOUT_S = 60.0
MAX_GROWTH_MIB = 64.0
HEAD_TIMEOUT_S = Settings.head_timeout_s
FLAGS = (*("--tuning-seconds", "0", "--build-default-database", "false", "--max-connections", "600"),)


@dataclass
class Row:
    """The result of one attack."""

    attack: str
    requests: int = 0
    responses: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    rss_before_mib: float = 0.0
    rss_after_mib: float = 0.0
    ordinary_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, response: str, seconds: float) -> None:
        """Count a response, or its absence."""
        self.requests += 1
        self.responses[response] += 1
        self.longest_s = max(self.longest_s, round(seconds, 2))

    def fault(self, what: str) -> None:
        """Record a fault; only the first 20 of an attack are kept."""
        if len(self.faults) < 20:
            self.faults.append(what)


class Attacker:
    """Sends hostile requests.

    Args:
        server: to attack.
        client: for requests that are valid HTTP.
        images: number of mutated images.
    """

    def __init__(self, server: Server, client: httpx.AsyncClient, images: int) -> None:
        self.server = server
        self.client = client
        self.images = images
        self.photo = photographs(1)[0]
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.address = (host, int(port))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def send(self, row: Row, what: str, method: str, path: str, **more: Any) -> httpx.Response | None:
        """Send a request and count its response."""
        started = time.perf_counter()
        try:
            response = await self.client.request(method, path, **more)
        except httpx.TimeoutException:
            row.add("hung", time.perf_counter() - started)
            row.fault(f"{what}: no response within {TIMEOUT_S:g} s")
            return None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            row.add("closed", time.perf_counter() - started)
            if isinstance(error, httpx.ConnectError):
                row.fault(f"{what}: {error}")
            return None
        row.add(str(response.status_code), time.perf_counter() - started)
        self.check_response(row, what, response.status_code, response.headers, response.content)
        return response

    def check_response(self, row: Row, what: str, status: int, headers: Any, body: bytes) -> None:
        """Record a fault if a response breaks a rule."""
        if status >= 500 and status not in {501, 503, 504}:
            row.fault(f"{what}: {status} {body[:300]!r}")
        if status in {503, 504} and "retry-after" not in headers:
            row.fault(f"{what}: {status} without Retry-After")
        if status >= 400 and headers.get("content-type") != "application/problem+json":
            row.fault(f"{what}: {status} as {headers.get('content-type')}")

    async def all(self, requests: AsyncIterator[Awaitable[Any]], concurrency: int = 8) -> None:
        """Run requests with limited concurrency."""
        running: set[asyncio.Future[Any]] = set()
        async for request in requests:
            running.add(asyncio.ensure_future(request))
            if len(running) >= concurrency:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for finished in done:
                    finished.result()
        await asyncio.gather(*running)

    async def raw(self, row: Row, what: str, sent: bytes, *, wait_s: float = 30.0, half: bool = False) -> bytes:
        """Send bytes, and read until the server closes the connection or the time is over."""
        started = time.perf_counter()
        got = b""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            with suppress(ConnectionError):
                writer.write(sent)
                await asyncio.wait_for(writer.drain(), wait_s)
                if half:
                    writer.write_eof()
            async with asyncio.timeout(wait_s):
                while chunk := await reader.read(65536):
                    got += chunk
        except TimeoutError:
            if not got:
                row.fault(f"{what}: neither a response nor a closed connection within {wait_s:g} s")
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
        statuses = re.findall(rb"(?:^|\n|\})HTTP/1\.1 (\d{3})", got)
        response = ", ".join(sorted({status.decode() for status in statuses})) or "closed"
        row.add(response, time.perf_counter() - started)
        for status in statuses:
            if status.startswith(b"5") and status not in {b"503", b"504"}:
                row.fault(f"{what}: {got[:300]!r}")
        return got

    async def ordinary(self, row: Row, when: str) -> float:
        """Send an ordinary request, and return its duration."""
        started = time.perf_counter()
        try:
            response = await self.client.post("/classify", files={"image": self.photo}, data={"labels": "cat, dog"})
        except httpx.HTTPError as error:
            row.fault(f"an ordinary request {when}: {error!r}")
        else:
            if response.status_code != 200 or len(response.json()["results"][0]["predictions"]) != 2:
                row.fault(f"an ordinary request {when}: {response.status_code} {response.text[:200]}")
        return time.perf_counter() - started

    @asynccontextmanager
    async def ordinary_requests(self, row: Row) -> AsyncIterator[None]:
        """Send ordinary requests during an attack."""

        async def send_repeatedly() -> None:
            while True:
                row.ordinary_s = max(row.ordinary_s, round(await self.ordinary(row, "during the attack"), 2))
                await asyncio.sleep(0.2)

        sending = asyncio.create_task(send_repeatedly())
        try:
            yield
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    # --- images ------------------------------------------------------------------------------------------------------

    def forms(self, image: bytes, number: int) -> dict[str, Any]:
        """Return a request with the image in one of the three forms."""
        if number % 3 == 0:
            return {"files": {"image": ("x.jpg", image)}, "data": {"labels": "cat, dog"}}
        if number % 3 == 1:
            return {"json": {"labels": ["cat", "dog"], "images": [{"base64": base64.b64encode(image).decode()}]}}
        return {"content": image, "headers": {"content-type": "image/jpeg"}, "params": {"labels": "cat,dog"}}

    async def mutated_images(self, row: Row) -> None:
        """Send mutated images of every format, one per request."""

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for number, (kind, image) in enumerate(mutants(self.images)):
                yield self.send(row, kind, "POST", "/v1/classify", **self.forms(image, number))

        await self.all(requests())

    async def mutated_images_in_one_request(self, row: Row) -> None:
        """Send requests of 32 mutated images and a good one, which must be classified."""

        async def one(images: Sequence[tuple[str, bytes]]) -> None:
            files = [("image", ("x", image)) for _, image in images]
            response = await self.send(
                row,
                "32 at once",
                "POST",
                "/v1/classify",
                files=[*files, ("image", self.photo)],
                data={"labels": "a, b"},
            )
            if (
                response is not None
                and response.status_code == 200
                and response.json()["results"][-1]["error"] is not None
            ):
                row.fault(f"the good image: {response.json()['results'][-1]['error']}")

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            images = list(mutants(self.images, seed=1))
            for first in range(0, len(images), 32):
                yield one(images[first : first + 32])

        await self.all(requests(), concurrency=3)

    async def hostile_images(self, row: Row) -> None:
        """Send decompression bombs, false sizes, polyglots and other files, in each form."""

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for kind, image in hostile_images().items():
                for number in range(3):
                    yield self.send(row, kind, "POST", "/v1/classify", **self.forms(image, number))

        await self.all(requests(), concurrency=4)

    async def images_as_examples(self, row: Row) -> None:
        """Send mutated images as examples."""
        await self.client.put("/v1/label-sets/attacked", json={"classes": ["cat", "dog"]})

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            images = list(mutants(min(self.images, 320), seed=2))
            for first in range(0, len(images), 16):
                files = [("image", (kind, image)) for kind, image in images[first : first + 16]]
                yield self.send(
                    row, "examples", "POST", "/v1/label-sets/attacked/images", files=files, data={"class": ["cat"] * 16}
                )

        await self.all(requests(), concurrency=2)
        await self.client.delete("/v1/label-sets/attacked")

    # --- bodies ------------------------------------------------------------------------------------------------------

    async def malformed_json(self, row: Row) -> None:
        """Send JSON that is deep, long, invalid or of wrong types to every route with a JSON body."""
        routes = [
            ("POST", "/v1/classify"),
            ("PUT", "/v1/label-sets/odd"),
            ("POST", "/v1/label-sets/odd/classes"),
            ("POST", "/v1/databases/odd/search"),
            ("POST", "/v1/label-sets/odd:evaluate"),
            ("POST", "/v1/label-sets/odd/images"),
        ]
        fields = ["labels", "classes", "images", "image", "text", "label_set", "top_k", "options", "method", "template"]
        values: list[Any] = [
            *(None, True, -1, 0, 1e308, 10**400, "", "\0", "\ud800", "x" * 1_000_000, [], {}, [[]], [{}], [None]),
            *([1] * 1000, ["a"] * 5000, {"a": {"b": {}}}, [{"base64": None}], [{"url": "file:///etc/passwd"}]),
            *(["\u202ea"], ["a", "A"], ["\ufdd0"], [{"name": "a", "descriptions": ["x"] * 10_000}]),
        ]
        texts = [
            *(
                "[" * 100_000,
                '{"a":' * 100_000,
                "{" * 1000,
                "",
                "null",
                "NaN",
                '{"labels": [NaN]}',
                "1e999999",
                "9" * 100_000,
            ),
            *('{"labels": ["a"], "labels": ["b"]}', "\ufeff{}", '{"a": "' + "\\u0000" * 100_000 + '"}', "[1,]" * 1000),
            '{"labels": [' + ",".join(f'"l{n}"' for n in range(200_000)) + "]}",
            '{"labels": ["' + "a" * 10_000_000 + '"]}',
        ]

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for method, path in routes:
                for name in fields:
                    for value in values:
                        body = json.dumps({name: value}).encode()
                        what = f"{method} {path} {name}={body[:80]!r}"
                        yield self.send(
                            row, what, method, path, content=body, headers={"content-type": "application/json"}
                        )
                for text in texts:
                    what = f"{method} {path} {text[:40]!r}"
                    body = text.encode("utf-8", "surrogatepass")
                    yield self.send(row, what, method, path, content=body, headers={"content-type": "application/json"})

        await self.all(requests())

    async def malformed_forms(self, row: Row) -> None:
        """Send forms with 10,000 parts, without an end, and with headers of megabytes."""

        def part(name: str, content: bytes, filename: str | None = None) -> bytes:
            shown = f'; filename="{filename}"' if filename else ""
            return f'--b\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode() + content + b"\r\n"

        end = b"--b--\r\n"
        bodies = {
            "10,000 fields": b"".join(part(f"f{n}", b"x") for n in range(10_000)) + end,
            "10,000 files": part("labels", b"a,b") + b"".join(part("image", b"x", "x") for _ in range(10_000)) + end,
            "10,000 labels": b"".join(part("labels", b"l%d" % n) for n in range(10_000))
            + part("image", b"x", "x")
            + end,
            "no end": part("image", self.photo, "x"),
            "no parts": end,
            "nothing": b"",
            "another boundary": part("image", b"x", "x").replace(b"--b", b"--c") + end,
            "a header of 1 MB": b"--b\r\nContent-Disposition: form-data; name=image; x="
            + b"a" * 2**20
            + b"\r\n\r\nx\r\n"
            + end,
            "20,000 headers": b"--b\r\n" + b"X: y\r\n" * 20_000 + b"\r\nx\r\n" + end,
            "a field of 10 MB": part("labels", b"a" * 10 * 2**20) + part("image", self.photo, "x") + end,
            "a path as a name": part("image", self.photo, "../../etc/passwd") + part("labels", b"a,b") + end,
            "no disposition": b"--b\r\nContent-Type: image/png\r\n\r\nx\r\n" + end,
            "no charset": b'--b\r\nContent-Disposition: form-data; name="labels"\r\n'
            b"Content-Type: text/plain; charset=x\r\n\r\na\r\n" + end,
        }

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for what, body in bodies.items():
                for content_type in (
                    "multipart/form-data; boundary=b",
                    "multipart/form-data",
                    "multipart/form-data; boundary=b; charset=utf-16",
                ):
                    yield self.send(
                        row, what, "POST", "/v1/classify", content=body, headers={"content-type": content_type}
                    )

        await self.all(requests(), concurrency=4)

    async def compressed_bodies(self, row: Row) -> None:
        """Send a gigabyte of zeros, compressed twice."""
        import gzip  # noqa: PLC0415 - for this attack only

        bomb = gzip.compress(gzip.compress(bytes(64 * 2**20)) * 16)
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x"):
            for content_type in ("application/json", "image/png", "multipart/form-data; boundary=b"):
                headers = {"content-type": content_type, "content-encoding": coding}
                await self.send(row, coding, "POST", "/v1/classify", content=bomb, headers=headers)

    async def names_that_are_paths(self, row: Row) -> None:
        """Request names that are paths or code, and unknown routes."""
        names = [
            "..",
            "%2e%2e",
            "..%2f..%2fetc%2fpasswd",
            "%00",
            "a%00b",
            "%0d%0aX:%20y",
            "#",
            "acme%23pets",
            "a" * 60_000,
            "%ff",
            "con",
            "~",
            "%25",
            "{{7*7}}",
            "'; DROP TABLE label_sets; --",
            "${jndi:ldap://127.0.0.1/a}",
        ]
        for name in names:
            for method, path in [
                ("GET", "/v1/label-sets/{}"),
                ("DELETE", "/v1/label-sets/{}"),
                ("GET", "/v1/label-sets/{}/images"),
                ("GET", "/v1/databases/{}"),
                ("DELETE", "/v1/databases/{}"),
                ("GET", "/v1/jobs/{}"),
                ("GET", "/{}"),
                ("GET", "/docs/{}"),
                ("PATCH", "/v1/{}"),
            ]:
                await self.send(row, f"{method} {path.format(name[:40])}", method, path.format(name))

    async def injected_headers(self, row: Row) -> None:
        """Send headers that try to inject content into the log or the database."""
        values = [
            "x\x1b[31mred",
            "a" * 5000,
            "${jndi:ldap://127.0.0.1/a}",
            "%0aforged=line",
            "é",
            "../../x",
            "' OR 1=1 --",
        ]
        for name in (
            "X-Request-ID",
            "If-Match",
            "If-None-Match",
            "Accept",
            "User-Agent",
            "Range",
            "Host",
            "X-Forwarded-For",
            "Authorization",
            "X-API-Key",
            "Deixis-Namespace",
            "Cookie",
            "Origin",
        ):
            for value in values:
                with suppress(UnicodeEncodeError, httpx.LocalProtocolError):
                    await self.send(
                        row, f"{name}: {value[:20]}", "GET", "/v1/label-sets", headers={name: value.encode("utf-8")}
                    )

    # --- connections -------------------------------------------------------------------------------------------------

    async def invalid_http(self, row: Row) -> None:
        """Send invalid and ambiguous HTTP."""
        post = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"
        end_of_head = b"Host: localhost\r\nConnection: close\r\n\r\n"
        get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sent = {
            "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
            "HTTP/0.9": b"GET /healthz\r\n",
            "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
            "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
            "zeros": bytes(100_000),
            "noise": random.Random(3).randbytes(100_000),
            "both lengths": post
            + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /docs HTTP/1.1\r\n\r\n",
            "two lengths": post + b"Content-Length: 1\r\nContent-Length: 50\r\n\r\nx" + get,
            "a negative length": post + b"Content-Length: -5\r\n\r\nhello",
            "a length of letters": post + b"Content-Length: abc\r\n\r\n",
            "a length of 2^64": post + b"Content-Length: 18446744073709551616\r\n\r\n",
            "a coding twice": post + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
            "a coding hidden": post + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
            "a chunk of 2^64": post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n",
            "a chunk without a size": post + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
            "a chunk with 1 MB of extension": post + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 2**20 + b"\r\n",
            "1 MB of trailers": post
            + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            + b"X: y\r\n" * 170_000,
            "a folded header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
            "a header without a name": b"GET / HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n",
            "a zero in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
            "line feeds only": b"GET /healthz HTTP/1.1\nHost: localhost\nConnection: close\n\n",
            "no host": b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
            "another server's address": b"GET http://127.0.0.2:1/healthz HTTP/1.1\r\n" + end_of_head,
            "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "upgrade": b"GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + end_of_head,
            "a method of 10,000 letters": b"A" * 10_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "an address of 1 MB": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "100,000 headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
            "a header of 10 MB": b"GET / HTTP/1.1\r\nX: " + b"a" * 10 * 2**20 + b"\r\n\r\n",
        }
        for what, content in sent.items():
            for half in (False, True):
                await self.raw(row, what, content, half=half)

    async def pipelined_requests(self, row: Row) -> None:
        """Send 1,000 requests on one connection before reading."""
        requests = (
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 999
            + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        for _ in range(3):
            got = await self.raw(row, "pipelined", requests, wait_s=30)
            if got.count(b"HTTP/1.1 200") != 1000:
                row.fault(f"{got.count(b'HTTP/1.1 200')} of 1000 pipelined requests got status 200")

    async def slow_heads(self, row: Row) -> None:
        """Keep 300 connections open with a byte of a header each second."""
        await self.slow(row, 300, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"a")

    async def slow_bodies(self, row: Row) -> None:
        """Send 300 uploads at one byte per second."""
        head = b"POST /v1/classify?labels=a,b HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        head += b"Content-Length: 5000000\r\n\r\n"
        await self.slow(row, 300, head, b"a")

    async def idle_connections(self, row: Row) -> None:
        """Open 300 connections and send nothing."""
        await self.slow(row, 300, b"", b"")

    async def slow(self, row: Row, connections: int, head: bytes, byte: bytes) -> None:
        """Open connections and send a byte per second, until the server closes them."""

        async def one(number: int) -> None:
            started = time.perf_counter()
            got = b""
            reader, writer = await asyncio.open_connection(*self.address)
            try:
                writer.write(head)
                async with asyncio.timeout(TIMEOUT_S):
                    while True:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(1):
                                chunk = await reader.read(65536)
                                if not chunk:
                                    break
                                got += chunk
                        if byte and not got:
                            writer.write(byte)
            except ConnectionError:
                pass
            except TimeoutError:
                row.fault(f"slow connection {number} is open after {TIMEOUT_S:g} s")
            finally:
                writer.transport.abort()
            status = re.match(rb"HTTP/1\.1 (\d{3})", got)
            row.add(status[1].decode() if status else "closed", time.perf_counter() - started)

        async with self.ordinary_requests(row):
            await asyncio.gather(*(one(number) for number in range(connections)))

    async def too_many_connections(self, row: Row) -> None:
        """Open 1,500 connections at once; 600 are allowed."""
        opened: list[asyncio.StreamWriter] = []

        async def one() -> None:
            started = time.perf_counter()
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(*self.address), TIMEOUT_S)
                opened.append(writer)
                got = await asyncio.wait_for(reader.read(65536), TIMEOUT_S)
            except (ConnectionError, TimeoutError) as error:
                row.add("closed" if isinstance(error, ConnectionError) else "hung", time.perf_counter() - started)
                return
            status = re.match(rb"HTTP/1\.1 (\d{3})", got)
            row.add(status[1].decode() if status else "closed", time.perf_counter() - started)

        try:
            await asyncio.gather(*(one() for _ in range(1500)))
        finally:
            for writer in opened:
                writer.transport.abort()
        await asyncio.sleep(1)

    async def aborted_uploads(self, row: Row) -> None:
        """Abort 500 uploads in progress."""
        head = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        head += b"Content-Length: 9000000\r\n\r\n"
        part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + bytes(2 * 2**20)

        async def one() -> None:
            _, writer = await asyncio.open_connection(*self.address)
            with suppress(ConnectionError):
                writer.write(head + part)
                await writer.drain()
            writer.transport.abort()
            row.add("closed", 0.0)

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for _ in range(500):
                yield one()

        await self.all(requests(), concurrency=20)

    async def unread_responses(self, row: Row) -> None:
        """Request more than the buffers hold on 100 connections, and read nothing."""

        async def one() -> None:
            started = time.perf_counter()
            small = socket.socket()
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.setblocking(False)  # noqa: FBT003 - positional only
            await asyncio.get_running_loop().sock_connect(small, self.address)
            _, writer = await asyncio.open_connection(sock=small, limit=1024)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    while True:
                        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
                        await writer.drain()
                        await asyncio.sleep(1)
            except ConnectionError:
                row.add("closed", time.perf_counter() - started)
            except TimeoutError:
                row.add("kept", time.perf_counter() - started)
                row.fault("the connection of a client that reads nothing stays open")
            finally:
                writer.transport.abort()

        async with self.ordinary_requests(row):
            await asyncio.gather(*(one() for _ in range(100)))

    async def largest_requests(self, row: Row) -> None:
        """Send the largest allowed request 60 times, with images that are slow to decode."""
        big = photographs(1, (3000, 2000))[0]
        count = min(64, 120 * 2**20 // len(big))

        async def requests() -> AsyncIterator[Awaitable[Any]]:
            for _ in range(60):
                files = [("image", ("x.jpg", big))] * count
                yield self.send(
                    row, f"{count} of 6 MP", "POST", "/v1/classify", files=files, data={"labels": "cat, dog"}
                )

        await self.all(requests(), concurrency=4)


ATTACKS: Sequence[Callable[[Attacker, Row], Awaitable[None]]] = (
    Attacker.mutated_images,
    Attacker.mutated_images_in_one_request,
    Attacker.hostile_images,
    Attacker.images_as_examples,
    Attacker.malformed_json,
    Attacker.malformed_forms,
    Attacker.compressed_bodies,
    Attacker.names_that_are_paths,
    Attacker.injected_headers,
    Attacker.invalid_http,
    Attacker.pipelined_requests,
    Attacker.slow_heads,
    Attacker.slow_bodies,
    Attacker.idle_connections,
    Attacker.too_many_connections,
    Attacker.aborted_uploads,
    Attacker.unread_responses,
    Attacker.largest_requests,
)


# Memory that these attacks allocate once, such as the pools of the allocator, is not a leak.
WARM_UP = (
    Attacker.mutated_images_in_one_request,
    Attacker.hostile_images,
    Attacker.largest_requests,
    Attacker.malformed_json,
    Attacker.images_as_examples,
)


async def attack(server: Server, images: int, only: Sequence[str]) -> list[Row]:
    """Run every attack, after a warm-up with those that need much memory."""
    rows = []
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
        attacker = Attacker(server, client, images)
        for warm in WARM_UP:
            if not only or warm.__name__ in only:
                await warm(attacker, Row("warm up"))
        max_mib = server.rss_mib()
        for attack_method in ATTACKS:
            if only and attack_method.__name__ not in only:
                continue
            row = Row(attack_method.__name__.replace("_", " "))
            await attacker.ordinary(row, "before")
            row.rss_before_mib = server.rss_mib()
            await attack_method(attacker, row)
            await asyncio.sleep(1)
            row.ordinary_s = max(row.ordinary_s, round(await attacker.ordinary(row, "after"), 2))
            row.rss_after_mib = server.rss_mib()
            max_mib = max(max_mib, row.rss_before_mib)
            if row.rss_after_mib - max_mib > MAX_GROWTH_MIB:
                row.fault(f"memory grew to {row.rss_after_mib} MiB, above the previous maximum of {max_mib} MiB")
            if server.process.poll() is not None:
                row.fault(f"the server ended with status {server.process.returncode}")
            rows.append(row)
            say(f"{row.attack}: {row.requests} requests, {dict(row.responses)}, {len(row.faults)} faults")
    return rows


@contextmanager
def with_captions(data_dir: Path) -> Iterator[Server]:
    """Start a server with a small caption database."""
    captions = "".join(f"a {thing} on a {place}\n" for thing in ("cat", "dog", "cup") for place in ("table", "sofa"))
    command = [Path(sys.executable).with_name("deixis"), "captions", "build", "-", "--name", "everyday"]
    settings = {"DEIXIS_DATA_DIR": str(data_dir), "DEIXIS_TUNING_SECONDS": "0", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, input=captions, text=True, check=True, capture_output=True, env={**os.environ, **settings})
    with serving("embedded", data_dir, *FLAGS) as server:
        yield server


def fuzz(server: Server, command: Path, examples: int) -> Row:
    """Run schemathesis with the OpenAPI description."""
    row = Row("schemathesis", rss_before_mib=server.rss_mib())
    flags = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    flags += ["--max-examples", str(examples), "--seed", "1"]
    done = subprocess.run(
        [command, "run", f"{server.url}/openapi.json", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    row.rss_after_mib = server.rss_mib()
    generated = re.search(r"(\d+) generated", done.stdout)
    row.requests = int(generated[1]) if generated else 0
    # Features that are not configured respond with 501.
    found = re.findall(r"^- (ST\d+) .*\n\n.*?\[(\d{3})\]", done.stdout, re.MULTILINE | re.DOTALL)
    is_expected = done.returncode == 0 or {*found} == {("ST101", "501")}
    row.responses["passed" if is_expected else "failed"] += 1
    if not is_expected:
        row.faults.append(done.stdout)
    return row


def table(rows: Sequence[Row]) -> str:
    """Return the figures in Markdown."""
    lines = [
        "| attack | requests | responses | slowest | ordinary request during or after | MiB before | after | faults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        responses = ", ".join(f"{count} x {response}" for response, count in sorted(row.responses.items()))
        lines.append(
            f"| {row.attack} | {row.requests:,} | {responses} | {row.longest_s:.2f} s | {row.ordinary_s:.2f} s |"
            f" {row.rss_before_mib:.0f} | {row.rss_after_mib:.0f} | {len(row.faults)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the attacks, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=2000, help="number of mutated images, sent once separately and once together"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of attacks, such as mutated_images")
    parser.add_argument("--schemathesis", type=Path, help="path of its command, to run it too")
    parser.add_argument("--examples", type=int, default=50, help="examples of schemathesis for each operation")
    parser.add_argument("--output", type=Path, help="folder for JSON and table; the table is always printed")
    arguments = parser.parse_args()
    os.environ.setdefault(
        "MALLOC_ARENA_MAX", "2"
    )  # as in the container image; otherwise each thread keeps its own pool
    with tempfile.TemporaryDirectory() as folder, with_captions(Path(folder)) as server:
        rows = asyncio.run(attack(server, arguments.images, arguments.only))
        if arguments.schemathesis:
            rows.append(fuzz(server, arguments.schemathesis, arguments.examples))
    report = table(rows)
    print(report)  # noqa: T201 - the output of the command
    for row in rows:
        for fault in row.faults:
            say(f"{row.attack}: {fault}")
    if arguments.output:
        about = about_this_run()
        stem = arguments.output / f"{about['date']}-attack"
        found = [{**vars(row), "responses": dict(row.responses)} for row in rows]
        stem.with_suffix(".json").write_text(json.dumps({**about, "attacks": found}, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(f"# {about['date']}, commit {about['commit']}\n\n{report}", encoding="utf-8")
    if any(row.faults for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
