"""API keys: creating them, reading the operator's keys file, and finding the key that a request carries.

A key is shown once, when it is created, as ``dx_<id>_<secret>``; a key in the operator's file may be any text. Only the
SHA-256 digest of a key is stored. A created key has 256 random bits, so a slow hash would add no protection.
"""

import asyncio
import hashlib
import hmac
import math
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import structlog
from cachetools import TTLCache
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.api.auth.policy import KeyPolicy, parse_rate
from app.errors import ConfigurationError, InvalidFieldError, StoreError, UnauthenticatedError
from app.names.field_values import Whole
from app.names.namespaces import clean_namespace
from app.store.keys import Key, KeyRepository
from app.types import Scope

_Result = TypeVar("_Result")

log = structlog.get_logger()

_PREFIX = "dx"
_CREATED_KEY = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")
# A revoked key stops working after at most this time.
_LOOKUP_CACHE_S = 1.0
_MAX_CACHED_KEYS = 10_000
# The name of the query whether there is a key; the others have the ids of keys.
_ANY_KEY = ""
# The resolution of a key's `last_used_at`.
_LAST_USE_INTERVAL_S = 60.0
# While the database is unavailable, keys that were found within this time stay valid.
_OUTAGE_CACHE_S = 3600.0
_MIN_FILE_KEY_CHARS = 24
_MAX_FILE_BYTES = 2**20


def key_digest(key: str) -> bytes:
    """Return the SHA-256 digest of a key, 32 bytes; only this is stored."""
    return hashlib.sha256(key.encode()).digest()


async def create_key(repository: KeyRepository, key: Key) -> tuple[str, Key]:
    """Create a key; return its text, which is not stored and cannot be shown again, and its record.

    Args:
        repository: where the record is stored.
        key: the permissions; its id is replaced by a new one.
    """
    key_id = secrets.token_hex(6)
    text = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    return text, await repository.add(replace(key, id=key_id), key_digest(text))


class _FileKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    key: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")
    scope: Scope = Scope.CLASSIFY
    namespace: str = ""
    rate: str | None = None
    image_rate: str | None = None
    concurrency: Annotated[Whole, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "_FileKey":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.key is not None and len(self.key) < _MIN_FILE_KEY_CHARS:
            raise ValueError(
                f"key has fewer than {_MIN_FILE_KEY_CHARS} characters and can be guessed; use a longer one"
            )
        return self


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[_FileKey]


def load_keys_file(file: Path) -> list[tuple[Key, bytes]]:
    """Return the keys of a TOML file with their digests; docs/security.md shows an example.

    Raises:
        ConfigurationError: the file cannot be read, or a key in it is invalid. The message never contains a key.
    """
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigurationError(f"the API keys file '{file}' has more than {_MAX_FILE_BYTES:,} bytes")
        content = _KeysFile.model_validate(tomllib.loads(file.read_text("utf-8")))
        keys = [_key_and_digest(entry) for entry in content.keys]
    except OSError as error:
        raise ConfigurationError(f"the API keys file '{file}' cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"the API keys file '{file}': {problems}") from error
    except InvalidFieldError as error:
        raise ConfigurationError(f"the API keys file '{file}': {error.message}") from error
    except ValueError as error:  # not TOML or not UTF-8; the text of the error could quote a key
        raise ConfigurationError(f"the API keys file '{file}' is not valid TOML ({type(error).__name__})") from None
    for field, values in (("id", [key.id for key, _ in keys]), ("key", [digest for _, digest in keys])):
        if len(set(values)) != len(values):
            raise ConfigurationError(f"the API keys file '{file}' contains the same {field} twice")
    return keys


def _key_and_digest(entry: _FileKey) -> tuple[Key, bytes]:
    digest = bytes.fromhex(entry.sha256) if entry.sha256 is not None else key_digest(entry.key or "")
    key = Key(
        entry.id,
        entry.scope,
        clean_namespace(entry.namespace, f"{entry.id}.namespace"),
        rate=parse_rate(entry.rate, f"{entry.id}.rate"),
        image_rate=parse_rate(entry.image_rate, f"{entry.id}.image_rate"),
        concurrency=entry.concurrency,
    )
    return key, digest


class KeyRing:
    """Finds the key that a request carries. Its coroutines must all run on one event loop.

    Args:
        repository: keys created by ``deixis keys create``; lookups are cached for one second.
        file_keys: keys of the operator's file with their digests.
        policy: whether requests need a key.
    """

    def __init__(
        self, repository: KeyRepository, file_keys: Sequence[tuple[Key, bytes]] = (), policy: KeyPolicy = KeyPolicy.AUTO
    ) -> None:
        self._repository = repository
        self._file_keys = tuple(file_keys)
        self._policy = policy
        self._any: bool | None = None
        self._any_read_at = -math.inf
        self._recent: TTLCache[str, tuple[Key, bytes] | None] = TTLCache(_MAX_CACHED_KEYS, _LOOKUP_CACHE_S)
        self._trusted: TTLCache[str, tuple[Key, bytes]] = TTLCache(_MAX_CACHED_KEYS, _OUTAGE_CACHE_S)
        self._last_use_saved_at: dict[str, float] = {}
        self._saving: set[asyncio.Task[None]] = set()
        self._reading: dict[str, asyncio.Task[Any]] = {}

    async def is_required(self) -> bool:
        """Return whether requests need a key."""
        if self._policy is not KeyPolicy.AUTO:
            return self._policy is KeyPolicy.REQUIRED
        if self._file_keys or self._any:
            return True  # revoked keys stay in the table, so it never becomes empty again
        now = time.monotonic()
        if now - self._any_read_at > _LOOKUP_CACHE_S:
            try:
                self._any = await self._once(_ANY_KEY, self._repository.any)
            except StoreError:
                if self._any is None:
                    raise
            self._any_read_at = now
        return bool(self._any)

    async def find(self, text: str) -> Key:
        """Return the key with this text.

        Raises:
            UnauthenticatedError: there is no such key, or it was revoked.
            StoreError: the database is unavailable, and the key was not found in the last hour.
        """
        digest = key_digest(text)
        found = None
        # Compare with every key, so that the time taken does not reveal which one matched.
        for key, stored in self._file_keys:
            if hmac.compare_digest(stored, digest):
                found = key
        created = _CREATED_KEY.fullmatch(text)
        if found is None and created is not None:
            record = await self._look_up(created[1])
            if record is not None and hmac.compare_digest(record[1], digest) and record[0].revoked_at is None:
                found = record[0]
                self._save_last_use(found)
        if found is None:
            raise UnauthenticatedError("the API key is unknown or was revoked; ask the operator for a new one")
        return found

    async def close(self) -> None:
        """Wait until pending writes are done."""
        await asyncio.gather(*self._saving, *self._reading.values(), return_exceptions=True)

    async def _look_up(self, key_id: str) -> tuple[Key, bytes] | None:
        if key_id in self._recent:
            return self._recent[key_id]
        try:
            record = await self._once(key_id, partial(self._repository.find, key_id))
        except StoreError:
            if key_id not in self._trusted:
                raise
            # Not asked again for a second, because the database may take long to fail.
            record = self._recent[key_id] = self._trusted[key_id]
            return record
        self._recent[key_id] = record
        if record is not None:  # invented ids must not evict keys that are in use
            self._trusted[key_id] = record
        return record

    async def _once(self, name: str, read: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Return what one query reads for all requests that wait for it; under a load, hundreds would ask at once."""
        running: asyncio.Task[_Result] | None = self._reading.get(name)
        if running is None:
            running = self._reading[name] = asyncio.create_task(read())
            running.add_done_callback(partial(self._end_reading, name))
        return await asyncio.shield(running)

    def _end_reading(self, name: str, done: asyncio.Task[Any]) -> None:
        del self._reading[name]
        if not done.cancelled():
            done.exception()  # every request may have been cancelled, and an error is not reported then

    def _save_last_use(self, key: Key) -> None:
        now = time.monotonic()
        if now - self._last_use_saved_at.get(key.id, -math.inf) < _LAST_USE_INTERVAL_S:
            return
        self._last_use_saved_at[key.id] = now

        async def save() -> None:
            try:
                await self._repository.used(key.id, datetime.now(UTC))
            except StoreError as error:
                log.warning("key_last_use_not_saved", key=key.id, reason=error.message)

        task = asyncio.create_task(save())
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)


def parse_authorization(headers: Mapping[str, str]) -> str | None:
    """Return the key in ``Authorization: Bearer`` or ``X-API-Key``; None if a request has neither header.

    Raises:
        UnauthenticatedError: the scheme is not Bearer, or the two headers carry different keys.
    """
    bearer: str | None = None
    if authorization := headers.get("authorization"):
        scheme, _, bearer = authorization.partition(" ")
        bearer = bearer.strip()
        if scheme.lower() != "bearer" or not bearer:
            raise UnauthenticatedError("the Authorization header must be 'Bearer' followed by the API key")
    plain = headers.get("x-api-key") or None
    if bearer and plain and bearer != plain:
        raise UnauthenticatedError("Authorization and X-API-Key carry different keys; send one of them")
    return bearer or plain
