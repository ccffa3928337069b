"""Runs `deixis` with the names of its Python threads in /proc: `python -m benchmarks.named_threads serve`.

Python 3.14 does so by itself. Threads of libraries keep the name of the process.
"""

import threading
from contextlib import suppress
from pathlib import Path

from deixis.__main__ import main


def name_threads() -> None:
    """Give each thread that starts from now on its name."""
    run = threading.Thread.run

    def named_run(thread: threading.Thread) -> None:
        with suppress(OSError):
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(thread.name, encoding="utf-8")
        run(thread)

    threading.Thread.run = named_run  # type: ignore[method-assign]


if __name__ == "__main__":
    name_threads()
    main()
