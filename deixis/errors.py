"""The errors of the client."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deixis.answers import Problem

# Problems with the images of a request, including their total size, rather than with its other fields.
_IMAGE_PROBLEMS = frozenset(
    {"not-an-image", "image-too-large", "image-not-fetched", "body-too-large", "unsupported-media-type"}
)


class ClientError(Exception):
    """The base class of all errors of this package."""


class UnreachableError(ClientError):
    """No response arrived, even after retries: the server does not run, the network fails, or it is too slow."""


class InvalidNameError(ClientError, ValueError):
    """A name cannot be part of a URL; the request is not sent."""


class ProblemError(ClientError):
    """The service refused a request, or failed while it handled it.

    Args:
        problem: the error of the response, as RFC 9457 problem details.
        retry_after_s: the seconds to wait before a retry, if the service returned them.
    """

    def __init__(self, problem: "Problem", retry_after_s: float | None = None) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    @property
    def kind(self) -> str:
        """The kind of problem, such as ``invalid-field``; docs/problems.md explains each kind."""
        return self.problem.kind

    @property
    def is_about_images(self) -> bool:
        """Whether only the images are refused, so that each of them may still succeed in a request of its own."""
        fields = [error.get("field", "") for error in self.problem.errors or ()]
        return self.kind in _IMAGE_PROBLEMS or (
            bool(fields) and all(field.startswith(("image.", "images.")) for field in fields)
        )


class JobFailedError(ClientError):
    """A job failed or was cancelled."""
