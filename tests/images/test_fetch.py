"""Images are fetched only from checked public addresses, within the limits on size and time."""

import asyncio
import ssl
from contextlib import asynccontextmanager

import httpcore
import pytest

from app.errors import ImageTooLargeError, InvalidFieldError, TooLargeError, UnreachableImageError
from app.images import fetch as image_urls
from app.images.fetch import MAX_URL_CHARS, Allowance, ImageFetcher, ImageUrl, RemoteImages, is_public

pytestmark = pytest.mark.anyio

LOCAL = "127.0.0.1"
PLAIN = "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture
def anyio_backend():
    return "asyncio"


# --- addresses -----------------------------------------------------------------------------------------------------

PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1"]
PUBLIC += ["2606:4700:4700::1111", "2a00:1450:4001:81b::200e", "2620:fe::fe"]

NOT_PUBLIC = {
    "this network": ["0.0.0.0", "0.1.2.3"],
    "private": ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1"],
    "carriers' NAT": ["100.64.0.1", "100.127.255.255"],
    "loopback": ["127.0.0.1", "127.1.2.3", "::1"],
    "link-local, and of a cloud": [
        "168.63.129.16",
        "169.254.169.254",
        "169.254.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "febf::1",
    ],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "special": ["192.0.0.1", "192.0.0.170", "192.88.99.1", "198.18.0.1", "198.19.255.255", "2001:1::1", "2001:20::1"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved and broadcast": ["240.0.0.1", "255.255.255.255", "::", "4000::1", "5f00::1", "8000::1"],
    "unique local": ["fc00::1", "fd00::1", "fdff:ffff::1"],
    "site local": ["fec0::1"],
    "discard": ["100::1"],
    "IPv4 in IPv6": ["::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::8.8.8.8"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1"],
    "6to4 and Teredo": ["2002:7f00:1::", "2002:808:808::1", "2001:0:53aa:64c::1"],
    "no address": ["", "localhost", "127.1", "2130706433", "0x7f000001", "017700000001", "8.8.8.8.8", "8.8.8.8 "],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address):
    assert is_public(address)


@pytest.mark.parametrize("address", [item for some in NOT_PUBLIC.values() for item in some])
def test_private_addresses_are_not_allowed(address):
    assert not is_public(address)


# --- requests ------------------------------------------------------------------------------------------------------


def resolver(*addresses):
    """Return a resolver, and the list of its requests."""
    lookups = []

    async def resolve(host, port):
        lookups.append((host, port))
        return list(addresses)

    return resolve, lookups


def fetcher(*addresses, **changes):
    resolve, _ = resolver(*addresses)
    return ImageFetcher(**{"max_bytes": 1000, "timeout_s": 5, "resolve": resolve, **changes})


async def error_of(fetching, url, total=10_000):
    return await fetching.fetch(ImageUrl(url), Allowance(total))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.com/a.png", "the scheme is 'ftp'"),
        ("file:///etc/passwd", "the scheme is 'file'"),
        ("data:image/png;base64,AAAA", "the scheme is 'data'"),
        ("gopher://example.com", "the scheme is 'gopher'"),
        ("//example.com/a.png", "the scheme is ''"),
        ("example.com/a.png", "the scheme is ''"),
        ("", "the scheme is ''"),
        ("https://", "has no host"),
        ("http:///a.png", "has no host"),
        ("https://user:secret@example.com/", "user or a password"),
        ("https://user@example.com/", "user or a password"),
        ("https://example.com:8443/", "port 8443 of 'example.com' is not allowed"),
        ("http://example.com:443/", "port 443"),
        ("http://example.com:22/", "port 22"),
        ("https://exa mple.com/", "this is not a URL"),
        ("https://example.com:99999999/", "port 99999999"),
        ("https://[::1/", "this is not a URL"),
        ("https://example.com/\x00", "this is not a URL"),
        ("https://example.com/a\r\nX: y", "this is not a URL"),
        ("https://example.com/" + "a" * MAX_URL_CHARS, "at most 2,048"),
    ],
)
async def test_an_invalid_url_is_rejected_before_its_host_is_resolved(url, problem):
    resolve, lookups = resolver("8.8.8.8")
    error = await error_of(fetcher(resolve=resolve), url)
    assert isinstance(error, InvalidFieldError)
    assert problem in error.message
    assert "secret" not in error.message
    assert lookups == []


@pytest.mark.parametrize("address", [item for some in NOT_PUBLIC.values() for item in some if item])
async def test_a_host_with_a_private_address_is_rejected(address):
    error = await error_of(fetcher("8.8.8.8", address), "https://example.com/")
    assert isinstance(error, InvalidFieldError)
    assert "'example.com' is not a host with only public addresses" in error.message


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_every_form_of_the_loopback_address_is_rejected(host):
    error = await error_of(ImageFetcher(max_bytes=10, timeout_s=5), f"http://{host}/")
    assert isinstance(error, InvalidFieldError)
    assert "only public addresses" in error.message or "not a URL" in error.message


@pytest.mark.parametrize("failure", [OSError("none"), UnicodeError("label too long")])
async def test_a_missing_host_has_the_same_error_as_a_private_one(failure):
    async def resolve(host, port):
        raise failure

    for fetching in (fetcher(resolve=resolve), fetcher()):
        error = await error_of(fetching, "https://nowhere.example/")
        inner = await error_of(fetcher("10.0.0.1"), "https://nowhere.example/")
        assert isinstance(error, InvalidFieldError)
        assert error.message == inner.message


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("images.example.com", True),
        ("IMAGES.example.com.", True),
        ("a.cdn.example.net", True),
        ("a.b.cdn.example.net", True),
        ("cdn.example.net", False),
        ("evilcdn.example.net", False),
        ("example.com", False),
        ("images.example.com.evil.net", False),
    ],
)
async def test_only_hosts_of_the_allow_list_are_fetched_from(host, is_allowed):
    resolve, lookups = resolver(LOCAL)
    error = await error_of(
        fetcher(resolve=resolve, hosts=("images.example.com", "*.cdn.example.net")), f"https://{host}/"
    )
    assert ("only public addresses" in error.message) == is_allowed
    assert bool(lookups) == is_allowed


# --- responses -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(*pieces, then=None):
    """Yield the port of a server that sends this response to every request, and the list of its requests."""
    requests = []

    async def answer(reader, writer):
        try:
            requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            for piece in pieces:
                writer.write(piece.encode("latin-1") if isinstance(piece, str) else piece)
                await writer.drain()
            if then is not None:
                await then(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the fetcher has disconnected
        finally:
            writer.close()

    server = await asyncio.start_server(answer, LOCAL, 0)
    async with server:
        yield server.sockets[0].getsockname()[1], requests


@pytest.fixture
def asking(monkeypatch):
    """Return a function that fetches from a local server as if it were a public one on port 80."""

    def made(port, **changes):
        monkeypatch.setattr(image_urls, "_PORTS", {"http": port})
        return fetcher(LOCAL, **{"is_public": lambda address: address == LOCAL, **changes})

    return made


async def test_a_request_has_the_host_name_and_no_private_headers(asking, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with answering(PLAIN) as (port, requests):
        assert await error_of(asking(port), "http://images.example.com/a%20b.png?c=d&e#part") == b"hello"
    (request,) = requests
    line, *headers = request.strip().split("\r\n")
    assert line == "GET /a%20b.png?c=d&e HTTP/1.1"
    assert {header.partition(":")[0].lower() for header in headers} == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
    }
    assert any(header.lower().startswith("host: images.example.com") for header in headers)


async def test_a_host_is_resolved_once_and_the_checked_address_is_used(asking):
    answers = [[LOCAL], ["169.254.169.254"]]

    async def rebound(host, port):
        return answers.pop(0)

    async with answering(PLAIN) as (port, requests):
        assert await error_of(asking(port, resolve=rebound), "http://images.example.com/") == b"hello"
    assert len(requests) == 1
    assert answers == [["169.254.169.254"]]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_not_followed(asking, status):
    elsewhere = f"HTTP/1.1 {status}\r\nLocation: http://169.254.169.254/secret\r\nContent-Length: 0\r\n\r\n"
    async with answering(elsewhere) as (port, requests):
        error = await error_of(asking(port), "http://images.example.com/")
    assert isinstance(error, UnreachableImageError)
    assert "redirects are not followed" in error.message
    assert "169.254" not in error.message
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret", "answered 404"),
        ("HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "answered 500"),
        ("HTTP/1.1 206 Partial\r\nContent-Length: 0\r\n\r\n", "answered 206"),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", "sent a compressed response"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "no valid response"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", "no valid response"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999999\r\n\r\n", "no valid response"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "no valid response"),
        ("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 40_000, "no valid response"),
        ("", "no valid response"),
    ],
)
async def test_the_error_for_an_invalid_response_does_not_repeat_it(asking, answer, problem):
    async with answering(answer) as (port, _):
        error = await error_of(asking(port), "http://images.example.com/")
    assert isinstance(error, UnreachableImageError)
    assert problem in error.message
    assert "secret" not in error.message


async def test_an_image_in_chunks_is_joined(asking):
    chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
    async with answering(chunks) as (port, _):
        assert await error_of(asking(port), "http://images.example.com/") == b"hello"


async def test_a_declared_length_above_the_limit_is_rejected_immediately(asking):
    async def wait(writer):
        await asyncio.Event().wait()  # never sends the body

    async with answering("HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", then=wait) as (port, _):
        error = await error_of(asking(port), "http://images.example.com/")
    assert isinstance(error, ImageTooLargeError)
    assert "more than 1,000 bytes" in error.message


async def test_an_undeclared_length_above_the_limit_is_rejected_while_reading(asking):
    async def go_on(writer):
        while True:
            writer.write(b"a" * 500)
            await writer.drain()

    async with answering("HTTP/1.1 200 OK\r\n\r\n", then=go_on) as (port, _):
        error = await error_of(asking(port), "http://images.example.com/")
    assert isinstance(error, ImageTooLargeError)


async def test_the_images_of_a_request_share_a_limit(asking):
    async with answering(PLAIN) as (port, _):
        fetching, allowance = asking(port), Allowance(12)
        answers = [await fetching.fetch(ImageUrl("http://images.example.com/"), allowance) for _ in range(3)]
    assert answers[:2] == [b"hello", b"hello"]
    assert isinstance(answers[2], TooLargeError)
    assert "more than 12 bytes together" in answers[2].message


async def test_a_slow_response_is_stopped_at_the_timeout(asking):
    async def drip(writer):
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with answering("HTTP/1.1 200 OK\r\n\r\n", then=drip) as (port, _):
        error = await error_of(asking(port, timeout_s=0.2, max_bytes=10**6), "http://images.example.com/")
    assert isinstance(error, UnreachableImageError)
    assert "within 0.2 s" in error.message


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        ("HTTP/1.1 200 OK\r\n", "X: y\r\n"),
        ("HTTP/1.1 200 OK\r\nX: ", "y" * 1000),
        ("", "HTTP/1.1 100 Continue\r\n\r\n"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\na\r\n"),
    ],
)
async def test_a_response_of_tiny_chunks_is_stopped_before_the_timeout(asking, start, piece):
    async def go_on(writer):
        while True:
            writer.write(piece.encode() * 100)
            await writer.drain()

    async with answering(start, then=go_on) as (port, _):
        error = await error_of(asking(port, timeout_s=60, max_bytes=10**8), "http://images.example.com/", 10**8)
    assert isinstance(error, UnreachableImageError)
    assert "within" not in error.message


async def test_a_small_number_of_small_chunks_is_accepted(asking):
    chunks = ("100\r\n" + "a" * 256 + "\r\n") * 500
    async with answering(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n") as (port, _):
        body = await error_of(asking(port, max_bytes=10**6), "http://images.example.com/", 10**6)
    assert body == b"a" * 256 * 500


async def test_a_timeout_during_the_tls_handshake_closes_the_connection(monkeypatch):
    closed = []

    class Stuck(httpcore.AsyncNetworkStream):
        async def start_tls(self, *_, **__):
            await asyncio.Event().wait()

        async def aclose(self):
            closed.append(True)

    async def connect_tcp(self, *_):
        return Stuck()

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    error = await error_of(fetcher("8.8.8.8", timeout_s=1), "https://images.example.com/")
    assert "within 1 s" in error.message
    assert closed


async def test_a_host_that_cannot_be_connected_to_is_not_tried_again(asking):
    async with answering(PLAIN) as (port, _):
        pass  # the port is closed again
    fetching = asking(port)
    resolve, lookups = resolver(LOCAL)
    fetching._resolve = resolve
    first = await error_of(fetching, "http://dead.example.com/1.png")
    second = await error_of(fetching, "http://dead.example.com/2.png")
    assert "no valid response" in first.message
    assert "failed less than 30 s ago" in second.message
    assert len(lookups) == 1


async def test_of_a_host_that_accepts_connections_only_the_slow_url_is_not_tried_again(asking):
    async def slow(_):
        await asyncio.sleep(60)

    async with answering(then=slow) as (port, requests):
        fetching = asking(port, timeout_s=0.3)
        fetching._ssl_context = ssl.create_default_context()  # takes longer
        urls = ["http://images.example.com/slow.png"] * 2 + ["http://images.example.com/other.png"]
        messages = [(await error_of(fetching, url)).message for url in urls]
        assert ["failed less than" in message for message in messages] == [False, True, False]
        assert len(requests) == 2


async def test_dead_urls_of_one_request_leave_turns_for_other_requests(asking):
    """Sixteen fetches run at the same time; sixty-four URLs that never respond are one request."""
    waiting = asyncio.Event()

    async def resolve(host, port):
        if host.startswith("dead"):
            await waiting.wait()
        return [LOCAL]

    async with answering(PLAIN) as (port, _):
        fetching = asking(port, resolve=resolve)
        dead = asyncio.create_task(
            RemoteImages(fetching, max_bytes=1000).fetch([ImageUrl(f"http://dead{n}.example.com/") for n in range(64)])
        )
        await asyncio.sleep(0)
        assert await error_of(fetching, "http://images.example.com/") == b"hello"
        assert not dead.done()
        dead.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dead


async def test_waiting_for_a_turn_is_not_a_failure_of_the_host(asking):
    async with answering(PLAIN) as (port, _):
        fetching = asking(port, timeout_s=0.3, max_concurrent=1)
        fetching._ssl_context = ssl.create_default_context()  # takes longer
        async with fetching._slots:
            error = await error_of(fetching, "http://images.example.com/")
        assert "not received within" in error.message
        assert await error_of(fetching, "http://images.example.com/") == b"hello"


async def test_the_timeout_includes_resolving_the_host():
    async def never(host, port):
        await asyncio.Event().wait()

    error = await error_of(fetcher(resolve=never, timeout_s=0.05), "https://example.com/")
    assert isinstance(error, UnreachableImageError)


async def test_the_number_of_concurrent_fetches_is_limited(asking):
    running, most, gate = 0, 0, asyncio.Event()

    async def resolve(host, port):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            gate.set()
        await gate.wait()
        running -= 1
        return []

    fetching = fetcher(resolve=resolve, max_concurrent=2)
    await asyncio.gather(*(error_of(fetching, "https://example.com/") for _ in range(6)))
    assert most == 2


async def test_a_cancelled_fetch_closes_its_connection(asking):
    closed, started = asyncio.Event(), asyncio.Event()

    async def watch(writer):
        started.set()
        try:
            while True:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with answering("HTTP/1.1 200 OK\r\n\r\n", then=watch) as (port, _):
        task = asyncio.create_task(error_of(asking(port, max_bytes=10**9), "http://images.example.com/", 10**9))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(closed.wait(), 5)


async def test_the_next_address_is_tried_if_the_first_does_not_respond(asking):
    async with answering(PLAIN) as (port, _):
        fetching = asking(port, resolve=resolver("127.0.0.2", LOCAL)[0], is_public=lambda _: True)
        # Nothing listens on the first address; the server has only the other one.
        assert await error_of(fetching, "http://images.example.com/") == b"hello"


async def test_the_tls_certificate_must_match_the_host_name(monkeypatch):
    """The connection uses the address, and TLS the host name."""
    begun = []

    class Stream(httpcore.AsyncNetworkStream):
        async def start_tls(self, ssl_context, server_hostname=None, timeout=None):  # noqa: ASYNC109 - the signature of httpcore
            begun.append((server_hostname, ssl_context.verify_mode, ssl_context.check_hostname))
            raise httpcore.ConnectError("as far as this goes")

        async def aclose(self):
            pass

        async def read(self, max_bytes, timeout=None):  # noqa: ASYNC109
            return b""

        async def write(self, buffer, timeout=None):  # noqa: ASYNC109
            pass

        def get_extra_info(self, info):
            return None

    connected = []

    async def connect_tcp(self, host, port, *_):
        connected.append((host, port))
        return Stream()

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    error = await error_of(fetcher("8.8.8.8"), "https://images.example.com/")
    assert isinstance(error, UnreachableImageError)
    assert connected == [("8.8.8.8", 443)]
    assert begun == [("images.example.com", ssl.CERT_REQUIRED, True)]
