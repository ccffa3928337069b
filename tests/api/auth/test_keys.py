"""API keys, the keys file, and the headers that carry a key."""

import asyncio
import re
from pathlib import Path

import pytest

from app.api.auth import keys as keys_module
from app.api.auth.keys import KeyRing, create_key, key_digest, load_keys_file, parse_authorization
from app.api.auth.policy import KeyPolicy
from app.errors import (
    ConfigurationError,
    ConflictError,
    StoreError,
    UnauthenticatedError,
    UnknownNameError,
)
from app.names.namespaces import OPEN_NAMESPACE, Namespace
from app.store.database import open_engine
from app.store.keys import Key, KeyRepository
from app.types import Scope

pytestmark = pytest.mark.anyio

SECRET = "a secret of the operator, long enough"


@pytest.fixture
async def repository(settings):
    engine = open_engine(settings.effective_database_url)
    yield KeyRepository(engine)
    await engine.dispose()


@pytest.fixture
def no_lookup_cache(monkeypatch):
    """Every lookup reads the database, as it does after a second."""
    monkeypatch.setattr(keys_module, "_LOOKUP_CACHE_S", 0)


def key(**more) -> Key:
    return Key(**({"id": "", "scope": Scope.CLASSIFY, "namespace": OPEN_NAMESPACE} | more))


def test_each_scope_includes_the_lower_ones_and_metrics_stands_alone():
    allowed = {scope: {wanted for wanted in Scope if scope.allows(wanted)} for scope in Scope}
    assert allowed == {
        Scope.METRICS: {Scope.METRICS},
        Scope.CLASSIFY: {Scope.CLASSIFY},
        Scope.WRITE: {Scope.CLASSIFY, Scope.WRITE},
        Scope.ADMIN: set(Scope),
    }


async def test_a_key_is_found_by_its_text_and_only_its_digest_is_stored(repository, settings):
    text, created = await create_key(repository, key(namespace=Namespace("acme"), rate="60 per 1 minute", note="shop"))
    assert (await KeyRing(repository).find(text)).namespace == Namespace("acme")
    assert text.startswith(f"dx_{created.id}_")
    await repository.list()
    for file in settings.data_dir.glob("deixis.sqlite3*"):
        assert text.encode() not in file.read_bytes()
        assert text.split("_", 2)[2].encode() not in file.read_bytes()


@pytest.mark.parametrize("change", [lambda s: s[:-1] + "!", lambda s: s[:-1], lambda s: s + "a", str.upper])
async def test_a_changed_key_is_rejected(repository, change):
    text, _ = await create_key(repository, key())
    with pytest.raises(UnauthenticatedError):
        await KeyRing(repository).find(change(text))


async def test_the_secret_of_one_key_does_not_work_with_the_id_of_another(repository):
    (one, _), (other, _) = [await create_key(repository, key()) for _ in range(2)]
    mixed = "_".join([*one.split("_", 2)[:2], other.split("_", 2)[2]])
    with pytest.raises(UnauthenticatedError):
        await KeyRing(repository).find(mixed)


async def test_a_revoked_key_is_rejected_at_the_next_lookup_and_stays_listed(repository, no_lookup_cache):
    text, created = await create_key(repository, key())
    ring = KeyRing(repository)
    await ring.find(text)
    first = await repository.revoke(created.id)
    with pytest.raises(UnauthenticatedError):
        await ring.find(text)
    assert (await repository.revoke(created.id)).revoked_at == first.revoked_at
    assert [key.id for key in await repository.list()] == [created.id]
    for unknown_id in ("0" * 12, "\ud800", "\0"):
        with pytest.raises(UnknownNameError, match="deixis keys list"):
            await repository.revoke(unknown_id)
    with pytest.raises(ConflictError):
        await repository.add(created, b"x")


async def test_the_last_use_of_a_key_is_saved_at_most_once_per_interval(repository):
    text, created = await create_key(repository, key())
    assert (await repository.find(created.id))[0].last_used_at is None
    ring = KeyRing(repository)
    await ring.find(text)
    await ring.close()
    used = (await repository.find(created.id))[0].last_used_at
    assert used >= created.created_at
    await ring.find(text)
    await ring.close()
    assert (await repository.find(created.id))[0].last_used_at == used


async def test_known_keys_stay_valid_while_the_database_is_unavailable(repository, no_lookup_cache, monkeypatch):
    (text, _), (unseen, _) = [await create_key(repository, key()) for _ in range(2)]
    ring = KeyRing(repository)
    assert await ring.is_required()
    await ring.find(text)
    await ring.close()

    async def fail(*_):
        raise StoreError("unavailable")

    for name in ("find", "any", "used"):
        monkeypatch.setattr(repository, name, fail)
    monkeypatch.setattr(keys_module, "_LAST_USE_INTERVAL_S", 0)
    assert await ring.is_required()
    assert await ring.find(text)
    await ring.close()
    with pytest.raises(StoreError):
        await ring.find(unseen)
    with pytest.raises(StoreError):  # a new process cannot know whether keys exist, and rejects requests
        await KeyRing(repository).is_required()


async def test_keys_are_required_once_one_exists_unless_the_policy_says_otherwise(repository, no_lookup_cache):
    ring = KeyRing(repository)
    assert not await ring.is_required()
    assert not await KeyRing(repository, policy=KeyPolicy.OFF).is_required()
    assert await KeyRing(repository, policy=KeyPolicy.REQUIRED).is_required()
    assert await KeyRing(repository, [(key(id="a"), key_digest(SECRET))]).is_required()
    _, created = await create_key(repository, key())
    assert await ring.is_required()
    await repository.revoke(created.id)
    assert await ring.is_required()
    assert await KeyRing(repository).is_required()
    assert not await KeyRing(repository, policy=KeyPolicy.OFF).is_required()


# --- the keys file ---------------------------------------------------------------------------------------------


async def test_keys_in_a_file_are_given_as_text_or_as_a_digest(tmp_path, repository):
    file = tmp_path / "keys.toml"
    file.write_text(
        f"""
        [[keys]]
        id = "shop"
        key = "{SECRET}"
        scope = "write"
        namespace = "shop"
        rate = "60/min"
        concurrency = 4

        [[keys]]
        id = "prometheus"
        sha256 = "{key_digest("another secret").hex()}"
        scope = "metrics"
        """
    )
    ring = KeyRing(repository, load_keys_file(file))
    shop = await ring.find(SECRET)
    assert (shop.id, shop.scope, shop.namespace, shop.concurrency) == ("shop", Scope.WRITE, Namespace("shop"), 4)
    assert (await ring.find("another secret")).scope is Scope.METRICS
    with pytest.raises(UnauthenticatedError):
        await ring.find(SECRET + " ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = 3", "keys"),
        (f"key = '{SECRET}", "is not valid TOML"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nsha256 = '{'0' * 64}'", "give either key or sha256"),
        ("[[keys]]\nid = 'a'", "give either key or sha256"),
        ("[[keys]]\nid = 'a'\nkey = 'guessed'", "can be guessed"),
        (f"[[keys]]\nid = 'a b'\nkey = '{SECRET}'", "keys.0.id"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nscope = 'root'", "keys.0.scope"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nnamespace = 'A/b'", "is not a valid namespace"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nrate = 'often'", "'often' is not a rate"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\n[[keys]]\nid = 'a'\nkey = '{SECRET}.'", "same id twice"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\n[[keys]]\nid = 'b'\nkey = '{SECRET}'", "same key twice"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nconcurrency = true", "keys.0.concurrency: Input should be a number"),
        (f"# {'x' * 2**20}", "more than 1,048,576 bytes"),
    ],
)
def test_errors_in_a_keys_file_are_reported_without_its_secrets(tmp_path, text, problem):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        load_keys_file(file)
    assert SECRET not in caught.value.message
    assert "guessed'" not in caught.value.message


def test_a_missing_keys_file_is_reported(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_keys_file(tmp_path / "none.toml")


# --- request headers --------------------------------------------------------------------------------------------


def test_a_key_is_read_from_either_header():
    assert parse_authorization({}) is None
    assert parse_authorization({"authorization": "Bearer abc"}) == "abc"
    assert parse_authorization({"authorization": "bearer  abc"}) == "abc"
    assert parse_authorization({"x-api-key": "abc"}) == "abc"
    assert parse_authorization({"authorization": "Bearer abc", "x-api-key": "abc"}) == "abc"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Basic YTpi"},
        {"authorization": "Bearer"},
        {"authorization": "abc"},
        {"authorization": "Bearer abc", "x-api-key": "abd"},
    ],
)
def test_another_scheme_or_two_different_keys_are_rejected(headers):
    with pytest.raises(UnauthenticatedError):
        parse_authorization(headers)


def test_the_keys_file_shown_in_the_security_page_is_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "keys.toml"
    file.write_text(example)
    assert [(key.id, key.scope, key.namespace.name) for key, _ in load_keys_file(file)] == [
        ("shop", Scope.WRITE, "acme"),
        ("prometheus", Scope.METRICS, ""),
    ]


# --- many requests at once -------------------------------------------------------------------------------------------


class SlowRepository:
    """Responds once ``open`` is set, and records its queries."""

    def __init__(self, answer):
        self.queries, self.answer = [], answer
        self.asked, self.open = asyncio.Event(), asyncio.Event()

    async def any(self):
        return await self._answered("any")

    async def find(self, key_id):
        return await self._answered(key_id)

    async def _answered(self, query):
        self.queries.append(query)
        self.asked.set()
        await self.open.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def asked_together(repository, ask, count=50):
    asking = [asyncio.create_task(ask()) for _ in range(count)]
    await repository.asked.wait()
    repository.open.set()
    return await asyncio.gather(*asking, return_exceptions=True)


async def test_requests_that_arrive_together_share_a_query():
    repository = SlowRepository(False)
    ring = KeyRing(repository, policy=KeyPolicy.AUTO)
    assert await asked_together(repository, ring.is_required) == [False] * 50
    assert repository.queries == ["any"]

    text = f"dx_{'0' * 12}_{'a' * 43}"
    repository = SlowRepository((key(id="0" * 12), key_digest(text)))
    ring = KeyRing(repository, policy=KeyPolicy.AUTO)
    ring._save_last_use = lambda _: None
    found = await asked_together(repository, lambda: ring.find(text))
    assert {each.id for each in found} == {"0" * 12}
    assert repository.queries == ["0" * 12]


async def test_a_shared_query_that_fails_fails_for_every_request_and_is_asked_again():
    repository = SlowRepository(StoreError("the database does not respond"))
    ring = KeyRing(repository, policy=KeyPolicy.AUTO)
    failed = await asked_together(repository, ring.is_required)
    assert all(isinstance(each, StoreError) for each in failed)
    repository.answer = True
    assert await ring.is_required()
    assert repository.queries == ["any", "any"]


async def test_a_request_that_leaves_does_not_cancel_the_query_of_others():
    repository = SlowRepository(False)
    ring = KeyRing(repository, policy=KeyPolicy.AUTO)
    first, second = (asyncio.create_task(ring.is_required()) for _ in range(2))
    await repository.asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    repository.open.set()
    assert not await second
    await ring.close()
