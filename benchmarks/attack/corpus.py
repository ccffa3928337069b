"""Images that attack a decoder: mutations of every format, and constructed files."""

import io
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, features

Mutation = Callable[[bytes, random.Random], bytes]


def seeds() -> dict[str, bytes]:
    """Return a small image in each supported format, mode and encoding."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    rgb = Image.fromarray(pixels)
    frames = [Image.fromarray(np.roll(pixels, 8 * step, axis=1)) for step in range(1, 5)]

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    found = {
        "jpeg": saved(rgb, "JPEG"),
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg grey": saved(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg exif": saved(rgb, "JPEG", exif=_exif(6)),
        "png": saved(rgb, "PNG"),
        "png alpha": saved(rgb.convert("RGBA"), "PNG"),
        "png palette": saved(rgb.convert("P"), "PNG", transparency=0),
        "png one bit": saved(rgb.convert("1"), "PNG"),
        "png 16 bit": saved(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
        "gif": saved(rgb.convert("P"), "GIF"),
        "gif animated": saved(rgb.convert("P"), "GIF", save_all=True, append_images=[f.convert("P") for f in frames]),
        "tiff": saved(rgb, "TIFF"),
        "tiff lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff pages": saved(rgb, "TIFF", save_all=True, append_images=frames),
        "bmp": saved(rgb, "BMP"),
        "bmp palette": saved(rgb.convert("P"), "BMP"),
        "ppm": saved(rgb, "PPM"),
    }
    if features.check("webp"):
        found["webp"] = saved(rgb, "WEBP")
        found["webp lossless"] = saved(rgb.convert("RGBA"), "WEBP", lossless=True)
        found["webp animated"] = saved(rgb, "WEBP", save_all=True, append_images=frames)
    if features.check("avif"):
        found["avif"] = saved(rgb, "AVIF")
    return found


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20, 100))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flipped_head(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(len(changed), 128))] = rng.randrange(256)
    return bytes(changed)


def _false_numbers(data: bytes, rng: random.Random) -> bytes:
    """Write a very large, zero or negative number into the header."""
    value = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\xff\xff", b"\0\0"))
    at = rng.randrange(4, min(len(data), 200))
    return data[:at] + value + data[at + len(value) :]


def _overwritten(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    length = rng.randint(1, 64)
    return data[:at] + bytes([rng.choice((0, 255, 65))]) * length + data[at + length :]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    piece = data[begin : begin + rng.randint(1, 400)]
    return data[:begin] + piece * rng.randint(2, 50) + data[begin:]


def _removed(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 64) :]


def _shuffled(data: bytes, rng: random.Random) -> bytes:
    edges = sorted(rng.sample(range(len(data)), min(4, len(data))))
    pieces = [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]
    kept, moved = pieces[:1], pieces[1:]
    rng.shuffle(moved)
    return b"".join(kept + moved)


MUTATIONS: dict[str, Mutation] = {
    "cut": _cut,
    "bits flipped": _flipped,
    "head changed": _flipped_head,
    "false numbers": _false_numbers,
    "overwritten": _overwritten,
    "repeated": _repeated,
    "removed": _removed,
    "shuffled": _shuffled,
}


def mutants(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield mutated images with their descriptions; the same seed gives the same images."""
    rng = random.Random(seed)
    originals = seeds()
    for number in range(count):
        kind = list(originals)[number % len(originals)]
        mutation = list(MUTATIONS)[(number // len(originals)) % len(MUTATIONS)]
        data = MUTATIONS[mutation](originals[kind], rng)
        if rng.random() < 0.2:
            data = rng.choice(list(MUTATIONS.values()))(data or b"\0" * 5, rng) if len(data) > 5 else data
        yield f"{kind}, {mutation}", data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, data: bytes | None = None, colour: int = 0) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    body = zlib.compress(bytes((width + 1) * height), 9) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """Return this number of zeros, compressed, without allocating them."""
    packer = zlib.compressobj(9)
    pieces = [packer.compress(bytes(2**20)) for _ in range(count // 2**20)]
    return b"".join([*pieces, packer.compress(bytes(count % 2**20)), packer.flush()])


def _tiff(entries: Sequence[tuple[int, int, int, int]], next_ifd: int = 0, tail: bytes = b"") -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", next_ifd) + tail


def _progressive(scans: int) -> bytes:
    """Return a JPEG of 5000 x 5000 pixels with many empty scans."""
    whole = seeds()["jpeg progressive"]
    at = whole.index(b"\xff\xc2")
    sized = whole[: at + 5] + struct.pack(">HH", 5000, 5000) + whole[at + 9 :]
    scan = sized[sized.index(b"\xff\xda") : sized.index(b"\xff\xda", sized.index(b"\xff\xda") + 2)]
    return sized[:-2] + scan * scans + sized[-2:]


def _resized_jpeg(width: int, height: int) -> bytes:
    whole = seeds()["jpeg"]
    at = whole.index(b"\xff\xc0")
    return whole[: at + 5] + struct.pack(">HH", height, width) + whole[at + 9 :]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("evil.html", "<script>alert(1)</script>" * 1000)
    return file.getvalue()


def _gif(frames: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", 500, 500, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x01\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b";"


def hostile_images() -> dict[str, bytes]:
    """Return decompression bombs, false sizes, polyglots, and other files that are not images."""
    jpeg, png, gif = seeds()["jpeg"], seeds()["png"], seeds()["gif"]
    bomb = _zeros(200 * 2**20)
    return {
        "png of 60,000 x 60,000": _png(60_000, 60_000, data=_zeros(60_000 * 60)),
        "empty png of 7,000 x 7,000": _png(7_000, 7_000),
        "png of 2^31 x 1": _png(2**31 - 1, 1, data=b""),
        "png of 0 x 0": _png(0, 0, data=b""),
        "png with 200 MB after its pixels": _png(8, 8, data=bomb),
        "png with a profile of 200 MB": _png(8, 8, _chunk(b"iCCP", b"x\0\0" + bomb)),
        "png with a text of 200 MB": _png(8, 8, _chunk(b"zTXt", b"x\0\0" + bomb)),
        "png with a translation of 200 MB": _png(8, 8, _chunk(b"iTXt", b"x\0\1\0\0\0" + bomb)),
        "png with 5,000 texts": _png(8, 8, *[_chunk(b"tEXt", b"k%d\0v" % n) for n in range(5000)]),
        "png with an invalid profile": _png(8, 8, _chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile")), colour=0),
        "jpeg of 65,535 x 65,535": _resized_jpeg(65_535, 65_535),
        "jpeg of 7,000 x 7,000 with little data": _resized_jpeg(7_000, 7_000),
        "jpeg with 45 scans of 25 MP": _progressive(35),
        "jpeg with 1,000 scans": _progressive(1_000),
        "jpeg with 10,000 comments": jpeg[:2] + b"\xff\xfe\0\x04hi" * 10_000 + jpeg[2:],
        "jpeg with circular exif": jpeg[:2]
        + _app1(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0")
        + jpeg[2:],
        "jpeg with an invalid orientation": jpeg[:2] + _app1(b"Exif\0\0" + _exif(77)[6:]) + jpeg[2:],
        "gif of 65,535 x 65,535": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif of 20,000 frames": _gif(20_000),
        "tiff of 2^31 x 2^31": _tiff(
            [(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 8)]
        ),
        "tiff with circular directories": _tiff([(256, 4, 1, 8), (257, 4, 1, 8), (273, 4, 1, 8)], next_ifd=8),
        "tiff with a million strips": _tiff(
            [(256, 4, 1, 8), (257, 4, 1, 1_000_000), (278, 4, 1, 1), (273, 4, 1_000_000, 200)]
        ),
        "tiff of a tile of 40,000 x 40,000": _tiff(
            [(256, 4, 1, 8), (257, 4, 1, 8), (322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 8)]
        ),
        "ppm of 10^9 x 10^9": b"P6 1000000000 1000000000 255\n",
        "ppm with an endless number": b"P6 " + b"9" * 100_000,
        "bmp of -2^31 rows": b"BM"
        + bytes(8)
        + struct.pack("<IIiiHHIIiiII", 54, 40, 8, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        "webp with a false size": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(32),
        "avif with nested boxes": struct.pack(">I", 32)
        + b"ftypavif"
        + bytes(20)
        + (struct.pack(">I", 16) + b"meta") * 5000,
        "jpeg and zip": jpeg + _zip(),
        "gif and script": gif[:-1] + b"\x21\xfe\x1c/*<script>alert(1)</script>*/\0;",
        "png and page": png + b"<html><script>alert(1)</script></html>",
        "pdf with a jpeg header": jpeg[:20] + b"%PDF-1.7\n" + bytes(500),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "svg with entities": b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 1000 + b'">]><svg>' + b"&a;" * 1000 + b"</svg>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file pop\n",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        "zip": _zip(),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "icon": b"\0\0\x01\0\x01\0" + struct.pack("<BBBBHHII", 8, 8, 0, 0, 1, 32, 2**31, 22),
        "empty": b"",
        "one byte": b"\xff",
        "zeros": bytes(100_000),
        "noise": random.Random(1).randbytes(100_000),
        "signature of a png": b"\x89PNG\r\n\x1a\n",
        "signature of a jpeg": b"\xff\xd8\xff",
        "pickle": pickle.dumps(print),
    }


def _app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
