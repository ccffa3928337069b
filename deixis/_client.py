"""The synchronous client."""

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
    ClassifyOptions,
    ClassLike,
    DescribeOptions,
)
from deixis._images import ImageLike, SentImage, read_image, read_upload
from deixis._progress import ProgressBar
from deixis._streams import BATCH_SIZE, CONCURRENCY, StreamResult, batches, check_bounds, read_batch
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

    def __call__(self, call: Call[T], /) -> T: ...


class Client:
    """A connection to a service. Threads may share a client.

    Args:
        url: address of the service.
        api_key: API key, if the service requires one; by default the environment variable DEIXIS_API_KEY.
        namespace: namespace of label sets and caption databases, for keys of scope admin; by default DEIXIS_NAMESPACE.
        timeout_s: timeout of each request.
        retries: how many times a request is sent again that the service refused for now (429, 503).
        max_wait_s: if the service asks for a longer wait than this, its refusal is raised at once.
        connect_retries: how many times a request without a response is sent again; by default ``retries``. A request
            whose response was lost is sent again only if a second copy does no harm.
        transport: an httpx transport that replaces the network.

    Every method raises ``ProblemError`` if the service refuses the request, and ``UnreachableError`` if no response
    arrives.
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
        connect_retries: int | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers=request_headers(api_key, namespace),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            transport=transport,
        )
        self._retries = Retries(retries, retries if connect_retries is None else connect_retries, max_wait_s)
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

    def classify(
        self, *images: ImageLike | Sequence[ImageLike], **request: Unpack[ClassifyOptions]
    ) -> answers.Classification:
        """Classify images in one request. If some images cannot be decoded, their results carry an ``error``.

        Args:
            images: one or more images, or a list of images; labels may follow as a list, as in
                ``classify("cat.jpg", ["cat", "dog"])``.
            request: ``labels``, as a list or as a string that the service splits, or ``label_set``, and the other
                fields of ``POST /v1/classify``. Without labels and label set, the service discovers labels in a caption
                database.

        Raises:
            OSError, TypeError, ValueError: an image cannot be read by the client.
        """
        given, fields = _calls.classify_arguments(images, request)
        return self._send(_calls.classify([read_image(image) for image in given], fields)).of(given)

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
        progress: bool = False,
        **request: Unpack[ClassifyOptions],
    ) -> Iterator[StreamResult]:
        """Classify any number of images, and yield the results in the order of the images.

        Args:
            images: read as they are needed; at most ``batch_size * (concurrency + 1)`` are in memory.
            batch_size: images per request.
            concurrency: maximum number of simultaneous requests.
            progress: show a progress bar.
            request: as for ``classify``.

        Yields:
            A result per image. An image that the client cannot read or the service cannot decode has an ``error``
            and does not end the stream.
        """
        check_bounds(batch_size, concurrency)
        _calls.checked_fields(ClassifyOptions, request)
        return self._stream(images, batch_size, concurrency, progress, request)

    def _stream(
        self,
        images: Iterable[ImageLike],
        batch_size: int,
        concurrency: int,
        progress: bool,  # noqa: FBT001 - a keyword of ``stream``
        request: ClassifyOptions,
    ) -> Iterator[StreamResult]:
        total = len(images) if isinstance(images, Sized) else None
        pending: deque[Future[list[StreamResult]]] = deque()
        with ProgressBar("classifying", shown=progress) as bar, ThreadPoolExecutor(concurrency) as pool:
            try:
                for batch in batches(images, batch_size):
                    pending.append(pool.submit(self._batch, batch, request))
                    if len(pending) > concurrency:
                        yield from self._with_progress(pending.popleft().result(), bar, total)
                while pending:
                    yield from self._with_progress(pending.popleft().result(), bar, total)
            finally:
                for future in pending:
                    future.cancel()

    @staticmethod
    def _with_progress(results: Sequence[StreamResult], bar: ProgressBar, total: int | None) -> Iterator[StreamResult]:
        for result in results:
            yield result
            bar.show(result.index + 1, total)

    def _batch(self, batch: Sequence[tuple[int, ImageLike]], request: ClassifyOptions) -> list[StreamResult]:
        slots, read = read_batch(batch)
        if read:
            results = self._results([image for _, image in read], request)
            for (slot, _), result in zip(read, results, strict=True):
                slots[slot] = StreamResult(*batch[slot], result)
        return [slot for slot in slots if slot is not None]

    def _results(self, images: Sequence[SentImage], request: ClassifyOptions) -> list[answers.ImageResult]:
        try:
            return self._send(_calls.classify(images, request)).results
        except ProblemError as error:
            # Of several images, the number may exceed a limit; of one image, it is a limit on another field.
            if not (error.is_about_images or (error.kind == "too-large" and len(images) > 1)):
                raise
            if len(images) == 1:
                return [answers.ImageResult(predictions=[], error=error.problem)]
        # All images were refused, or the batch is too large: one request per image gives each its own result.
        return [result for image in images for result in self._results([image], request)]

    def embed_texts(self, texts: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the embeddings of texts, each of length 1."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        return self._send(_calls.embed(texts, "text", model))

    def embed_images(self, images: Sequence[ImageLike], *, model: str | None = None) -> list[list[float]]:
        """Return the embeddings of images, each of length 1."""
        return self._send(_calls.embed_images([read_image(image) for image in images], model))

    def models(self) -> list[answers.Model]:
        """List the models in service, the default first."""
        return self._send(_calls.models())

    def methods(self) -> list[answers.Method]:
        """List the methods and their options."""
        return self._send(_calls.methods())

    def is_ready(self) -> bool:
        """Return whether the service accepts requests; false if no response arrives."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _send(self, call: Call[T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                response = self._http.request(
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
            time.sleep(wait_s)


class Job(answers.JobState):
    """The state of a background job of the service."""

    _send: Send = PrivateAttr()

    @classmethod
    def bound(cls, state: answers.JobState, send: Send) -> "Job":
        """Return the job with the connection that its methods use."""
        job = cls.model_validate(state.model_dump())
        job._send = send  # noqa: SLF001 - an instance of this class
        return job

    def refresh(self) -> "Job":
        """Return the current state of the job."""
        return Job.bound(self._send(_calls.job(self.id)), self._send)

    def cancel(self) -> "Job":
        """Cancel the job."""
        return Job.bound(self._send(_calls.cancel_job(self.id)), self._send)

    def wait(
        self,
        *,
        timeout_s: float | None = None,
        progress: bool = False,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> "Job":
        """Wait until the job is over, and return it with its result.

        Args:
            timeout_s: how long to wait. The job continues after a timeout.
            progress: show a progress bar.
            on_progress: called with the number of finished steps and of all steps; the latter is 0 while unknown.

        Raises:
            JobFailedError: the job failed or was cancelled.
            TimeoutError: the job is not over in time.
        """
        job, poll_s = self, FIRST_POLL_S
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        with ProgressBar(self.kind, shown=progress) as bar:
            while not job.is_over:
                if give_up_at is not None and time.monotonic() + poll_s > give_up_at:
                    raise TimeoutError(f"the job {self.id} is {job.status} after {timeout_s:g} s, and continues")
                time.sleep(poll_s)
                poll_s = min(1.5 * poll_s, LONGEST_POLL_S)
                job = job.refresh()
                bar.show(job.done, job.total)
                if on_progress is not None:
                    on_progress(job.done, job.total)
        _calls.check_succeeded(job)
        return job if job.result is not None else job.refresh()  # the job may come from a list


class _Resource:
    def __init__(self, send: Send) -> None:
        self._send = send

    def _job(self, call: Call[answers.JobState]) -> Job:
        return Job.bound(self._send(call), self._send)

    def _pages(self, page_call: Callable[[Any], Call[Any]], items: str) -> Iterator[Any]:
        after = None
        while True:
            page = self._send(page_call(after))
            yield from getattr(page, items)
            after = page.next_after
            if after is None:
                return


class LabelSets(_Resource):
    """Stored label sets. Each change writes a new version.

    ``version`` guards a change against lost updates: the service refuses it if the newest version is another one.
    """

    def list(self) -> Iterator[answers.LabelSetSummary]:
        """Yield all label sets, by name."""
        return self._pages(_calls.label_sets, "label_sets")

    def get(self, reference: str) -> answers.LabelSet:
        """Return the newest version of ``name``, or the version ``name@version``."""
        return self._send(_calls.label_set(reference))

    def shipped(self) -> Sequence[answers.ShippedLabelSetSummary]:
        """Return the label sets with descriptions that come with the service, by name."""
        return self._send(_calls.shipped_label_sets())

    def import_shipped(self, name: str) -> answers.LabelSet:
        """Write a label set that comes with the service under its name, as a new version if it exists."""
        content = self._send(_calls.shipped_label_set(name))
        return self.put(name, content.classes, **_calls.settings_of(content))

    def put(
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
        return self._send(_calls.put_label_set(name, classes, settings, version))

    def add_classes(
        self,
        name: str,
        classes: Sequence[ClassLike],
        *,
        priors: Mapping[str, float] | None = None,
        version: int | None = None,
    ) -> answers.LabelSet:
        """Write a version with additional classes."""
        return self._send(_calls.add_classes(name, classes, priors, version))

    def remove_class(self, name: str, label: str, *, version: int | None = None) -> answers.LabelSet:
        """Write a version without the class ``label``."""
        return self._send(_calls.remove_class(name, label, version))

    def delete(self, name: str, *, version: int | None = None) -> None:
        """Delete all versions and the example images of a label set."""
        self._send(_calls.delete_label_set(name, version))

    def evaluate(
        self,
        name: str,
        images: Mapping[str, Iterable[ImageLike]] | Iterable[tuple[ImageLike, Sequence[str]]] | None = None,
        *,
        model: str | None = None,
        template: str | None = None,
        multi_label: bool | None = None,
    ) -> Job:
        """Start a job that compares all methods, or with several classes per image, measures zero-shot.

        Args:
            name: the label set.
            images: labelled images, by class, or pairs of an image and its classes; by default the stored examples.
            model: the model; by default the service's first.
            template: a template set or one template; by default that of the label set.
            multi_label: images may have several classes; by default true if one of ``images`` has, or if the label set
                says so.
        """
        labelled = [(label, read_upload(image)) for label, image in _calls.labelled_pairs(images)]
        return self._job(_calls.evaluate(name, labelled, model, template, multi_label=multi_label))

    def selection(self, name: str, *, model: str | None = None) -> answers.Selection:
        """Return the method that is selected for the label set, and the evidence for it."""
        return self._send(_calls.selection(name, model))

    def thresholds(
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
        return self._send(_calls.thresholds(name, model, precision, recall))

    def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, version: int | None = None
    ) -> answers.LabelSet:
        """Write a version with other thresholds of some classes; None removes that of a class."""
        return self._send(_calls.set_thresholds(name, thresholds, version))

    def estimate(self, name: str, **request: Unpack[DescribeOptions]) -> answers.DescribeEstimate:
        """Return an upper bound of the requests and tokens that ``describe`` uses."""
        return self._send(_calls.estimate(name, request))

    def describe(self, name: str, *, accept: bool = False, **request: Unpack[DescribeOptions]) -> Job:
        """Start a job in which a language model describes the classes.

        The descriptions are drafts until they are accepted; ``accept`` accepts all of them at the end of the job.
        """
        return self._job(_calls.describe(name, request, accept=accept))

    def drafts(
        self, name: str, *, status: Literal["draft", "accepted", "rejected"] | None = None, label: str | None = None
    ) -> Iterator[answers.Draft]:
        """Yield the drafts of a label set, or those of one status or one class."""
        return self._pages(lambda after: _calls.drafts(name, status, label, after), "drafts")

    def accept_drafts(
        self, name: str, ids: Sequence[int] | None = None, *, version: int | None = None
    ) -> answers.AcceptedDrafts:
        """Write drafts, by default all undecided ones, into a new version."""
        return self._send(_calls.accept_drafts(name, ids, version))

    def reject_drafts(self, name: str, ids: Sequence[int] | None = None) -> int:
        """Reject drafts, by default all undecided ones, and return their number."""
        return self._send(_calls.reject_drafts(name, ids))


class Examples(_Resource):
    """Example images of a label set, from which few-shot methods learn."""

    def list(self, name: str, *, label: str | None = None) -> Iterator[answers.Example]:
        """Yield the example images of a label set, or those of one class."""
        return self._pages(lambda after: _calls.examples(name, label, after), "images")

    def counts(self, name: str) -> answers.ExampleCounts:
        """Return the number of example images by class."""
        return self._send(_calls.examples(name, None, None)).counts

    def add(
        self,
        name: str,
        images: Iterable[ImageLike],
        *,
        label: str | Sequence[str | Sequence[str] | None] | None = None,
        classes: Sequence[str] | None = None,
    ) -> answers.AddedExamples:
        """Add example images in one request.

        Args:
            name: the label set.
            images: the images.
            label: the class of all images, or the class or classes of each; None for unlabelled images.
            classes: instead of ``label``, the classes that every image has.
        """
        uploads = [read_upload(image) for image in images]
        return self._send(_calls.add_examples(name, uploads, _calls.labels_of(label, classes, len(uploads))))

    def import_folder(
        self, name: str, folder: str, *, label: str | Sequence[str] | None = None, by_subfolder: bool | None = None
    ) -> Job:
        """Start a job that adds a folder on the machine of the service, below its DEIXIS_IMPORT_DIR."""
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
        """Delete one image, the images of a class, the unlabelled ones, or all; exactly one must be specified."""
        if image_id is not None:
            return self._send(_calls.delete_example(name, image_id))
        return self._send(_calls.delete_examples(name, label, unlabelled=unlabelled, everything=everything))


class Databases(_Resource):
    """Caption databases, in which labels are discovered for images without a label list."""

    def list(self) -> list[answers.Database]:
        """Return all caption databases, by name."""
        return self._send(_calls.databases())

    def get(self, name: str) -> answers.Database:
        """Return one caption database."""
        return self._send(_calls.database(name))

    def build(self, name: str, **plan: Unpack[BuildPlan]) -> Job:
        """Start a job that builds a database; an existing one stays in use until the job succeeds."""
        return self._job(_calls.build_database(name, plan))

    def search(
        self, name: str, text: str | None = None, *, image: ImageLike | None = None, **options: Unpack[CaptionFilter]
    ) -> answers.FoundCaptions:
        """Return the captions nearest to a text or an image."""
        sent = None if image is None else read_image(image)
        return self._send(_calls.search_captions(name, text, sent, options))

    def delete(self, name: str) -> None:
        """Delete a caption database."""
        self._send(_calls.delete_database(name))


class Jobs(_Resource):
    """Background jobs."""

    def list(self) -> Iterator[Job]:
        """Yield all jobs without their results, the newest first; ``refresh`` and ``wait`` return the result."""
        return (Job.bound(state, self._send) for state in self._pages(_calls.jobs, "jobs"))

    def get(self, job_id: str) -> Job:
        """Return one job."""
        return self._job(_calls.job(job_id))
