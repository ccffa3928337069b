"""How the names of files become text, in one form for terminals, CSV, JSON, Parquet and requests.

The system allows any bytes in a name. Python represents those that are not UTF-8 by lone surrogates, which no encoder
accepts.
"""

import os
import re

_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
# Characters that control a terminal, end a line or change the direction of text; and lone surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def file_text(path: "str | os.PathLike[str]") -> str:
    r"""Return a path as text, from which the path can be restored.

    Each byte that is not UTF-8 becomes ``\xHH``. A backslash that would look like the start of such an escape becomes
    ``\x5c``. All other paths stay as they are.
    """
    text = _ESCAPE.sub(r"\\x5c", os.fspath(path))
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    r"""Return text for a terminal, in which control characters are escapes such as ``\x1b``, ``\n`` and ``\u202e``."""
    return _CONTROLS.sub(_escaped, text)


def _escaped(found: "re.Match[str]") -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
