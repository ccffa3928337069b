"""Files with the labels of images, of which an image may have several: CSV, JSON and COCO annotations."""

import csv
import json
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import InvalidFieldError
from app.names.text import nfc

_SEPARATORS = "|;"
_PATH_NAMES = frozenset({"file", "filename", "file_name", "image", "path"})
_LABEL_NAMES = frozenset({"labels", "label", "class", "classes", "tags"})
_FORMS = (
    "a CSV file has the columns file and labels, separated by | or ;, or one row for each label; a JSON file is an"
    ' object such as {"a.jpg": ["cat", "sofa"]}, or COCO annotations with images, annotations and categories'
)


def read_label_file(file: Path) -> dict[str, tuple[str, ...]]:
    """Return the labels of each image by its path, with ``/``; an image may have none.

    - CSV, with a header or without: the path of the image and its labels, separated by ``|`` or ``;``, or a row for
      each label. Columns named ``file`` and ``labels`` (or ``label``, ``class``, ``classes``) are found by name;
      otherwise they are the first two.
    - JSON: an object from the path to a label or an array of labels.
    - COCO annotations (``instances_*.json``): an image has the names of the categories of its annotations.

    Raises:
        InvalidFieldError: the file cannot be read or has none of these forms.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError.of(str(file), f"cannot be read: {error}") from error
    if text.lstrip()[:1] in {"{", "["}:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidFieldError.of(str(file), f"is not JSON: {error}") from error
        pairs = _pairs_of_json(content)
    else:
        pairs = _pairs_of_csv(text)
    if pairs is None:
        raise InvalidFieldError.of(str(file), f"has no labels of images: {_FORMS}")
    found: dict[str, dict[str, None]] = {}
    for path, labels in pairs:
        found.setdefault(nfc(str(PurePosixPath(path))), {}).update(dict.fromkeys(labels))
    if not found:
        raise InvalidFieldError.of(str(file), f"names no image: {_FORMS}")
    return {path: tuple(labels) for path, labels in found.items()}


def _pairs_of_json(content: Any) -> list[tuple[str, list[str]]] | None:
    if not isinstance(content, dict):
        return None
    if {"images", "annotations", "categories"} <= content.keys():
        return _pairs_of_coco(content)
    pairs = []
    for path, labels in content.items():
        listed = [labels] if isinstance(labels, str) else labels
        if not (isinstance(listed, list) and all(isinstance(label, str) for label in listed)):
            return None
        pairs.append((path, _cleaned(listed)))
    return pairs


def _pairs_of_coco(content: Mapping[str, Any]) -> list[tuple[str, list[str]]] | None:
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        pairs: list[tuple[str, list[str]]] = [(path, []) for path in files.values()]
        pairs += [(files[each["image_id"]], [names[each["category_id"]]]) for each in content["annotations"]]
    except (KeyError, TypeError):
        return None
    return pairs


def _pairs_of_csv(text: str) -> list[tuple[str, list[str]]] | None:
    try:
        rows = [row for row in csv.reader(StringIO(text)) if any(cell.strip() for cell in row)]
    except csv.Error:
        return None
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    path_column, label_column = 0, 1
    if header[0] in _PATH_NAMES or any(name in _LABEL_NAMES for name in header):
        path_column = next((index for index, name in enumerate(header) if name in _PATH_NAMES), 0)
        label_column = next((index for index, name in enumerate(header) if name in _LABEL_NAMES), 1)
        rows = rows[1:]
    if any(len(row) <= path_column for row in rows) or not any(len(row) > label_column for row in rows):
        return None
    return [
        (row[path_column].strip(), _cleaned(_split(row[label_column] if len(row) > label_column else "")))
        for row in rows
    ]


def _split(cell: str) -> list[str]:
    for separator in _SEPARATORS[1:]:
        cell = cell.replace(separator, _SEPARATORS[0])
    return cell.split(_SEPARATORS[0])


def _cleaned(labels: Iterable[str]) -> list[str]:
    return [label.strip() for label in labels if label.strip()]
