"""Who calls, by an API key, and how much of the service each key may use.

A key is shown once, when it is made, and looks like ``dx_<id>_<secret>``, or it is any text of an operator's file. Only
its SHA-256 is kept: a key made here has 256 random bits, against which a slow hash adds nothing.
"""

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import structlog
from cachetools import TTLCache
from limits import RateLimitItem, parse_many
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConcurrentUpdateError, StorageError
from limits.storage import storage_from_string
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import (
    ConfigurationError,
    InvalidFieldError,
    RateLimitedError,
    StoreError,
    TooLargeError,
    UnauthenticatedError,
)
from app.names.namespaces import clean_namespace
from app.store.keys import Key, KeyRepository, Scope

log = structlog.get_logger()

_PREFIX = "dx"
_OURS = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")
# What is revoked stops to work after this at the latest; what is used is looked up so often.
_KNOWN_FOR_S = 1.0
_MAX_KNOWN = 10_000
# How exact "last used" is.
_USE_NOTED_EVERY_S = 60.0
# While the database does not answer, keys that were good a while ago still are.
_TRUSTED_FOR_S = 3600.0
# A request waits no longer for its count.
_REDIS_TIMEOUT_S = 0.5
_FILE_KEY_CHARS = 24
_MAX_FILE_BYTES = 2**20


class KeyPolicy(StrEnum):
    """Whether callers need a key; with ``auto`` they do once there is one."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


def digest_of(key: str) -> bytes:
    """Return what is kept of a key: its SHA-256, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


async def make_key(repository: KeyRepository, key: Key) -> tuple[str, Key]:
    """Make a key and return it, which nobody can do again, with what is kept of it.

    Args:
        repository: to keep it in.
        key: what it allows; its id is chosen here.
    """
    key_id = secrets.token_hex(6)
    shown = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    return shown, await repository.add(replace(key, id=key_id), digest_of(shown))


def read_rate(text: str | None, field: str) -> str | None:
    """Return a rate in the spelling of the ``limits`` library; several are separated by ``;``.

    Raises:
        InvalidFieldError: it is none such as ``60/min`` or ``10/second; 1000/day``.
    """
    if text is None:
        return None
    spelled = re.sub(r"\bmin\b", "minute", re.sub(r"\bsec\b", "second", text.strip()))
    try:
        items = parse_many(spelled)
    except ValueError:
        items = []
    if not items or any(item.amount < 1 for item in items):
        raise InvalidFieldError.of(field, f"'{text}' is no rate; write it as 60/min, or 10/second; 1000/day")
    return spelled


class _FileKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    key: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")
    scope: Scope = Scope.CLASSIFY
    namespace: str = ""
    rate: str | None = None
    image_rate: str | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "_FileKey":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give one of key and sha256")
        if self.key is not None and len(self.key) < _FILE_KEY_CHARS:
            raise ValueError(f"key has fewer than {_FILE_KEY_CHARS} characters, and can be guessed")
        return self


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[_FileKey]


def read_keys_file(file: Path) -> list[tuple[Key, bytes]]:
    """Return the keys of a TOML file with their digests; docs/security.md shows one.

    Raises:
        ConfigurationError: it cannot be read, or a key of it breaks a rule. The message has nothing of its content.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigurationError(f"the file of API keys '{file}' has more than {_MAX_FILE_BYTES:,} bytes")
        given = _KeysFile.model_validate(tomllib.loads(file.read_text("utf-8")))
        keys = [_from_file(each) for each in given.keys]
    except OSError as error:
        raise ConfigurationError(f"the file of API keys '{file}' cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}"
            for each in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"the file of API keys '{file}': {problems}") from error
    except InvalidFieldError as error:
        raise ConfigurationError(f"the file of API keys '{file}': {error.message}") from error
    except ValueError as error:  # no TOML, or no UTF-8; its text could quote a key
        raise ConfigurationError(f"the file of API keys '{file}' is no TOML ({type(error).__name__})") from None
    for what, values in (("id", [key.id for key, _ in keys]), ("key", [digest for _, digest in keys])):
        if len(set(values)) != len(values):
            raise ConfigurationError(f"the file of API keys '{file}' has the same {what} twice")
    return keys


def _from_file(given: _FileKey) -> tuple[Key, bytes]:
    digest = bytes.fromhex(given.sha256) if given.sha256 is not None else digest_of(given.key or "")
    key = Key(
        given.id,
        given.scope,
        clean_namespace(given.namespace, f"{given.id}.namespace"),
        rate=read_rate(given.rate, f"{given.id}.rate"),
        image_rate=read_rate(given.image_rate, f"{given.id}.image_rate"),
        concurrency=given.concurrency,
    )
    return key, digest


class KeyRing:
    """Finds the key that a caller shows. Its coroutines belong to one event loop.

    Args:
        repository: keys that were made by ``deixis keys create``; asked again after a second.
        from_file: those of the operator's file, with their digests.
        policy: whether a key is needed.
    """

    def __init__(
        self, repository: KeyRepository, from_file: Sequence[tuple[Key, bytes]] = (), policy: KeyPolicy = KeyPolicy.AUTO
    ) -> None:
        self._repository = repository
        self._from_file = tuple(from_file)
        self._policy = policy
        self._any: bool | None = None
        self._any_read = -math.inf
        self._known: TTLCache[str, tuple[Key, bytes] | None] = TTLCache(_MAX_KNOWN, _KNOWN_FOR_S)
        self._trusted: TTLCache[str, tuple[Key, bytes]] = TTLCache(_MAX_KNOWN, _TRUSTED_FOR_S)
        self._noted: dict[str, float] = {}
        self._noting: set[asyncio.Task[None]] = set()

    async def is_required(self) -> bool:
        """Tell whether callers need a key."""
        if self._policy is not KeyPolicy.AUTO:
            return self._policy is KeyPolicy.REQUIRED
        if self._from_file or self._any:
            return True  # a table that had a key never gets empty again
        now = time.monotonic()
        if now - self._any_read > _KNOWN_FOR_S:
            try:
                self._any = await self._repository.any()
            except StoreError:
                if self._any is None:
                    raise
            self._any_read = now
        return bool(self._any)

    async def find(self, shown: str) -> Key:
        """Return the key of which a caller shows the text.

        Raises:
            UnauthenticatedError: it is none, or was revoked.
            StoreError: the database cannot be asked, and the key was not seen before.
        """
        digest = digest_of(shown)
        found = None
        # All of them, so that the time does not tell which one it is.
        for key, kept in self._from_file:
            if hmac.compare_digest(kept, digest):
                found = key
        ours = _OURS.fullmatch(shown)
        if found is None and ours is not None:
            known = await self._look_up(ours[1])
            if known is not None and hmac.compare_digest(known[1], digest) and known[0].revoked_at is None:
                found = known[0]
                self._note_use(found)
        if found is None:
            raise UnauthenticatedError("the API key is not known here, or was revoked; ask the operator for another")
        return found

    async def close(self) -> None:
        """Wait until what was noted is written."""
        await asyncio.gather(*self._noting, return_exceptions=True)

    async def _look_up(self, key_id: str) -> tuple[Key, bytes] | None:
        if key_id in self._known:
            return self._known[key_id]
        try:
            found = await self._repository.find(key_id)
        except StoreError:
            if key_id in self._trusted:
                return self._trusted[key_id]
            raise
        self._known[key_id] = found
        if found is not None:  # so that made-up ones do not push out those that are in use
            self._trusted[key_id] = found
        return found

    def _note_use(self, key: Key) -> None:
        now = time.monotonic()
        if now - self._noted.get(key.id, -math.inf) < _USE_NOTED_EVERY_S:
            return
        self._noted[key.id] = now

        async def note() -> None:
            try:
                await self._repository.used(key.id, datetime.now(UTC))
            except StoreError as error:
                log.warning("key_use_not_noted", key=key.id, reason=error.message)

        task = asyncio.create_task(note())
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)


@dataclass(frozen=True, slots=True)
class DefaultQuotas:
    """What keys may do that say nothing of it; None is without a bound."""

    rate: str | None = None
    image_rate: str | None = None
    concurrency: int | None = None


class Quotas:
    """Counts what each key uses.

    Args:
        defaults: for keys that have none of their own.
        storage: ``memory://`` counts in this process, ``redis://host:port`` for all that share it.

    Raises:
        ConfigurationError: there is no such storage.
    """

    def __init__(self, defaults: DefaultQuotas, storage: str) -> None:
        self._defaults = defaults
        self._redis: Any = None
        try:
            if not re.match(r"memory://$|rediss?://.", storage):
                raise ValueError("another kind of storage")  # noqa: TRY301 - told as those of the library
            options: dict[str, Any] = {}
            if storage != "memory://":
                self._redis = _redis_pool(storage)
                options = {"implementation": "redispy", "connection_pool": self._redis}
            counts = storage_from_string(f"async+{storage}", wrap_exceptions=True, **options)
        except Exception as error:  # whatever a client library raises
            raise ConfigurationError(
                f"DEIXIS_RATE_LIMIT_STORAGE cannot be used ({type(error).__name__}); write memory://, or"
                " redis://host:port with the extra redis installed"
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
        """Count a request of the key until it is answered.

        Raises:
            RateLimitedError: as many as the key may have are being answered.
        """
        most = key.concurrency or self._defaults.concurrency
        if most is not None and self._running[key.id] >= most:
            raise RateLimitedError(
                f"{most} requests of the key '{key.id}' are being answered, and it may have no more at a time; wait for"
                " one of them",
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
        """Count one request; raises ``RateLimitedError`` where that is one too many."""
        await self._spend(key, "requests", key.rate or self._defaults.rate, 1)

    async def spend_images(self, key: Key, images: int) -> None:
        """Count the images of a request; raises as ``spend_request``, ``TooLargeError`` if it can never be allowed."""
        await self._spend(key, "images", key.image_rate or self._defaults.image_rate, images)

    async def _spend(self, key: Key, what: str, rate: str | None, cost: int) -> None:
        if rate is None or not cost:
            return
        if rate not in self._rates:
            self._rates[rate] = parse_many(rate)
        for item in self._rates[rate]:
            if cost > item.amount:
                raise TooLargeError(f"{cost:,} {what} at once, and the key '{key.id}' may send {item}; send fewer")
            try:
                if await self._limiter.hit(item, what, key.id, cost=cost):
                    continue
                resets_at = (await self._limiter.get_window_stats(item, what, key.id)).reset_time
            except (StorageError, ConcurrentUpdateError) as error:
                # Better too much for a while than nothing at all.
                log.warning("rates_not_counted", reason=type(error).__name__)
                return
            wait_s = min(max(1, math.ceil(resets_at - time.time())), item.get_expiry())
            raise RateLimitedError(
                f"the key '{key.id}' may send {item} ({what}), which are used up; wait, or ask the operator for more",
                retry_after_s=wait_s,
            )


def _redis_pool(url: str) -> Any:
    from redis.asyncio import ConnectionPool  # noqa: PLC0415 - an extra
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    return ConnectionPool.from_url(
        url,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def parse_authorization(headers: Mapping[str, str]) -> str | None:
    """Return the key that a request shows, as ``Authorization: Bearer`` or ``X-API-Key``; None where there is none.

    Raises:
        UnauthenticatedError: another scheme, or two keys that differ.
    """
    bearer: str | None = None
    if authorization := headers.get("authorization"):
        scheme, _, bearer = authorization.partition(" ")
        bearer = bearer.strip()
        if scheme.lower() != "bearer" or not bearer:
            raise UnauthenticatedError("the header Authorization must be 'Bearer' and the API key")
    plain = headers.get("x-api-key") or None
    if bearer and plain and bearer != plain:
        raise UnauthenticatedError("Authorization and X-API-Key have different keys; send one")
    return bearer or plain
