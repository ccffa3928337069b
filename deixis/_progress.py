"""A progress bar on the terminal: that of rich if it is installed, else a line of text."""

import sys
from types import TracebackType
from typing import Any, Self


class ProgressBar:
    """Shows progress on standard error if that is a terminal.

    Args:
        title: the text before the bar.
        shown: if false, nothing is shown.
    """

    def __init__(self, title: str, *, shown: bool) -> None:
        self._title = title
        self._shown = shown and sys.stderr.isatty()
        self._rich: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            try:
                from rich.console import Console  # noqa: PLC0415 - an optional dependency
                from rich.progress import Progress  # noqa: PLC0415
            except ImportError:
                return self
            self._rich = Progress(console=Console(stderr=True))
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=None)
        return self

    def show(self, done: int, total: int | None) -> None:
        """Show how many steps are done; ``total`` is None or 0 if it is unknown."""
        if self._rich is not None:
            self._rich.update(self._task, completed=done, total=total or None)
        elif self._shown:
            sys.stderr.write(f"\r{self._title}: {done}{f' of {total}' if total else ''}")
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._shown:
            sys.stderr.write("\n")
