"""The asynchronous client: the methods of ``Client``, to be awaited."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence, Sized
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
    ClassifyOptions,
    ClassLike,
    DescribeOptions,
)
from deixis._images import ImageLike, SentImage, read_image, read_upload
from deixis._progress import ProgressBar
from deixis._streams import BATCH_SIZE, CONCURRENCY, StreamResult, check_bounds, read_batch
from deixis._transport import (
    CONNECT_TIMEOUT_S,
    DEFAULT_URL,
    Retries,
    refused,
    request_headers,
    unexpected_body,
    unreachable,
)
from deixis.errors import ProblemError

T = TypeVar("T")


class Send(Protocol):
    """Sends a request and returns its parsed response."""

    async def __call__(self, call: Call[T], /) -> T: ...


class AsyncClient:
    """A connection to a service; ``Client`` documents the arguments. Files are read in a worker thread."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        namespace: str | None = None,
        timeout_s: float = 60,
        retries: int = 5,
        max_wait_s: float = 60,
        connect_retries: int | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=request_headers(api_key, namespace),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            transport=transport,
        )
        self._retries = Retries(retries, retries if connect_retries is None else connect_retries, max_wait_s)
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

    async def classify(
        self, *images: ImageLike | Sequence[ImageLike], **request: Unpack[ClassifyOptions]
    ) -> answers.Classification:
        """Classify images in one request."""
        given, fields = _calls.classify_arguments(images, request)
        answer = await self._send(_calls.classify(await _read_all(read_image, given), fields))
        return answer.of(given)

    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        **request: Unpack[ClassifyOptions],
    ) -> AsyncIterator[StreamResult]:
        """Classify any number of images, and yield the results in the order of the images."""
        check_bounds(batch_size, concurrency)
        _calls.checked_fields(ClassifyOptions, request)
        return self._stream(images, batch_size, concurrency, progress, request)

    async def _stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        batch_size: int,
        concurrency: int,
        progress: bool,  # noqa: FBT001 - a keyword of ``stream``
        request: ClassifyOptions,
    ) -> AsyncIterator[StreamResult]:
        total = len(images) if isinstance(images, Sized) else None
        pending: deque[asyncio.Task[list[StreamResult]]] = deque()
        with ProgressBar("classifying", shown=progress) as bar:
            try:
                async for batch in _batches(images, batch_size):
                    pending.append(asyncio.create_task(self._batch(batch, request)))
                    if len(pending) > concurrency:
                        for result in await pending.popleft():
                            yield result
                            bar.show(result.index + 1, total)
                while pending:
                    for result in await pending.popleft():
                        yield result
                        bar.show(result.index + 1, total)
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def _batch(self, batch: Sequence[tuple[int, ImageLike]], request: ClassifyOptions) -> list[StreamResult]:
        slots, read = await asyncio.to_thread(read_batch, batch)
        if read:
            results = await self._results([image for _, image in read], request)
            for (slot, _), result in zip(read, results, strict=True):
                slots[slot] = StreamResult(*batch[slot], result)
        return [slot for slot in slots if slot is not None]

    async def _results(self, images: Sequence[SentImage], request: ClassifyOptions) -> list[answers.ImageResult]:
        try:
            return (await self._send(_calls.classify(images, request))).results
        except ProblemError as error:
            # Of several images, the number may exceed a limit; of one image, it is a limit on another field.
            if not (error.is_about_images or (error.kind == "too-large" and len(images) > 1)):
                raise
            if len(images) == 1:
                return [answers.ImageResult(predictions=[], error=error.problem)]
        # All images were refused, or the batch is too large: one request per image gives each its own result.
        return [result for image in images for result in await self._results([image], request)]

    async def embed_texts(self, texts: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the embeddings of texts, each of length 1."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        return await self._send(_calls.embed(texts, "text", model))

    async def embed_images(self, images: Sequence[ImageLike], *, model: str | None = None) -> list[list[float]]:
        """Return the embeddings of images, each of length 1."""
        return await self._send(_calls.embed_images(await _read_all(read_image, images), model))

    async def models(self) -> list[answers.Model]:
        """List the models in service, the default first."""
        return await self._send(_calls.models())

    async def methods(self) -> list[answers.Method]:
        """List the methods and their options."""
        return await self._send(_calls.methods())

    async def is_ready(self) -> bool:
        """Return whether the service accepts requests; false if no response arrives."""
        try:
            return (await self._http.get("/readyz")).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def _send(self, call: Call[T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                response = await self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    json=call.json,
                    data=call.data,
                    files=call.files,
                    headers=call.headers,
                )
            except httpx.RequestError as error:
                wait_s = self._retries.after_failure(call, error, tries)
                if wait_s is None:
                    raise unreachable(self._http.base_url, error) from error
            else:
                if response.is_success:
                    try:
                        return call.read(response.content)
                    except (ValidationError, ValueError, KeyError, TypeError) as error:
                        raise unexpected_body(response) from error
                wait_s = self._retries.after_response(call, response, tries)
                if wait_s is None:
                    raise refused(response)
            await asyncio.sleep(wait_s)


R = TypeVar("R")


async def _read_all(read: Callable[[ImageLike], R], images: Iterable[ImageLike]) -> list[R]:
    return await asyncio.to_thread(lambda: [read(image) for image in images])


async def _batches(
    images: Iterable[ImageLike] | AsyncIterable[ImageLike], size: int
) -> AsyncIterator[list[tuple[int, ImageLike]]]:
    """Yield batches of ``size`` numbered images."""
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
    """The state of a background job of the service."""

    _send: Send = PrivateAttr()

    @classmethod
    def bound(cls, state: answers.JobState, send: Send) -> "AsyncJob":
        """Return the job with the connection that its methods use."""
        job = cls.model_validate(state.model_dump())
        job._send = send  # noqa: SLF001 - an instance of this class
        return job

    async def refresh(self) -> "AsyncJob":
        """Return the current state of the job."""
        return AsyncJob.bound(await self._send(_calls.job(self.id)), self._send)

    async def cancel(self) -> "AsyncJob":
        """Cancel the job."""
        return AsyncJob.bound(await self._send(_calls.cancel_job(self.id)), self._send)

    async def wait(
        self,
        *,
        timeout_s: float | None = None,
        progress: bool = False,
        on_progress: Callable[[int, int], Awaitable[object]] | None = None,
    ) -> "AsyncJob":
        """Wait until the job is over, and return it with its result; ``Job.wait`` documents arguments and errors."""
        job, poll_s = self, FIRST_POLL_S
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        with ProgressBar(self.kind, shown=progress) as bar:
            while not job.is_over:
                if give_up_at is not None and time.monotonic() + poll_s > give_up_at:
                    raise TimeoutError(f"the job {self.id} is {job.status} after {timeout_s:g} s, and continues")
                await asyncio.sleep(poll_s)
                poll_s = min(1.5 * poll_s, LONGEST_POLL_S)
                job = await job.refresh()
                bar.show(job.done, job.total)
                if on_progress is not None:
                    await on_progress(job.done, job.total)
        _calls.check_succeeded(job)
        return job if job.result is not None else await job.refresh()  # the job may come from a list


class _AsyncResource:
    def __init__(self, send: Send) -> None:
        self._send = send

    async def _job(self, call: Call[answers.JobState]) -> AsyncJob:
        return AsyncJob.bound(await self._send(call), self._send)

    async def _pages(self, page_call: Callable[[Any], Call[Any]], items: str) -> AsyncIterator[Any]:
        after = None
        while True:
            page = await self._send(page_call(after))
            for item in getattr(page, items):
                yield item
            after = page.next_after
            if after is None:
                return


class AsyncLabelSets(_AsyncResource):
    """Stored label sets; see ``LabelSets``."""

    def list(self) -> AsyncIterator[answers.LabelSetSummary]:
        """Yield all label sets, by name."""
        return self._pages(_calls.label_sets, "label_sets")

    async def get(self, reference: str) -> answers.LabelSet:
        """Return the newest version of ``name``, or the version ``name@version``."""
        return await self._send(_calls.label_set(reference))

    async def shipped(self) -> Sequence[answers.ShippedLabelSetSummary]:
        """Return the label sets with descriptions that come with the service, by name."""
        return await self._send(_calls.shipped_label_sets())

    async def import_shipped(self, name: str) -> answers.LabelSet:
        """Write a label set that comes with the service under its name, as a new version if it exists."""
        content = await self._send(_calls.shipped_label_set(name))
        return await self.put(name, content.classes, **_calls.settings_of(content))

    async def put(
        self,
        name: str,
        classes: Sequence[ClassLike],
        *,
        templates: str | None = None,
        merge_synonyms: Literal["max", "mean"] | None = None,
        multi_label: bool | None = None,
        priors: Mapping[str, float] | None = None,
        version: int | None = None,
    ) -> answers.LabelSet:
        """Write a version; with ``version=0`` only if the label set does not exist yet."""
        settings: _calls.LabelSetSettings = {
            "templates": templates,
            "merge_synonyms": merge_synonyms,
            "multi_label": multi_label,
            "priors": None if priors is None else dict(priors),
        }
        return await self._send(_calls.put_label_set(name, classes, settings, version))

    async def add_classes(
        self,
        name: str,
        classes: Sequence[ClassLike],
        *,
        priors: Mapping[str, float] | None = None,
        version: int | None = None,
    ) -> answers.LabelSet:
        """Write a version with additional classes."""
        return await self._send(_calls.add_classes(name, classes, priors, version))

    async def remove_class(self, name: str, label: str, *, version: int | None = None) -> answers.LabelSet:
        """Write a version without the class ``label``."""
        return await self._send(_calls.remove_class(name, label, version))

    async def delete(self, name: str, *, version: int | None = None) -> None:
        """Delete all versions and the example images of a label set."""
        await self._send(_calls.delete_label_set(name, version))

    async def evaluate(
        self,
        name: str,
        images: Mapping[str, Iterable[ImageLike]] | Iterable[tuple[ImageLike, Sequence[str]]] | None = None,
        *,
        model: str | None = None,
        template: str | None = None,
        multi_label: bool | None = None,
    ) -> AsyncJob:
        """Start a job that compares all methods; ``LabelSets.evaluate`` documents the arguments."""
        pairs = _calls.labelled_pairs(images)
        uploads = await _read_all(read_upload, [image for _, image in pairs])
        labelled = [(label, upload) for (label, _), upload in zip(pairs, uploads, strict=True)]
        return await self._job(_calls.evaluate(name, labelled, model, template, multi_label=multi_label))

    async def selection(self, name: str, *, model: str | None = None) -> answers.Selection:
        """Return the method that is selected for the label set, and the evidence for it."""
        return await self._send(_calls.selection(name, model))

    async def thresholds(
        self,
        name: str,
        *,
        model: str | None = None,
        precision: float | None = None,
        recall: float | None = None,
    ) -> answers.Thresholds:
        """Return the threshold of each label where images may have several, and its curve on example images.

        Args:
            name: the label set.
            model: the model; by default the service's first.
            precision: suggest the lowest thresholds with this precision, in (0, 1); excludes ``recall``.
            recall: suggest the highest thresholds with this recall, in (0, 1). By default, the highest F1.
        """
        return await self._send(_calls.thresholds(name, model, precision, recall))

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, version: int | None = None
    ) -> answers.LabelSet:
        """Write a version with other thresholds of some classes; None removes that of a class."""
        return await self._send(_calls.set_thresholds(name, thresholds, version))

    async def estimate(self, name: str, **request: Unpack[DescribeOptions]) -> answers.DescribeEstimate:
        """Return an upper bound of the requests and tokens that ``describe`` uses."""
        return await self._send(_calls.estimate(name, request))

    async def describe(self, name: str, *, accept: bool = False, **request: Unpack[DescribeOptions]) -> AsyncJob:
        """Start a job in which a language model describes the classes; see ``LabelSets.describe``."""
        return await self._job(_calls.describe(name, request, accept=accept))

    def drafts(
        self, name: str, *, status: Literal["draft", "accepted", "rejected"] | None = None, label: str | None = None
    ) -> AsyncIterator[answers.Draft]:
        """Yield the drafts of a label set, or those of one status or one class."""
        return self._pages(lambda after: _calls.drafts(name, status, label, after), "drafts")

    async def accept_drafts(
        self, name: str, ids: Sequence[int] | None = None, *, version: int | None = None
    ) -> answers.AcceptedDrafts:
        """Write drafts, by default all undecided ones, into a new version."""
        return await self._send(_calls.accept_drafts(name, ids, version))

    async def reject_drafts(self, name: str, ids: Sequence[int] | None = None) -> int:
        """Reject drafts, by default all undecided ones, and return their number."""
        return await self._send(_calls.reject_drafts(name, ids))


class AsyncExamples(_AsyncResource):
    """Example images of a label set, from which few-shot methods learn."""

    def list(self, name: str, *, label: str | None = None) -> AsyncIterator[answers.Example]:
        """Yield the example images of a label set, or those of one class."""
        return self._pages(lambda after: _calls.examples(name, label, after), "images")

    async def counts(self, name: str) -> answers.ExampleCounts:
        """Return the number of example images by class."""
        return (await self._send(_calls.examples(name, None, None))).counts

    async def add(
        self,
        name: str,
        images: Iterable[ImageLike],
        *,
        label: str | Sequence[str | Sequence[str] | None] | None = None,
        classes: Sequence[str] | None = None,
    ) -> answers.AddedExamples:
        """Add example images in one request; ``Examples.add`` documents the arguments."""
        uploads = await _read_all(read_upload, images)
        return await self._send(_calls.add_examples(name, uploads, _calls.labels_of(label, classes, len(uploads))))

    async def import_folder(
        self, name: str, folder: str, *, label: str | Sequence[str] | None = None, by_subfolder: bool | None = None
    ) -> AsyncJob:
        """Start a job that adds a folder on the machine of the service, below its DEIXIS_IMPORT_DIR."""
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
        """Delete one image, the images of a class, the unlabelled ones, or all; exactly one must be specified."""
        if image_id is not None:
            return await self._send(_calls.delete_example(name, image_id))
        return await self._send(_calls.delete_examples(name, label, unlabelled=unlabelled, everything=everything))


class AsyncDatabases(_AsyncResource):
    """Caption databases, in which labels are discovered for images without a label list."""

    async def list(self) -> list[answers.Database]:
        """Return all caption databases, by name."""
        return await self._send(_calls.databases())

    async def get(self, name: str) -> answers.Database:
        """Return one caption database."""
        return await self._send(_calls.database(name))

    async def build(self, name: str, **plan: Unpack[BuildPlan]) -> AsyncJob:
        """Start a job that builds a database; an existing one stays in use until the job succeeds."""
        return await self._job(_calls.build_database(name, plan))

    async def search(
        self, name: str, text: str | None = None, *, image: ImageLike | None = None, **options: Unpack[CaptionFilter]
    ) -> answers.FoundCaptions:
        """Return the captions nearest to a text or an image."""
        sent = None if image is None else await asyncio.to_thread(read_image, image)
        return await self._send(_calls.search_captions(name, text, sent, options))

    async def delete(self, name: str) -> None:
        """Delete a caption database."""
        await self._send(_calls.delete_database(name))


class AsyncJobs(_AsyncResource):
    """Background jobs."""

    async def list(self) -> AsyncIterator[AsyncJob]:
        """Yield all jobs without their results, the newest first; ``refresh`` and ``wait`` return the result."""
        async for state in self._pages(_calls.jobs, "jobs"):
            yield AsyncJob.bound(state, self._send)

    async def get(self, job_id: str) -> AsyncJob:
        """Return one job."""
        return await self._job(_calls.job(job_id))
