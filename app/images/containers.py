"""Removes from an image file what does not decide about its pixels, before a decoder sees it.

Decoders refuse a file for a wrong checksum in a comment, or take memory for megabytes of text; browsers show it. The
functions copy the parts that a decoder needs. A file whose structure they do not understand is returned unchanged, so
that the decoder names the fault.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

MAX_PROFILE_BYTES = 2**20
"""Larger compressed colour profiles of a PNG are ignored; Pillow has the same limit."""

_JPEG_END = b"\xff\xd9"
# With every restart marker, because a decoder skips to the next one.
_NOISE = b"".join(bytes([0x5A, 0xA5, 0x3C, 0x69]) * 16 + bytes([0xFF, 0xD0 + count]) for count in range(8)) * 2
# The beginnings of the segments that are used, with the length that Pillow reads without a check.
_JPEG_SEGMENTS = ((0xE0, b"JFIF\0", 14), (0xE1, b"Exif\0\0", 6), (0xE2, b"ICC_PROFILE\0", 14), (0xEE, b"Adobe", 12))
_WEBP_IMAGE = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
_WEBP_METADATA: Mapping[bytes, int] = MappingProxyType({b"ICCP": 0x20, b"EXIF": 0x08})
_WEBP_METADATA_FLAGS = 0x2C
# Size, encoding, colours, orientation and profile.
_TIFF_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332}
    | {334, 338, 339, 340, 341, 347, *range(512, 522), *range(529, 533), 34675, 50674}
)
_MAX_TIFF_TAGS = 4096


def without_metadata(image_format: str, content: bytes) -> bytes:
    """Return a file with the same pixels, orientation and colour profile, and without other metadata.

    Args:
        image_format: the name of the format, as ``PNG``; other formats than those below are returned unchanged.
        content: the file.
    """
    reduce = _REDUCERS.get(image_format)
    try:
        return content if reduce is None else reduce(content)
    except (IndexError, ValueError):  # cut off in a header
        return content


def possible_ends(content: bytes) -> tuple[bytes, ...]:
    """Return the file, or for a JPEG without its end marker two files that only look the same if no pixel is missing.

    A decoder fills missing pixels from what follows: grey before an end marker, noise from other bytes. What follows
    the last pixel changes nothing.
    """
    if content.endswith(_JPEG_END) or content.rfind(_JPEG_END) > content.rfind(b"\xff\xda"):
        return (content,)
    # A download into a file of the final size leaves zeros, which a decoder takes for pixels.
    data = content.rstrip(b"\0") if content.endswith(bytes(8)) else content
    data = data[:-1] if data.endswith(b"\xff") and data is content else data
    return (data + _JPEG_END, data + _NOISE + _JPEG_END) if _has_all_scans(data) else ()


def _has_all_scans(content: bytes) -> bool:
    """Return whether a JPEG has scans of every coefficient of every component, to the last bit."""
    frame = re.search(rb"\xff([\xc0-\xc2\xc9\xca])..\x08....([\x01-\x04])(.{3,12})", content, re.DOTALL)
    if frame is None:
        return False
    is_progressive = frame[1] in {b"\xc2", b"\xca"}
    missing = {frame[3][3 * place]: set(range(64)) for place in range(min(frame[2][0], len(frame[3]) // 3))}
    for scan in re.finditer(rb"\xff\xda..([\x01-\x04])(?=(.{5,11}))", content, re.DOTALL):
        count, header = scan[1][0], scan[2]
        first, last, bits = header[2 * count : 2 * count + 3]
        for place in range(count):
            if not is_progressive:
                missing.pop(header[2 * place], None)
            elif header[2 * place] in missing and bits & 15 == 0:
                missing[header[2 * place]] -= set(range(first, last + 1))
    return not any(missing.values())


def _png(content: bytes) -> bytes:
    kept, at, seen = [content[:8]], 8, set()
    while at + 8 <= len(content):
        name, end = content[at + 4 : at + 8], at + 12 + int.from_bytes(content[at : at + 4])
        if not name.isalpha():
            break
        is_critical = not name[0] & 0x20
        if is_critical or (name not in seen and end <= len(content) and _is_usable(content[at:end], content[25])):
            kept.append(content[at:end])
        seen.add(name)
        if name == b"IEND":
            break
        at = end
    return b"".join(kept)


def _is_usable(chunk: bytes, colour_type: int) -> bool:
    """Return whether a chunk that may be missing is needed and intact."""
    name, data = chunk[4:8], chunk[8:-4]
    if name not in {b"tRNS", b"iCCP", b"eXIf"} or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    if name == b"tRNS":
        return len(data) >= {0: 2, 2: 6}.get(colour_type, 0)
    if name == b"iCCP":
        _, _, profile = data.partition(b"\0")
        unpacker = zlib.decompressobj()
        try:
            unpacker.decompress(profile[1:], MAX_PROFILE_BYTES)
        except zlib.error:
            return False
        return profile[:1] == b"\0" and not unpacker.unconsumed_tail
    return True


def _jpeg(content: bytes) -> bytes:
    kept, at = [content[:2]], 2
    while True:
        at = content.index(b"\xff", at)
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker == 0xDA:
            return b"".join([*kept, content[at:]])
        elif marker in {0x00, 0x01, 0xD8} or 0xD0 <= marker <= 0xD7:  # no segments
            at += 2
        else:
            length = int.from_bytes(content[at + 2 : at + 4])
            segment = content[at : at + 2 + length]
            if marker == 0xD9 or length < 2 or len(segment) < 2 + length:
                return content
            is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
            if not is_metadata or _is_used(segment):
                kept.append(segment)
            at += len(segment)


def _is_used(segment: bytes) -> bool:
    return any(
        segment[1] == marker and segment[4:].startswith(name) and len(segment) >= 4 + length
        for marker, name, length in _JPEG_SEGMENTS
    )


def _gif(content: bytes) -> bytes:
    at = 13 + (3 * 2 ** ((content[10] & 7) + 1) if content[10] & 0x80 else 0)
    head, control = content[:at], b""
    while content[at] != 0x2C:  # the first image
        if content[at] == 0x3B:
            return content
        if content[at] != 0x21:
            at += 1
            continue
        start, at = at, at + 2
        while size := content[at]:
            at += 1 + size
        at += 1
        if content[start + 1] == 0xF9:  # its transparent colour
            control = content[start:at]
    return head + control + content[at:]


def _webp(content: bytes) -> bytes:
    chunks: dict[int, tuple[bytes, bytes]] = {}
    at, flags, seen = 12, 0, set()
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        chunk = content[at : at + 8 + size]
        if len(chunk) < 8 + size:
            if name in _WEBP_IMAGE:
                return content
            break
        if name in _WEBP_IMAGE or (name in _WEBP_METADATA and name not in seen):
            chunks[at] = name, chunk + bytes(size % 2)
            flags |= _WEBP_METADATA.get(name, 0)
        seen.add(name)
        at += 8 + size + size % 2
    if not chunks:
        return content
    at, (name, first) = next(iter(chunks.items()))
    if name == b"VP8X":
        chunks[at] = name, first[:8] + bytes([first[8] & ~_WEBP_METADATA_FLAGS | flags]) + first[9:]
    else:  # the simple form, which has no metadata
        chunks = {at: chunks[at]}
    body = b"WEBP" + b"".join(chunk for _, chunk in chunks.values())
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def _tiff(content: bytes) -> bytes:
    """Remove tags from the first directory, in its place, because all other data is found by its offset."""
    order: Literal["little", "big"] = "little" if content[:1] == b"I" else "big"
    is_big = 43 in content[2:4]
    offset_size, count_size, entry_size = (8, 8, 20) if is_big else (4, 2, 12)
    first = int.from_bytes(content[offset_size : 2 * offset_size], order)
    start = first + count_size
    count = int.from_bytes(content[first:start], order)
    end = start + count * entry_size
    if count > _MAX_TIFF_TAGS or end > len(content):
        return content
    entries = [content[at : at + entry_size] for at in range(start, end, entry_size)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in _TIFF_TAGS]
    following = content[end : end + offset_size]
    directory = len(kept).to_bytes(count_size, order) + b"".join(kept) + following
    unused = bytes((len(entries) - len(kept)) * entry_size)
    return content[:first] + directory + unused + content[end + len(following) :]


_REDUCERS: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType(
    {"PNG": _png, "JPEG": _jpeg, "GIF": _gif, "WebP": _webp, "TIFF": _tiff}
)
