"""The garbage collector while modules are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collections_paused() -> Iterator[None]:
    """Pause the garbage collector; imports make hundreds of thousands of objects, and hardly any garbage.

    Afterwards the collector never looks at the objects that exist then. They live as long as the process, and each of
    its first collections, and the last one at the exit, would take 0.1 to 0.3 s for them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()
