"""Raw requests with ambiguous or invalid framing, and their expected responses."""

from dataclasses import dataclass

_CLOSE = b"Connection: close\r\n"
_POST = b"POST /v1/classify?labels=a,b HTTP/1.1\r\nHost: localhost\r\n"
_PNG = _POST + b"Content-Type: image/png\r\n"
_SECOND = b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Framing:
    """The bytes of one connection.

    Args:
        sent: the bytes.
        statuses: allowed statuses of the response; a second response is not allowed, and the connection must be closed.
    """

    sent: bytes
    statuses: frozenset[int]


def _rejected(sent: bytes) -> Framing:
    return Framing(sent, frozenset({400}))


def framings() -> dict[str, Framing]:
    """Return requests that a proxy and the service might split differently, and floods of headers."""
    return {
        "both lengths": _rejected(
            _POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _SECOND
        ),
        "both lengths of a GET": _rejected(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
            b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + _SECOND
        ),
        "two lengths": _rejected(_POST + b"Content-Length: 1\r\nContent-Length: 50\r\n\r\nx" + _SECOND),
        "the same length twice": _rejected(_POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx" + _SECOND),
        "a list of lengths": _rejected(_POST + b"Content-Length: 1, 1\r\n\r\nx" + _SECOND),
        "a length with a sign": _rejected(_POST + b"Content-Length: +1\r\n\r\nx" + _SECOND),
        "a negative length": _rejected(_POST + b"Content-Length: -1\r\n\r\n" + _SECOND),
        "a length of 2^64": _rejected(_POST + b"Content-Length: 18446744073709551617\r\n\r\nx" + _SECOND),
        "another coding": _rejected(_POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + _SECOND),
        "a coding after chunked": _rejected(_POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + _SECOND),
        "a space before the colon": _rejected(_POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + _SECOND),
        "a hexadecimal prefix": _rejected(_PNG + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n" + _SECOND),
        "a size of 2^68": _rejected(_PNG + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n" + _SECOND),
        "a size of letters": _rejected(_PNG + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n" + _SECOND),
        "a size with a sign": _rejected(_PNG + b"Transfer-Encoding: chunked\r\n\r\n-1\r\na\r\n0\r\n\r\n" + _SECOND),
        "chunks with line feeds": _rejected(_PNG + b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n" + _SECOND),
        "a line break in an extension": _rejected(
            _PNG + b'Transfer-Encoding: chunked\r\n\r\n1;a="\r\n"\r\na\r\n0\r\n\r\n' + _SECOND
        ),
        "a chunk longer than its size": _rejected(
            _PNG + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + _SECOND
        ),
        "a folded header": _rejected(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n" + _SECOND),
        "a header without a name": _rejected(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n: a\r\n\r\n"),
        "a header without a colon": _rejected(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length 5\r\n\r\n"),
        "a zero in a header": _rejected(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n"),
        "carriage returns only": _rejected(b"GET /healthz HTTP/1.1\rHost: localhost\r\r"),
        "bytes in the address": _rejected(b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE + b"\r\n"),
        "an unterminated address": Framing(
            b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE + b"\r\n", frozenset({400, 421})
        ),
        "HTTP/0.9": Framing(b"GET /healthz\r\n\r\n", frozenset({200, 400})),
        "HTTP/9.9": _rejected(b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n"),
        "TLS hello": _rejected(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
        "zeros": _rejected(bytes(10_000)),
        "another expectation": Framing(
            _PNG + b"Content-Length: 1\r\nExpect: the-moon\r\n" + _CLOSE + b"\r\na", frozenset({400, 415, 417})
        ),
        "many ranges": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nRange: bytes=" + b"0-," * 5000 + b"0-\r\n" + _CLOSE + b"\r\n",
            frozenset({200, 416}),
        ),
        "a long Accept": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nAccept: " + b"a/b;q=9," * 5000 + b"\r\n" + _CLOSE + b"\r\n",
            frozenset({200, 406}),
        ),
        "10,000 headers": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X: 456\r\n" * 10_000 + b"\r\n", frozenset({431})
        ),
        "a header of 1 MB": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20 + b"\r\n\r\n", frozenset({431})
        ),
        "an address of 1 MB": Framing(
            b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", frozenset({431})
        ),
    }
