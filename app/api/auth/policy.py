"""The policy of API keys as settings state it: whether requests need a key, and the notation of rates."""

import re
from enum import StrEnum

from app.errors import InvalidFieldError


class KeyPolicy(StrEnum):
    """Whether requests need a key; ``auto`` requires one as soon as any key exists."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


def parse_rate(text: str | None, field: str) -> str | None:
    """Return a rate in the notation of the ``limits`` library; ``;`` separates several.

    Raises:
        InvalidFieldError: the text is not a rate such as ``60/min`` or ``10/second; 1000/day``.
    """
    if text is None:
        return None
    from limits import parse_many  # noqa: PLC0415 - few settings have rates, and it imports all storages

    rate = re.sub(r"\bmin\b", "minute", re.sub(r"\bsec\b", "second", text.strip()))
    try:
        items = parse_many(rate)
    except ValueError:
        items = []
    if not items or any(item.amount < 1 for item in items):
        raise InvalidFieldError.of(field, f"'{text}' is not a rate; write it as 60/min, or 10/second; 1000/day")
    return rate
