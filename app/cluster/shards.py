"""Caption databases searched in parts, by replicas that have a part each."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog

from app import __version__
from app.captions.catalogue import CaptionCatalogue
from app.captions.database import NearestCaptions, merge_parts
from app.captions.index import Part
from app.cluster.calls import ask
from app.cluster.messages import ReplicaUnavailableError, SerializedError
from app.cluster.telemetry import Exposition, own_exposition
from app.errors import DeixisError, NotReadyError
from app.names.namespaces import own_name
from app.observability.logs import configure_logs
from app.observability.metrics import Metrics
from app.settings import Settings
from app.types import ImageFeatures, TextFeatures

log = structlog.get_logger()

# Once a part has answered, so long is waited for the others before the answer goes without them.
_STRAGGLERS_S = 2.0
_TRIES = 2


class ShardReplica:
    """Searches a part of every database: that which it is asked for, of which it then has the pages in memory.

    Args:
        settings: of the service, whose folder of databases all replicas share.
    """

    def __init__(self, settings: Settings) -> None:
        configure_logs(settings.log_format, settings.log_level)
        self._metrics = Metrics(__version__)
        self._databases = CaptionCatalogue(
            settings.effective_captions_dir,
            default=settings.default_database,
            wordnet=settings.wordnet_dir,
            metrics=self._metrics,
            max_queued=settings.max_queued_images,
            stalled_after_s=settings.stall_timeout_s,
        )

    async def search(
        self,
        part: Part,
        name: str,
        generation: str,
        queries: ImageFeatures | TextFeatures,
        k: int,
        features: bool,  # noqa: FBT001 - a call across processes
        within_s: float | None,
    ) -> list[NearestCaptions] | SerializedError:
        """Return the captions of a part nearest to each query, of the generation that the edge knows.

        The edge says which part: while everything is replaced, others know another number of them.
        """
        try:
            return await self._databases.search_generation(
                name, generation, queries, k, features=features, within_s=within_s, part=part
            )
        except DeixisError as error:
            return SerializedError.from_exception(error)

    async def exposition(self) -> Exposition:
        """Return what Prometheus is told of this replica."""
        return own_exposition(self._metrics)

    async def check_health(self) -> None:
        """Have this replica replaced where a search hangs; called by Ray."""
        if self._databases.problem is not None:
            raise RuntimeError(self._databases.problem)


class RemoteShards:
    """Searches all parts at once, and merges what they find: ``app.captions.catalogue.RemoteSearch``.

    Args:
        handles: of the deployments, by the number of their part.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

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
        """Return what the parts found together; of parts that do not answer, what is missing is told.

        Raises:
            NotReadyError: not one part answered.
            OverloadedError: a part has too many searches waiting.
            DeadlineExceededError: none was done in time.
        """
        asked = [
            asyncio.ensure_future(
                _searched(handle, Part(number, len(self._handles)), name, generation, queries, k, features, within_s)
            )
            for number, handle in enumerate(self._handles)
        ]
        try:
            await _one_has_answered(asked, within_s)
            await asyncio.wait(asked, timeout=_STRAGGLERS_S)
        finally:
            for each in asked:
                each.cancel()
        answers = []
        for number, each in enumerate(asked):
            if each.done() and not each.cancelled():
                if (error := each.exception()) is None:
                    answers.append(each.result())
                else:
                    log.warning(
                        "captions_part_failed", database=name, part=number, reason=f"{type(error).__name__}: {error}"
                    )
        refusals = [each for each in answers if isinstance(each, SerializedError)]
        found = [each for each in answers if not isinstance(each, SerializedError)]
        # In time others may find room, and without a part its captions are better told to be missing.
        passing = [each for each in refusals if each.kind in {"overloaded", "deadline"}]
        if passing or (refusals and not found):
            raise (passing or refusals)[0].to_exception()
        if not found:
            raise NotReadyError(f"not one part of the caption database '{own_name(name)}' answers; try again later")
        missing = len(asked) - len(found)
        if missing:
            log.warning("captions_not_searched", database=name, parts=missing, of=len(asked))
        told = (
            f"{missing} of {len(asked)} parts of the caption database '{own_name(name)}' could not be searched, so that"
            " what is nearest may be missing"
        )
        return [
            merge_parts([part[number] for part in found], k, told if missing else None)
            for number in range(len(queries))
        ]


async def _one_has_answered(
    asked: Sequence[asyncio.Future[list[NearestCaptions] | SerializedError]], within_s: float | None
) -> None:
    """Wait for the first that has found something, or for all, or as long as there is time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await _first_found(asked)


async def _first_found(asked: Sequence[asyncio.Future[list[NearestCaptions] | SerializedError]]) -> None:
    for each in asyncio.as_completed(asked):
        with suppress(Exception):
            if not isinstance(await each, SerializedError):
                return


async def _searched(handle: Any, *arguments: Any) -> list[NearestCaptions] | SerializedError:
    for _ in range(_TRIES - 1):
        try:
            answer: list[NearestCaptions] | SerializedError = await ask(handle.search, *arguments)
        except ReplicaUnavailableError:
            continue
        return answer
    last: list[NearestCaptions] | SerializedError = await ask(handle.search, *arguments)
    return last
