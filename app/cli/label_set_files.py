"""Label sets as text and CSV: the names of classes, with their parents."""

import csv
import io
from collections.abc import Sequence

from app.cli.csv_output import read_rows, write_rows
from app.errors import InvalidFieldError
from app.names.hierarchy import SEPARATOR, Forest, forest_of
from app.types import ClassEntry

_COLUMNS = ("name", "parent")
_INDENT = "  "


def classes_of_text(text: str, file: str) -> list[ClassEntry]:
    """Return one class per line; lines that are indented below another one are below it in the hierarchy.

    A line with others below it is a label without prompts, and no class. The indentation may have any width.

    Raises:
        InvalidFieldError: a line is indented less than the lines before it, but not as much as one of those above.
    """
    open_levels: list[tuple[int, str]] = []
    labels: list[tuple[str, str | None, bool]] = []  # the name, the path above it, and whether it is a class
    for number, line in enumerate(text.expandtabs(8).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        indent = len(line) - len(line.lstrip())
        closed = [level for level, _ in open_levels if level >= indent]
        if closed and closed[0] != indent:
            problem = f"line {number} is indented by {indent} characters, and none of the lines above it is"
            raise InvalidFieldError.of(file, f"{problem}; indent lines of one level equally")
        open_levels = [(level, above) for level, above in open_levels if level < indent]
        if open_levels and labels[-1][0] == open_levels[-1][1]:
            labels[-1] = (*labels[-1][:2], False)
        labels.append((name, SEPARATOR.join(above for _, above in open_levels) or None, True))
        open_levels.append((indent, name))
    return [ClassEntry(name, parent=parent) for name, parent, is_class in labels if is_class]


def indented_text_of(classes: Sequence[ClassEntry]) -> str:
    """Return the names as ``classes_of_text`` reads them.

    Raises:
        InvalidFieldError: a class is above another one, which such a text cannot say.
    """
    forest = forest_of(classes)
    if forest is None:
        return "".join(f"{entry.name}\n" for entry in classes)
    for index, entry in enumerate(classes):
        if forest.children[index]:
            problem = f"'{entry.name}' is a class with others below it, and an indented line is a label only"
            raise InvalidFieldError.of("--output", f"{problem}; write a file with the suffix .csv or .json")
    lines = []
    stack = [(root, 0) for root in reversed(forest.roots)]
    while stack:
        index, depth = stack.pop()
        lines.append(f"{_INDENT * depth}{forest.names[index]}\n")
        stack += [(child, depth + 1) for child in reversed(forest.children[index])]
    return "".join(lines)


def classes_of_csv(text: str, file: str) -> list[ClassEntry]:
    """Return one class per row, of a table with the columns ``name`` and maybe ``parent``.

    Raises:
        InvalidFieldError: there is no column ``name``, or a row is longer than the header.
    """
    try:
        header, *rows = read_rows(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise InvalidFieldError.of(file, f"is not CSV: {error}") from error
    columns = [cell.strip().lower() for cell in header]
    if "name" not in columns or not set(columns) <= set(_COLUMNS):
        raise InvalidFieldError.of(file, f"has the columns {', '.join(header)}; the first line must be name,parent")
    classes = []
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(columns):
            raise InvalidFieldError.of(file, f"row {number} has {len(row)} cells, and the header {len(columns)}")
        cells = dict(zip(columns, row, strict=False))
        classes.append(ClassEntry(cells.get("name", ""), parent=cells.get("parent", "").strip() or None))
    return classes


def csv_of(classes: Sequence[ClassEntry]) -> str:
    """Return the names and parents as ``classes_of_csv`` reads them.

    A parent is the path to it, or from the nearest class above, whose own row has the rest: names of classes may
    contain the separator.
    """
    forest = forest_of(classes)
    file = io.StringIO(newline="")
    parents = [entry.parent for entry in classes]
    if forest is not None:
        parents = [_parent_in(forest, index, len(classes)) for index in range(len(classes))]
    write_rows(file, [_COLUMNS, *((entry.name, parent or "") for entry, parent in zip(classes, parents, strict=True))])
    return file.getvalue()


def _parent_in(forest: Forest, index: int, classes: int) -> str:
    levels = []
    while (index := forest.parents[index]) >= 0:
        levels.append(forest.names[index])
        if index < classes:
            break
    return SEPARATOR.join(reversed(levels))
