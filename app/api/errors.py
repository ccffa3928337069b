"""The one table from error class to HTTP status, and RFC 9457 problem+json.

``type`` is a stable URN, because the service does not know under which address it is reached; docs/problems.md explains
each one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import structlog
from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import errors
from app.api.auth.access import Caller
from app.errors import DeixisError, FieldProblem, InvalidFieldError, MalformedRequestError, TooLargeError
from app.names.namespaces import OPEN_NAMESPACE, Namespace

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:deixis:problem:"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of errors is told to the caller."""

    status: int
    slug: str
    title: str


# Found by walking the error's bases, so that a subclass without a row is told as its parent.
KINDS: Mapping[type[DeixisError], Kind] = MappingProxyType(
    {
        errors.MalformedRequestError: Kind(400, "malformed-request", "The request cannot be parsed"),
        errors.UnauthenticatedError: Kind(401, "unauthenticated", "A key is needed"),
        errors.ForbiddenError: Kind(403, "forbidden", "The key does not allow this"),
        errors.UnknownNameError: Kind(404, "unknown-name", "There is nothing of that name"),
        errors.UnknownRouteError: Kind(404, "unknown-route", "There is no such route"),
        errors.MethodNotAllowedError: Kind(405, "method-not-allowed", "The route has no such method"),
        errors.RequestTimeoutError: Kind(408, "request-timeout", "The request did not arrive in time"),
        errors.ConflictError: Kind(409, "conflict", "The change conflicts with what is there"),
        errors.PreconditionFailedError: Kind(412, "precondition-failed", "The version is not the one expected"),
        errors.TooLargeError: Kind(413, "too-large", "A limit is passed"),
        errors.BodyTooLargeError: Kind(413, "body-too-large", "The request is too large"),
        errors.ImageTooLargeError: Kind(413, "image-too-large", "The image is too large"),
        errors.NotAnImageError: Kind(415, "not-an-image", "This is not an image that can be read"),
        errors.UnreachableImageError: Kind(422, "image-not-fetched", "The image could not be fetched"),
        errors.UnsupportedMediaTypeError: Kind(415, "unsupported-media-type", "The content type is not supported"),
        errors.InvalidFieldError: Kind(422, "invalid-field", "A field breaks a rule"),
        errors.RateLimitedError: Kind(429, "rate-limited", "The key's share is used up for now"),
        errors.HeadTooLargeError: Kind(431, "head-too-large", "The headers are too large"),
        errors.ClientError: Kind(400, "bad-request", "The request is refused"),
        errors.OverloadedError: Kind(503, "overloaded", "The queue is full"),
        errors.NotReadyError: Kind(503, "not-ready", "The service is not ready"),
        errors.NotConfiguredError: Kind(501, "not-configured", "The service is not set up for this"),
        errors.StoreError: Kind(503, "store-unavailable", "The database is not available"),
        errors.ModelUnavailableError: Kind(503, "model-unavailable", "The model is not available"),
        errors.DeadlineExceededError: Kind(504, "deadline-exceeded", "The request took too long"),
        errors.ServerError: Kind(500, "internal-error", "The service failed"),
    }
)

# For the description of the API: FastAPI would promise errors in a form of its own.
_PROBLEM_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
RESPONSES: Mapping[int | str, dict[str, Any]] = MappingProxyType(
    {
        "4XX": {"description": "The request is refused; docs/problems.md has every type.", "content": _PROBLEM_CONTENT},
        "5XX": {"description": "The service failed or is busy.", "content": _PROBLEM_CONTENT},
    }
)

# How long to wait when the error itself does not know.
_RETRY_AFTER_S = 5

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")

_MAX_SHOWN_CHARS = 4000
_MAX_SHOWN_PROBLEMS = 1000


def kind_of(error: DeixisError) -> Kind:
    """Return the row of the error's class or of its nearest base."""
    return next(KINDS[base] for base in type(error).__mro__ if base in KINDS)


def problem(error: DeixisError, namespace: Namespace = OPEN_NAMESPACE) -> dict[str, Any]:
    """Return the RFC 9457 members for callers of a namespace, with ``errors`` for field errors."""
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
            {"field": _shown(each.field), "problem": _shown(namespace.hide(each.problem))}
            for each in error.problems[:_MAX_SHOWN_PROBLEMS]
        ]
    return members


def _shown(text: str) -> str:
    """Return a text that may repeat what a caller sent: cut where it is too long, and without lone surrogates."""
    cut = text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
    return cut.encode("utf-8", "backslashreplace").decode()


def problem_response(
    error: DeixisError, headers: Mapping[str, str] | None = None, namespace: Namespace = OPEN_NAMESPACE
) -> JSONResponse:
    """Return the error as a response, as ``problem``; 429, 503 and 504 carry Retry-After."""
    members = problem(error, namespace)
    sent = dict(headers or {})
    if members["status"] == 401:
        sent["WWW-Authenticate"] = "Bearer"
    if members["status"] in {429, 503, 504}:
        sent["Retry-After"] = str(getattr(error, "retry_after_s", _RETRY_AFTER_S))
    return JSONResponse(members, members["status"], headers=sent, media_type=MEDIA_TYPE)


def field_problems(found: list[Any]) -> DeixisError:
    """Return what pydantic found as one of our errors.

    JSON that does not parse is malformed, a list beyond every limit too large, and the rest are fields.
    """
    for each in found:
        if each["type"] == "too_long":
            return TooLargeError(f"{_field_of(each)}: {each['msg']}; send fewer")
        if each["type"] == "json_invalid":
            reason = each.get("ctx", {}).get("error", each["msg"])
            return MalformedRequestError(f"the body is no JSON: {reason}")
    return InvalidFieldError([FieldProblem(_field_of(each), each["msg"]) for each in found])


def _field_of(found: Any) -> str:
    return ".".join(str(part) for part in found["loc"] if part not in {"body", "query", "path"})


async def _on_deixis_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DeixisError)
    if kind_of(error).status >= 500:
        log.warning("request_failed", error=type(error).__name__, detail=error.message)
    caller: Caller | None = getattr(request.state, "caller", None)  # there is none where it was not let in
    return problem_response(error, namespace=OPEN_NAMESPACE if caller is None else caller.namespace)


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return problem_response(field_problems(list(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _on_disconnect(request, error)
    if error.status_code == 404:
        told: DeixisError = errors.UnknownRouteError(f"there is no route {request.url.path}; /docs lists them")
    elif error.status_code == 405:
        allowed = _methods_of(request)
        known = ", ".join(allowed)
        told = errors.MethodNotAllowedError(
            f"{request.method} is not possible on {request.url.path}; possible: {known}"
        )
        return problem_response(told, {"Allow": known})
    elif error.__cause__ is not None:  # FastAPI could not parse a body
        reason = type(error.__cause__).__name__
        told = MalformedRequestError(
            f"the body does not parse ({reason}); it may be nested too deep, or hold a number that is too long"
        )
    else:
        told = MalformedRequestError(str(error.detail))
    return problem_response(told, error.headers)


def _methods_of(request: Request) -> list[str]:
    """Return what is possible on a path; Starlette knows that of the first route that matches only."""
    # Behind a colon is a verb, and what has none matches as a name that there cannot be.
    asked = ("POST",) if ":" in request.url.path.rpartition("/")[2] else _METHODS
    return [
        method
        for method in asked
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _on_anything_else(_: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", exc_info=error)
    told = errors.ServerError("an unexpected error; the log has it under this request_id, please report it")
    # Starlette answers these outside every middleware, those of the request's id and of headers too.
    return problem_response(told, {"X-Request-ID": correlation_id.get() or "", "X-Content-Type-Options": "nosniff"})


async def _on_disconnect(request: Request, _: Exception) -> Response:
    """Nobody is there to read an answer, and nothing is wrong here; 499 is what nginx logs then."""
    log.info("client_disconnected", path=request.url.path)
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Make every error of every route a problem."""
    app.add_exception_handler(DeixisError, _on_deixis_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_anything_else)
