"""Caption shards: replicas that each search a part of every caption database."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog

from app import __version__
from app.captions.catalogue import CaptionCatalogue
from app.captions.database import NearestCaptions, merge_parts
from app.captions.index import Part
from app.cluster.calls import call
from app.cluster.messages import ReplicaUnavailableError, SerializedError
from app.cluster.telemetry import Exposition, own_exposition
from app.errors import DeixisError, NotReadyError
from app.names.namespaces import own_name
from app.observability.logs import configure_logs
from app.observability.metrics import Metrics
from app.settings import Settings
from app.types import ImageFeatures, TextFeatures

log = structlog.get_logger()

# After the first shard has responded, the time that a search waits for the others.
_STRAGGLERS_S = 2.0
_TRIES = 2


class ShardReplica:
    """Searches a part of every database; the pages of this part stay in its memory.

    Args:
        settings: of the service; all replicas share its folder of databases.
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
        """Return the captions of a part nearest to each query, in the generation that the edge expects.

        The edge names the part: during a rolling update, replicas may know another number of parts.
        """
        try:
            return await self._databases.search_generation(
                name, generation, queries, k, features=features, within_s=within_s, part=part
            )
        except DeixisError as error:
            return SerializedError.from_exception(error)

    async def exposition(self) -> Exposition:
        """Return the Prometheus metrics of this replica."""
        return own_exposition(self._metrics)

    async def check_health(self) -> None:
        """Fail, so that Ray replaces this replica, if a search hangs; called by Ray."""
        if self._databases.problem is not None:
            raise RuntimeError(self._databases.problem)


class RemoteShards:
    """Searches all shards concurrently, and merges their results; implements ``app.captions.catalogue.RemoteSearch``.

    Args:
        handles: of the deployments, by the number of the shard.
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
        """Return the merged results; a result without all shards has a warning.

        Raises:
            NotReadyError: no shard responded.
            OverloadedError: too many searches wait for a shard.
            DeadlineExceededError: no shard finished in time.
        """
        searches = [
            asyncio.ensure_future(
                _search(handle, Part(number, len(self._handles)), name, generation, queries, k, features, within_s)
            )
            for number, handle in enumerate(self._handles)
        ]
        try:
            await _wait_for_first(searches, within_s)
            await asyncio.wait(searches, timeout=_STRAGGLERS_S)
        finally:
            for search in searches:
                search.cancel()
        results: list[list[NearestCaptions]] = []
        refusals: list[SerializedError] = []
        for number, search in enumerate(searches):
            if not search.done() or search.cancelled():
                continue
            if (error := search.exception()) is not None:
                reason = f"{type(error).__name__}: {error}"
                log.warning("caption_shard_failed", database=name, shard=number, reason=reason)
            elif isinstance(outcome := search.result(), SerializedError):
                refusals.append(outcome)
            else:
                results.append(outcome)
        # An overload or a timeout is temporary, so the request fails. Other errors only remove a shard from the result.
        temporary = [refusal for refusal in refusals if refusal.kind in {"overloaded", "deadline"}]
        if temporary or (refusals and not results):
            raise (temporary or refusals)[0].to_exception()
        if not results:
            raise NotReadyError(f"no shard of the caption database '{own_name(name)}' responded; try again later")
        missing = len(searches) - len(results)
        if missing:
            log.warning("caption_shards_missing", database=name, missing=missing, shards=len(searches))
        warning = (
            f"{missing} of {len(searches)} shards of the caption database '{own_name(name)}' could not be searched, so"
            " the nearest captions may be missing"
        )
        return [
            merge_parts([result[number] for result in results], k, warning if missing else None)
            for number in range(len(queries))
        ]


async def _wait_for_first(
    searches: Sequence[asyncio.Future[list[NearestCaptions] | SerializedError]], within_s: float | None
) -> None:
    """Wait until a search succeeds, all searches fail, or the time is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            for search in asyncio.as_completed(searches):
                with suppress(Exception):
                    if not isinstance(await search, SerializedError):
                        return


async def _search(handle: Any, *arguments: Any) -> list[NearestCaptions] | SerializedError:
    for _ in range(_TRIES - 1):
        try:
            result: list[NearestCaptions] | SerializedError = await call(handle.search, *arguments)
        except ReplicaUnavailableError:
            continue
        return result
    last: list[NearestCaptions] | SerializedError = await call(handle.search, *arguments)
    return last
