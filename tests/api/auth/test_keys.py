"""Keys and quotas by themselves."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import structlog

from app.api.auth import keys as keys_module
from app.api.auth.keys import (
    DefaultQuotas,
    KeyPolicy,
    KeyRing,
    Quotas,
    digest_of,
    make_key,
    parse_authorization,
    read_keys_file,
    read_rate,
)
from app.errors import (
    ConfigurationError,
    ConflictError,
    InvalidFieldError,
    RateLimitedError,
    StoreError,
    TooLargeError,
    UnauthenticatedError,
    UnknownNameError,
)
from app.names.namespaces import OPEN_NAMESPACE, Namespace
from app.store.database import open_engine
from app.store.keys import Key, KeyRepository, Scope

pytestmark = pytest.mark.anyio

SECRET = "a secret of the operator, long enough"


@pytest.fixture
async def repository(settings):
    engine = open_engine(settings.effective_database_url)
    yield KeyRepository(engine)
    await engine.dispose()


@pytest.fixture
def no_memory(monkeypatch):
    """Everything is looked up again, as after a second."""
    monkeypatch.setattr(keys_module, "_KNOWN_FOR_S", 0)


def key(**more) -> Key:
    return Key(**({"id": "", "scope": Scope.CLASSIFY, "namespace": OPEN_NAMESPACE} | more))


def test_each_scope_includes_the_smaller_ones_and_metrics_is_by_itself():
    allowed = {scope: {wanted for wanted in Scope if scope.allows(wanted)} for scope in Scope}
    assert allowed == {
        Scope.METRICS: {Scope.METRICS},
        Scope.CLASSIFY: {Scope.CLASSIFY},
        Scope.WRITE: {Scope.CLASSIFY, Scope.WRITE},
        Scope.ADMIN: set(Scope),
    }


async def test_a_key_is_found_by_what_was_shown_once_and_only_its_hash_is_kept(repository, settings):
    shown, made = await make_key(repository, key(namespace=Namespace("acme"), rate="60 per 1 minute", note="shop"))
    assert (await KeyRing(repository).find(shown)).namespace == Namespace("acme")
    assert shown.startswith(f"dx_{made.id}_")
    await repository.list()
    for file in settings.data_dir.glob("deixis.sqlite3*"):
        assert shown.encode() not in file.read_bytes()
        assert shown.split("_", 2)[2].encode() not in file.read_bytes()


@pytest.mark.parametrize("change", [lambda s: s[:-1] + "!", lambda s: s[:-1], lambda s: s + "a", str.upper])
async def test_no_other_text_is_that_key(repository, change):
    shown, _ = await make_key(repository, key())
    with pytest.raises(UnauthenticatedError):
        await KeyRing(repository).find(change(shown))


async def test_the_secret_of_one_key_is_none_of_another(repository):
    (one, _), (other, _) = [await make_key(repository, key()) for _ in range(2)]
    mixed = "_".join([*one.split("_", 2)[:2], other.split("_", 2)[2]])
    with pytest.raises(UnauthenticatedError):
        await KeyRing(repository).find(mixed)


async def test_a_revoked_key_is_refused_once_it_is_looked_up_again_and_stays_listed(repository, no_memory):
    shown, made = await make_key(repository, key())
    ring = KeyRing(repository)
    await ring.find(shown)
    first = await repository.revoke(made.id)
    with pytest.raises(UnauthenticatedError):
        await ring.find(shown)
    assert (await repository.revoke(made.id)).revoked_at == first.revoked_at
    assert [each.id for each in await repository.list()] == [made.id]
    for nobody in ("0" * 12, "\ud800", "\0"):
        with pytest.raises(UnknownNameError, match="deixis keys list"):
            await repository.revoke(nobody)
    with pytest.raises(ConflictError):
        await repository.add(made, b"x")


async def test_when_a_key_was_last_used_is_noted_now_and_then(repository):
    shown, made = await make_key(repository, key())
    assert (await repository.find(made.id))[0].last_used_at is None
    ring = KeyRing(repository)
    await ring.find(shown)
    await ring.close()
    used = (await repository.find(made.id))[0].last_used_at
    assert used >= made.created_at
    await ring.find(shown)
    await ring.close()
    assert (await repository.find(made.id))[0].last_used_at == used


async def test_keys_that_were_good_stay_good_while_the_database_is_away(repository, no_memory, monkeypatch):
    (shown, _), (unseen, _) = [await make_key(repository, key()) for _ in range(2)]
    ring = KeyRing(repository)
    assert await ring.is_required()
    await ring.find(shown)
    await ring.close()

    async def away(*_):
        raise StoreError("away")

    for name in ("find", "any", "used"):
        monkeypatch.setattr(repository, name, away)
    monkeypatch.setattr(keys_module, "_USE_NOTED_EVERY_S", 0)
    assert await ring.is_required()
    assert await ring.find(shown)
    await ring.close()
    with pytest.raises(StoreError):
        await ring.find(unseen)
    with pytest.raises(StoreError):  # a new process does not know, and lets nobody in
        await KeyRing(repository).is_required()


async def test_keys_are_required_once_there_was_one_and_as_the_operator_says(repository, no_memory):
    ring = KeyRing(repository)
    assert not await ring.is_required()
    assert not await KeyRing(repository, policy=KeyPolicy.OFF).is_required()
    assert await KeyRing(repository, policy=KeyPolicy.REQUIRED).is_required()
    assert await KeyRing(repository, [(key(id="a"), digest_of(SECRET))]).is_required()
    _, made = await make_key(repository, key())
    assert await ring.is_required()
    await repository.revoke(made.id)
    assert await ring.is_required()
    assert await KeyRing(repository).is_required()
    assert not await KeyRing(repository, policy=KeyPolicy.OFF).is_required()


# --- the operator's file ---------------------------------------------------------------------------------------------


async def test_keys_of_a_file_are_found_by_text_or_hash(tmp_path, repository):
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
        sha256 = "{digest_of("another secret").hex()}"
        scope = "metrics"
        """
    )
    ring = KeyRing(repository, read_keys_file(file))
    shop = await ring.find(SECRET)
    assert (shop.id, shop.scope, shop.namespace, shop.concurrency) == ("shop", Scope.WRITE, Namespace("shop"), 4)
    assert (await ring.find("another secret")).scope is Scope.METRICS
    with pytest.raises(UnauthenticatedError):
        await ring.find(SECRET + " ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = 3", "keys"),
        (f"key = '{SECRET}", "is no TOML"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nsha256 = '{'0' * 64}'", "give one of key and sha256"),
        ("[[keys]]\nid = 'a'", "give one of key and sha256"),
        ("[[keys]]\nid = 'a'\nkey = 'guessed'", "can be guessed"),
        (f"[[keys]]\nid = 'a b'\nkey = '{SECRET}'", "keys.0.id"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nscope = 'root'", "keys.0.scope"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nnamespace = 'A/b'", "is not a valid namespace"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\nrate = 'often'", "'often' is no rate"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\n[[keys]]\nid = 'a'\nkey = '{SECRET}.'", "same id twice"),
        (f"[[keys]]\nid = 'a'\nkey = '{SECRET}'\n[[keys]]\nid = 'b'\nkey = '{SECRET}'", "same key twice"),
        (f"# {'x' * 2**20}", "more than 1,048,576 bytes"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_without_its_secrets(tmp_path, text, problem):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as told:
        read_keys_file(file)
    assert SECRET not in told.value.message
    assert "guessed'" not in told.value.message


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_keys_file(tmp_path / "none.toml")


# --- what a request shows --------------------------------------------------------------------------------------------


def test_a_key_is_shown_as_bearer_or_by_its_own_header():
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
def test_another_scheme_or_two_keys_are_refused(headers):
    with pytest.raises(UnauthenticatedError):
        parse_authorization(headers)


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["60/min", "60/minute", "60 per 1 minute", " 10/sec; 5000/day ", "1/2hours"])
def test_rates_are_read(text):
    assert read_rate(text, "rate")


@pytest.mark.parametrize("text", ["", "often", "60", "0/min", "-1/min", "60/fortnight", "60/min; 0/day"])
def test_what_is_no_rate_is_told_by_its_field(text):
    with pytest.raises(InvalidFieldError, match="no rate") as told:
        read_rate(text, "--rate")
    assert told.value.problems[0].field == "--rate"


async def test_requests_and_images_of_each_key_are_counted_apart():
    quotas = Quotas(DefaultQuotas(), "memory://")
    one, other = key(id="one", rate="2/hour", image_rate="5/hour"), key(id="other", rate="2/hour")
    for _ in range(2):
        await quotas.spend_request(one)
    with pytest.raises(RateLimitedError, match="'one' may send 2 per 1 hour") as told:
        await quotas.spend_request(one)
    assert 1 <= told.value.retry_after_s <= 3600
    await quotas.spend_request(other)
    await quotas.spend_images(one, 4)
    with pytest.raises(RateLimitedError):
        await quotas.spend_images(one, 2)
    await quotas.spend_images(one, 1)
    await quotas.spend_images(other, 10_000)
    with pytest.raises(TooLargeError, match="6 images at once"):
        await quotas.spend_images(one, 6)


async def test_a_key_without_a_rate_has_that_of_the_settings():
    quotas = Quotas(DefaultQuotas(rate="1/hour", concurrency=1), "memory://")
    await quotas.spend_request(key(id="one"))
    with pytest.raises(RateLimitedError):
        await quotas.spend_request(key(id="one"))
    for _ in range(3):
        await quotas.spend_request(key(id="rich", rate="3/hour"))


async def test_only_so_many_requests_of_a_key_are_answered_at_a_time():
    quotas = Quotas(DefaultQuotas(), "memory://")
    one = key(id="one", concurrency=2)
    with quotas.running(one), quotas.running(key(id="other", concurrency=1)):
        with quotas.running(one), pytest.raises(RateLimitedError, match="2 requests of the key 'one'"):
            quotas.running(one).__enter__()
        with pytest.raises(KeyError), quotas.running(one):
            raise KeyError
        with quotas.running(one):
            pass
    assert not quotas._running


async def test_where_rates_cannot_be_counted_requests_are_let_through(monkeypatch):
    from limits.errors import StorageError

    quotas = Quotas(DefaultQuotas(rate="1/hour"), "memory://")

    async def away(*_, **__):
        raise StorageError(ConnectionError("away"))

    monkeypatch.setattr(quotas._limiter, "hit", away)
    for _ in range(3):
        await quotas.spend_request(key(id="one"))


@pytest.fixture
def redis_port(tmp_path):
    """The port of a Redis of the test's own; skipped where there is none, unless it is said to be required."""
    server = shutil.which("redis-server")
    if server is None:
        assert os.environ.get("TEST_REQUIRE_REDIS") != "1", "redis-server is not on PATH"
        pytest.skip("redis-server is not on PATH")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([server, *flags], stdout=subprocess.DEVNULL) as process:
        give_up_at = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "Redis did not start"
                assert time.monotonic() < give_up_at, "Redis does not answer"
                time.sleep(0.02)
        yield port
        process.terminate()


async def test_two_processes_count_together_in_redis(redis_port):
    here, there = (Quotas(DefaultQuotas(), f"redis://127.0.0.1:{redis_port}") for _ in range(2))
    one = key(id="one", rate="3/hour", image_rate="10/hour")
    await here.spend_request(one)
    await there.spend_request(one)
    await here.spend_images(one, 6)
    with pytest.raises(RateLimitedError, match="images"):
        await there.spend_images(one, 5)
    await here.spend_request(one)
    with pytest.raises(RateLimitedError, match="requests") as told:
        await there.spend_request(one)
    assert 1 <= told.value.retry_after_s <= 3600
    await there.spend_request(key(id="other", rate="1/hour"))
    await here.close()
    await there.close()


async def test_a_redis_that_accepts_and_never_answers_holds_nobody_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, structlog.testing.capture_logs() as logged:
        quotas = Quotas(DefaultQuotas(rate="1/hour"), f"redis://127.0.0.1:{silent.getsockname()[1]}")
        async with asyncio.timeout(20):
            for _ in range(2):
                await quotas.spend_request(key(id="one"))
        await quotas.close()
    assert [each["event"] for each in logged] == ["rates_not_counted"] * 2


@pytest.mark.parametrize("storage", ["memory", "nonsense://here", "mongodb://here"])
def test_a_storage_that_there_is_not_is_told(storage):
    with pytest.raises(ConfigurationError, match="DEIXIS_RATE_LIMIT_STORAGE"):
        Quotas(DefaultQuotas(), storage)


def test_the_file_of_the_guide_can_be_read(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text("utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "keys.toml"
    file.write_text(shown)
    assert [(each.id, each.scope, each.namespace.name) for each, _ in read_keys_file(file)] == [
        ("shop", Scope.WRITE, "acme"),
        ("prometheus", Scope.METRICS, ""),
    ]
