"""Reads the fields ``class`` of forms: one class per image, or several."""

import json
from collections.abc import Sequence

from app.errors import InvalidFieldError
from app.names.class_names import indices_of


def read_classes(given: Sequence[str], images: int, classnames: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the classes of each image as the label set spells them; none for unlabelled images.

    Args:
        given: the values of the field: none, one for all images, or one for each. Each is a class, empty, or a JSON
            array of classes. Of a single image, all values are classes of it.
        images: their number.
        classnames: of the label set.

    Raises:
        InvalidFieldError: another number of values, or a value that is not a JSON array of strings.
        UnknownNameError: the label set has no such class.
    """
    if not given:
        return [()] * images
    listed = [_listed(value, classnames) for value in given]
    if images == 1:
        listed = [[name for names in listed for name in names]]
    if len(listed) not in {1, images}:
        raise InvalidFieldError.of(
            "class",
            f"{images} images and {len(given)} classes are given; send one class for all, one for each image, or none;"
            ' several classes of an image are a JSON array: ["cat", "sofa"]',
        )
    if len(given) == 1 and images > 1 and not listed[0]:
        raise InvalidFieldError.of("class", "is empty; leave it out for unlabelled images")
    indices = iter(indices_of([name for names in listed for name in names], classnames))
    found = [tuple(dict.fromkeys(classnames[next(indices)] for _ in names)) for names in listed]
    return found * images if len(found) == 1 else found


def _listed(value: str, classnames: Sequence[str]) -> list[str]:
    """Return the classes that a value names; one in brackets is a JSON array, unless a class has that name."""
    if not value.strip():
        return []
    if not value.lstrip().startswith("[") or value.strip() in classnames:
        return [value]
    try:
        names = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidFieldError.of("class", f"'{value[:200]}' is not a JSON array of class names: {error}") from error
    if not (isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)):
        raise InvalidFieldError.of("class", f"'{value[:200]}' is not a JSON array of class names, each a text")
    distinct = list(dict.fromkeys(names))
    if len(distinct) > len(classnames):
        problem = f"a JSON array has {len(distinct):,} classes, and the label set {len(classnames):,}"
        raise InvalidFieldError.of("class", f"{problem}; give each class of an image once")
    return distinct
