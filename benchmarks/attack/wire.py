"""Raw requests with ambiguous or invalid framing, and their expected responses."""

from dataclasses import dataclass

_CLOSE = b"Connection: close\r\n"
_POST = b"POST /v1/classify?labels=a,b HTTP/1.1\r\nHost: x\r\n"
_PNG = _POST + b"Content-Type: image/png\r\n"
_HIDDEN = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Framing:
    """The bytes of one connection.

    Args:
        sent: the bytes.
        statuses: allowed statuses of the response; a second response is not allowed, and the connection must be closed.
    """

    sent: bytes
    statuses: frozenset[int]


def _refused(sent: bytes) -> Framing:
    return Framing(sent, frozenset({400}))


def framings() -> dict[str, Framing]:
    """Return requests that a proxy and the service might split differently, and floods of headers."""
    return {
        "both lengths": _refused(_POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _HIDDEN),
        "both lengths of a GET": _refused(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
            + _HIDDEN
        ),
        "two lengths": _refused(_POST + b"Content-Length: 1\r\nContent-Length: 50\r\n\r\nx" + _HIDDEN),
        "the same length twice": _refused(_POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx" + _HIDDEN),
        "a list of lengths": _refused(_POST + b"Content-Length: 1, 1\r\n\r\nx" + _HIDDEN),
        "a length with a sign": _refused(_POST + b"Content-Length: +1\r\n\r\nx" + _HIDDEN),
        "a length below nothing": _refused(_POST + b"Content-Length: -1\r\n\r\n" + _HIDDEN),
        "a length of 2^64": _refused(_POST + b"Content-Length: 18446744073709551617\r\n\r\nx" + _HIDDEN),
        "another coding": _refused(_POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + _HIDDEN),
        "a coding after chunks": _refused(_POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + _HIDDEN),
        "a blank before the colon": _refused(_POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + _HIDDEN),
        "a size in C": _refused(_PNG + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n" + _HIDDEN),
        "a size of 2^68": _refused(_PNG + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n" + _HIDDEN),
        "a size that is none": _refused(_PNG + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n" + _HIDDEN),
        "a size with a sign": _refused(_PNG + b"Transfer-Encoding: chunked\r\n\r\n-1\r\na\r\n0\r\n\r\n" + _HIDDEN),
        "chunks by line feeds": _refused(_PNG + b"Transfer-Encoding: chunked\r\n\r\n1\na\n0\n\n" + _HIDDEN),
        "a line end in an extension": _refused(
            _PNG + b'Transfer-Encoding: chunked\r\n\r\n1;a="\r\n"\r\na\r\n0\r\n\r\n' + _HIDDEN
        ),
        "a chunk longer than it says": _refused(
            _PNG + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + _HIDDEN
        ),
        "a folded header": _refused(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n" + _HIDDEN),
        "a header without a name": _refused(b"GET /healthz HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n"),
        "a header without a colon": _refused(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length 5\r\n\r\n"),
        "a zero in a header": _refused(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n"),
        "carriage returns alone": _refused(b"GET /healthz HTTP/1.1\rHost: x\r\r"),
        "bytes in the address": _refused(b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n" + _CLOSE + b"\r\n"),
        "an address without an end": _refused(b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n" + _CLOSE + b"\r\n"),
        "HTTP/0.9": Framing(b"GET /healthz\r\n\r\n", frozenset({200, 400})),
        "HTTP/9.9": _refused(b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n"),
        "hello of TLS": _refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)),
        "zeros": _refused(bytes(10_000)),
        "another expectation": Framing(
            _PNG + b"Content-Length: 1\r\nExpect: the-moon\r\n" + _CLOSE + b"\r\na", frozenset({400, 415, 417})
        ),
        "many ranges": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nRange: bytes=" + b"0-," * 5000 + b"0-\r\n" + _CLOSE + b"\r\n",
            frozenset({200, 416}),
        ),
        "an absurd Accept": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nAccept: " + b"a/b;q=9," * 5000 + b"\r\n" + _CLOSE + b"\r\n",
            frozenset({200, 406}),
        ),
        "10,000 headers": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: 456\r\n" * 10_000 + b"\r\n", frozenset({431})
        ),
        "a header of 1 MB": Framing(
            b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**20 + b"\r\n\r\n", frozenset({431})
        ),
        "an address of 1 MB": Framing(b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: x\r\n\r\n", frozenset({431})),
    }
