"""Label hierarchies: classes with a parent form a forest, whose inner labels need not be classes themselves."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from app.errors import FieldProblem, InvalidFieldError
from app.names.text import quoted
from app.types import ClassEntry

SEPARATOR = "|"
"""Between the levels of a parent that is a path."""

_MAX_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Forest:
    """The labels of a hierarchy.

    ``names`` are the classes in their order, then the labels that are no classes. ``parents`` are indices of names, -1
    for a root. ``order`` are the indices of the classes, so that the classes at or below each label are neighbours:
    from ``starts`` to before ``ends`` in it. ``children`` are the labels below each one, and ``roots`` those below
    none.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    order: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]
    roots: tuple[int, ...]


def forest_of(classes: Sequence[ClassEntry], known: int = 0) -> Forest | None:
    """Return the hierarchy of classes with clean names; None if no class has a parent.

    A parent is the name of a class, or of a label that is no class, or a path of labels from a root to the parent.

    Args:
        classes: of a label set.
        known: how many of the first ones are stored already, and not part of the request.

    Raises:
        InvalidFieldError: a label is below itself, or has two parents, or a path has an empty level.
    """
    if all(entry.parent is None for entry in classes):
        return None
    names = [entry.name for entry in classes]
    index_of = {name.lower(): index for index, name in enumerate(names)}
    parents = [-1] * len(names)
    givers = [-1] * len(names)  # the classes whose field says what the parent is
    problems: list[tuple[int, str]] = []
    for index, entry in enumerate(classes):
        lower, levels = index, _levels(entry.parent, index_of)
        if not all(levels):
            problem = f"{quoted(entry.parent or '')} has an empty level; write one name between two '{SEPARATOR}'"
            problems.append((index, problem))
            continue
        for level in reversed(levels):
            upper = index_of.setdefault(level.lower(), len(names))
            if upper == len(names):
                names.append(level)
                parents.append(-1)
                givers.append(-1)
            if parents[lower] not in {-1, upper}:
                both = f"{quoted(names[parents[lower]])} and {quoted(names[upper])}"
                problem = f"{quoted(names[lower])} has two parents, {both}; a label has at most one"
                problems.append((index, problem))
                break
            if parents[lower] == -1:
                parents[lower], givers[lower] = upper, index
            lower = upper
    problems += [(max(givers[label] for label in cycle), problem) for cycle, problem in _cycles(parents, names)]
    if problems:
        raise InvalidFieldError(
            [FieldProblem(f"classes.{max(index - known, 0)}.parent", problem) for index, problem in problems]
        )
    return _arranged(names, parents, len(classes))


def without_class(classes: Sequence[ClassEntry], name: str) -> tuple[ClassEntry, ...]:
    """Return the classes without one; each label stays below those that it was below.

    What only the removed class said of the labels above, a class that remains below them says instead.
    """
    known = {entry.name.lower() for entry in classes}
    chains = {entry.name: [entry.name, *reversed(_levels(entry.parent, known))] for entry in classes}
    above: dict[str, str] = {}
    said: set[str] = set()  # labels whose parent a remaining class gives
    for entry_name, chain in chains.items():
        for lower, upper in pairwise(chain):
            above.setdefault(lower.lower(), upper)
            if entry_name != name:
                said.add(lower.lower())
    remaining = []
    for entry in classes:
        if entry.name == name:
            continue
        label = chains[entry.name][-1]
        levels = [] if entry.parent is None else [entry.parent]
        while label.lower() in above and label.lower() not in said:
            said.add(label.lower())
            label = above[label.lower()]
            levels.insert(0, label)
        remaining.append(replace(entry, parent=SEPARATOR.join(levels) or None))
    return tuple(remaining)


def _levels(parent: str | None, known: Iterable[str]) -> list[str]:
    if parent is None:
        return []
    if parent.lower() in known:  # a name may contain the separator
        return [parent]
    return [level.strip() for level in parent.split(SEPARATOR)]


def _cycles(parents: Sequence[int], names: Sequence[str]) -> Iterator[tuple[list[int], str]]:
    """Yield the labels of each cycle, and what is wrong."""
    done: set[int] = set()
    for first in range(len(parents)):
        path: dict[int, None] = {}
        index = first
        while index >= 0 and index not in done and index not in path:
            path[index] = None
            index = parents[index]
        if index in path:
            cycle = list(path)[list(path).index(index) :]
            if len(cycle) == 1:
                yield cycle, f"{quoted(names[index])} is its own parent; remove the parent, or name another one"
            else:
                shown = [quoted(names[each]) for each in cycle[:_MAX_SHOWN]]
                more = ["..."] if len(cycle) > _MAX_SHOWN else []
                listed = " is below ".join([*shown, *more, quoted(names[index])])
                yield cycle, f"the parents form a cycle: {listed}; remove one of these parents"
        done.update(path)


def _arranged(names: Sequence[str], parents: Sequence[int], classes: int) -> Forest:
    children: list[list[int]] = [[] for _ in names]
    roots: list[int] = []
    # Labels come in the order of their first classes.
    arranged: set[int] = set()
    for index in range(classes):
        label = index
        while label >= 0 and label not in arranged:
            arranged.add(label)
            parent = parents[label]
            (roots if parent < 0 else children[parent]).append(label)
            label = parent
    order: list[int] = []
    starts, ends = [0] * len(names), [0] * len(names)
    # Without recursion, because a hierarchy may have ten thousand levels.
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        index, left = stack.pop()
        if left:
            ends[index] = len(order)
            continue
        starts[index] = len(order)
        if index < classes:
            order.append(index)
        stack.append((index, True))
        stack += [(child, False) for child in reversed(children[index])]
    return Forest(
        tuple(names),
        tuple(parents),
        tuple(order),
        tuple(starts),
        tuple(ends),
        tuple(map(tuple, children)),
        tuple(roots),
    )
