"""The client for programs with an event loop of asyncio; every method is that of ``Client``, to be awaited."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence, Sized
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, Unpack

import httpx
from pydantic import PrivateAttr, ValidationError

from deixis import _calls, answers
from deixis._calls import (
    FIRST_POLL_S,
    LONGEST_POLL_S,
    BuildPlan,
    Call,
    CaptionFilter,
    ClassLike,
    DescribeQuestion,
    Question,
)
from deixis._images import Address, ImageLike, Upload, read_image, read_upload
from deixis._progress import Bar
from deixis._streams import BATCH_SIZE, CONCURRENCY, Streamed, check_bounds, read_batch
from deixis._transport import CONNECT_TIMEOUT_S, DEFAULT_URL, Retries, headers_of, not_ours, refused, unreachable
from deixis.errors import ProblemError

T = TypeVar("T")


class Send(Protocol):
    """Sends a request and returns its answer."""

    async def __call__(self, call: Call[T], /) -> T: ...


class AsyncClient:
    """A connection to a service; see ``Client`` for the arguments. Files are read beside the event loop."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        namespace: str | None = None,
        timeout_s: float = 60,
        retries: int = 5,
        max_wait_s: float = 60,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers_of(api_key, namespace),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            transport=transport,
        )
        self._retries = Retries(retries, max_wait_s)
        self.label_sets = AsyncLabelSets(self._send)
        self.examples = AsyncExamples(self._send)
        self.databases = AsyncDatabases(self._send)
        self.jobs = AsyncJobs(self._send)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def classify(self, *images: ImageLike, **question: Unpack[Question]) -> answers.Classification:
        """Classify images in one request."""
        if not images:
            raise ValueError("give one or more images")
        return await self._send(_calls.classify(await _all(read_image, images), question))

    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        **question: Unpack[Question],
    ) -> AsyncIterator[Streamed]:
        """Classify any number of images, and yield the results in their order."""
        check_bounds(batch_size, concurrency)
        _calls.known(Question, question)
        return self._stream(images, batch_size, concurrency, progress, question)

    async def _stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        batch_size: int,
        concurrency: int,
        progress: bool,  # noqa: FBT001 - of ``stream``, by name there
        question: Question,
    ) -> AsyncIterator[Streamed]:
        total = len(images) if isinstance(images, Sized) else None
        under_way: deque[asyncio.Task[list[Streamed]]] = deque()
        with Bar("classifying", shown=progress) as bar:
            try:
                async for batch in _batches(images, batch_size):
                    under_way.append(asyncio.create_task(self._batch(batch, question)))
                    if len(under_way) > concurrency:
                        for each in await under_way.popleft():
                            yield each
                            bar.show(each.index + 1, total)
                while under_way:
                    for each in await under_way.popleft():
                        yield each
                        bar.show(each.index + 1, total)
            finally:
                for task in under_way:
                    task.cancel()
                await asyncio.gather(*under_way, return_exceptions=True)

    async def _batch(self, batch: Sequence[tuple[int, ImageLike]], question: Question) -> list[Streamed]:
        slots, read = await asyncio.to_thread(read_batch, batch)
        if read:
            told = await self._results([image for _, image in read], question)
            for (slot, _), result in zip(read, told, strict=True):
                slots[slot] = Streamed(*batch[slot], result)
        return [each for each in slots if each is not None]

    async def _results(self, images: Sequence[Upload | Address], question: Question) -> list[answers.ImageResult]:
        try:
            return (await self._send(_calls.classify(images, question))).results
        except ProblemError as error:
            if not _calls.is_of_images(error):
                raise
            if len(images) == 1:
                return [answers.ImageResult(predictions=[], error=error.problem)]
        # Every image was refused, or the batch as a whole: one at a time, each gets its own answer.
        return [result for each in images for result in await self._results([each], question)]

    async def embed_texts(self, texts: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the features of texts, of length 1 each."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list; a text alone would be read letter by letter")
        return await self._send(_calls.embed(texts, "text", model))

    async def embed_images(self, images: Sequence[ImageLike], *, model: str | None = None) -> list[list[float]]:
        """Return the features of images, of length 1 each."""
        return await self._send(_calls.embed_images(await _all(read_image, images), model))

    async def models(self) -> list[answers.Model]:
        """List the models that are served, the default first."""
        return await self._send(_calls.models())

    async def methods(self) -> list[answers.Method]:
        """List the methods and their options."""
        return await self._send(_calls.methods())

    async def is_ready(self) -> bool:
        """Ask whether the service answers requests; False also where there is none."""
        try:
            return (await self._http.get("/readyz")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def _send(self, call: Call[T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                answer = await self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    json=call.json,
                    data=call.data,
                    files=call.files,
                    headers=call.headers,
                )
            except httpx.TransportError as error:
                wait_s = self._retries.after_failure(call, error, tries)
                if wait_s is None:
                    raise unreachable(self._http.base_url, error) from error
            else:
                if answer.is_success:
                    try:
                        return call.read(answer.content)
                    except (ValidationError, ValueError, KeyError, TypeError) as error:
                        raise not_ours(answer) from error
                wait_s = self._retries.after_answer(call, answer, tries)
                if wait_s is None:
                    raise refused(answer)
            await asyncio.sleep(wait_s)


R = TypeVar("R")


async def _all(read: Callable[[ImageLike], R], images: Iterable[ImageLike]) -> list[R]:
    return await asyncio.to_thread(lambda: [read(each) for each in images])


async def _batches(
    images: Iterable[ImageLike] | AsyncIterable[ImageLike], size: int
) -> AsyncIterator[list[tuple[int, ImageLike]]]:
    """Yield images with their places, so many at a time."""
    batch: list[tuple[int, ImageLike]] = []
    index = 0
    async for image in _asynchronous(images):
        batch.append((index, image))
        index += 1
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


async def _asynchronous(images: Iterable[ImageLike] | AsyncIterable[ImageLike]) -> AsyncIterator[ImageLike]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image


class AsyncJob(answers.JobState):
    """A job of the service."""

    _send: Send = PrivateAttr()

    @classmethod
    def bound(cls, state: answers.JobState, send: Send) -> "AsyncJob":
        """Return a job that can be asked for."""
        job = cls.model_validate(state.model_dump())
        job._send = send  # noqa: SLF001 - of this class
        return job

    async def refresh(self) -> "AsyncJob":
        """Return it as it is now."""
        return AsyncJob.bound(await self._send(_calls.job(self.id)), self._send)

    async def cancel(self) -> "AsyncJob":
        """Have it ended."""
        return AsyncJob.bound(await self._send(_calls.cancel_job(self.id)), self._send)

    async def wait(self, *, timeout_s: float | None = None, progress: bool = False) -> "AsyncJob":
        """Wait until it is over, and return it with its result; raises as ``Job.wait``."""
        job, poll_s = self, FIRST_POLL_S
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        with Bar(self.kind, shown=progress) as bar:
            while not job.is_over:
                if give_up_at is not None and time.monotonic() + poll_s > give_up_at:
                    raise TimeoutError(f"the job {self.id} is {job.status} after {timeout_s:g} s; it goes on")
                await asyncio.sleep(poll_s)
                poll_s = min(1.5 * poll_s, LONGEST_POLL_S)
                job = await job.refresh()
                bar.show(job.done, job.total)
        _calls.check_succeeded(job)
        return job


class _AsyncResource:
    def __init__(self, send: Send) -> None:
        self._send = send

    async def _job(self, call: Call[answers.JobState]) -> AsyncJob:
        return AsyncJob.bound(await self._send(call), self._send)

    async def _pages(self, page: Callable[[Any], Call[Any]], items: str) -> AsyncIterator[Any]:
        after = None
        while True:
            told = await self._send(page(after))
            for each in getattr(told, items):
                yield each
            after = told.next_after
            if after is None:
                return


class AsyncLabelSets(_AsyncResource):
    """Stored classes, under a name; see ``LabelSets``."""

    def list(self) -> AsyncIterator[answers.LabelSetSummary]:
        """Yield all of them."""
        return self._pages(_calls.label_sets, "label_sets")

    async def get(self, reference: str) -> answers.LabelSet:
        """Return ``name``, the newest version, or ``name@version``."""
        return await self._send(_calls.label_set(reference))

    async def put(
        self,
        name: str,
        classes: Sequence[ClassLike],
        *,
        templates: str | None = None,
        merge_synonyms: Literal["max", "mean"] | None = None,
        version: int | None = None,
    ) -> answers.LabelSet:
        """Make a version; 0 as ``version`` where there must be none yet."""
        return await self._send(_calls.put_label_set(name, classes, templates, merge_synonyms, version))

    async def add_classes(
        self, name: str, classes: Sequence[ClassLike], *, version: int | None = None
    ) -> answers.LabelSet:
        """Make a version with more classes."""
        return await self._send(_calls.add_classes(name, classes, version))

    async def remove_class(self, name: str, label: str, *, version: int | None = None) -> answers.LabelSet:
        """Make a version without a class."""
        return await self._send(_calls.remove_class(name, label, version))

    async def delete(self, name: str, *, version: int | None = None) -> None:
        """Delete all versions, and the example images."""
        await self._send(_calls.delete_label_set(name, version))

    async def evaluate(
        self,
        name: str,
        images: Mapping[str, Iterable[ImageLike]] | None = None,
        *,
        model: str | None = None,
        template: str | None = None,
    ) -> AsyncJob:
        """Try every method: on labelled images, by class, or on the stored example images."""
        labelled = [(label, each) for label, some in (images or {}).items() for each in await _all(read_upload, some)]
        return await self._job(_calls.evaluate(name, labelled, model, template))

    async def selection(self, name: str, *, model: str | None = None) -> answers.Selection:
        """Return which method answers, and the evidence."""
        return await self._send(_calls.selection(name, model))

    async def estimate(self, name: str, **question: Unpack[DescribeQuestion]) -> answers.DescribeEstimate:
        """Tell how much a language model would be asked."""
        return await self._send(_calls.estimate(name, question))

    async def describe(self, name: str, *, accept: bool = False, **question: Unpack[DescribeQuestion]) -> AsyncJob:
        """Have a language model describe the classes."""
        return await self._job(_calls.describe(name, question, accept=accept))

    def drafts(
        self, name: str, *, status: Literal["draft", "accepted", "rejected"] | None = None, label: str | None = None
    ) -> AsyncIterator[answers.Draft]:
        """Yield drafts."""
        return self._pages(lambda after: _calls.drafts(name, status, label, after), "drafts")

    async def accept_drafts(
        self, name: str, ids: Sequence[int] | None = None, *, version: int | None = None
    ) -> answers.AcceptedDrafts:
        """Put drafts, or all undecided ones, into a new version."""
        return await self._send(_calls.accept_drafts(name, ids, version))

    async def reject_drafts(self, name: str, ids: Sequence[int] | None = None) -> int:
        """Decide against drafts, or all undecided ones; return how many."""
        return await self._send(_calls.reject_drafts(name, ids))


class AsyncExamples(_AsyncResource):
    """Example images of a label set, from which methods learn."""

    def list(self, name: str, *, label: str | None = None) -> AsyncIterator[answers.Example]:
        """Yield all of them, or those of a class."""
        return self._pages(lambda after: _calls.examples(name, label, after), "images")

    async def counts(self, name: str) -> answers.ExampleCounts:
        """Return how many there are, by class."""
        return (await self._send(_calls.examples(name, None, None))).counts

    async def add(self, name: str, images: Iterable[ImageLike], *, label: str | None = None) -> answers.AddedExamples:
        """Add images of a class, or without one, in one request."""
        return await self._send(_calls.add_examples(name, await _all(read_upload, images), label))

    async def import_folder(
        self, name: str, folder: str, *, label: str | None = None, by_subfolder: bool | None = None
    ) -> AsyncJob:
        """Add a folder of the service's own machine, below its DEIXIS_IMPORT_DIR."""
        return await self._job(_calls.import_examples(name, folder, label, by_subfolder=by_subfolder))

    async def delete(
        self,
        name: str,
        image_id: int | None = None,
        *,
        label: str | None = None,
        unlabelled: bool = False,
        everything: bool = False,
    ) -> answers.DeletedExamples:
        """Delete one, those of a class, the unlabelled, or everything; one of these must be said."""
        if image_id is not None:
            return await self._send(_calls.delete_example(name, image_id))
        return await self._send(_calls.delete_examples(name, label, unlabelled=unlabelled, everything=everything))


class AsyncDatabases(_AsyncResource):
    """Caption databases, in which names are found where there are no labels."""

    async def list(self) -> list[answers.Database]:
        """Return all of them."""
        return await self._send(_calls.databases())

    async def get(self, name: str) -> answers.Database:
        """Return one."""
        return await self._send(_calls.database(name))

    async def build(self, name: str, **plan: Unpack[BuildPlan]) -> AsyncJob:
        """Build one: of ``source``, ``files`` or ``captions``; the old one answers until the new one is there."""
        return await self._job(_calls.build_database(name, plan))

    async def search(
        self, name: str, text: str | None = None, *, image: ImageLike | None = None, **which: Unpack[CaptionFilter]
    ) -> answers.FoundCaptions:
        """Return captions near a text or an image."""
        given = None if image is None else await asyncio.to_thread(read_image, image)
        return await self._send(_calls.search_captions(name, text, given, which))

    async def delete(self, name: str) -> None:
        """Delete one."""
        await self._send(_calls.delete_database(name))


class AsyncJobs(_AsyncResource):
    """Work that goes on after the answer."""

    async def list(self) -> AsyncIterator[AsyncJob]:
        """Yield all of them, the newest first."""
        async for each in self._pages(_calls.jobs, "jobs"):
            yield AsyncJob.bound(each, self._send)

    async def get(self, job_id: str) -> AsyncJob:
        """Return one."""
        return await self._job(_calls.job(job_id))
