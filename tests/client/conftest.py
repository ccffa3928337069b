"""Fixtures that run every test with both clients, against the whole application behind a socket."""

import inspect
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from deixis import AsyncClient, Client
from tests.api.live import live


class Awaited:
    """Wraps an object of the asynchronous client in the interface of the synchronous one."""

    def __init__(self, portal: Any, inner: Any) -> None:
        self._portal = portal
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._inner, name))

    def _wrapped(self, value: Any) -> Any:
        if inspect.ismethod(value):
            return lambda *arguments, **keywords: self._result(value(*arguments, **keywords))
        is_of_client = type(value).__module__ == "deixis._async_client"
        return Awaited(self._portal, value) if is_of_client else value

    def _result(self, value: Any) -> Any:
        if isinstance(value, AsyncIterator):
            return self._items(value)
        if inspect.iscoroutine(value):
            return self._wrapped(self._portal.call(self._awaited, value))
        return value

    @staticmethod
    async def _awaited(value: Any) -> Any:
        return await value

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._wrapped(self._portal.call(items.__anext__))
                except StopAsyncIteration:
                    return
        finally:
            self._portal.call(items.aclose)


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    """The URL and the data folder of a service with the fake encoder, for which a colour's name fits its pictures."""
    folder = tmp_path_factory.mktemp("service")
    shutil.copy(empty_database, folder)
    settings = Settings(
        data_dir=folder,
        import_dir=folder,
        models=("embedded",),
        build_default_database=False,
        max_images_per_request=8,
        max_queued_images=16,
    )
    with live(create_app(settings, lambda _: [FakeEncoder()])) as (host, port):
        yield f"http://{host}:{port}", folder


@pytest.fixture
def url(server):
    """The URL of the service, which is empty for each test."""
    yield server[0]
    with Client(server[0]) as client:
        for label_set in list(client.label_sets.list()):
            client.label_sets.delete(label_set.name)
        for database in client.databases.list():
            client.databases.delete(database.name)


@pytest.fixture(params=["sync", "async"])
def connect(request):
    """A function that opens a client of either kind; it takes the arguments of the client."""
    clients = []
    if request.param == "sync":

        def open_client(*arguments, **keywords):
            clients.append(Client(*arguments, **keywords))
            return clients[-1]

        yield open_client
        for client in clients:
            client.close()
        return
    with start_blocking_portal() as portal:

        async def build(arguments, keywords):
            return AsyncClient(*arguments, **keywords)

        def open_async_client(*arguments, **keywords):
            clients.append(portal.call(build, arguments, keywords))
            return Awaited(portal, clients[-1])

        yield open_async_client
        for client in clients:
            portal.call(client.close)


@pytest.fixture
def client(connect, url):
    return connect(url)
