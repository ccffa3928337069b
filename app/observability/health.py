"""Whether the process can do its work: liveness and readiness."""

from collections.abc import Awaitable, Callable, Sequence

from app.errors import NotReadyError


class Health:
    """Answers the probes of an orchestrator.

    Args:
        problems: each returns why a part cannot do its work, None if it can.
        background_problem: returns why work in the background does not go on. It does not concern liveness, because a
            restart would end requests that are answered.
        ping: raises ``StoreError`` if the database cannot be reached.
    """

    def __init__(
        self,
        problems: Sequence[Callable[[], str | None]],
        background_problem: Callable[[], str | None],
        ping: Callable[[], Awaitable[None]],
    ) -> None:
        self._problems = problems
        self._background_problem = background_problem
        self._ping = ping
        self._is_draining = False

    def begin_draining(self) -> None:
        """Report not ready from now on, because the process will stop; requests are still answered."""
        self._is_draining = True

    def check_alive(self) -> None:
        """Raise ``NotReadyError`` if a part cannot do its work."""
        for find_problem in self._problems:
            if (problem := find_problem()) is not None:
                raise NotReadyError(problem)

    async def check_ready(self) -> None:
        """Raise as ``check_alive``, ``NotReadyError`` while draining, ``StoreError`` without the database."""
        if self._is_draining:
            raise NotReadyError("the service is stopping; ask another instance")
        self.check_alive()
        if (problem := self._background_problem()) is not None:
            raise NotReadyError(problem)
        await self._ping()
