"""Images from URLs, without letting callers reach what only this machine can.

A host is resolved once, every address that it has must be public, and the connection is made to one of these very
addresses, so that no second answer of a name server can lead elsewhere. Redirects, cookies, proxies and compression are
not taken part in. One fetch has one bound on its bytes and one on its time, from the resolution to the last byte.
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

from app.errors import ClientError, ImageTooLargeError, InvalidFieldError, TooLargeError, UnreachableImageError

MAX_URL_CHARS = 2048

_PORTS = {"http": 80, "https": 443}
_HEADERS = (("User-Agent", "deixis"), ("Accept", "image/*"), ("Accept-Encoding", "identity"))

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")

_MAX_HEAD_BYTES = 32 * 1024
"""Of status lines and headers, interim answers (1xx) included; a CDN's are 2 to 8 KiB."""

_MIN_PIECE_BYTES = 256
"""A body's pieces must be so long on average, after as many that need not: each is parsed on the event loop."""

# Beside ``is_global``, whose answers for some of these have changed between releases of Python.
_NOT_PUBLIC_4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # what Azure tells its machines
        "169.254.0.0/16",  # link-local: what clouds tell their machines is here
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
# All that is handed out is in here. Loopback, unique local, link-local and multicast addresses are not, nor are those
# that hold an IPv4 address: mapped, compatible, and NAT64.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # special purposes; Teredo is one of them, and holds an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which holds an IPv4 address
        "3fff::/20",  # documentation
    )
]


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """Where an image is to be fetched from, as a caller gave it."""

    url: str


@dataclass(slots=True)
class Allowance:
    """Bytes that the images of one request may have together, less those that have come."""

    total: int
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.total

    def take(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            TooLargeError: they are more than there may be.
        """
        self.left -= count
        if self.left < 0:
            raise TooLargeError(
                f"the images of this request have more than {self.total:,} bytes together; send fewer per request, or"
                " raise DEIXIS_MAX_REQUEST_BYTES"
            )


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns every address of a host; raises ``OSError`` where it has none."""


def is_public(address: str) -> bool:
    """Tell whether an address is one that anybody on the internet could reach."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False  # with a zone, or none at all
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_4)
    if parsed.scope_id is not None:
        return False
    return parsed in _GLOBAL_6 and parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_6)


def _addresses_of(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """Fetches images over HTTP and HTTPS.

    Args:
        max_bytes: of one image.
        timeout_s: for one image, from resolving its host to its last byte.
        hosts: the only ones that may be asked, as ``images.example.com`` or ``*.example.com``; none for all.
        max_at_once: fetches under way; others wait, within their time.
        resolve: finds a host's addresses, in the order in which they should be tried; by default the system, in threads
            of its own, since nobody can stop a name server that does not answer.
        is_public: tells which of them may be asked.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        hosts: Sequence[str] = (),
        max_at_once: int = 16,
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._hosts = tuple(host.lower() for host in hosts)
        self._turns = asyncio.Semaphore(max_at_once)
        self._resolvers = ThreadPoolExecutor(max_at_once, thread_name_prefix="resolve")
        self._resolve = resolve or self._resolved_by_system
        self._is_public = is_public
        self._ssl_context: ssl.SSLContext | None = None

    async def fetch(self, image: ImageUrl, allowance: Allowance) -> bytes | ClientError:
        """Return an image's bytes, which are taken from the request's allowance, or why it cannot be had."""
        try:
            url = self._checked(image.url)
            try:
                async with asyncio.timeout(self._timeout_s), self._turns:
                    return await self._fetched(url, allowance)
            except TimeoutError:
                raise UnreachableImageError(
                    f"the image at '{url.host}' was not there within {self._timeout_s:g} s; send the file itself"
                ) from None
        except ClientError as error:
            return error.with_traceback(None)  # which holds what has come of the image

    def close(self) -> None:
        """Begin no more resolutions."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _resolved_by_system(self, host: str, port: int) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(self._resolvers, _addresses_of, host, port)

    def _checked(self, given: str) -> httpx.URL:
        """Return the URL, if it may be asked.

        Raises:
            InvalidFieldError: it may not.
        """
        if len(given) > MAX_URL_CHARS:
            raise _refused(f"a URL of {len(given):,} characters; at most {MAX_URL_CHARS:,} are allowed")
        try:
            url = httpx.URL(given)
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError, ValueError):
            raise _refused("this is no URL; write https://host/path") from None
        if url.scheme not in _PORTS:
            raise _refused(f"the scheme is '{url.scheme[:20]}'; write an address that begins with https:// or http://")
        if not host:
            raise _refused("the URL names no host; write https://host/path")
        if not _HOST.fullmatch(host):
            raise _refused("this is no URL; write https://host/path")
        if url.userinfo:
            raise _refused("the URL holds a user or a password, which are not passed on; leave them out")
        if url.port not in {None, _PORTS[url.scheme]}:
            raise _refused(f"port {url.port} of '{host}' is not asked, only 80 for http and 443 for https")
        if self._hosts and not any(_is_host(host.lower().rstrip("."), allowed) for allowed in self._hosts):
            raise _refused(f"images are not fetched from '{host}', only from {', '.join(self._hosts)}")
        return url

    async def _fetched(self, url: httpx.URL, allowance: Allowance) -> bytes:
        host, port = url.raw_host.decode("ascii"), _PORTS[url.scheme]
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = ()
        # One answer for both, so that nobody learns which names there are on the inner network.
        if not addresses or not all(self._is_public(address) for address in addresses):
            raise _refused(
                f"'{host}' is no host that has public addresses only; correct the URL, or send the file itself"
            )
        if self._ssl_context is None:
            self._ssl_context = await asyncio.to_thread(httpcore.default_ssl_context)
        pinned = _Pinned(addresses, self._timeout_s / len(addresses))
        pool = httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, max_connections=1, network_backend=pinned)
        target = url.copy_with(port=port, fragment=None)
        headers = [("Host", url.netloc.decode("ascii").lower()), *_HEADERS]
        try:
            async with pool, pool.stream("GET", str(target), headers=headers) as answer:
                pinned.head_bytes_left = None
                return await self._body(host, answer, allowance)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise UnreachableImageError(
                f"'{host}' gave no proper answer ({type(error).__name__}); try again, or send the file itself"
            ) from error
        finally:
            await pinned.aclose()

    async def _body(self, host: str, answer: httpcore.Response, allowance: Allowance) -> bytes:
        headers = {name.lower(): value for name, value in answer.headers}
        if 300 <= answer.status < 400:
            problem = f"'{host}' answered {answer.status}, and redirects are not followed"
            raise UnreachableImageError(f"{problem}; give the address that it leads to")
        if answer.status != 200:
            raise UnreachableImageError(f"'{host}' answered {answer.status} instead of an image; correct the URL")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnreachableImageError(f"'{host}' sent the image compressed, which was not asked for; send the file")
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            raise self._too_large(host)
        received, pieces = bytearray(), 0
        async for piece in answer.aiter_stream():
            received += piece
            pieces += 1
            if len(received) > self._max_bytes:
                raise self._too_large(host)
            if pieces > _MIN_PIECE_BYTES + len(received) // _MIN_PIECE_BYTES:
                raise UnreachableImageError(
                    f"'{host}' sends the image in {pieces:,} pieces of {len(received) / pieces:.0f} bytes, and at least"
                    f" {_MIN_PIECE_BYTES} are expected; send the file itself"
                )
            allowance.take(len(piece))
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
                "url", "this service fetches no URLs; send the image itself, or set DEIXIS_ALLOW_IMAGE_URLS"
            )
            return [refused if isinstance(image, ImageUrl) else image for image in images]
        allowance = Allowance(self._max_bytes)
        fetching = {
            index: asyncio.ensure_future(fetcher.fetch(image, allowance))
            for index, image in enumerate(images)
            if isinstance(image, ImageUrl)
        }
        try:
            await asyncio.gather(*fetching.values())
        finally:
            for fetch in fetching.values():
                fetch.cancel()
        return [
            fetching[index].result() if isinstance(image, ImageUrl) else image for index, image in enumerate(images)
        ]

    def close(self) -> None:
        """Close the fetcher."""
        if self._fetcher is not None:
            self._fetcher.close()


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, whatever host is asked for; names are for TLS and the Host header.

    Args:
        addresses: tried one after the other.
        timeout_s: for each of them.

    ``head_bytes_left`` is what may yet be read before an answer's headers are there, and None from then on.
    """

    def __init__(self, addresses: Iterable[str], timeout_s: float) -> None:
        self._addresses = tuple(addresses)
        self._timeout_s = timeout_s
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
        """Connect to the first address that answers."""
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
                return _Stream(self._stream, self)
        assert failure is not None
        raise failure

    async def aclose(self) -> None:
        """Close the connection; httpcore leaves it open when a fetch ends within TLS's handshake."""
        if self._stream is not None:
            await self._stream.aclose()


class _Stream(httpcore.AsyncNetworkStream):
    """What a connection carries, in the clear or out of TLS, up to as many bytes as its headers may have."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, pinned: _Pinned) -> None:
        self._stream = stream
        self._pinned = pinned

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        left = self._pinned.head_bytes_left
        if left is None:
            return await self._stream.read(max_bytes, timeout)
        if left == 0:
            raise httpcore.RemoteProtocolError(f"no end of the headers within {_MAX_HEAD_BYTES} bytes")
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
