"""All errors that this service raises on purpose, as one tree.

DeixisError
├── ClientError                       the caller can fix it
│   ├── MalformedRequestError         the request cannot be parsed
│   ├── InvalidFieldError             parsed, but a field breaks a rule
│   ├── UnauthenticatedError          a key is needed, and there is none or a wrong one
│   ├── ForbiddenError                the key does not allow this
│   ├── CrossSiteError                a page of another site changes the state
│   ├── MisdirectedRequestError       the service does not answer for this host
│   ├── RateLimitedError              the key has used up its quota
│   ├── UnknownNameError              no label set, model or job of that name
│   ├── UnknownRouteError             no route with that path
│   ├── ConflictError                 it exists already
│   ├── PreconditionFailedError       If-Match or If-None-Match does not hold
│   ├── TooLargeError                 too many images or labels
│   │   ├── BodyTooLargeError         the request has too many bytes
│   │   └── ImageTooLargeError        one image has too many bytes or pixels
│   ├── NotAnImageError               bytes that no decoder accepts
│   ├── UnknownImageError             no features are kept under this image id
│   ├── UnreachableImageError         a URL that returned no image
│   ├── UnsupportedMediaTypeError     a content type that the route does not accept
│   ├── MethodNotAllowedError         the path exists, the HTTP method does not
│   ├── HeadTooLargeError             the request line and headers have too many bytes
│   └── RequestTimeoutError           the request did not arrive in time
└── ServerError                       the operator can fix it, or it passes
    ├── OverloadedError               the queue is full
    ├── NotReadyError                 starting, draining, or a part has failed
    ├── DeadlineExceededError         not done before the deadline
    ├── NotConfiguredError            a setting is missing that this request needs
    ├── StoreError                    the database cannot be reached or is not usable
    ├── StatementRefusedError         the database refuses a value or a statement, at every attempt
    ├── ModelUnavailableError         weights are unavailable or not the expected ones
    └── ConfigurationError            a setting that cannot work

Domain code raises these and never HTTP errors; ``app/api/problems.py`` has the only table from class to status. Every
message names the bad value, the rule and the way out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

# Characters shown of an unknown name: enough to recognise it.
_MAX_SHOWN_CHARS = 200
# Limits on the search for a similar name, which a client can request: 2,000 names take at most 10 ms.
_MAX_COMPARED_CHARS = 64
_MAX_COMPARED_NAMES = 2000
_MIN_SIMILARITY = 0.7
# Problems in the message of an invalid request, which may have hundreds of thousands.
_MAX_LISTED_PROBLEMS = 10


class DeixisError(Exception):
    """An error whose message may be shown to the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ClientError(DeixisError):
    """The request is wrong; the caller can fix it."""


class MalformedRequestError(ClientError):
    """The request cannot be parsed at all."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One broken rule: the dotted path of the field and what is wrong with it."""

    field: str
    problem: str


class InvalidFieldError(ClientError):
    """One or more fields break a rule; ``problems`` lists all of them, the message the first and how many more."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        listed = [
            f"{p.field[:_MAX_SHOWN_CHARS]}: {p.problem}" if p.field else p.problem
            for p in problems[:_MAX_LISTED_PROBLEMS]
        ]
        if len(problems) > _MAX_LISTED_PROBLEMS:
            listed.append(f"and {len(problems) - _MAX_LISTED_PROBLEMS:,} more")
        super().__init__("; ".join(listed))
        self.problems = tuple(problems)

    @classmethod
    def of(cls, field: str, problem: str) -> "InvalidFieldError":
        """Return the error for a single field."""
        return cls([FieldProblem(field, problem)])

    def renamed(self, names: Mapping[str, str]) -> "InvalidFieldError":
        """Return the same error for a request in which the fields ``names`` have other paths."""
        paths = [(*problem.field.partition("."), problem.problem) for problem in self.problems]
        return InvalidFieldError(
            [FieldProblem(names.get(first, first) + dot + rest, problem) for first, dot, rest, problem in paths]
        )


class HeadTooLargeError(ClientError):
    """The request line and headers exceed the limit."""


class RequestTimeoutError(ClientError):
    """The client did not send its request in time."""


class UnauthenticatedError(ClientError):
    """The request needs a valid API key."""


class ForbiddenError(ClientError):
    """The API key is valid, but does not allow this."""


class CrossSiteError(ClientError):
    """A page of another site may not change the state of a service without keys."""


class MisdirectedRequestError(ClientError):
    """The service does not answer for the host that the request names."""


class RateLimitedError(ClientError):
    """The key has used up its quota; ``retry_after_s`` is a whole number of seconds, at least 1."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def most_similar(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a name, in upper or lower case; None if none is similar."""
    if len(name) > _MAX_COMPARED_CHARS:
        return None
    spelt = {other.lower(): other for other in islice(known, _MAX_COMPARED_NAMES)}
    found = get_close_matches(name.lower(), spelt, n=1, cutoff=_MIN_SIMILARITY)
    return spelt[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of every message about an unknown name: a suggestion, or nothing if no known name is similar."""
    similar = most_similar(name, known)
    return "" if similar is None else f"; did you mean '{similar}'?"


class UnknownNameError(ClientError):
    """A name that does not exist; the message lists the known names and suggests the most similar one.

    Args:
        kind: the kind of name, such as ``model`` or ``label set``.
        name: the unknown name.
        known: existing names; the first twenty are shown, sorted. None lists none.
        way_out: what the caller can do, if a list of names is not enough.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str] | None = None, way_out: str = "") -> None:
        names = sorted(known or ())
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        shown = name if len(name) <= _MAX_SHOWN_CHARS else f"{name[:_MAX_SHOWN_CHARS]}..."
        message = f"unknown {kind} '{shown}'" + ("" if known is None else f"; known: {listed or 'none'}")
        super().__init__((f"{message}; {way_out}" if way_out else message) + did_you_mean(name, names))
        self.kind = kind
        self.name = name


class UnknownRouteError(ClientError):
    """No route has this path."""


class ConflictError(ClientError):
    """The request would create something that exists already."""


class PreconditionFailedError(ClientError):
    """A conditional header does not match the current version."""


class TooLargeError(ClientError):
    """A limit is exceeded, such as the number of images or labels of a request."""


class BodyTooLargeError(TooLargeError):
    """The request's body has too many bytes."""


class ImageTooLargeError(TooLargeError):
    """One image has too many bytes or pixels, or needs more memory than is available."""


class NotAnImageError(ClientError):
    """The bytes are not an image that can be decoded completely."""


class UnknownImageError(ClientError):
    """The features of an earlier request's image are not kept, or no longer."""


class UnreachableImageError(ClientError):
    """An image could not be fetched from its URL."""


class UnsupportedMediaTypeError(ClientError):
    """The route does not accept the content type of the body."""


class MethodNotAllowedError(ClientError):
    """The route exists, but not for this HTTP method."""


class ServerError(DeixisError):
    """The service cannot answer, although the request is valid."""


class OverloadedError(ServerError):
    """The queue is full; ``retry_after_s`` estimates when it has drained, in whole seconds, at least 1."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(ServerError):
    """The service is starting or stopping, or a part of it has failed."""


class DeadlineExceededError(ServerError):
    """The request was not done before its deadline."""


class NotConfiguredError(ServerError):
    """A part that this request needs is not configured."""


class StoreError(ServerError):
    """The database cannot be reached, or has a schema newer than this release."""


class StatementRefusedError(ServerError):
    """The database is available, and refuses a value or a statement; the same attempt will fail again."""


class ModelUnavailableError(ServerError):
    """A model's weights are unavailable, or not the expected ones."""


class ConfigurationError(ServerError):
    """A setting cannot work; raised at start, never by a request."""


def one_line(error: BaseException | None) -> str:
    """Return the message of an error of another library in one line of at most 300 characters, or its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__
