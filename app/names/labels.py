"""Labels written as one string."""

import json

from app.errors import InvalidFieldError, MalformedRequestError, TooLargeError
from app.names.class_names import MAX_ITEMS


def check_commas(*texts: str) -> None:
    """Refuse labels that would take seconds to split; the number of labels is checked afterwards.

    Raises:
        TooLargeError: more than ``MAX_ITEMS`` commas in all.
    """
    if sum(text.count(",") for text in texts) > MAX_ITEMS:
        raise TooLargeError(f"labels have more than {MAX_ITEMS:,} commas; send fewer labels")


def split_labels(text: str) -> list[str]:
    """Return the labels of one string: a JSON array of strings, or separated by commas.

    Raises:
        MalformedRequestError: it begins like a JSON array and cannot be parsed.
        InvalidFieldError: a label is not a string.
        TooLargeError: far more commas than a request may have labels.
    """
    check_commas(text)
    if not text.lstrip().startswith("["):
        return text.split(",")
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"labels begin with '[' but are not a JSON array: {error}") from error
    if not all(isinstance(label, str) for label in labels):
        raise InvalidFieldError.of("labels", "every label must be a string")
    return list(labels)
