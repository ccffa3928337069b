"""What can go wrong between a program and the service."""

from deixis.answers import Problem


class ClientError(Exception):
    """All errors of this package."""


class UnreachableError(ClientError):
    """There was no answer, also after trying again: no server, no network, or too slow."""


class ProblemError(ClientError):
    """The service refused a request, or failed at it.

    Args:
        problem: what it told, as RFC 9457 has it.
        retry_after_s: when to try again, where it said so.
    """

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    @property
    def kind(self) -> str:
        """The problem's name, such as ``invalid-field``; the service's documentation has a section about each."""
        return self.problem.kind


class JobFailedError(ClientError):
    """A job failed or was cancelled."""
