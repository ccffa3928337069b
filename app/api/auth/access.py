"""Authorization: the scope each route requires, and the check that runs before a request body is read."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute

from app.api.auth.keys import KeyRing, parse_authorization
from app.api.auth.quotas import Quotas
from app.errors import ForbiddenError, UnauthenticatedError
from app.names.namespaces import OPEN_NAMESPACE, Namespace, clean_namespace
from app.store.keys import Key
from app.types import Scope

NAMESPACE_HEADER = "Deixis-Namespace"

OPEN = None
"""The route needs no key."""

ACCESS: Mapping[str, Scope | None] = MappingProxyType(
    {
        "healthz": OPEN,
        "readyz": OPEN,
        "metrics": Scope.METRICS,
        "models": Scope.CLASSIFY,
        "methods": Scope.CLASSIFY,
        "classify": Scope.CLASSIFY,
        "create_embeddings": Scope.CLASSIFY,
        "zero_shot_image_classification": Scope.CLASSIFY,
        "hugging_face_task": Scope.CLASSIFY,
        "hugging_face_model_task": Scope.CLASSIFY,
        "list_label_sets": Scope.CLASSIFY,
        "get_label_set": Scope.CLASSIFY,
        "list_shipped_label_sets": Scope.CLASSIFY,
        "get_shipped_label_set": Scope.CLASSIFY,
        "put_label_set": Scope.WRITE,
        "delete_label_set": Scope.WRITE,
        "add_classes": Scope.WRITE,
        "remove_class": Scope.WRITE,
        "list_images": Scope.CLASSIFY,
        "get_image": Scope.CLASSIFY,
        "get_image_content": Scope.WRITE,  # files that other users of the namespace have sent
        "add_images": Scope.WRITE,  # and Scope.ADMIN for a folder on the server
        "delete_images": Scope.WRITE,
        "delete_image": Scope.WRITE,
        "get_selection": Scope.CLASSIFY,
        "get_thresholds": Scope.CLASSIFY,
        "set_thresholds": Scope.WRITE,
        "list_question_sets": Scope.CLASSIFY,
        "estimate_descriptions": Scope.CLASSIFY,
        "generate_descriptions": Scope.WRITE,
        "list_drafts": Scope.CLASSIFY,
        "accept_drafts": Scope.WRITE,
        "reject_drafts": Scope.WRITE,
        "evaluate_label_set": Scope.WRITE,
        "list_databases": Scope.CLASSIFY,
        "get_database": Scope.CLASSIFY,
        "build_database": Scope.WRITE,  # and Scope.ADMIN for files on the server
        "delete_database": Scope.WRITE,
        "search_database": Scope.CLASSIFY,
        "list_jobs": Scope.CLASSIFY,
        "get_job": Scope.CLASSIFY,
        "cancel_job": Scope.WRITE,
    }
)
"""The scope each route requires, by the name of its function. A route without an entry cannot be created."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request: its namespace, and its key if one is required."""

    namespace: Namespace
    key: Key | None = None
    quotas: Quotas | None = None

    def require(self, scope: Scope, action: str) -> None:
        """Require a higher scope for an optional part of a route; raises ``ForbiddenError``."""
        if self.key is not None and not self.key.scope.allows(scope):
            raise ForbiddenError(f"{action} needs a key of scope {scope}; this key has scope {self.key.scope}")

    async def spend_images(self, images: int) -> None:
        """Count the images of the request; raises the errors of ``Quotas.spend_images``."""
        if self.key is not None and self.quotas is not None:
            await self.quotas.spend_images(self.key, images)


_ANYBODY = Caller(OPEN_NAMESPACE)


class Gate:
    """Authenticates requests and enforces scopes and quotas.

    Args:
        keys: the known keys.
        quotas: the use of each key.
    """

    def __init__(self, keys: KeyRing, quotas: Quotas) -> None:
        self._keys = keys
        self._quotas = quotas

    async def needs_key(self) -> bool:
        """Return whether requests need an API key; raises ``StoreError`` if the database is unavailable."""
        return await self._keys.is_required()

    async def caller(self, headers: Mapping[str, str], required: Scope | None) -> Caller:
        """Return the sender of a request.

        Args:
            headers: the headers of the request.
            required: the scope that the route requires; None if it needs no key.

        Raises:
            UnauthenticatedError: the request carries no known key.
            ForbiddenError: the key does not allow the route or the namespace.
            InvalidFieldError: the namespace is not a valid name.
        """
        if required is None:
            return _ANYBODY
        header = headers.get(NAMESPACE_HEADER)
        namespace = None if header is None else clean_namespace(header.strip(), NAMESPACE_HEADER)
        if not await self._keys.is_required():
            return _ANYBODY if namespace is None else Caller(namespace)
        text = parse_authorization(headers)
        if text is None:
            raise UnauthenticatedError(
                "the request has no API key; send one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )
        key = await self._keys.find(text)
        if not key.scope.allows(required):
            raise ForbiddenError(
                f"this route needs a key of scope {required}; the key '{key.id}' has scope {key.scope}"
            )
        if namespace is not None and namespace != key.namespace and not key.scope.allows(Scope.ADMIN):
            raise ForbiddenError(
                f"the key '{key.id}' can only use its own namespace; leave out the header {NAMESPACE_HEADER}"
            )
        return Caller(key.namespace if namespace is None else namespace, key, self._quotas)

    @asynccontextmanager
    async def counted(self, key: Key) -> AsyncIterator[None]:
        """Count a request of this key, which is running until the context ends.

        Raises:
            RateLimitedError: a quota of the key is used up.
        """
        with self._quotas.running(key):
            await self._quotas.spend_request(key)
            yield


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class GuardedRoute(APIRoute):
    """A route that enforces ``ACCESS`` before it reads the request body."""

    def get_route_handler(self) -> Handler:
        """Return the route's handler behind the access check."""
        return self.guarded(super().get_route_handler())

    def guarded(self, handle: Handler) -> Handler:
        """Return a handler behind the access check of this route."""
        required = ACCESS[self.name]

        async def guarded(request: Request) -> Response:
            gate: Gate = request.app.state.gate
            caller = request.state.caller = await gate.caller(request.headers, required)
            if caller.namespace.name:
                log_fields(request, namespace=caller.namespace.name)
            if caller.key is None:
                return await handle(request)
            async with gate.counted(caller.key):
                log_fields(request, key=caller.key.id)
                return await handle(request)

        return guarded


def log_fields(request: Request, **fields: Any) -> None:
    """Add fields to the access log event of this request."""
    request.scope.setdefault("deixis.log", {}).update(fields)


def caller_of(request: Request) -> Caller:
    """Return the caller that ``GuardedRoute`` has admitted."""
    caller: Caller = request.state.caller
    return caller


async def namespace_header(
    _namespace: Annotated[
        str | None,
        Header(alias=NAMESPACE_HEADER, description="The namespace to use; others than that of the key need `admin`."),
    ] = None,
) -> None:
    """Describe the header in OpenAPI; ``Gate`` reads it."""


async def _caller(request: Request, _: Annotated[None, Depends(namespace_header)]) -> Caller:
    return caller_of(request)


CallerDependency = Annotated[Caller, Depends(_caller)]


async def _label_set_name(name: str, caller: CallerDependency) -> str:
    return caller.namespace.label_set(name)


LabelSetName = Annotated[str, Depends(_label_set_name)]
"""The stored name of the label set that ``{name}`` in the path refers to, with its namespace."""
