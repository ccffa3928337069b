"""Labels written as one string."""

import json
import re

from app.errors import InvalidFieldError, MalformedRequestError, TooLargeError
from app.names.class_names import MAX_ITEMS

# Separators of other habits and scripts. Labels may contain them, so they separate only where nothing else does.
_OTHER_SEPARATORS = re.compile("[;|\uff1b\uff0c\uff5c\u3001\u060c\u061b]")

_NEW_LINE = re.compile("\r\n?|\n")


def split_labels(*texts: str) -> list[str]:
    """Return the labels of all texts: each is a JSON array of strings, or labels separated by commas or new lines.

    If all texts would be one label together, it is also split at semicolons, vertical bars, and the commas and
    semicolons of Chinese, Japanese and Arabic. A JSON array is never split further.

    Raises:
        MalformedRequestError: a text begins like a JSON array and cannot be parsed.
        InvalidFieldError: a label is not a string.
        TooLargeError: far more separators than a request may have labels.
    """
    # Counted first, because more of them would take seconds to split; the number of labels is checked afterwards.
    if sum(text.count(",") + text.count("\n") + text.count("\r") for text in texts) > MAX_ITEMS:
        raise TooLargeError(f"labels have more than {MAX_ITEMS:,} commas and new lines; send fewer labels")
    labels = [label for text in texts for label in _labels_of(text)]
    if len(labels) == 1 and not _is_array(texts[0]):
        return _OTHER_SEPARATORS.split(labels[0], MAX_ITEMS)
    return labels


def _is_array(text: str) -> bool:
    return text.lstrip().startswith("[")


def _labels_of(text: str) -> list[str]:
    if not _is_array(text):
        lines = [line for line in _NEW_LINE.split(text) if line.strip()]
        if len(lines) > 1:  # a comma at the end of a line separates no further label
            lines = [line.rstrip().removesuffix(",") for line in lines]
        return [label for line in lines for label in line.split(",")] or [text]
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"labels begin with '[' but are not a JSON array: {error}") from error
    if not all(isinstance(label, str) for label in labels):
        raise InvalidFieldError.of("labels", "every label must be a string")
    return list(labels)
