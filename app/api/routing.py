"""Routers of the service, and what all of their routes do: check access, read JSON in threads, describe errors."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from app.api.auth.access import GuardedRoute, namespace_header
from app.api.errors import RESPONSES
from app.api.forms import check_is_json, validate_json


class _JsonRoute(APIRoute):
    """A route that parses and validates its JSON body in a thread; FastAPI does it on the event loop.

    A list of 100,000 class names takes two seconds.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        if field is None:
            return handle
        kind = field.field_info.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)

        async def parsed(request: Request) -> Response:
            check_is_json(request)
            content = await request.body()
            return await handle(_ParsedRequest(request, await asyncio.to_thread(validate_json, kind, content)))

        return parsed


class _ParsedRequest(Request):
    """A request with a body that has been validated; pydantic does not validate an instance of a model again."""

    def __init__(self, request: Request, body: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._body = b"{}"  # not empty, so that FastAPI calls ``json``
        self._parsed = body

    async def json(self) -> Any:
        return self._parsed


class _Route(GuardedRoute, _JsonRoute):
    """Checks access before it reads the body."""


class DirectRoute(GuardedRoute):
    """A route whose function takes the request and nothing else, reads all of it, and returns a response.

    FastAPI only describes it. To find out that nothing is left to do for it takes FastAPI a sixth of the time that the
    event loop spends on a classification.
    """

    def __init__(self, path: str, endpoint: Callable[[Request], Coroutine[Any, Any, Response]], **options: Any) -> None:
        # Described, not called.
        options["dependencies"] = [*options.get("dependencies", ()), Depends(namespace_header)]
        super().__init__(path, endpoint, **options)
        handle = self.guarded(endpoint)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await handle(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app


def guarded_router(*, prefix: str = "", tags: Sequence[str], route_class: type[GuardedRoute] = _Route) -> APIRouter:
    """Return a router whose routes enforce ``ACCESS``, and by default parse JSON in threads."""
    return APIRouter(
        prefix=prefix,
        tags=list(tags),
        route_class=route_class,
        responses=dict(RESPONSES),
        # Names in generated clients: put_label_set, not put_label_set_v1_label_sets__name__put.
        generate_unique_id_function=lambda route: route.name,
    )


def add_routes(app: FastAPI, router: APIRouter) -> None:
    """Add the routes of a router to an application, as they are.

    ``FastAPI.include_router`` builds every route once more during the first request, which blocks the event loop for a
    tenth of a second.
    """
    app.router.routes.extend(router.routes)
