import os
import re

import pytest

from app.runtime.file_names import file_text, printable


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        (b"caf\\xe9.jpg", r"caf\x5cxe9.jpg"),
        (b"caf\\x5cxe9.jpg", r"caf\x5cx5cxe9.jpg"),
        ("café 猫\u3000\U0001f408.jpg".encode(), "café 猫\u3000\U0001f408.jpg"),
        (rb"back\slash\xyz\x5", r"back\slash\xyz\x5"),
        (b"a\n\x1b", "a\n\x1b"),
    ],
)
def test_the_text_of_a_name_can_be_turned_back_into_the_name(name, text):
    assert file_text(os.fsdecode(name)) == text
    text.encode("utf-8", "strict")
    restored = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text.encode())
    assert restored == name


def test_text_for_a_terminal_has_no_controls():
    assert printable("a\x1b[31m\n\u202e\x9b\udce9\ud800 猫\u3000\u200d") == (
        r"a\x1b[31m\n\u202e\x9b\xe9\ud800" + " 猫\u3000\u200d"
    )
