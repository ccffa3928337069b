"""Images as text: what browsers accept as a data: URL or as base64, and the advice for everything else."""

import base64
import re
from urllib.parse import quote, quote_from_bytes

import pytest

from app.errors import NotAnImageError
from app.images.data_urls import is_data_url, read_image_text
from tests.conftest import picture

# Its base64 contains + and /, and needs padding.
IMAGE = next(
    picture((0, 60, 0), (width, 3)) + tail
    for width in range(1, 200)
    for tail in (b"\xfb\xef\xff", b"\xfb\xef\xff1", b"\xfb\xef\xff12")
    if len(picture((0, 60, 0), (width, 3)) + tail) % 3 == 1
)
TEXT = base64.b64encode(IMAGE).decode()
WRAPPED = "\r\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76))


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        WRAPPED,
        f"\ufeff {WRAPPED}\n",
        f"data:image/png;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f" \n\tdata:image/png;base64,{TEXT} \n",
        f"da\nta:image/png;ba\tse64,{WRAPPED}",
        f"data:;base64,{TEXT}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{TEXT}",
        f"data:image/png; base64 ,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64, {quote(TEXT, safe='')}",
        f"data:image/png;base64,{quote(WRAPPED)}",
        f"data:image/png;base64,{TEXT}#fragment",
        f"data:image/png,{quote_from_bytes(IMAGE, safe='')}",
        f"data:,{quote_from_bytes(IMAGE)}",
    ],
    ids=lambda text: text[:40],
)
def test_an_image_is_read_as_a_browser_reads_it(text):
    assert read_image_text(text) == IMAGE


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (base64.urlsafe_b64encode(IMAGE).decode(), "URL-safe alphabet; replace - by + and _ by /"),
        (f"data:image/png;base64,{base64.urlsafe_b64encode(IMAGE).decode()}", "URL-safe alphabet"),
        (f"data:image/png,{TEXT}", "write ;base64 before its comma"),
        (f"data:image/png;base64{TEXT}", "no comma"),
        (f"data:image/png;base64;charset=utf-8,{TEXT}", "write ;base64 before its comma"),
        (TEXT[:-3], "send the complete text"),
        (f"{TEXT}=", "padding"),
        ("https://example.com/a.jpg", "it is a URL"),
        ("&&&&", "characters other than"),
        (f"b'{TEXT}'", "characters other than"),
        (f'"{TEXT}"', "characters other than"),
        (f"{TEXT}é", "characters other than"),
    ],
    ids=lambda text: text[:40],
)
def test_every_other_text_is_refused_with_advice(text, advice):
    with pytest.raises(NotAnImageError, match=re.escape(advice)) as caught:
        read_image_text(text)
    assert len(str(caught.value)) < 200


def test_percent_signs_that_encode_nothing_stay():
    assert read_image_text("data:,100%%41%4%zz%") == b"100%A%4%zz%"


def test_the_scheme_is_recognised_however_it_is_written():
    assert all(map(is_data_url, ("data:", "DaTa:,", "\x00 \n data:,", "d\na\tta:")))
    assert not any(map(is_data_url, ("", "data", "dat a:", "/data:", "mydata:,", "data.png")))
