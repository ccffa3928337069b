"""Parses multipart/form-data (RFC 7578), keeping its files in memory, which the budget of all bodies allows for."""

import re
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from encodings import normalize_encoding
from encodings.aliases import aliases

from fastapi import Request
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, header_unquote

from app.errors import InvalidFieldError, MalformedRequestError, TooLargeError

# Of a field that is not a file: a thousand labels of 200 characters take up to 0.8 MB.
_MAX_FIELD_BYTES = 4 * 1024 * 1024
# Of a header of a part. The parser joins one that is folded again for each of its lines.
_MAX_HEADER_BYTES = 2048
# Of Content-Type. Some clients send a boundary such as ``----=_Part_1`` without the quotes that RFC 2045 demands.
_OPTION = re.compile(r';\s*([^\s;="]+)\s*=\s*("(?:\\.|[^\\"])*"|[^;]*)')
# The last one makes surrogates, and browsers refuse it too.
_CHARSETS = frozenset(aliases.values()) - {"utf_7"}


@dataclass(slots=True)
class Form:
    """The parts of a form: the files named ``image``, and the values of each other field."""

    images: list[bytes] = field(default_factory=list)
    fields: dict[str, list[str]] = field(default_factory=dict)

    def take_images(self, count: int) -> list[bytes]:
        """Remove the first images from the form and return them, so that they can be freed."""
        taken = self.images[:count]
        del self.images[:count]
        return taken


async def parse_form(request: Request, *, max_images: int, max_fields: int, too_many_images: TooLargeError) -> Form:
    """Read a request with multipart/form-data.

    Args:
        request: its body has not been read.
        max_images: limit on files named ``image``.
        max_fields: limit on all other parts.
        too_many_images: raised if there are more images.

    Raises:
        MalformedRequestError: the form cannot be parsed.
        InvalidFieldError: a part named ``image`` is not a file, another part is one, or there is no image.
        TooLargeError: the form exceeds a limit.
    """
    found = _OPTION.findall(request.headers["content-type"])
    options = {name.lower(): header_unquote(value.strip()) for name, value in found}
    parts = _Parts(max_images, max_fields, too_many_images, options.get("charset") or "utf-8")
    if not (boundary := options.get("boundary")):
        raise MalformedRequestError(
            "the Content-Type of the form has no boundary; leave this header to the HTTP client, which adds it"
        )
    try:
        reader = _PartReader(boundary)
        async with aclosing(request.stream()) as stream:
            async for received in stream:
                for part, content in reader.feed(received):
                    parts.add(part, content)
        reader.close()
    except ParserLimitReached as error:
        raise TooLargeError(f"the form exceeds a limit: {error}") from error
    except MultipartError as error:
        raise MalformedRequestError(f"the form cannot be parsed: {error}") from error
    if not parts.form.images:
        raise InvalidFieldError.of("image", "is missing; send one or more file parts named image")
    return parts.form


class _Parts:
    """Collects the parts of a form, within its limits; ``charset`` is that of texts that name none."""

    def __init__(self, max_images: int, max_fields: int, too_many_images: TooLargeError, charset: str) -> None:
        self.form = Form()
        self._max_images = max_images
        self._max_fields = max_fields
        self._too_many_images = too_many_images
        self._charset = charset
        self._fields = 0

    def add(self, part: MultipartSegment, content: bytes) -> None:
        """Add a complete part."""
        name = _name(part)
        if not name:
            raise MalformedRequestError("the form cannot be parsed: a part has no name")
        if name != "image":
            self._add_field(name, part, content)
        elif len(self.form.images) == self._max_images:
            raise self._too_many_images
        elif not _is_file(part):
            raise InvalidFieldError.of("image", "must be a file; give its part a filename in Content-Disposition")
        else:
            self.form.images.append(content)

    def _add_field(self, name: str, part: MultipartSegment, content: bytes) -> None:
        self._fields += 1
        if self._fields > self._max_fields:
            raise TooLargeError(f"the form exceeds a limit: it has more than {self._max_fields:,} fields")
        if _is_file(part):
            raise InvalidFieldError.of(name, "is a file; file parts must be named image")
        self.form.fields.setdefault(name, []).append(_decoded(content, part.charset or self._charset))


class _PartReader:
    """Puts the parts of a form together from the bytes that arrive; raises ``MultipartError``."""

    def __init__(self, boundary: str) -> None:
        # A name that is not ASCII is decoded by ``_name``.
        self._parser = PushMultipartParser(boundary, max_header_size=_MAX_HEADER_BYTES, header_charset="latin-1")
        self._part: MultipartSegment | None = None
        self._chunks: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[tuple[MultipartSegment, bytes]]:
        """Yield each part that is complete now, with its content."""
        if not received:
            return  # to the parser, this would be the end
        for event in self._parser.parse(received):
            if isinstance(event, MultipartSegment):
                self._part, self._chunks = event, []
                continue
            assert self._part is not None
            if event is None:
                yield self._part, b"".join(self._chunks)
                continue
            self._chunks.append(event)
            if self._part.bytes_received > _MAX_FIELD_BYTES and not _is_file(self._part):
                limit = f"{_MAX_FIELD_BYTES // 1024**2} MiB"
                raise TooLargeError(f"the form exceeds a limit: the field '{_name(self._part)[:100]}' is over {limit}")

    def close(self) -> None:
        """Check that the form is complete."""
        try:
            self._parser.close()
        except MultipartError as error:
            raise MalformedRequestError("the form ends before its last boundary; send all of it") from error


def _name(part: MultipartSegment) -> str:
    name = part.name or ""
    return name if name.isascii() else name.encode("latin-1").decode(errors="replace")


def _is_file(part: MultipartSegment) -> bool:
    """Return whether a part is a file; some clients send only ``filename*`` (RFC 5987), or only the content type."""
    return (
        part.filename is not None
        or (part.content_type or "").startswith(("image/", "application/octet-stream"))
        or "filename*" in part.header("Content-Disposition", "").lower()
    )


def _decoded(content: bytes, charset: str) -> str:
    codec = normalize_encoding(charset).lower()
    problem: object = f"unknown charset '{charset[:40]}'"
    try:
        if aliases.get(codec, codec) in _CHARSETS:
            return content.decode(codec)
    except (UnicodeError, LookupError) as error:
        problem = error
    raise MalformedRequestError(f"the form is not in the charset that its Content-Type names: {problem}")
