"""Images written as text: base64, or a ``data:`` URL as browsers read it."""

import base64
import binascii
import codecs
import re

import numpy as np

from app.errors import NotAnImageError

# What a URL parser removes: these around a URL, and tabs and line breaks also inside.
_AROUND = bytes(range(0x21))
_INSIDE = b"\t\n\r"
_WHITE_SPACE = b" \t\n\r\f\v"
_SCHEME = b"data:"
_BASE64_FLAG = re.compile(rb";\x20*base64\x20*$", re.IGNORECASE)
_LOOKS_LIKE_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


def is_data_url(text: str) -> bool:
    """Return whether a text is a ``data:`` URL, however its scheme is spelled."""
    return _is_data_url(text[:80].encode("utf-8", "replace"))


def read_image_text(text: str) -> bytes:
    """Return the bytes that base64 or a ``data:`` URL encodes.

    Base64 is decoded as browsers do: its padding is optional, and white space is ignored. A ``data:`` URL is read by
    the rules of browsers (https://fetch.spec.whatwg.org/#data-urls); its media type is not used, because the bytes say
    what they are.

    Raises:
        NotAnImageError: the text is neither of the two.
    """
    raw = text.encode("utf-8", "replace")
    if not _is_data_url(raw[:80]):
        return _decoded(raw.removeprefix(codecs.BOM_UTF8))
    head, comma, body = raw.strip(_AROUND).translate(None, _INSIDE)[len(_SCHEME) :].partition(b",")
    if not comma:
        raise NotAnImageError("the data: URL has no comma; write data:image/jpeg;base64,... with one")
    content = _percent_decoded(body.partition(b"#")[0])
    if _BASE64_FLAG.search(head):
        return _decoded(content)
    if _LOOKS_LIKE_BASE64.fullmatch(content):
        raise NotAnImageError("the data: URL contains base64 but does not say so; write ;base64 before its comma")
    return content


def _is_data_url(beginning: bytes) -> bool:
    return beginning.lstrip(_AROUND).translate(None, _INSIDE).lower().startswith(_SCHEME)


def _percent_decoded(raw: bytes) -> bytes:
    """Return the bytes with every ``%41`` decoded; vectorised, because a request may have millions of them."""
    if b"%" not in raw:
        return raw
    decoded = np.frombuffer(raw, np.uint8).copy()
    digits = np.full(256, 16, np.uint8)
    digits[np.frombuffer(b"0123456789abcdefABCDEF", np.uint8)] = [*range(16), *range(10, 16)]
    signs = np.flatnonzero(decoded[:-2] == ord("%"))
    high, low = digits[decoded[signs + 1]], digits[decoded[signs + 2]]
    is_valid = (high < 16) & (low < 16)
    signs = signs[is_valid]
    decoded[signs] = 16 * high[is_valid] + low[is_valid]
    return bytes(np.delete(decoded, np.concatenate([signs + 1, signs + 2])))


def _decoded(raw: bytes) -> bytes:
    encoded = raw.translate(None, _WHITE_SPACE)
    # Complete padding is optional, but padding that is given must be the right one.
    if not encoded.endswith(b"=") and len(encoded) % 4 > 1:
        encoded += b"=" * (-len(encoded) % 4)
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise NotAnImageError(f"the image is not base64: {_problem(encoded)}") from None


def _problem(encoded: bytes) -> str:
    if re.match(rb"https?://", encoded, re.IGNORECASE):
        return "it is a URL; send it as url, if the service fetches URLs"
    others = set(encoded) - set(_ALPHABET)
    if not others:
        return "its length or padding is wrong; send the complete text"
    if others <= set(b"-_"):
        return "it is in the URL-safe alphabet; replace - by + and _ by /"
    return "it contains characters other than A-Z, a-z, 0-9, + and /; encode the bytes of the file in base64"
