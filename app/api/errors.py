"""Errors as problem+json responses (RFC 9457)."""

from collections.abc import Mapping, Sequence
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
from starlette.types import Receive, Scope, Send

from app import errors
from app.api.auth.access import Caller
from app.api.problems import foreign_error, kind_of, problem
from app.errors import ClientError, DeixisError, FieldProblem, InvalidFieldError, MalformedRequestError, TooLargeError
from app.names.field_values import with_value
from app.names.namespaces import OPEN_NAMESPACE, Namespace
from app.runtime.tracebacks import drop_tracebacks

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"

# Replaces the error schema that FastAPI adds to the OpenAPI description by default.
_PROBLEM_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
RESPONSES: Mapping[int | str, dict[str, Any]] = MappingProxyType(
    {
        "4XX": {
            "description": "The request is invalid or not allowed. docs/problems.md describes each problem type.",
            "content": _PROBLEM_CONTENT,
        },
        "5XX": {"description": "The service failed or is overloaded.", "content": _PROBLEM_CONTENT},
    }
)

# Retry-After if the error does not set it.
_RETRY_AFTER_S = 5

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class ProblemResponse(JSONResponse):
    """A problem, with the member ``error`` if the path is that of another API."""

    media_type = MEDIA_TYPE

    def __init__(self, members: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(members, members["status"], headers=headers)
        self._members = members

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; only here is the path known, also where a middleware answers."""
        error = foreign_error(scope["path"], self._members)
        if error is not None:
            self.body = self.render({**self._members, "error": error})
            self.headers["Content-Length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def problem_response(
    error: DeixisError, headers: Mapping[str, str] | None = None, namespace: Namespace = OPEN_NAMESPACE
) -> ProblemResponse:
    """Return the error as a problem response; 429, 503 and 504 carry Retry-After."""
    members = problem(error, namespace)
    all_headers = dict(headers or {})
    if members["status"] == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    if members["status"] in {429, 503, 504}:
        all_headers["Retry-After"] = str(getattr(error, "retry_after_s", _RETRY_AFTER_S))
    return ProblemResponse(members, all_headers)


def from_pydantic(found: Sequence[Any]) -> ClientError:
    """Return pydantic's validation errors as one client error.

    Invalid JSON becomes ``MalformedRequestError``, a list that is too long ``TooLargeError``, and everything else one
    ``InvalidFieldError``.
    """
    for error in found:
        if error["type"] == "too_long":
            return TooLargeError(f"{_field_path(error)}: {error['msg']}; send fewer")
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", error["msg"])
            return MalformedRequestError(f"the body is not valid JSON: {reason}")
    return InvalidFieldError([FieldProblem(_field_path(error), error["msg"]) for error in found])


def _field_path(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"])


async def _on_deixis_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DeixisError)
    if kind_of(error).status >= 500:
        log.warning("request_failed", error=type(error).__name__, detail=error.message)
    drop_tracebacks(error)
    caller: Caller | None = getattr(request.state, "caller", None)  # not set if the access check failed
    return problem_response(error, namespace=OPEN_NAMESPACE if caller is None else caller.namespace)


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    drop_tracebacks(error)
    # FastAPI puts the part of the request first: body, query, path or header.
    return problem_response(
        from_pydantic(
            [
                {**found, "loc": found["loc"][1:], "msg": with_value(found["msg"], found.get("input"))}
                for found in error.errors()
            ]
        )
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    drop_tracebacks(error)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _on_disconnect(request, error)
    allowed = ", ".join(_allowed_methods(request)) if error.status_code == 405 else ""
    # Without a method, the part after a colon is no action, although the path looks like a name.
    if error.status_code == 404 or (error.status_code == 405 and not allowed):
        return problem_response(errors.UnknownRouteError(f"unknown route {request.url.path}; /docs lists all routes"))
    if error.status_code == 405:
        problem = f"the method {request.method} is not allowed on {request.url.path}; allowed: {allowed}"
        return problem_response(errors.MethodNotAllowedError(problem), {"Allow": allowed})
    return problem_response(MalformedRequestError(str(error.detail)), error.headers)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of every route that matches the path; Starlette reports those of the first match only."""
    # A path that ends in ":verb" also matches routes with a name parameter, but no name contains a colon.
    methods = ("POST",) if ":" in request.url.path.rpartition("/")[2] else _METHODS
    return [
        method
        for method in methods
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _on_unexpected_error(_: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", exc_info=error)
    reported = errors.ServerError(
        "unexpected error; please report it with the stack trace that the log has under this request_id"
    )
    # Starlette sends this response outside of all middleware, so these headers are not added there.
    return problem_response(reported, {"X-Request-ID": correlation_id.get() or "", "X-Content-Type-Options": "nosniff"})


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Log that the client disconnected; the status is the 499 of nginx, and no one receives it."""
    drop_tracebacks(error)
    log.info("client_disconnected", path=request.url.path)
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Register the handlers that turn every error into a problem response."""
    app.add_exception_handler(DeixisError, _on_deixis_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unexpected_error)
