"""Fetch images from URLs without giving clients access to private networks.

A host is resolved once. All of its addresses must be public, and the connection uses one of these addresses, so that a
second answer of a name server has no effect. Redirects, cookies, proxies and compression are not supported. A fetch has
a limit on its bytes and a limit on its time, from the resolution to the last byte.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx
from cachetools import TTLCache

from app.errors import ClientError, ImageTooLargeError, InvalidFieldError, TooLargeError, UnreachableImageError

MAX_URL_CHARS = 2048

_PORTS = {"http": 80, "https": 443}
_HEADERS = (("User-Agent", "deixis"), ("Accept", "image/*"), ("Accept-Encoding", "identity"))

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")

_MAX_HEAD_BYTES = 32 * 1024
"""Limit on the status line and headers, including interim responses (1xx); those of CDNs have 2 to 8 KiB."""

_MIN_CHUNK_BYTES = 256
"""Minimum average size of the chunks of a body, after as many chunks of any size: the event loop parses each one."""

_MAX_PER_REQUEST = 8
"""Concurrent fetches of one request: half of all, so that the dead URLs of one caller do not stop the others."""

_FAILURE_TTL_S = 30
"""Seconds in which a host or URL that failed is not tried again; each try may take the whole timeout."""

_MAX_FAILURES = 4096

# In addition to ``is_global``, whose results for some of these differ between releases of Python.
_NOT_PUBLIC_4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's metadata service
        "169.254.0.0/16",  # link-local, with the metadata services of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
]
# All allocated global addresses. It excludes loopback, unique local, link-local and multicast addresses, and addresses
# that contain an IPv4 address: mapped, compatible and NAT64.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # special purposes, such as Teredo, which contains an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which contains an IPv4 address
        "3fff::/20",  # documentation
    )
]


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """The URL of an image, as in the request."""

    url: str


@dataclass(slots=True)
class Allowance:
    """The bytes that all images of one request may have, how many of them are left, and turns for its fetches."""

    total: int
    left: int = field(init=False)
    turns: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(_MAX_PER_REQUEST))

    def __post_init__(self) -> None:
        self.left = self.total

    def take(self, count: int) -> None:
        """Count received bytes.

        Raises:
            TooLargeError: the request exceeds its limit.
        """
        self.left -= count
        if self.left < 0:
            raise TooLargeError(
                f"the images of this request have more than {self.total:,} bytes together; send fewer per request, or"
                " raise DEIXIS_MAX_REQUEST_BYTES"
            )


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns all addresses of a host; raises ``OSError`` if it has none."""


def is_public(address: str) -> bool:
    """Return whether an address is reachable from the whole internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False  # not an address, or one with a zone
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_4)
    if parsed.scope_id is not None:
        return False
    return parsed in _GLOBAL_6 and parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_6)


def _system_addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """Fetches images over HTTP and HTTPS.

    Args:
        max_bytes: of one image.
        timeout_s: for one image, from resolving its host to its last byte.
        hosts: the allowed hosts, as ``images.example.com`` or ``*.example.com``; empty allows all.
        max_concurrent: number of concurrent fetches; others wait within their timeout.
        resolve: returns the addresses of a host in order of preference; by default the system's resolver, in separate
            threads, since a resolution cannot be interrupted.
        is_public: returns whether an address may be connected to.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        hosts: Sequence[str] = (),
        max_concurrent: int = 16,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._hosts = tuple(host.lower() for host in hosts)
        self._slots = asyncio.Semaphore(max_concurrent)
        self._resolvers = ThreadPoolExecutor(max_concurrent, thread_name_prefix="resolve")
        self._resolve = resolve or self._resolve_by_system
        self._is_public = is_public
        self._ssl_context: ssl.SSLContext | None = None
        # Hosts that could not be connected to, and URLs that did not respond in time.
        self._failed: TTLCache[str, None] = TTLCache(_MAX_FAILURES, _FAILURE_TTL_S)

    async def fetch(self, image: ImageUrl, allowance: Allowance) -> bytes | ClientError:
        """Return the bytes of an image, which count towards the allowance, or the error that prevented fetching it."""
        try:
            url = self._validate(image.url)
            tried: list[str] = []
            try:
                async with asyncio.timeout(self._timeout_s), allowance.turns, self._slots:
                    if url.host in self._failed or str(url) in self._failed:
                        raise UnreachableImageError(
                            f"'{url.host}' failed less than {_FAILURE_TTL_S} s ago and is not tried again before; send"
                            " the file itself"
                        )
                    return await self._request(url, allowance, tried)
            except TimeoutError:
                self._failed.update(dict.fromkeys(tried[-1:]))
                raise UnreachableImageError(
                    f"the image at '{url.host}' was not received within {self._timeout_s:g} s; send the file itself"
                ) from None
        except ClientError as error:
            return error.with_traceback(None)  # the traceback references the received bytes

    def close(self) -> None:
        """Start no further resolutions."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _resolve_by_system(self, host: str, port: int) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(self._resolvers, _system_addresses, host, port)

    def _validate(self, given: str) -> httpx.URL:
        """Return the parsed URL.

        Raises:
            InvalidFieldError: the URL is invalid or not allowed.
        """
        if len(given) > MAX_URL_CHARS:
            raise _refused(f"the URL has {len(given):,} characters; at most {MAX_URL_CHARS:,} are allowed")
        try:
            url = httpx.URL(given)
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise _refused("this is not a URL; write https://host/path") from None
        if url.scheme not in _PORTS:
            raise _refused(f"the scheme is '{url.scheme[:20]}'; write a URL that starts with https:// or http://")
        if not host:
            raise _refused("the URL has no host; write https://host/path")
        if not _HOST.fullmatch(host):
            raise _refused("this is not a URL; write https://host/path")
        if url.userinfo:
            raise _refused("the URL contains a user or a password, which are not sent; remove them")
        if url.port not in {None, _PORTS[url.scheme]}:
            raise _refused(f"port {url.port} of '{host}' is not allowed; use 80 for http or 443 for https")
        if self._hosts and not any(_is_host(host.lower().rstrip("."), allowed) for allowed in self._hosts):
            raise _refused(f"the host '{host}' is not allowed; allowed: {', '.join(self._hosts)}")
        return url

    async def _request(self, url: httpx.URL, allowance: Allowance, tried: list[str]) -> bytes:
        """Return the body, and append to ``tried`` what is to blame if time runs out: the host, later only the URL."""
        if self._ssl_context is None:
            self._ssl_context = await asyncio.to_thread(httpcore.default_ssl_context)
        tried.append(url.host)
        host, port = url.raw_host.decode("ascii"), _PORTS[url.scheme]
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = ()
        # The same error for both, so that clients cannot find out which names exist in the private network.
        if not addresses or not all(self._is_public(address) for address in addresses):
            raise _refused(
                f"'{host}' is not a host with only public addresses; correct the URL, or send the file itself"
            )
        pinned = _PinnedBackend(addresses, self._timeout_s / len(addresses), lambda: tried.append(str(url)))
        pool = httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, max_connections=1, network_backend=pinned)
        target = url.copy_with(port=port, fragment=None)
        headers = [("Host", url.netloc.decode("ascii").lower()), *_HEADERS]
        try:
            async with pool, pool.stream("GET", str(target), headers=headers) as response:
                pinned.head_bytes_left = None
                return await self._read_body(host, response, allowance)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            if isinstance(error, httpcore.ConnectError | httpcore.ConnectTimeout):
                self._failed[url.host] = None
            raise UnreachableImageError(
                f"'{host}' sent no valid response ({type(error).__name__}); try again, or send the file itself"
            ) from error
        finally:
            await pinned.aclose()

    async def _read_body(self, host: str, response: httpcore.Response, allowance: Allowance) -> bytes:
        headers = {name.lower(): value for name, value in response.headers}
        if 300 <= response.status < 400:
            problem = f"'{host}' answered {response.status}, and redirects are not followed"
            raise UnreachableImageError(f"{problem}; send the URL that it redirects to")
        if response.status != 200:
            raise UnreachableImageError(f"'{host}' answered {response.status} instead of an image; correct the URL")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnreachableImageError(
                f"'{host}' sent a compressed response, which is not supported; send the file itself"
            )
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large(host)
        received, chunks = bytearray(), 0
        async for chunk in response.aiter_stream():
            received += chunk
            chunks += 1
            if len(received) > self._max_bytes:
                raise self._too_large(host)
            if chunks > _MIN_CHUNK_BYTES + len(received) // _MIN_CHUNK_BYTES:
                raise UnreachableImageError(
                    f"'{host}' sends the image in {chunks:,} chunks of {len(received) / chunks:.0f} bytes, and the"
                    f" minimum is {_MIN_CHUNK_BYTES}; send the file itself"
                )
            allowance.take(len(chunk))
        return bytes(received)

    def _too_large(self, host: str) -> ImageTooLargeError:
        return ImageTooLargeError(
            f"the image at '{host}' has more than {self._max_bytes:,} bytes; send a smaller one, or raise"
            " DEIXIS_MAX_IMAGE_BYTES"
        )


class RemoteImages:
    """Fetches the images of a request that are given by URL.

    Args:
        fetcher: None refuses every URL.
        max_bytes: limit on all images of one request.
    """

    def __init__(self, fetcher: ImageFetcher | None, *, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._max_bytes = max_bytes

    async def fetch(self, images: Sequence[bytes | ClientError | ImageUrl]) -> list[bytes | ClientError]:
        """Return the images, with each URL replaced by its content or by the error that kept it from being fetched."""
        fetcher = self._fetcher
        if fetcher is None:
            refused = InvalidFieldError.of(
                "url", "this service does not fetch URLs; send the image itself, or set DEIXIS_ALLOW_IMAGE_URLS"
            )
            return [refused if isinstance(image, ImageUrl) else image for image in images]
        allowance = Allowance(self._max_bytes)
        fetching = {
            index: asyncio.ensure_future(fetcher.fetch(image, allowance))
            for index, image in enumerate(images)
            if isinstance(image, ImageUrl)
        }
        try:
            fetched = dict(zip(fetching, await asyncio.gather(*fetching.values()), strict=True))
        finally:
            while fetching:  # the traceback of an error refers to this frame, which must not refer to tasks with it
                fetching.popitem()[1].cancel()
        return [fetched[index] if isinstance(image, ImageUrl) else image for index, image in enumerate(images)]

    def close(self) -> None:
        """Close the fetcher."""
        if self._fetcher is not None:
            self._fetcher.close()


class _PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to checked addresses instead of resolving the host; the host name is only used for TLS and headers.

    Args:
        addresses: tried in this order.
        timeout_s: for each address.
        on_connect: called when a connection exists.

    ``head_bytes_left`` is the remaining limit on the bytes of the headers; None once the headers are complete.
    """

    def __init__(self, addresses: Iterable[str], timeout_s: float, on_connect: Callable[[], None]) -> None:
        self._addresses = tuple(addresses)
        self._timeout_s = timeout_s
        self._on_connect = on_connect
        self._backend = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None
        self.head_bytes_left: int | None = _MAX_HEAD_BYTES

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature that httpcore calls
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that accepts a connection."""
        del host, timeout
        failure: Exception | None = None
        for address in self._addresses:
            try:
                self._stream = await self._backend.connect_tcp(
                    address, port, self._timeout_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                self._on_connect()
                return _Stream(self._stream, self)
        assert failure is not None
        raise failure

    async def aclose(self) -> None:
        """Close the connection; httpcore leaves it open when a fetch ends during the TLS handshake."""
        if self._stream is not None:
            await self._stream.aclose()


class _Stream(httpcore.AsyncNetworkStream):
    """A plain or TLS stream that limits the bytes of the headers."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, pinned: _PinnedBackend) -> None:
        self._stream = stream
        self._pinned = pinned

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        left = self._pinned.head_bytes_left
        if left is None:
            return await self._stream.read(max_bytes, timeout)
        if left == 0:
            raise httpcore.RemoteProtocolError(f"the headers have more than {_MAX_HEAD_BYTES} bytes")
        received = await self._stream.read(min(max_bytes, left), timeout)
        self._pinned.head_bytes_left = left - len(received)
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._pinned)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _is_host(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _refused(problem: str) -> InvalidFieldError:
    return InvalidFieldError.of("url", problem)
