"""The catalogue of caption databases: lists, searches, builds and deletes them, and opens their new generations.

A database is in the catalogue as soon as a build has published it, in this process or in another. Each use of a
database checks, at most once a second, whether a new generation has replaced the one in use. A search that has begun
ends with the generation it began with.
"""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog

from app.captions.background_builder import Advance, BackgroundBuilder, Encode
from app.captions.build_plan import BuildPlan
from app.captions.cased.lexicon import Lexicon, is_installed
from app.captions.database import CaptionDatabase, NearestCaptions
from app.captions.everyday import everyday_names
from app.captions.generations import current_generation, is_database, remove
from app.captions.index import Part
from app.captions.manifest import Manifest, check_files, read_manifest
from app.captions.served_database import ServedDatabase
from app.captions.sources import Source
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
from app.names.namespaces import OPEN_NAMESPACE, Namespace, is_qualified_database_name, namespace_of, own_name
from app.observability.metrics import Metrics
from app.types import ImageFeatures, TextFeatures

log = structlog.get_logger()

# A deleted database stays open this long, so that requests that have begun can end. It uses disk space until then.
_CLOSE_DELAY_S = 60.0


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """A database as it is on the disk. ``problem`` says why it cannot be read; the other fields may then be None."""

    name: str
    generation: str | None = None
    manifest: Manifest | None = None
    problem: str | None = None

    @property
    def nbytes(self) -> int:
        """The size of its files in bytes."""
        return 0 if self.manifest is None else sum(int(entry["bytes"]) for entry in self.manifest.files.values())

    def problem_with(self, models: Sequence[str]) -> str | None:
        """Return why the database cannot be queried by ``models``, the matching ones in service; None if it can."""
        if self.manifest is not None and self.problem is None and not models:
            return (
                f"it was built with the model '{self.manifest.model}', which is not in service; add it to"
                " DEIXIS_MODELS, or build the database again"
            )
        return self.problem


class RemoteSearch(Protocol):
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
    ) -> list[NearestCaptions]:
        """Return the same as ``CaptionCatalogue.search``; ``name`` is the qualified name."""


class CaptionCatalogue:
    """The caption databases of a folder. Its coroutines belong to one event loop.

    Args:
        folder: contains a folder for each database; it need not exist.
        default: the name of the database that is searched if a request names none.
        wordnet: the folder of WordNet's files.
        metrics: receives the numbers of searches.
        max_queued: searches that may wait for one database.
        stalled_after_s: a search that takes longer makes its database unhealthy.
        remote_search: runs the searches in other processes; this process then only lists and builds databases.
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
        remote_search: RemoteSearch | None = None,
    ) -> None:
        self.folder = folder
        self.default = default
        self.wordnet = wordnet
        self._metrics = metrics
        self._max_queued = max_queued
        self._stalled_after_s = stalled_after_s
        self._remote_search = remote_search
        self._served: dict[str, ServedDatabase] = {}
        self._closing: dict[str, asyncio.TimerHandle] = {}
        self._builder = BackgroundBuilder(wordnet)
        self._lexicon: Lexicon | None = None
        self._lexicon_lock = threading.Lock()

    @property
    def problem(self) -> str | None:
        """Why searches are not answered at the moment; None if they are."""
        problems = (served.queue.problem for served in self._served.values())
        return next((problem for problem in problems if problem is not None), None)

    # --- listing -------------------------------------------------------------------------------------------------

    def qualified_name(self, raw: str, namespace: Namespace, field: str = "name") -> str:
        """Return the qualified name of the database that callers of a namespace know as ``raw``.

        The default database belongs to the open namespace, and callers of every namespace may read it. Raises as
        ``clean_database_name``.
        """
        name = OPEN_NAMESPACE.database(raw, field)
        return name if name == self.default else namespace.qualify(name)

    def writable_name(self, raw: str, namespace: Namespace) -> str:
        """Return the qualified name of a database that callers of a namespace want to build or delete.

        Raises:
            InvalidFieldError: the name is not valid.
            ForbiddenError: it is the default database, and the namespace is not the open one.
        """
        name = self.qualified_name(raw, namespace)
        if not namespace.contains(name):
            problem = f"the caption database '{name}' belongs to the operator, and is read-only in a namespace"
            raise ForbiddenError(f"{problem}; choose another name")
        return name

    async def states(self, namespace: Namespace | None = None) -> list[DatabaseState]:
        """Return all databases, sorted by name; with ``namespace`` only those that its callers may read."""

        def read() -> list[DatabaseState]:
            names = self._names() if namespace is None else self._readable_names(namespace)
            return [state for name in names if (state := _read_state(self.folder / name, name)) is not None]

        return await asyncio.to_thread(read)

    async def state(self, name: str) -> DatabaseState:
        """Return one database.

        Raises:
            UnknownNameError: there is no database of this name.
        """
        state = await asyncio.to_thread(_read_state, self._folder_of(name), name)
        if state is None:
            raise await self._unknown(name)
        return state

    async def manifest(self, name: str) -> Manifest:
        """Return the manifest of the generation in use; an unreadable newer generation does not replace it.

        Raises:
            UnknownNameError: there is no database of this name.
            StoreError: it is damaged.
        """
        return (await self._open(name)).current.manifest

    async def check_model(self, name: str, fingerprint: str, *, field: str = "database") -> None:
        """Check that a database exists and was built with this model.

        Args:
            name: the qualified name.
            fingerprint: of the model's text tower.
            field: the field that an error about the model names.

        Raises:
            InvalidFieldError: it was built with another model.
            UnknownNameError: there is no database of this name.
            StoreError: it is damaged.
        """
        _require_model(name, (await self._open(name)).current.manifest, fingerprint, field)

    async def choose(self, model: str, fingerprint: str, namespace: Namespace = OPEN_NAMESPACE) -> str:
        """Return the database to search if a request names none: the default one, else the model's only database.

        Args:
            model: its name, for messages.
            fingerprint: of its text tower.
            namespace: of the caller.

        Raises:
            NotReadyError: the database is still being built.
            NotConfiguredError: the model has no database.
            InvalidFieldError: the model has several databases.
            StoreError: the database is damaged.
        """
        with suppress(UnknownNameError, StoreError):
            if (await self._open(self.default)).current.manifest.fingerprint == fingerprint:
                return self.default
        suitable: list[str] = []
        damaged: dict[str, StoreError] = {}
        for name in await asyncio.to_thread(self._readable_names, namespace):
            try:
                if (await self._open(name)).current.manifest.fingerprint == fingerprint:
                    suitable.append(name)
            except UnknownNameError:
                continue  # deleted a moment ago
            except StoreError as error:
                damaged[name] = error
        progress = self._builder.progress(self.default)
        if self.default in damaged and progress is None:
            raise damaged[self.default]
        if len(suitable) == 1:
            return suitable[0]
        if suitable:
            problem = f"name one; the model '{model}' has {', '.join(suitable)}"
            raise InvalidFieldError.of("database", problem)
        if progress is not None:
            raise NotReadyError(f"the caption database '{self.default}' {progress}; try again later, or give labels")
        if damaged:
            raise next(iter(damaged.values()))
        raise NotConfiguredError(
            f"the model '{model}' has no caption database in which to find labels; build one with"
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
    ) -> list[NearestCaptions]:
        """Return the k captions nearest to each query, in batches with other callers' searches.

        Args:
            name: of a database that passed ``check_model``.
            fingerprint: of the model that encoded the queries.
            queries: unit rows (q, d).
            k: at least 1; a database with fewer captions returns all of them.
            features: also return the features of the captions.
            within_s: the time after which the caller does not need the result any more.

        Raises:
            OverloadedError: too many searches wait.
            DeadlineExceededError: the search waited too long.
            InvalidFieldError: a database of another model replaced it since ``check_model``.
            UnknownNameError: there is no database of this name.
            StoreError: it is damaged.
        """
        served = await self._open(name, allow_deleted=True)
        database = served.current  # all queries search the same generation
        _require_model(name, database.manifest, fingerprint, "database")
        if self._remote_search is not None:
            found = await self._remote_search(
                name, database.generation, queries, k, features=features, within_s=within_s
            )
        else:
            found = await served.search(database, queries, k, features=features, within_s=within_s)
        warning = database.manifest.warning
        return found if warning is None else [replace(each, missing=each.missing or warning) for each in found]

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
    ) -> list[NearestCaptions]:
        """Search a part of a given generation, which is or recently was the current one for another process.

        Raises:
            StoreError: it does not exist any more, or is damaged.
            Exception: as ``search``.
        """
        served = await self._open(name, allow_deleted=True)
        if served.current.generation != generation:
            served = await self._open(name, refresh=True, allow_deleted=True)
        database = served.current
        if database.generation != generation:
            database = await asyncio.to_thread(CaptionDatabase.open_generation, self._folder_of(name), generation)
        return await served.search(database, queries, k, features=features, within_s=within_s, part=part)

    async def open_all(self) -> None:
        """Open every database and read the lexicon, so that no request waits for them; log what cannot be opened."""
        for name in await asyncio.to_thread(self._names):
            try:
                await self._open(name)
            except DeixisError as error:
                log.warning("database_not_opened", database=name, reason=error.message)
        if self._served:
            await self._read_lexicon()

    async def _read_lexicon(self) -> None:
        try:
            lexicon = await asyncio.to_thread(self.lexicon)
            await asyncio.to_thread(lexicon.singular, "words")
        except NotConfiguredError as error:
            log.warning("lexicon_not_read", reason=error.message)
        except Exception as error:
            log.warning("lexicon_not_read", exc_info=error)

    def lexicon(self) -> Lexicon:
        """Return the lexicon: WordNet's if it is installed. The first call reads it, which takes a second.

        Raises:
            NotConfiguredError: WordNet's files are damaged.
        """
        with self._lexicon_lock:
            if self._lexicon is None:
                packaged = Lexicon.of_names(everyday_names())
                try:
                    installed = Lexicon.load(self.wordnet) if is_installed(self.wordnet) else packaged
                except ConfigurationError as error:
                    raise NotConfiguredError(f"finding labels needs WordNet: {error.message}") from error
                self._lexicon = replace(installed, names=packaged.names)
            return self._lexicon

    # --- building and deleting -----------------------------------------------------------------------------------

    def announce_build(self, name: str) -> None:
        """Record that a database will be built soon, so that callers learn that it is not merely missing."""
        self._builder.announce(name)

    def withdraw_build(self, name: str) -> None:
        """Remove the record of ``announce_build``."""
        self._builder.withdraw(name)

    async def build(
        self,
        name: str,
        plan: BuildPlan,
        sources: Sequence[Source],
        *,
        encode: Encode,
        fingerprint: str,
        advance: Advance,
    ) -> Manifest:
        """Build a database, or the next generation of an existing one, as ``BackgroundBuilder.build``."""
        manifest = await self._builder.build(
            name,
            self._folder_of(name),
            plan,
            sources,
            encode=encode,
            fingerprint=fingerprint,
            advance=advance,
        )
        with suppress(UnknownNameError, StoreError):  # deleted or damaged since
            await self._open(name, refresh=True)
        await self._read_lexicon()
        return manifest

    async def delete(self, name: str) -> None:
        """Delete a database. Requests that have begun can still search it.

        Raises:
            UnknownNameError: there is no database of this name.
            ConflictError: it is being built.
            StoreError: it cannot be removed.
        """
        name = (await self.state(name)).name
        await asyncio.to_thread(remove, self._folder_of(name))
        if name in self._served:
            await asyncio.to_thread(self._served[name].refresh)
            self._close_later(name)

    async def close(self) -> None:
        """End all threads."""
        for handle in self._closing.values():
            handle.cancel()
        for served in self._served.values():
            await asyncio.to_thread(served.close)
        await self._builder.close()

    def _folder_of(self, name: str) -> Path:
        if not is_qualified_database_name(name):
            raise InvalidFieldError.of("name", f"'{name}' is not a valid name of a caption database")
        return self.folder / name

    def _names(self) -> list[str]:
        try:
            found = [path.name for path in self.folder.iterdir() if is_database(path)]
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"the folder of caption databases '{self.folder}' cannot be read: {error.strerror}"
            raise StoreError(f"{problem}; make it readable for the service") from error
        return sorted(name for name in found if is_qualified_database_name(name))

    def _readable_names(self, namespace: Namespace) -> list[str]:
        return [name for name in self._names() if namespace.contains(name) or name == self.default]

    async def _unknown(self, name: str) -> UnknownNameError:
        known = await asyncio.to_thread(self._readable_names, namespace_of(name))
        return UnknownNameError("caption database", own_name(name), map(own_name, known))

    async def _open(self, name: str, *, refresh: bool = False, allow_deleted: bool = False) -> ServedDatabase:
        """Return a database with an open generation, refreshed unless that was done less than a second ago.

        Args:
            name: the qualified name.
            refresh: refresh in any case.
            allow_deleted: also return a database that was deleted less than a minute ago.

        Raises:
            UnknownNameError: there is no database of this name.
            StoreError: it is damaged, and no generation is open.
        """
        served = self._served.get(name)
        if served is not None and served.is_fresh and not refresh:
            return served
        if served is None:
            if not await asyncio.to_thread(is_database, self._folder_of(name)):
                raise await self._unknown(name)
            # Another request may have added it during the await.
            served = self._served.get(name) or ServedDatabase(
                self._folder_of(name),
                self._metrics,
                max_queued=self._max_queued,
                stalled_after_s=self._stalled_after_s,
            )
            self._served[name] = served
        await asyncio.to_thread(served.refresh)
        if served.is_deleted:
            self._close_later(name)
            if served.database is None or not allow_deleted:
                raise await self._unknown(name)
        return served

    def _close_later(self, name: str) -> None:
        """Close a deleted database in a minute, unless it was built again."""

        def close() -> None:
            del self._closing[name]
            served = self._served.get(name)
            if served is not None and served.is_deleted:
                del self._served[name]
                loop.run_in_executor(None, served.close)

        loop = asyncio.get_running_loop()
        if name not in self._closing:
            self._closing[name] = loop.call_later(_CLOSE_DELAY_S, close)


def _require_model(name: str, manifest: Manifest, fingerprint: str, field: str) -> None:
    if manifest.fingerprint != fingerprint:
        problem = f"the caption database '{name}' was built with another model, '{manifest.model}'"
        raise InvalidFieldError.of(field, f"{problem}; name that model, or another database")


def _read_state(folder: Path, name: str) -> DatabaseState | None:
    """Return the state of a database on the disk; None if there is no database."""
    generation = manifest = problem = None
    try:
        generation = current_generation(folder)
        manifest = read_manifest(folder / generation)
        check_files(folder / generation, manifest, verify=False)
    except ServerError as error:
        problem = error.message
    # Checked last, because the database may be deleted during the reads.
    return DatabaseState(name, generation, manifest, problem) if is_database(folder) else None
