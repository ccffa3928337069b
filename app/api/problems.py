"""The one table from error class to RFC 9457 problem: its HTTP status, type and title.

``type`` is a stable URN rather than a URL, because the service does not know its public address. docs/problems.md
describes each type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from asgi_correlation_id import correlation_id

from app import errors
from app.errors import DeixisError, InvalidFieldError
from app.names.namespaces import OPEN_NAMESPACE, Namespace

TYPE_PREFIX = "urn:deixis:problem:"


@dataclass(frozen=True, slots=True)
class Kind:
    """The HTTP status, the problem type and the title of an error class."""

    status: int
    slug: str
    title: str


# A subclass without a row uses the row of its nearest base.
KINDS: Mapping[type[DeixisError], Kind] = MappingProxyType(
    {
        errors.MalformedRequestError: Kind(400, "malformed-request", "Malformed request"),
        errors.UnauthenticatedError: Kind(401, "unauthenticated", "API key required"),
        errors.ForbiddenError: Kind(403, "forbidden", "Not allowed for this key"),
        errors.CrossSiteError: Kind(403, "cross-site", "Cross-site request refused"),
        errors.MisdirectedRequestError: Kind(421, "misdirected-request", "Host not served"),
        errors.UnknownNameError: Kind(404, "unknown-name", "Unknown name"),
        errors.UnknownRouteError: Kind(404, "unknown-route", "Unknown route"),
        errors.MethodNotAllowedError: Kind(405, "method-not-allowed", "Method not allowed"),
        errors.RequestTimeoutError: Kind(408, "request-timeout", "Request timeout"),
        errors.ConflictError: Kind(409, "conflict", "Conflict with the current state"),
        errors.PreconditionFailedError: Kind(412, "precondition-failed", "Precondition failed"),
        errors.TooLargeError: Kind(413, "too-large", "Limit exceeded"),
        errors.BodyTooLargeError: Kind(413, "body-too-large", "Request body too large"),
        errors.ImageTooLargeError: Kind(413, "image-too-large", "Image too large"),
        errors.NotAnImageError: Kind(415, "not-an-image", "Not a readable image"),
        errors.UnknownImageError: Kind(404, "unknown-image", "Unknown image"),
        errors.UnreachableImageError: Kind(422, "image-not-fetched", "Image not fetched"),
        errors.UnsupportedMediaTypeError: Kind(415, "unsupported-media-type", "Unsupported media type"),
        errors.InvalidFieldError: Kind(422, "invalid-field", "Invalid field"),
        errors.RateLimitedError: Kind(429, "rate-limited", "Rate limit exceeded"),
        errors.HeadTooLargeError: Kind(431, "head-too-large", "Request headers too large"),
        errors.ClientError: Kind(400, "bad-request", "Bad request"),
        errors.OverloadedError: Kind(503, "overloaded", "Service overloaded"),
        errors.NotReadyError: Kind(503, "not-ready", "Service not ready"),
        errors.NotConfiguredError: Kind(501, "not-configured", "Feature not configured"),
        errors.StoreError: Kind(503, "store-unavailable", "Database unavailable"),
        errors.StatementRefusedError: Kind(500, "statement-refused", "Refused by the database"),
        errors.ModelUnavailableError: Kind(503, "model-unavailable", "Model unavailable"),
        errors.DeadlineExceededError: Kind(504, "deadline-exceeded", "Deadline exceeded"),
        errors.ServerError: Kind(500, "internal-error", "Internal error"),
    }
)

# Also without /v1, which a base URL may lack; no suffix, for a label set may be called embeddings.
_OPENAI_PATHS = frozenset({"/embeddings", "/v1/embeddings", "/v1/models"})

_MAX_SHOWN_CHARS = 4000
# Of the path of a field, which may end with a name that the caller sent.
_MAX_FIELD_CHARS = 300
_MAX_SHOWN_PROBLEMS = 100


def kind_of(error: DeixisError) -> Kind:
    """Return the row of the error's class or of its nearest base."""
    return next(KINDS[base] for base in type(error).__mro__ if base in KINDS)


def problem(error: DeixisError, namespace: Namespace = OPEN_NAMESPACE) -> dict[str, Any]:
    """Return the RFC 9457 members, with ``errors`` for field errors; hides the names of other namespaces."""
    kind = kind_of(error)
    members: dict[str, Any] = {
        "type": TYPE_PREFIX + kind.slug,
        "title": kind.title,
        "status": kind.status,
        "detail": _shown(namespace.hide(error.message)),
        "request_id": correlation_id.get(),
    }
    if isinstance(error, InvalidFieldError):
        members["errors"] = [
            {"field": _shown(found.field, _MAX_FIELD_CHARS), "problem": _shown(namespace.hide(found.problem))}
            for found in error.problems[:_MAX_SHOWN_PROBLEMS]
        ]
    return members


def foreign_error(path: str, members: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """Return the member ``error`` of a problem, in which clients of another API look for the message.

    It is an object in OpenAI's API, a text in Hugging Face's, and None for paths of this service's own API.
    """
    if path in _OPENAI_PATHS or path.startswith("/v1/models/"):
        fields = members.get("errors") or [{"field": None}]
        kind = "invalid_request_error" if members["status"] < 500 else "server_error"
        code = members["type"].removeprefix(TYPE_PREFIX)
        return {"message": members["detail"], "type": kind, "param": fields[0]["field"], "code": code}
    if path in {"/", "/v1/zero-shot-image-classification"} or path.startswith("/models/"):
        return str(members["detail"])
    return None


def _shown(text: str, max_chars: int = _MAX_SHOWN_CHARS) -> str:
    """Return a text that may quote the request, cut to a maximum length and without lone surrogates."""
    cut = text if len(text) <= max_chars else f"{text[:max_chars]}..."
    return cut.encode("utf-8", "backslashreplace").decode()
