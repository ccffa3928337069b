"""Who may call which route: the one table of it, and what every request passes before its body is read."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from app.api.auth.keys import KeyRing, Quotas, parse_authorization
from app.errors import ForbiddenError, UnauthenticatedError
from app.names.namespaces import OPEN_NAMESPACE, Namespace, clean_namespace
from app.store.keys import Key, Scope

NAMESPACE_HEADER = "Deixis-Namespace"

OPEN = None
"""A route that nobody needs a key for."""

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
        "list_label_sets": Scope.CLASSIFY,
        "get_label_set": Scope.CLASSIFY,
        "put_label_set": Scope.WRITE,
        "delete_label_set": Scope.WRITE,
        "add_classes": Scope.WRITE,
        "remove_class": Scope.WRITE,
        "list_images": Scope.CLASSIFY,
        "get_image": Scope.CLASSIFY,
        "get_image_content": Scope.WRITE,  # what others of the namespace have sent
        "add_images": Scope.WRITE,  # and Scope.ADMIN for a folder of the server
        "delete_images": Scope.WRITE,
        "delete_image": Scope.WRITE,
        "get_selection": Scope.CLASSIFY,
        "list_question_sets": Scope.CLASSIFY,
        "estimate_descriptions": Scope.CLASSIFY,
        "generate_descriptions": Scope.WRITE,
        "list_drafts": Scope.CLASSIFY,
        "accept_drafts": Scope.WRITE,
        "reject_drafts": Scope.WRITE,
        "evaluate_label_set": Scope.WRITE,
        "list_databases": Scope.CLASSIFY,
        "get_database": Scope.CLASSIFY,
        "build_database": Scope.WRITE,  # and Scope.ADMIN of files of the server
        "delete_database": Scope.WRITE,
        "search_database": Scope.CLASSIFY,
        "list_jobs": Scope.CLASSIFY,
        "get_job": Scope.CLASSIFY,
        "cancel_job": Scope.WRITE,
    }
)
"""The scope that each route asks for, by the name of its function. A route that is not here cannot be made."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and whose label sets and databases it is about; without a key, where none is needed."""

    namespace: Namespace
    key: Key | None = None
    quotas: Quotas | None = None

    def require(self, scope: Scope, what: str) -> None:
        """Refuse a part of a route that asks for more than the route; raises ``ForbiddenError``."""
        if self.key is not None and not self.key.scope.allows(scope):
            raise ForbiddenError(f"{what} needs a key of scope {scope}, and this one has {self.key.scope}")

    async def spend_images(self, images: int) -> None:
        """Count the images of the request; raises as ``Quotas.spend_images``."""
        if self.key is not None and self.quotas is not None:
            await self.quotas.spend_images(self.key, images)


class Gate:
    """Lets requests in.

    Args:
        keys: who may come.
        quotas: how often.
    """

    def __init__(self, keys: KeyRing, quotas: Quotas) -> None:
        self._keys = keys
        self._quotas = quotas

    @asynccontextmanager
    async def admitted(self, headers: Mapping[str, str], needed: Scope | None) -> AsyncIterator[Caller]:
        """Yield who calls.

        Args:
            headers: of the request.
            needed: the scope of the route; None where anybody may call.

        Raises:
            UnauthenticatedError: there is no key that is known.
            ForbiddenError: the key is not for this, or not for that namespace.
            RateLimitedError: the key is used up.
            InvalidFieldError: a namespace that cannot be.
        """
        if needed is None:
            yield Caller(OPEN_NAMESPACE)
            return
        asked = headers.get(NAMESPACE_HEADER)
        namespace = None if asked is None else clean_namespace(asked.strip(), NAMESPACE_HEADER)
        if not await self._keys.is_required():
            yield Caller(namespace or OPEN_NAMESPACE)
            return
        shown = parse_authorization(headers)
        if shown is None:
            raise UnauthenticatedError("send an API key, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        key = await self._keys.find(shown)
        if not key.scope.allows(needed):
            raise ForbiddenError(f"this needs a key of scope {needed}, and '{key.id}' has {key.scope}")
        if namespace is not None and namespace != key.namespace and not key.scope.allows(Scope.ADMIN):
            raise ForbiddenError(f"the key '{key.id}' is for its own namespace; leave {NAMESPACE_HEADER} out")
        with self._quotas.running(key):
            await self._quotas.spend_request(key)
            yield Caller(key.namespace if namespace is None else namespace, key, self._quotas)


class GuardedRoute(APIRoute):
    """A route that is closed to whom ``ACCESS`` does not let in; nothing of a body is read before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()
        needed = ACCESS[self.name]

        async def guarded(request: Request) -> Response:
            gate: Gate = request.app.state.gate
            async with gate.admitted(request.headers, needed) as caller:
                request.state.caller = caller
                if caller.key is not None:
                    note(request, key=caller.key.id)
                if caller.namespace.name:
                    note(request, namespace=caller.namespace.name)
                return await answer(request)

        return guarded


def note(request: Request, **fields: Any) -> None:
    """Add to the line that the log will have of this request."""
    request.scope.setdefault("deixis.log", {}).update(fields)


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


CallerDependency = Annotated[Caller, Depends(_caller)]


async def _label_set_name(name: str, caller: CallerDependency) -> str:
    return caller.namespace.label_set(name)


LabelSetName = Annotated[str, Depends(_label_set_name)]
"""The label set that ``{name}`` of the path means, as it is kept."""
