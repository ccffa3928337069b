from contextlib import AsyncExitStack

import pytest

from app.store.database import migrate, open_engine
from app.store.label_sets import LabelSetRepository
from tests.postgres import postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path / 'deixis.sqlite3'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request):
    """Return the URL of an empty database; the test runs once per database kind."""
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
async def opened(anyio_backend):
    """Return a function that opens engines; they are closed after the test."""
    async with AsyncExitStack() as stack:

        def open_until_the_end(url):
            engine = open_engine(url)
            stack.push_async_callback(engine.dispose)
            return engine

        yield open_until_the_end


@pytest.fixture
async def engine(url, opened):
    engine = opened(url)
    await migrate(engine)
    return engine


@pytest.fixture
def repository(engine):
    return LabelSetRepository(engine)
