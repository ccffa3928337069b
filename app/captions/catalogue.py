"""The caption databases that are served: found in a folder, searched, replaced while they are in use, and built.

A database is whatever ``app/captions/build.py`` has published below the folder, by this process or by another. What
is asked of one looks, once in a while, whether it has been replaced; what was begun with the old one ends with it.
"""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog
from jaxtyping import Float32

from app.captions.build import BuildOptions, build, prune, remove
from app.captions.cased.lexicon import Lexicon
from app.captions.database import (
    WHOLE,
    CaptionDatabase,
    Found,
    Manifest,
    Part,
    check_files,
    current_generation,
    is_database,
    read_manifest,
)
from app.captions.plan import BuildPlan
from app.captions.sources import Counts, Source
from app.errors import (
    ConfigurationError,
    DeixisError,
    ForbiddenError,
    InvalidFieldError,
    NotConfiguredError,
    NotReadyError,
    ServerError,
    StoreError,
    UnknownNameError,
)
from app.models.queue import EncodeQueue
from app.names.namespaces import OPEN_NAMESPACE, Namespace, is_qualified_database_name, namespace_of
from app.observability.metrics import Metrics, TowerMetrics
from app.runtime.cpu import lower_priority
from app.types import ImageFeatures, TextFeatures

log = structlog.get_logger()

# Whether a database has been replaced is looked up at most so often.
_LOOKED_UP_EVERY_S = 1.0
# Requests that have begun end well when a database is deleted; its files take room on the disk until then.
_KEPT_OPEN_S = 60.0
_SEARCHED_AT_ONCE = 64
# Texts that a build hands to the queue at a time; it can stop between two of these.
_ENCODED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """A database as it is on the disk; ``problem`` tells why it cannot be read, and then the rest may be missing."""

    name: str
    generation: str | None = None
    manifest: Manifest | None = None
    problem: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return 0 if self.manifest is None else sum(int(each["bytes"]) for each in self.manifest.files.values())


class SearchElsewhere(Protocol):
    """Searches a generation of a caption database in other processes."""

    async def __call__(
        self,
        name: str,
        generation: str,
        queries: ImageFeatures | TextFeatures,
        k: int,
        *,
        features: bool,
        within_s: float | None,
    ) -> list[Found]:
        """Return what ``CaptionCatalogue.search`` does; ``name`` is as it is kept."""


@dataclass(frozen=True, slots=True)
class _Search:
    """One query (d,) of a caller, of which database, in which part of it and for how many captions."""

    database: CaptionDatabase
    query: Float32[np.ndarray, " d"]
    k: int
    features: bool
    part: Part


class CaptionCatalogue:
    """Searches caption databases, and builds them. Its coroutines belong to one event loop.

    Args:
        folder: has a folder for each; need not exist.
        default: the name of the one that is asked where none is named.
        wordnet: the folder of WordNet's files.
        metrics: told of searches.
        max_queued: searches that wait at once for one database.
        stalled_after_s: a search that takes longer makes its database unhealthy.
        search_elsewhere: searches in the place of this process, which then only looks up what there is.
    """

    def __init__(
        self,
        folder: Path,
        *,
        default: str,
        wordnet: Path,
        metrics: Metrics,
        max_queued: int,
        stalled_after_s: float,
        search_elsewhere: SearchElsewhere | None = None,
    ) -> None:
        self.folder = folder
        self.default = default
        self.wordnet = wordnet
        self._metrics = metrics
        self._max_queued = max_queued
        self._stalled_after_s = stalled_after_s
        self._search_elsewhere = search_elsewhere
        self._served: dict[str, _Served] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._awaited: dict[str, str] = {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="captions", initializer=lower_priority)
        self._lexicon: Lexicon | None = None
        self._reading = threading.Lock()

    @property
    def problem(self) -> str | None:
        """Why searches are not answered at the moment; None while all is well."""
        return next((problem for each in self._served.values() if (problem := each.queue.problem) is not None), None)

    # --- what there is -------------------------------------------------------------------------------------------

    def named(self, raw: str, namespace: Namespace, field: str = "name") -> str:
        """Return how the database is kept that callers of a namespace mean by a name.

        The default one belongs to the operator, and all may read it. Raises as ``clean_database_name``.
        """
        name = OPEN_NAMESPACE.database(raw, field)
        return name if name == self.default else namespace.qualify(name)

    def named_to_change(self, raw: str, namespace: Namespace) -> str:
        """Return the same for a name under which something is to be built or deleted.

        Raises:
            InvalidFieldError: a name that none can have.
            ForbiddenError: that of the default one, in a namespace.
        """
        name = self.named(raw, namespace)
        if not namespace.contains(name):
            raise ForbiddenError(
                f"the caption database '{name}' is the operator's, and is read only in a namespace; choose another name"
            )
        return name

    async def states(self, namespace: Namespace | None = None) -> list[DatabaseState]:
        """Return every database, by name; with a namespace those that its callers may read."""

        def read() -> list[DatabaseState]:
            names = self._names() if namespace is None else self._readable(namespace)
            return [state for name in names if (state := _state(self.folder / name, name)) is not None]

        return await asyncio.to_thread(read)

    async def state(self, name: str) -> DatabaseState:
        """Return one.

        Raises:
            UnknownNameError: there is none of that name.
        """
        state = await asyncio.to_thread(_state, self._folder_of(name), name)
        if state is None:
            raise await self._unknown(name)
        return state

    async def manifest(self, name: str) -> Manifest:
        """Return that of the generation in use, which an unreadable newer one does not replace.

        Raises:
            UnknownNameError: there is none of that name.
            StoreError: it is damaged.
        """
        return (await self._open(name)).current.manifest

    async def check(self, name: str, fingerprint: str, *, field: str = "database") -> None:
        """See that a database is there and can be asked with this model.

        Args:
            name: as it is kept.
            fingerprint: of the model's text tower.
            field: which to blame where the model does not suit.

        Raises:
            InvalidFieldError: another model made it.
            UnknownNameError: there is none of that name.
            StoreError: it is damaged.
        """
        _check_model(name, (await self._open(name)).current.manifest, fingerprint, field)

    async def choose(self, model: str, fingerprint: str, namespace: Namespace = OPEN_NAMESPACE) -> str:
        """Return the database to ask where a caller names none: the default one, else the only one of the model.

        Args:
            model: for messages.
            fingerprint: of its text tower.
            namespace: of the caller.

        Raises:
            NotReadyError: it is still being built.
            NotConfiguredError: there is none of this model.
            InvalidFieldError: there are several.
            StoreError: it is damaged.
        """
        with suppress(UnknownNameError, StoreError):
            if (await self._open(self.default)).current.manifest.fingerprint == fingerprint:
                return self.default
        suitable: list[str] = []
        damage: dict[str, StoreError] = {}
        for name in await asyncio.to_thread(self._readable, namespace):
            try:
                if (await self._open(name)).current.manifest.fingerprint == fingerprint:
                    suitable.append(name)
            except UnknownNameError:
                continue  # deleted a moment ago
            except StoreError as error:
                damage[name] = error
        if self.default in damage and self.default not in self._awaited:
            raise damage[self.default]
        if len(suitable) == 1:
            return suitable[0]
        if suitable:
            problem = f"name one; of the model '{model}' there are {', '.join(suitable)}"
            raise InvalidFieldError.of("database", problem)
        if self.default in self._awaited:
            raise NotReadyError(
                f"the caption database '{self.default}' {self._awaited[self.default]}; try again, or give labels"
            )
        if damage:
            raise next(iter(damage.values()))
        raise NotConfiguredError(
            f"there is no caption database of the model '{model}', in which names could be found; build one with"
            " `deixis captions build` or PUT /v1/databases/{name}, or give labels"
        )

    # --- searching -----------------------------------------------------------------------------------------------

    async def search(
        self,
        name: str,
        fingerprint: str,
        queries: ImageFeatures | TextFeatures,
        k: int,
        *,
        features: bool = False,
        within_s: float | None = None,
    ) -> list[Found]:
        """Return the k captions nearest to each query, in batches with the searches of others.

        Args:
            name: of a database that ``check`` let pass.
            fingerprint: of the model that made the queries.
            queries: unit rows (q, d).
            k: at least 1; fewer are found where there are not so many.
            features: also return those of the captions.
            within_s: after which the answer is of no use.

        Raises:
            OverloadedError: too many searches wait.
            DeadlineExceededError: it waited too long.
            InvalidFieldError: it was replaced by one of another model since it was checked.
            UnknownNameError: there is none of that name.
            StoreError: it is damaged.
        """
        # The same for all of them, whatever happens meanwhile.
        served = await self._open(name, deleted=True)
        database, queue = served.current, served.queue
        _check_model(name, database.manifest, fingerprint, "database")
        if self._search_elsewhere is not None:
            return await self._search_elsewhere(
                name, database.generation, queries, k, features=features, within_s=within_s
            )
        return await _found(database, queue, queries, k, features=features, within_s=within_s)

    async def search_generation(
        self,
        name: str,
        generation: str,
        queries: ImageFeatures | TextFeatures,
        k: int,
        *,
        features: bool,
        within_s: float | None,
        part: Part,
    ) -> list[Found]:
        """Return the same of a part of that generation which somebody else takes for the current one, or just did.

        Raises:
            StoreError: it is not there any more, or is damaged.
            Exception: as ``search``.
        """
        served = await self._open(name, deleted=True)
        if served.current.generation != generation:
            served = await self._open(name, look=True, deleted=True)
        database = served.current
        if database.generation != generation:
            database = await asyncio.to_thread(CaptionDatabase.open_generation, self._folder_of(name), generation)
        return await _found(database, served.queue, queries, k, features=features, within_s=within_s, part=part)

    async def open_all(self) -> None:
        """Open every database, so that no request waits for it; what is wrong with one is logged."""
        for name in await asyncio.to_thread(self._names):
            try:
                await self._open(name)
            except DeixisError as error:
                log.warning("database_not_opened", database=name, reason=error.message)
        if self._served:
            await self._read_words()

    async def _read_words(self) -> None:
        """Read what the first request would else wait for."""
        try:
            lexicon = await asyncio.to_thread(self.lexicon)
            await asyncio.to_thread(lexicon.singular, "words")
        except NotConfiguredError as error:
            log.warning("lexicon_not_read", reason=error.message)
        except Exception as error:
            log.warning("lexicon_not_read", exc_info=error)

    def lexicon(self) -> Lexicon:
        """Return what WordNet knows of words; read once, which takes a second.

        Raises:
            NotConfiguredError: WordNet is not there.
        """
        with self._reading:
            if self._lexicon is None:
                try:
                    self._lexicon = Lexicon.load(self.wordnet)
                except ConfigurationError as error:
                    raise NotConfiguredError(f"names cannot be told from other words: {error.message}") from error
            return self._lexicon

    # --- building and deleting -----------------------------------------------------------------------------------

    def expect(self, name: str) -> None:
        """Tell callers that a database is about to be built, and not merely missing."""
        self._awaited.setdefault(name, "is about to be built")

    def expect_no_more(self, name: str) -> None:
        """Take back what ``expect`` said."""
        self._awaited.pop(name, None)

    async def build(
        self,
        name: str,
        plan: BuildPlan,
        sources: Sequence[Source],
        *,
        encode: Callable[[Sequence[str]], Awaitable[TextFeatures]],
        fingerprint: str,
        advance: Callable[[int, int], Awaitable[object]],
    ) -> Manifest:
        """Build a database in the place of what has its name; cancelling stops it, and what is encoded is kept.

        Args:
            name: clean.
            plan: what and how.
            sources: where the plan's files are.
            encode: returns unit rows for texts; called on this event loop.
            fingerprint: of the text tower that it uses.
            advance: told how many captions are encoded, and of how many, 0 where that is not known.

        Raises:
            InvalidFieldError, StoreError, ConflictError: as ``app.captions.build.build``.
            ConfigurationError: WordNet is not there.
        """
        loop = asyncio.get_running_loop()
        stop = threading.Event()
        self._awaited[name] = "is about to be built"
        total = done = 0

        def check_going() -> None:
            if stop.is_set():
                raise _StoppedError

        def wait_for(work: Awaitable[Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(_awaiting(work), loop).result()

        def encode_here(texts: Sequence[str]) -> TextFeatures:
            nonlocal done
            check_going()
            features: TextFeatures = wait_for(encode(texts))
            done += len(texts)
            tell(done)
            return features

        def tell(encoded: int) -> None:
            of = f" of {total:,}" if total else ""
            self._awaited[name] = f"is being built, {encoded:,}{of} captions are encoded"
            wait_for(advance(encoded, total))

        def tell_stage(stage: str, count: int) -> None:
            nonlocal done
            check_going()
            if stage == "encode":
                done = count  # also what an earlier run had encoded
                tell(done)
            else:
                self._awaited[name] = f"is being built, its {count:,} captions are being put in order"

        def work() -> Manifest:
            nonlocal total
            counts = Counts()
            # What is no file, as a pipe, can be read once only.
            if all(_is_file(source) for source in sources):
                for total, _ in enumerate(plan.read(sources, self.wordnet, Counts()), start=1):  # noqa: B007 - the last
                    check_going()
            notes, licence = plan.notes
            if is_database(self._folder_of(name)):
                # Not the one that will be replaced: other machines may read it for a while. A damaged one is mended.
                with suppress(StoreError):
                    prune(self._folder_of(name))
            return build(
                plan.read(sources, self.wordnet, counts),
                self._folder_of(name),
                encode=encode_here,
                fingerprint=fingerprint,
                model=plan.model,
                name=name,
                source_notes=notes,
                licence=licence,
                options=BuildOptions(
                    encoded_at_once=_ENCODED_AT_ONCE,
                    recall=plan.recall,
                    near_duplicates=plan.near_duplicates,
                    threads=plan.threads,
                ),
                counts=counts,
                advance=tell_stage,
            )

        running = loop.run_in_executor(self._builder, work)
        try:
            manifest = await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await _end_of(running)
            raise
        finally:
            self._awaited.pop(name, None)
        with suppress(UnknownNameError, StoreError):  # deleted since, or replaced by one that is damaged
            await self._open(name, look=True)
        await self._read_words()
        return manifest

    async def delete(self, name: str) -> None:
        """Delete a database; what is being asked of it ends well.

        Raises:
            UnknownNameError: there is none of that name.
            ConflictError: it is being built.
            StoreError: it cannot be removed.
        """
        name = (await self.state(name)).name
        await asyncio.to_thread(remove, self._folder_of(name))
        if name in self._served:
            await asyncio.to_thread(self._served[name].look_up)
            self._leave(name)

    async def close(self) -> None:
        """End every thread."""
        for handle in self._leaving.values():
            handle.cancel()
        for served in self._served.values():
            await asyncio.to_thread(served.close)
        await asyncio.to_thread(self._builder.shutdown, wait=True, cancel_futures=True)

    def _folder_of(self, name: str) -> Path:
        if not is_qualified_database_name(name):
            raise InvalidFieldError.of("name", f"'{name}' is not a valid name of a caption database")
        return self.folder / name

    def _names(self) -> list[str]:
        try:
            found = [each.name for each in self.folder.iterdir() if is_database(each)]
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"the folder of caption databases '{self.folder}' cannot be read: {error.strerror}"
            raise StoreError(f"{problem}; make it readable for the service") from error
        return sorted(name for name in found if is_qualified_database_name(name))

    def _readable(self, namespace: Namespace) -> list[str]:
        return [name for name in self._names() if namespace.contains(name) or name == self.default]

    async def _unknown(self, name: str) -> UnknownNameError:
        known = await asyncio.to_thread(self._readable, namespace_of(name))
        return UnknownNameError("caption database", name, known)

    async def _open(self, name: str, *, look: bool = False, deleted: bool = False) -> "_Served":
        """Return a database that has a generation in use; looked up in a thread, unless that was done a moment ago.

        Args:
            name: clean.
            look: see whether there is a newer one, however short ago that was done.
            deleted: also return one that was deleted a moment ago.

        Raises:
            UnknownNameError: there is none of that name.
            StoreError: it is damaged, and was not open before.
        """
        served = self._served.get(name)
        if served is not None and served.is_fresh and not look:
            return served
        if served is None:
            if not await asyncio.to_thread(is_database, self._folder_of(name)):
                raise await self._unknown(name)
            # Another request may have been here meanwhile.
            served = self._served.get(name) or _Served(
                self._folder_of(name),
                self._metrics,
                max_queued=self._max_queued,
                stalled_after_s=self._stalled_after_s,
            )
            self._served[name] = served
        await asyncio.to_thread(served.look_up)
        if served.is_deleted:
            self._leave(name)
            if served.database is None or not deleted:
                raise await self._unknown(name)
        return served

    def _leave(self, name: str) -> None:
        """Close a database that was deleted, in a while."""

        def close() -> None:
            del self._leaving[name]
            served = self._served.get(name)
            if served is not None and served.is_deleted:
                del self._served[name]
                loop.run_in_executor(None, served.close)

        loop = asyncio.get_running_loop()
        if name not in self._leaving:
            self._leaving[name] = loop.call_later(_KEPT_OPEN_S, close)


class _StoppedError(Exception):
    """A build was cancelled."""


async def _end_of(running: asyncio.Future[Any]) -> None:
    """Wait for a thread that needs this loop to come to an end, however often that is asked for."""
    while not running.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([running])
    running.exception()  # told to nobody


async def _awaiting(work: Awaitable[Any]) -> Any:
    return await work


class _Served:
    """A database with the queue of its searches; ``database`` is the generation in use, once ``look_up`` found one."""

    def __init__(self, folder: Path, metrics: Metrics, *, max_queued: int, stalled_after_s: float) -> None:
        self.database: CaptionDatabase | None = None
        self.is_deleted = False
        self._folder = folder
        self._lock = threading.Lock()
        self._looked_up = -math.inf
        self._refused: str | None = None
        told = TowerMetrics(metrics, folder.name, "captions")
        self.queue: EncodeQueue[_Search, Found] = EncodeQueue(
            f"the caption database '{folder.name}'",
            lambda searches: partial(_searched, searches),
            batch_size=_SEARCHED_AT_ONCE,
            metrics=told,
            max_queued=max(max_queued, _SEARCHED_AT_ONCE),
            stalled_after_s=stalled_after_s,
        )
        queue = self.queue  # and not the database, which metrics would keep open
        told.watch(waiting=lambda: queue.waiting, admitted=lambda: queue.admitted)
        self._told = told

    def close(self) -> None:
        """End the thread, and let go of the files."""
        self.queue.close()
        self.database = None
        self._told.forget()

    @property
    def current(self) -> CaptionDatabase:
        """The generation in use, of one that was looked up."""
        assert self.database is not None
        return self.database

    @property
    def is_fresh(self) -> bool:
        """Whether it was there a moment ago."""
        return (
            self.database is not None
            and not self.is_deleted
            and time.monotonic() - self._looked_up <= _LOOKED_UP_EVERY_S
        )

    def look_up(self) -> None:
        """Open the current generation, if it is not open; in any thread.

        Where it was deleted, or where it cannot be opened, the one before stays.

        Raises:
            StoreError: it is damaged, and none was open before.
        """
        with self._lock:
            self.is_deleted = not is_database(self._folder)
            if self.is_deleted:
                return
            try:
                if self.database is None or current_generation(self._folder) != self.database.generation:
                    self.database = CaptionDatabase.open(self._folder, fingerprint=None)
                    self._tell_opened(self.database)
            except StoreError as error:
                if self.database is None:
                    raise
                if error.message != self._refused:
                    log.warning("database_not_replaced", database=self._folder.name, reason=error.message)
                    self._refused = error.message
            self._looked_up = time.monotonic()

    def _tell_opened(self, database: CaptionDatabase) -> None:
        self._refused = None
        log.info(
            "database_opened",
            database=self._folder.name,
            generation=database.generation,
            captions=len(database),
            model=database.manifest.model,
        )


async def _found(
    database: CaptionDatabase,
    queue: EncodeQueue[_Search, Found],
    queries: ImageFeatures | TextFeatures,
    k: int,
    *,
    features: bool,
    within_s: float | None,
    part: Part = WHOLE,
) -> list[Found]:
    searches = [_Search(database, query, k, features, part) for query in queries]
    found: list[Found] = []
    # A folder of photographs is more than the queue has places for.
    for first in range(0, len(searches), queue.batch_size):
        found += await queue.run(searches[first : first + queue.batch_size], within_s=within_s)
    return found


def _searched(searches: Sequence[_Search]) -> list[Found]:
    """Search together what asks the same database for as many captions: with another number it finds others."""
    found: dict[int, Found] = {}
    alike: dict[tuple[int, int, Part], list[int]] = {}
    for place, each in enumerate(searches):
        alike.setdefault((id(each.database), each.k, each.part), []).append(place)
    for (_, k, part), places in alike.items():
        database = searches[places[0]].database
        indices, cosines = database.search(np.stack([searches[place].query for place in places]), k, part)
        for place, row, told in zip(places, indices, cosines, strict=True):
            found[place] = database.found(row, told, features=searches[place].features)
    return [found[place] for place in range(len(searches))]


def _is_file(source: Source) -> bool:
    try:
        return isinstance(source, Path) and source.is_file()
    except OSError:  # in a folder that may not be entered; reading it will tell
        return False


def _check_model(name: str, manifest: Manifest, fingerprint: str, field: str) -> None:
    if manifest.fingerprint != fingerprint:
        problem = f"the caption database '{name}' was made by another model, '{manifest.model}'"
        raise InvalidFieldError.of(field, f"{problem}; name that model, or another database")


def _state(folder: Path, name: str) -> DatabaseState | None:
    """Return what is on the disk; None where nothing is."""
    generation = manifest = problem = None
    try:
        generation = current_generation(folder)
        manifest = read_manifest(folder / generation)
        check_files(folder / generation, manifest, verify=False)
    except ServerError as error:
        problem = error.message
    # Looked up last: it may have been deleted meanwhile.
    return DatabaseState(name, generation, manifest, problem) if is_database(folder) else None
