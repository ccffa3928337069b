"""Files with the labels of images, of which an image may have several: CSV, JSON and COCO annotations."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import InvalidFieldError
from app.names.text import nfc, quoted

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
        pairs = _pairs_of_json(content, str(file))
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


def _pairs_of_json(content: Any, file: str) -> list[tuple[str, list[str]]] | None:
    if not isinstance(content, dict):
        return None
    if {"images", "annotations", "categories"} <= content.keys():
        return _pairs_of_coco(content, file)
    pairs = []
    for path, labels in content.items():
        listed = [labels] if isinstance(labels, str) else labels
        if not (isinstance(listed, list) and all(isinstance(label, str) for label in listed)):
            problem = f"has {_shown(labels)} for {quoted(path)}, which is neither a label nor a list of labels"
            raise InvalidFieldError.of(file, f"{problem}: {_FORMS}")
        pairs.append((path, _cleaned(listed)))
    return pairs


def _pairs_of_coco(content: Mapping[str, Any], file: str) -> list[tuple[str, list[str]]]:
    names = _texts_by_id(content, "categories", "name", file)
    files = _texts_by_id(content, "images", "file_name", file)
    pairs: list[tuple[str, list[str]]] = [(path, []) for path in files.values()]
    for place, annotation in _entries(content, "annotations", ("image_id", "category_id"), file):
        image, category = annotation["image_id"], annotation["category_id"]
        for kind, name, found, given in (
            ("images", "image_id", files, image),
            ("categories", "category_id", names, category),
        ):
            if given not in found:
                problem = (
                    f"annotations.{place} has the {name} {_shown(given)}, which no entry of '{kind}' has as its id"
                )
                raise InvalidFieldError.of(file, f"{problem}; add this entry, or remove the annotation")
        pairs.append((files[image], [names[category]]))
    return pairs


def _texts_by_id(content: Mapping[str, Any], kind: str, field: str, file: str) -> dict[object, str]:
    """Return a text of each entry by the id of the entry."""
    texts: dict[object, str] = {}
    for place, entry in _entries(content, kind, ("id", field), file):
        if entry["id"] in texts:
            raise InvalidFieldError.of(file, f"{kind}.{place} has the id {_shown(entry['id'])} of an earlier entry")
        texts[entry["id"]] = str(entry[field])
    return texts


def _entries(
    content: Mapping[str, Any], kind: str, needed: Sequence[str], file: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the entries of a list of COCO annotations with their places.

    Raises:
        InvalidFieldError: it is not a list, or an entry lacks a field, or its value is neither a number nor a text.
    """
    if not isinstance(content[kind], list):
        raise InvalidFieldError.of(file, f"has {_shown(content[kind])} as '{kind}'; COCO annotations have a list there")
    for place, entry in enumerate(content[kind]):
        for name in needed:
            if not (isinstance(entry, dict) and isinstance(entry.get(name), int | float | str)):
                problem = f"{kind}.{place} has no {name}; COCO annotations need {' and '.join(needed)} in '{kind}'"
                raise InvalidFieldError.of(file, problem)
        yield place, entry


def _shown(value: object) -> str:
    return quoted(value) if isinstance(value, str) else json.dumps(value)[:40]


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
