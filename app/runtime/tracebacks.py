"""Tracebacks of errors that are kept."""


def drop_tracebacks(error: BaseException) -> None:
    """Remove the tracebacks of an error, and of the errors that led to it.

    Tracebacks refer to frames, and frames may refer to tasks and futures that hold the error. Such cycles would keep
    the images of a request in memory until a garbage collection.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        current.__traceback__ = None
        pending += [current.__cause__, current.__context__]
