"""Every error this service raises on purpose, as one tree.

DeixisError
├── ClientError                       the caller can mend it
│   ├── MalformedRequestError         the request cannot be parsed
│   ├── InvalidFieldError             parsed, but a field breaks a rule
│   ├── UnauthenticatedError          a key is needed, and there is none or a wrong one
│   ├── ForbiddenError                the key does not allow this
│   ├── RateLimitedError              the key has used up what it may for now
│   ├── UnknownNameError              nothing of that name: a label set, a model, a job
│   ├── UnknownRouteError             no route of that path
│   ├── ConflictError                 it exists already
│   ├── PreconditionFailedError       If-Match or If-None-Match does not hold
│   ├── TooLargeError                 too many images or labels
│   │   ├── BodyTooLargeError         the request has too many bytes
│   │   └── ImageTooLargeError        one image has too many bytes or pixels
│   ├── NotAnImageError               bytes that no decoder reads as a picture
│   ├── UnreachableImageError         a URL that gave no image
│   ├── UnsupportedMediaTypeError     a content type the route does not take
│   ├── MethodNotAllowedError         the path exists, the HTTP method does not
│   ├── HeadTooLargeError             the request's line and headers have too many bytes
│   └── RequestTimeoutError           the request did not arrive in time
└── ServerError                       the operator can mend it, or time will
    ├── OverloadedError               the queue is full
    ├── NotReadyError                 starting, draining, or a part has failed
    ├── DeadlineExceededError         not done within the request's time
    ├── NotConfiguredError            a setting is missing that this request needs
    ├── StoreError                    the database cannot be reached or is not usable
    ├── ModelUnavailableError         weights cannot be had or are not what they should be
    └── ConfigurationError            a setting that cannot work

Domain code raises these and never HTTP; ``app/api/errors.py`` holds the one table from class to status. Every message
names the bad value, the rule and the way out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Of a name that a caller made up: enough to recognise it, and what exists stays in sight.
_MAX_SHOWN_CHARS = 200


class DeixisError(Exception):
    """An error with a message fit to be shown to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ClientError(DeixisError):
    """The caller sent something that this service refuses."""


class MalformedRequestError(ClientError):
    """The request cannot be parsed at all."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One broken rule: the dotted path of the field and what is wrong with it."""

    field: str
    problem: str


class InvalidFieldError(ClientError):
    """A field was understood and breaks a rule; ``problems`` lists every one found."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        super().__init__("; ".join(f"{p.field}: {p.problem}" if p.field else p.problem for p in problems))
        self.problems = tuple(problems)

    @classmethod
    def of(cls, field: str, problem: str) -> "InvalidFieldError":
        """Return the error for a single field."""
        return cls([FieldProblem(field, problem)])


class HeadTooLargeError(ClientError):
    """The line and the headers of a request have more bytes than are read."""


class RequestTimeoutError(ClientError):
    """The client did not send its request in the time that it has for it."""


class UnauthenticatedError(ClientError):
    """The caller must say who it is, by a key that is known here."""


class ForbiddenError(ClientError):
    """The caller is known, and may not do this."""


class RateLimitedError(ClientError):
    """The caller has used up its share; ``retry_after_s`` is when more is allowed, in whole seconds of at least 1."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownNameError(ClientError):
    """Something was named that does not exist; the message lists what does.

    Args:
        kind: what was looked for, as in ``model`` or ``label set``.
        name: the name that was given.
        known: names that exist; the first twenty are shown, sorted. None where there is no use in listing them.
        way_out: what the caller can do, when a list of names is not enough.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str] | None = None, way_out: str = "") -> None:
        names = sorted(known or ())
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        shown = name if len(name) <= _MAX_SHOWN_CHARS else f"{name[:_MAX_SHOWN_CHARS]}..."
        message = f"unknown {kind} '{shown}'" + ("" if known is None else f"; known: {listed or 'none'}")
        super().__init__(f"{message}; {way_out}" if way_out else message)
        self.kind = kind
        self.name = name


class UnknownRouteError(ClientError):
    """The path is none of the service's."""


class ConflictError(ClientError):
    """The request would make something that exists already."""


class PreconditionFailedError(ClientError):
    """A conditional header does not match the current version."""


class TooLargeError(ClientError):
    """A limit is passed, such as on the images or the labels of a request."""


class BodyTooLargeError(TooLargeError):
    """The request's body has too many bytes."""


class ImageTooLargeError(TooLargeError):
    """One image has too many bytes or pixels, or needs more memory than there is."""


class NotAnImageError(ClientError):
    """The bytes are not a picture that can be decoded whole."""


class UnreachableImageError(ClientError):
    """An image could not be fetched from the URL that was given for it."""


class UnsupportedMediaTypeError(ClientError):
    """The body's content type is not one the route takes."""


class MethodNotAllowedError(ClientError):
    """The route exists under another HTTP method."""


class ServerError(DeixisError):
    """The service cannot answer although the request is sound."""


class OverloadedError(ServerError):
    """The queue is full; ``retry_after_s`` is when it should have drained, in whole seconds of at least 1."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(ServerError):
    """The service is starting, draining, or has lost a part."""


class DeadlineExceededError(ServerError):
    """The request was not done within its time."""


class NotConfiguredError(ServerError):
    """A part that this request needs has not been set up."""


class StoreError(ServerError):
    """The database cannot be reached, or holds a schema newer than this release."""


class ModelUnavailableError(ServerError):
    """A model's weights cannot be had, or are not the ones that were promised."""


class ConfigurationError(ServerError):
    """A setting cannot work; raised at start, never while serving."""
