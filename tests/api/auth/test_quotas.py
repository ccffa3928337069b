"""Rates and quotas of API keys."""

import asyncio
import os
import shutil
import socket
import subprocess
import time

import pytest
import structlog

from app.api.auth.policy import parse_rate
from app.api.auth.quotas import DefaultQuotas, Quotas
from app.errors import ConfigurationError, InvalidFieldError, RateLimitedError, TooLargeError
from app.names.namespaces import OPEN_NAMESPACE
from app.store.keys import Key
from app.types import Scope

pytestmark = pytest.mark.anyio


def key(**fields) -> Key:
    return Key(**({"id": "", "scope": Scope.CLASSIFY, "namespace": OPEN_NAMESPACE} | fields))


@pytest.mark.parametrize("text", ["60/min", "60/minute", "60 per 1 minute", " 10/sec; 5000/day ", "1/2hours"])
def test_rates_are_parsed(text):
    assert parse_rate(text, "rate")


@pytest.mark.parametrize("text", ["", "often", "60", "0/min", "-1/min", "60/fortnight", "60/min; 0/day"])
def test_an_invalid_rate_is_reported_with_its_field(text):
    with pytest.raises(InvalidFieldError, match="is not a rate") as caught:
        parse_rate(text, "--rate")
    assert caught.value.problems[0].field == "--rate"


async def test_requests_and_images_are_counted_separately_per_key():
    quotas = Quotas(DefaultQuotas(), "memory://")
    one, other = key(id="one", rate="2/hour", image_rate="5/hour"), key(id="other", rate="2/hour")
    for _ in range(2):
        await quotas.spend_request(one)
    with pytest.raises(RateLimitedError, match="'one' has used its rate of 2 per 1 hour") as caught:
        await quotas.spend_request(one)
    assert 1 <= caught.value.retry_after_s <= 3600
    await quotas.spend_request(other)
    await quotas.spend_images(one, 4)
    with pytest.raises(RateLimitedError):
        await quotas.spend_images(one, 2)
    await quotas.spend_images(one, 1)
    await quotas.spend_images(other, 10_000)
    with pytest.raises(TooLargeError, match="6 images in one request"):
        await quotas.spend_images(one, 6)


async def test_a_key_without_a_rate_uses_the_default_rate():
    quotas = Quotas(DefaultQuotas(rate="1/hour", concurrency=1), "memory://")
    await quotas.spend_request(key(id="one"))
    with pytest.raises(RateLimitedError):
        await quotas.spend_request(key(id="one"))
    for _ in range(3):
        await quotas.spend_request(key(id="rich", rate="3/hour"))


async def test_the_concurrent_requests_of_a_key_are_limited():
    quotas = Quotas(DefaultQuotas(), "memory://")
    one = key(id="one", concurrency=2)
    with quotas.running(one), quotas.running(key(id="other", concurrency=1)):
        with quotas.running(one), pytest.raises(RateLimitedError, match="'one' already has 2 requests"):
            quotas.running(one).__enter__()
        with pytest.raises(KeyError), quotas.running(one):
            raise KeyError
        with quotas.running(one):
            pass
    assert not quotas._running


async def test_requests_pass_while_the_rate_limit_storage_fails(monkeypatch):
    from limits.errors import StorageError

    quotas = Quotas(DefaultQuotas(rate="1/hour"), "memory://")

    async def fail(*_, **__):
        raise StorageError(ConnectionError("unavailable"))

    monkeypatch.setattr(quotas._limiter, "hit", fail)
    for _ in range(3):
        await quotas.spend_request(key(id="one"))


@pytest.fixture
def redis_port(tmp_path):
    """The port of a Redis server started for the test; skips if Redis is missing and TEST_REQUIRE_REDIS is not 1."""
    server = shutil.which("redis-server")
    if server is None:
        assert os.environ.get("TEST_REQUIRE_REDIS") != "1", "redis-server is not on PATH"
        pytest.skip("redis-server is not on PATH")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([server, *flags], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "Redis did not start"
                assert time.monotonic() < deadline, "Redis does not answer"
                time.sleep(0.02)
        yield port
        process.terminate()


async def test_two_processes_share_counts_in_redis(redis_port):
    first, second = (Quotas(DefaultQuotas(), f"redis://127.0.0.1:{redis_port}") for _ in range(2))
    one = key(id="one", rate="3/hour", image_rate="10/hour")
    await first.spend_request(one)
    await second.spend_request(one)
    await first.spend_images(one, 6)
    with pytest.raises(RateLimitedError, match="images"):
        await second.spend_images(one, 5)
    await first.spend_request(one)
    with pytest.raises(RateLimitedError, match="requests") as caught:
        await second.spend_request(one)
    assert 1 <= caught.value.retry_after_s <= 3600
    await second.spend_request(key(id="other", rate="1/hour"))
    await first.close()
    await second.close()


class Counted:
    def __init__(self):
        self.count = 0

    def inc(self):
        self.count += 1


async def test_a_redis_that_never_responds_delays_one_request():
    counted = Counted()
    with socket.create_server(("127.0.0.1", 0)) as silent, structlog.testing.capture_logs() as logged:
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        quotas = Quotas(DefaultQuotas(rate="1/hour", image_rate="5/hour"), address, counted)
        began = time.monotonic()
        for _ in range(100):
            await quotas.spend_request(key(id="one"))
            await quotas.spend_images(key(id="one"), 5)
        assert time.monotonic() - began < 2
        await quotas.close()
    assert [entry["event"] for entry in logged] == ["rate_limit_storage_failed"]
    assert counted.count == 1


async def test_rates_are_enforced_again_when_the_storage_responds_again(monkeypatch):
    counted = Counted()
    quotas = Quotas(DefaultQuotas(rate="1/hour"), "memory://", counted)
    hit, is_hung = quotas._limiter.hit, True

    async def hang(*args, **options):
        if is_hung:
            await asyncio.Event().wait()
        return await hit(*args, **options)

    monkeypatch.setattr(quotas._limiter, "hit", hang)
    monkeypatch.setattr("app.api.auth.quotas._RETRY_AFTER_S", 0.0)
    with structlog.testing.capture_logs() as logged:
        for _ in range(2):
            await quotas.spend_request(key(id="one"))
        is_hung = False
        await quotas.spend_request(key(id="one"))
        with pytest.raises(RateLimitedError):
            await quotas.spend_request(key(id="one"))
    assert [entry["event"] for entry in logged] == ["rate_limit_storage_failed", "rate_limit_storage_recovered"]
    assert counted.count == 2


@pytest.mark.parametrize("storage", ["memory", "nonsense://here", "mongodb://here"])
def test_an_unsupported_storage_is_reported(storage):
    with pytest.raises(ConfigurationError, match="DEIXIS_RATE_LIMIT_STORAGE"):
        Quotas(DefaultQuotas(), storage)
