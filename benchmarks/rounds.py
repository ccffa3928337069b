"""Measures several things in short alternating rounds, and refuses rounds in which other processes used the cores.

The speed of a shared machine changes from minute to minute. So things are compared within a round, in which they follow
each other, and a ratio is the median over the rounds, with the lowest and the highest. A round with a load by others is
repeated; if too many were, there is no ratio.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from app.runtime.cpu import OtherProcesses
from benchmarks.processes import about_this_run, cpu_s, say

MAX_CPU_BY_OTHERS = 0.1
"""Share of the usable cores; above it, a round is refused."""

BUSY = "busy"
_PAUSE_S = 2.0

Figures = dict[str, Any]
Round = Mapping[str, Figures]


@dataclass(frozen=True)
class Part:
    """One of the things that are measured in turns.

    Args:
        measure: takes some seconds, and returns figures.
        processes: do the work, with their child processes. All others disturb it, and so does a server or an encoder
            whose turn it is not.
    """

    measure: Callable[[], Figures]
    processes: Collection[int]


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """The rounds that count, the number of those that were wanted, and of those that were refused."""

    wanted: int
    accepted: Sequence[Round]
    refused: int

    @property
    def is_busy(self) -> bool:
        """Whether other processes used the machine in too many rounds."""
        return len(self.accepted) < self.wanted

    def spread(self, part: str, figure: str, over: tuple[str, str] | None = None) -> Spread | None:
        """Return the spread of a figure, or of its ratio to another one of the same round; None if it was busy.

        Args:
            part: name of the part.
            figure: its name; keys of nested figures are separated by a slash.
            over: part and figure of the denominator.
        """
        if self.is_busy:
            return None
        values = [_value(each, part, figure) / (1 if over is None else _value(each, *over)) for each in self.accepted]
        return Spread(*(round(value, 4) for value in (median(values), min(values), max(values))))

    def with_best_way(self, part: str) -> "Rounds":
        """Return the rounds with the figures of the fastest way only, of a part that measures several ways."""
        if self.is_busy:
            return self
        rates = {
            way: median(each[part]["ways"][way]["images_per_s"] for each in self.accepted)
            for way in self.accepted[0][part]["ways"]
        }
        best = max(rates, key=rates.__getitem__)
        accepted = [{**each, part: {**each[part], **each[part]["ways"][best], "way": best}} for each in self.accepted]
        return Rounds(self.wanted, accepted, self.refused)


def _value(each: Round, part: str, figure: str) -> float:
    found: Any = each[part]
    for key in figure.split("/"):
        found = found[key]
    return float(found)


def watch_others(processes: Collection[int]) -> Callable[[], float | None]:
    """Return a function that returns the share of the cores that all but these processes used since; None: unknown."""
    return OtherProcesses(own_s=lambda: time.process_time() + cpu_s(processes)).share


def alternate(
    parts: Mapping[str, Part],
    rounds: int,
    *,
    watch: Callable[[Collection[int]], Callable[[], float | None]] = watch_others,
    pause_s: float = _PAUSE_S,
    max_cpu_by_others: float = MAX_CPU_BY_OTHERS,
) -> Rounds:
    """Measure the parts in turns, until ``rounds`` rounds count or twice as many were refused.

    Args:
        parts: by name, in the order of a round.
        rounds: number of rounds.
        watch: see ``watch_others``.
        pause_s: wait after a refused round.
        max_cpu_by_others: share of the usable cores above which a round is refused.
    """
    accepted: list[Round] = []
    refused = 0
    while len(accepted) < rounds and refused < 2 * rounds:
        figures: dict[str, Figures] = {}
        for name, part in parts.items():
            share_of_others = watch(part.processes)
            figures[name] = part.measure()
            share = share_of_others()
            if share is not None and share > max_cpu_by_others:
                say(f"refused a round: other processes used {share:.0%} of the cores during '{name}'")
                refused += 1
                time.sleep(pause_s)
                break
            figures[name]["cpu_by_others"] = share
        else:
            accepted.append(figures)
    return Rounds(rounds, accepted, refused)


def cell(spread: Spread | None, digits: int = 2) -> str:
    """Return a cell of a table: the median, with the lowest and the highest."""
    if spread is None:
        return BUSY
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows)]


def write_results(name: str, found: Figures, text: str, folder: Path) -> Path:
    """Write the figures as JSON and the report as Markdown; return their path without a suffix."""
    about = about_this_run()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{about['date']}-{name}"
    content = json.dumps({**about, **found}, indent=1, default=asdict)
    stem.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    machine = about["machine"]
    head = f"# {about['date']}, commit {about['commit']}, {machine['processor']}, {machine['cores']} cores\n\n"
    stem.with_suffix(".md").write_text(head + text, encoding="utf-8")
    return stem


def end_if_busy(found: Iterable[Figures]) -> None:
    """End the program with status 1 if the machine was busy in one of the measurements."""
    if any(each["is_busy"] for each in found):
        sys.exit("other processes used the cores too often for the ratios of the cells with 'busy'; run this again")
