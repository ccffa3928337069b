"""The client for programs that wait for an answer."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
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
from deixis._streams import BATCH_SIZE, CONCURRENCY, Streamed, batches, check_bounds, read_batch
from deixis._transport import CONNECT_TIMEOUT_S, DEFAULT_URL, Retries, headers_of, not_ours, refused, unreachable
from deixis.errors import ProblemError

T = TypeVar("T")


class Send(Protocol):
    """Sends a request and returns its answer."""

    def __call__(self, call: Call[T], /) -> T: ...


class Client:
    """A connection to a service; threads may share it.

    Args:
        url: of the service.
        api_key: where it wants one; by default what DEIXIS_API_KEY holds.
        namespace: whose label sets and databases are meant, for keys of scope admin; by default DEIXIS_NAMESPACE.
        timeout_s: for each request.
        retries: how often a request is sent again that found no connection or was refused for now (429, 503). One
            whose answer was lost is sent again only if asking twice is as good as once.
        max_wait_s: where the service asks for a longer wait than this, its refusal is raised at once.
        transport: of httpx, in place of the network.

    Every method raises ``ProblemError`` where the service refuses, and ``UnreachableError`` where there is none.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        namespace: str | None = None,
        timeout_s: float = 60,
        retries: int = 5,
        max_wait_s: float = 60,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers=headers_of(api_key, namespace),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            transport=transport,
        )
        self._retries = Retries(retries, max_wait_s)
        self.label_sets = LabelSets(self._send)
        self.examples = Examples(self._send)
        self.databases = Databases(self._send)
        self.jobs = Jobs(self._send)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def classify(self, *images: ImageLike, **question: Unpack[Question]) -> answers.Classification:
        """Classify images in one request; a bad one among others has its ``error`` in its result.

        Args:
            images: one or more.
            question: ``labels`` or ``label_set``, and what else ``/v1/classify`` takes; without either, names are
                found in a caption database.

        Raises:
            OSError, TypeError, ValueError: an image that cannot be read here.
        """
        if not images:
            raise ValueError("give one or more images")
        return self._send(_calls.classify([read_image(each) for each in images], question))

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        **question: Unpack[Question],
    ) -> Iterator[Streamed]:
        """Classify any number of images, and yield the results in their order.

        Args:
            images: taken as they are needed: at most ``batch_size * (concurrency + 1)`` are in memory.
            batch_size: images of a request.
            concurrency: requests at a time.
            progress: show a bar.
            question: as for ``classify``.

        Yields:
            A result for each image. One that cannot be read, here or there, has an ``error``, and the others go on.
        """
        check_bounds(batch_size, concurrency)
        _calls.known(Question, question)
        return self._stream(images, batch_size, concurrency, progress, question)

    def _stream(
        self,
        images: Iterable[ImageLike],
        batch_size: int,
        concurrency: int,
        progress: bool,  # noqa: FBT001 - of ``stream``, by name there
        question: Question,
    ) -> Iterator[Streamed]:
        total = len(images) if isinstance(images, Sized) else None
        under_way: deque[Future[list[Streamed]]] = deque()
        with Bar("classifying", shown=progress) as bar, ThreadPoolExecutor(concurrency) as pool:
            try:
                for batch in batches(images, batch_size):
                    under_way.append(pool.submit(self._batch, batch, question))
                    if len(under_way) > concurrency:
                        yield from self._shown(under_way.popleft().result(), bar, total)
                while under_way:
                    yield from self._shown(under_way.popleft().result(), bar, total)
            finally:
                for each in under_way:
                    each.cancel()

    @staticmethod
    def _shown(results: Sequence[Streamed], bar: Bar, total: int | None) -> Iterator[Streamed]:
        for each in results:
            yield each
            bar.show(each.index + 1, total)

    def _batch(self, batch: Sequence[tuple[int, ImageLike]], question: Question) -> list[Streamed]:
        slots, read = read_batch(batch)
        if read:
            told = self._results([image for _, image in read], question)
            for (slot, _), result in zip(read, told, strict=True):
                slots[slot] = Streamed(*batch[slot], result)
        return [each for each in slots if each is not None]

    def _results(self, images: Sequence[Upload | Address], question: Question) -> list[answers.ImageResult]:
        try:
            return self._send(_calls.classify(images, question)).results
        except ProblemError as error:
            if not _calls.is_of_images(error):
                raise
            if len(images) == 1:
                return [answers.ImageResult(predictions=[], error=error.problem)]
        # Every image was refused, or the batch as a whole: one at a time, each gets its own answer.
        return [result for each in images for result in self._results([each], question)]

    def embed_texts(self, texts: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the features of texts, of length 1 each."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list; a text alone would be read letter by letter")
        return self._send(_calls.embed(texts, "text", model))

    def embed_images(self, images: Sequence[ImageLike], *, model: str | None = None) -> list[list[float]]:
        """Return the features of images, of length 1 each."""
        return self._send(_calls.embed_images([read_image(each) for each in images], model))

    def models(self) -> list[answers.Model]:
        """List the models that are served, the default first."""
        return self._send(_calls.models())

    def methods(self) -> list[answers.Method]:
        """List the methods and their options."""
        return self._send(_calls.methods())

    def is_ready(self) -> bool:
        """Ask whether the service answers requests; False also where there is none."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _send(self, call: Call[T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                answer = self._http.request(
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
            time.sleep(wait_s)


class Job(answers.JobState):
    """A job of the service."""

    _send: Send = PrivateAttr()

    @classmethod
    def bound(cls, state: answers.JobState, send: Send) -> "Job":
        """Return a job that can be asked for."""
        job = cls.model_validate(state.model_dump())
        job._send = send  # noqa: SLF001 - of this class
        return job

    def refresh(self) -> "Job":
        """Return it as it is now."""
        return Job.bound(self._send(_calls.job(self.id)), self._send)

    def cancel(self) -> "Job":
        """Have it ended."""
        return Job.bound(self._send(_calls.cancel_job(self.id)), self._send)

    def wait(self, *, timeout_s: float | None = None, progress: bool = False) -> "Job":
        """Wait until it is over, and return it with its result.

        Args:
            timeout_s: of the wait; the job goes on.
            progress: show a bar.

        Raises:
            JobFailedError: it failed, or was cancelled.
            TimeoutError: it is not over in time.
        """
        job, poll_s = self, FIRST_POLL_S
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        with Bar(self.kind, shown=progress) as bar:
            while not job.is_over:
                if give_up_at is not None and time.monotonic() + poll_s > give_up_at:
                    raise TimeoutError(f"the job {self.id} is {job.status} after {timeout_s:g} s; it goes on")
                time.sleep(poll_s)
                poll_s = min(1.5 * poll_s, LONGEST_POLL_S)
                job = job.refresh()
                bar.show(job.done, job.total)
        _calls.check_succeeded(job)
        return job


class _Resource:
    def __init__(self, send: Send) -> None:
        self._send = send

    def _job(self, call: Call[answers.JobState]) -> Job:
        return Job.bound(self._send(call), self._send)

    def _pages(self, page: Callable[[Any], Call[Any]], items: str) -> Iterator[Any]:
        after = None
        while True:
            told = self._send(page(after))
            yield from getattr(told, items)
            after = told.next_after
            if after is None:
                return


class LabelSets(_Resource):
    """Stored classes, under a name; each change is a version.

    ``version`` guards a change: it is refused where the newest version is another, so that nobody's change is lost.
    """

    def list(self) -> Iterator[answers.LabelSetSummary]:
        """Yield all of them."""
        return self._pages(_calls.label_sets, "label_sets")

    def get(self, reference: str) -> answers.LabelSet:
        """Return ``name``, the newest version, or ``name@version``."""
        return self._send(_calls.label_set(reference))

    def put(
        self,
        name: str,
        classes: Sequence[ClassLike],
        *,
        templates: str | None = None,
        merge_synonyms: Literal["max", "mean"] | None = None,
        version: int | None = None,
    ) -> answers.LabelSet:
        """Make a version; 0 as ``version`` where there must be none yet."""
        return self._send(_calls.put_label_set(name, classes, templates, merge_synonyms, version))

    def add_classes(self, name: str, classes: Sequence[ClassLike], *, version: int | None = None) -> answers.LabelSet:
        """Make a version with more classes."""
        return self._send(_calls.add_classes(name, classes, version))

    def remove_class(self, name: str, label: str, *, version: int | None = None) -> answers.LabelSet:
        """Make a version without a class."""
        return self._send(_calls.remove_class(name, label, version))

    def delete(self, name: str, *, version: int | None = None) -> None:
        """Delete all versions, and the example images."""
        self._send(_calls.delete_label_set(name, version))

    def evaluate(
        self,
        name: str,
        images: Mapping[str, Iterable[ImageLike]] | None = None,
        *,
        model: str | None = None,
        template: str | None = None,
    ) -> Job:
        """Try every method: on labelled images, by class, or on the stored example images."""
        labelled = [(label, read_upload(each)) for label, some in (images or {}).items() for each in some]
        return self._job(_calls.evaluate(name, labelled, model, template))

    def selection(self, name: str, *, model: str | None = None) -> answers.Selection:
        """Return which method answers, and the evidence."""
        return self._send(_calls.selection(name, model))

    def estimate(self, name: str, **question: Unpack[DescribeQuestion]) -> answers.DescribeEstimate:
        """Tell how much a language model would be asked."""
        return self._send(_calls.estimate(name, question))

    def describe(self, name: str, *, accept: bool = False, **question: Unpack[DescribeQuestion]) -> Job:
        """Have a language model describe the classes; drafts wait for a decision unless they are accepted at once."""
        return self._job(_calls.describe(name, question, accept=accept))

    def drafts(
        self, name: str, *, status: Literal["draft", "accepted", "rejected"] | None = None, label: str | None = None
    ) -> Iterator[answers.Draft]:
        """Yield drafts."""
        return self._pages(lambda after: _calls.drafts(name, status, label, after), "drafts")

    def accept_drafts(
        self, name: str, ids: Sequence[int] | None = None, *, version: int | None = None
    ) -> answers.AcceptedDrafts:
        """Put drafts, or all undecided ones, into a new version."""
        return self._send(_calls.accept_drafts(name, ids, version))

    def reject_drafts(self, name: str, ids: Sequence[int] | None = None) -> int:
        """Decide against drafts, or all undecided ones; return how many."""
        return self._send(_calls.reject_drafts(name, ids))


class Examples(_Resource):
    """Example images of a label set, from which methods learn."""

    def list(self, name: str, *, label: str | None = None) -> Iterator[answers.Example]:
        """Yield all of them, or those of a class."""
        return self._pages(lambda after: _calls.examples(name, label, after), "images")

    def counts(self, name: str) -> answers.ExampleCounts:
        """Return how many there are, by class."""
        return self._send(_calls.examples(name, None, None)).counts

    def add(self, name: str, images: Iterable[ImageLike], *, label: str | None = None) -> answers.AddedExamples:
        """Add images of a class, or without one, in one request."""
        return self._send(_calls.add_examples(name, [read_upload(each) for each in images], label))

    def import_folder(
        self, name: str, folder: str, *, label: str | None = None, by_subfolder: bool | None = None
    ) -> Job:
        """Add a folder of the service's own machine, below its DEIXIS_IMPORT_DIR."""
        return self._job(_calls.import_examples(name, folder, label, by_subfolder=by_subfolder))

    def delete(
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
            return self._send(_calls.delete_example(name, image_id))
        return self._send(_calls.delete_examples(name, label, unlabelled=unlabelled, everything=everything))


class Databases(_Resource):
    """Caption databases, in which names are found where there are no labels."""

    def list(self) -> list[answers.Database]:
        """Return all of them."""
        return self._send(_calls.databases())

    def get(self, name: str) -> answers.Database:
        """Return one."""
        return self._send(_calls.database(name))

    def build(self, name: str, **plan: Unpack[BuildPlan]) -> Job:
        """Build one: of ``source``, ``files`` or ``captions``; the old one answers until the new one is there."""
        return self._job(_calls.build_database(name, plan))

    def search(
        self, name: str, text: str | None = None, *, image: ImageLike | None = None, **which: Unpack[CaptionFilter]
    ) -> answers.FoundCaptions:
        """Return captions near a text or an image."""
        given = None if image is None else read_image(image)
        return self._send(_calls.search_captions(name, text, given, which))

    def delete(self, name: str) -> None:
        """Delete one."""
        self._send(_calls.delete_database(name))


class Jobs(_Resource):
    """Work that goes on after the answer."""

    def list(self) -> Iterator[Job]:
        """Yield all of them, the newest first."""
        return (Job.bound(each, self._send) for each in self._pages(_calls.jobs, "jobs"))

    def get(self, job_id: str) -> Job:
        """Return one."""
        return self._job(_calls.job(job_id))
