"""Builds caption databases in a background thread, one at a time, while the event loop answers requests."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.captions.build import BuildOptions, build
from app.captions.build_plan import EVERYDAY, BuildPlan
from app.captions.cleaning import Counts
from app.captions.generations import is_database, prune
from app.captions.manifest import Manifest
from app.captions.sources import Source
from app.errors import StoreError
from app.runtime.cpu import lower_priority
from app.runtime.turns import taking_turns
from app.types import TextFeatures

# The progress is reported after each batch.
_TEXTS_PER_BATCH = 256
# A database of the packaged names, which are sorted by how common they are, is published when it has so many of them,
# so that a slow model answers from the first ones. The first number divides the second.
_FIRST_CAPTIONS = 256
_MORE_CAPTIONS = 1024

Encode = Callable[[Sequence[str]], Awaitable[TextFeatures]]
Advance = Callable[[int, int], Awaitable[object]]
"""Called with the captions encoded so far and their total number, 0 where it is not known."""


class BackgroundBuilder:
    """Builds caption databases. Its coroutines belong to one event loop.

    Args:
        wordnet: the folder of WordNet's files.
    """

    def __init__(self, wordnet: Path) -> None:
        self._wordnet = wordnet
        self._progress: dict[str, str] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="captions", initializer=lower_priority)

    def progress(self, name: str) -> str | None:
        """Return the progress of a database's build as a message; None if no build is running or announced."""
        return self._progress.get(name)

    def announce(self, name: str) -> None:
        """Record that a database will be built soon, so that callers learn that it is not merely missing."""
        self._progress.setdefault(name, "will be built soon")

    def withdraw(self, name: str) -> None:
        """Remove an announcement."""
        self._progress.pop(name, None)

    async def build(
        self,
        name: str,
        folder: Path,
        plan: BuildPlan,
        sources: Sequence[Source],
        *,
        encode: Encode,
        fingerprint: str,
        advance: Advance,
    ) -> Manifest:
        """Build a database in ``folder``. Cancelling stops the build and keeps the finished shards.

        Args:
            name: of the database.
            folder: of the database.
            plan: the captions and the options.
            sources: the files of the plan.
            encode: returns unit rows for texts; called on this event loop.
            fingerprint: of the text tower that ``encode`` uses.
            advance: called with the progress, on this event loop.

        Raises:
            InvalidFieldError, StoreError, ConflictError: as ``app.captions.build.build``.
            ConfigurationError: WordNet is not installed.
        """
        self._progress[name] = "will be built soon"

        def report(message: str) -> None:
            self._progress[name] = message

        run = _Build(asyncio.get_running_loop(), encode, advance, report)

        def work() -> Manifest:
            # A pipe can be read only once, so its captions cannot be counted first.
            if all(_is_file(source) for source in sources):
                run.count(plan.read(sources, self._wordnet, Counts()))
            source_notes, licence = plan.notes
            options = BuildOptions(
                batch_size=_TEXTS_PER_BATCH,
                recall=plan.recall,
                near_duplicates=plan.near_duplicates,
                threads=plan.threads,
            )
            if plan.source == EVERYDAY:
                options = replace(options, shard_size=_FIRST_CAPTIONS)

            def publish(captions: Iterable[str], counts: Counts | None, to_come: int) -> Manifest:
                if is_database(folder):
                    # The current generation stays, because other machines may read it for a while.
                    with suppress(StoreError):  # a damaged database is replaced by the build
                        prune(folder)
                return build(
                    captions,
                    folder,
                    encode=run.encode,
                    fingerprint=fingerprint,
                    model=plan.model,
                    name=name,
                    source_notes=source_notes,
                    licence=licence,
                    options=options,
                    counts=counts,
                    advance=run.advance,
                    to_come=to_come,
                )

            if plan.source == EVERYDAY and not is_database(folder):
                captions = list(plan.read(sources, self._wordnet, Counts()))
                for ready in (_FIRST_CAPTIONS, _MORE_CAPTIONS):
                    if ready < len(captions):
                        publish(captions[:ready], None, len(captions) - ready)
            counts = Counts()
            return publish(plan.read(sources, self._wordnet, counts), counts, 0)

        running = asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, _in_turns, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            run.stop()
            await _wait_until_done(running)
            raise
        finally:
            self._progress.pop(name, None)

    async def close(self) -> None:
        """End the thread."""
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)


class _Build:
    """The thread's side of a running build: encodes and reports on the event loop, and ends after ``stop``."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, encode: Encode, advance: Advance, report: Callable[[str], None]
    ) -> None:
        self._stopped = threading.Event()
        self._encoding: Future[TextFeatures] | None = None
        self._loop = loop
        self._encode = encode
        self._advance = advance
        self._report = report
        self._total = 0
        self._encoded = 0

    def stop(self) -> None:
        """End the build, also while it waits for the encoder; called on the event loop."""
        self._stopped.set()
        if self._encoding is not None:
            self._encoding.cancel()

    def count(self, captions: Iterable[str]) -> None:
        """Count the captions, so that the progress has a total."""
        for _ in captions:
            self._end_if_stopped()
            self._total += 1

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Encode texts on the event loop."""
        self._encoding = asyncio.run_coroutine_threadsafe(_as_coroutine(self._encode(texts)), self._loop)
        if self._stopped.is_set():
            self._encoding.cancel()  # ``stop`` has cancelled the previous one
        try:
            features = self._encoding.result()
        except FutureCancelledError:
            self._end_if_stopped()
            raise
        self._report_encoded(self._encoded + len(texts))
        return features

    def advance(self, stage: str, count: int) -> None:
        """Report the progress of ``app.captions.build.build``."""
        self._end_if_stopped()
        if stage == "encode":
            self._report_encoded(count)  # also counts the shards of an earlier run
        else:
            self._report(f"is being built, its {count:,} captions are being indexed")

    def _report_encoded(self, encoded: int) -> None:
        self._encoded = encoded
        of_total = f" of {self._total:,}" if self._total else ""
        self._report(f"is being built, {encoded:,}{of_total} captions are encoded")
        self._wait_for(self._advance(encoded, self._total))

    def _end_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError

    def _wait_for(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(_as_coroutine(work), self._loop).result()


class _StoppedError(Exception):
    """A build was cancelled."""


def _in_turns(work: Callable[[], Manifest]) -> Manifest:
    with taking_turns():
        return work()


async def _as_coroutine(work: Awaitable[Any]) -> Any:
    return await work


async def _wait_until_done(running: asyncio.Future[Any]) -> None:
    """Wait for a thread that needs this event loop to end, however often this task is cancelled meanwhile."""
    while not running.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([running])
    running.exception()  # marks it as retrieved; asyncio would log it otherwise


def _is_file(source: Source) -> bool:
    try:
        return isinstance(source, Path) and source.is_file()
    except OSError:  # the folder may not be entered; reading the file reports this
        return False
