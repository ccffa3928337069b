"""Quotas per API key: requests and images per time, and concurrent requests."""

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from limits import RateLimitItem, parse_many
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConcurrentUpdateError, StorageError
from limits.storage import storage_from_string

from app.errors import ConfigurationError, RateLimitedError, TooLargeError
from app.store.keys import Key
from deixis.extras import needs_extra

log = structlog.get_logger()

# A request waits at most this long for its counts. After a failure, one request at a time tries again.
_STORAGE_TIMEOUT_S = 0.5
_RETRY_AFTER_S = 10.0
_MAX_REDIS_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class DefaultQuotas:
    """The quotas of keys that have none of their own; None means unlimited."""

    rate: str | None = None
    image_rate: str | None = None
    concurrency: int | None = None


class FailureCounter(Protocol):
    """Counts failures, as a counter of ``prometheus_client`` does."""

    def inc(self) -> None:
        """Count one."""


class Quotas:
    """Counts the use of each key and enforces its quotas.

    Args:
        defaults: for keys that have no quotas of their own.
        storage: ``memory://`` counts in this process; ``redis://host:port`` counts for all processes that share it.
        failures: counts the failures of the storage.

    Raises:
        ConfigurationError: the storage is not supported.
    """

    def __init__(self, defaults: DefaultQuotas, storage: str, failures: FailureCounter | None = None) -> None:
        self._defaults = defaults
        self._failures = failures
        self._is_failing = False
        self._retry_at = -math.inf
        self._redis: Any = None
        try:
            if not re.match(r"memory://$|rediss?://.", storage):
                raise ValueError("another kind of storage")  # noqa: TRY301 - reported like the library's own errors
            options: dict[str, Any] = {}
            if storage != "memory://":
                self._redis = _redis_pool(storage)
                options = {"implementation": "redispy", "connection_pool": self._redis}
            counts = storage_from_string(f"async+{storage}", wrap_exceptions=True, **options)
        except ImportError as error:
            raise ConfigurationError(needs_extra("DEIXIS_RATE_LIMIT_STORAGE=redis://...", "redis")) from error
        except Exception as error:  # client libraries raise errors of any class
            raise ConfigurationError(
                f"DEIXIS_RATE_LIMIT_STORAGE cannot be used ({type(error).__name__}); write memory:// or"
                " redis://host:port"
            ) from error
        self._limiter = SlidingWindowCounterRateLimiter(counts)
        self._rates: dict[str, Sequence[RateLimitItem]] = {}
        self._running: Counter[str] = Counter()

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._redis is not None:
            await self._redis.aclose()

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Count a request as running until the context ends.

        Raises:
            RateLimitedError: the key already has its maximum number of running requests.
        """
        limit = key.concurrency or self._defaults.concurrency
        if limit is not None and self._running[key.id] >= limit:
            raise RateLimitedError(
                f"the key '{key.id}' already has {limit} requests running, which is its limit; wait until one of them"
                " finishes",
                retry_after_s=1,
            )
        self._running[key.id] += 1
        try:
            yield
        finally:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    async def spend_request(self, key: Key) -> None:
        """Count one request; raises ``RateLimitedError`` if the key's rate is used up."""
        await self._spend(key, "requests", key.rate or self._defaults.rate, 1)

    async def spend_images(self, key: Key, images: int) -> None:
        """Count the images of a request.

        Raises:
            RateLimitedError: the key's image rate is used up.
            TooLargeError: the request has more images than the rate ever allows at once.
        """
        await self._spend(key, "images", key.image_rate or self._defaults.image_rate, images)

    async def _spend(self, key: Key, unit: str, rate: str | None, cost: int) -> None:
        if rate is None or not cost:
            return
        if rate not in self._rates:
            self._rates[rate] = parse_many(rate)
        for item in self._rates[rate]:
            if cost > item.amount:
                raise TooLargeError(
                    f"{cost:,} {unit} in one request exceed the rate of the key '{key.id}', {item}; send fewer"
                )
            if (resets_at := await self._hit(item, unit, key, cost)) is not None:
                wait_s = min(max(1, math.ceil(resets_at - time.time())), item.get_expiry())
                raise RateLimitedError(
                    f"the key '{key.id}' has used its rate of {item} ({unit}); wait, or ask the operator for a higher"
                    " rate",
                    retry_after_s=wait_s,
                )

    async def _hit(self, item: RateLimitItem, unit: str, key: Key, cost: int) -> float | None:
        """Count a cost; return when the rate resets if it is used up, and None if it is not or the storage fails."""
        # Serving too many requests for a while is better than serving none, or each of them late.
        if self._is_failing:
            if time.monotonic() < self._retry_at:
                return None
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
        try:
            async with asyncio.timeout(_STORAGE_TIMEOUT_S):
                resets_at = None
                if not await self._limiter.hit(item, unit, key.id, cost=cost):
                    resets_at = (await self._limiter.get_window_stats(item, unit, key.id)).reset_time
        except (StorageError, ConcurrentUpdateError, TimeoutError) as error:
            if self._failures is not None:
                self._failures.inc()
            if not self._is_failing:
                log.warning("rate_limit_storage_failed", reason=type(error).__name__, retry_after_s=_RETRY_AFTER_S)
            self._is_failing, self._retry_at = True, time.monotonic() + _RETRY_AFTER_S
            return None
        if self._is_failing:
            self._is_failing = False
            log.info("rate_limit_storage_recovered")
        return resets_at


def _redis_pool(url: str) -> Any:
    from redis.asyncio import BlockingConnectionPool  # noqa: PLC0415 - an extra
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    return BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_REDIS_CONNECTIONS,
        timeout=_STORAGE_TIMEOUT_S,
        socket_timeout=_STORAGE_TIMEOUT_S,
        socket_connect_timeout=_STORAGE_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
