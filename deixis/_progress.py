"""A bar on the terminal: rich's where it is installed, else one line."""

import sys
from types import TracebackType
from typing import Any, Self


class Bar:
    """Shows how far something is, on standard error, and only where that is a terminal.

    Args:
        title: what is going on.
        shown: else it shows nothing.
    """

    def __init__(self, title: str, *, shown: bool) -> None:
        self._title = title
        self._shown = shown and sys.stderr.isatty()
        self._rich: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            try:
                from rich.console import Console  # noqa: PLC0415 - may not be there
                from rich.progress import Progress  # noqa: PLC0415
            except ImportError:
                return self
            self._rich = Progress(console=Console(stderr=True))
            self._rich.start()
            self._task = self._rich.add_task(self._title, total=None)
        return self

    def show(self, done: int, total: int | None) -> None:
        """Show that so much is done."""
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
