"""Both clients, against the whole application behind a socket, by one set of tests."""

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from app.main import create_app
from deixis import AsyncClient, Client
from tests.api.live import live


class Awaited:
    """An object of the asynchronous client, used as the other: what it returns is awaited."""

    def __init__(self, portal: Any, inner: Any) -> None:
        self._portal = portal
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._inner, name))

    def _wrapped(self, value: Any) -> Any:
        if inspect.ismethod(value):
            return lambda *arguments, **more: self._answer(value(*arguments, **more))
        is_ours = type(value).__module__ == "deixis._async_client"
        return Awaited(self._portal, value) if is_ours else value

    def _answer(self, answer: Any) -> Any:
        if isinstance(answer, AsyncIterator):
            return self._items(answer)
        if inspect.iscoroutine(answer):
            return self._wrapped(self._portal.call(self._awaited, answer))
        return answer

    @staticmethod
    async def _awaited(answer: Any) -> Any:
        return await answer

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._wrapped(self._portal.call(items.__anext__))
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(items.aclose)


@pytest.fixture
def url(settings, encoder):
    """The address of a service with the fake encoder, of which pictures of a colour are near its name."""
    app = create_app(settings.model_copy(update={"import_dir": settings.data_dir}), lambda _: [encoder])
    with live(app) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(params=["sync", "async"])
def connect(request):
    """Makes a client, of either kind; keyword arguments are its own."""
    if request.param == "sync":
        opened = []

        def make(*arguments, **more):
            opened.append(Client(*arguments, **more))
            return opened[-1]

        yield make
        for each in opened:
            each.close()
        return
    with start_blocking_portal() as portal:
        made = []

        async def build(arguments, more):
            return AsyncClient(*arguments, **more)

        def make_async(*arguments, **more):
            made.append(portal.call(build, arguments, more))
            return Awaited(portal, made[-1])

        yield make_async
        for each in made:
            portal.call(each.close)


@pytest.fixture
def client(connect, url):
    return connect(url)
