"""A server, reached by the public client."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from app.captions.query import CaptionQuery
from app.classification.request import ClassifyRequest
from app.cli.backends._base import CurveFiles, LabelSetInput, OnProgress, failed_result, read_image
from app.cli.common import SILENT_S, note
from app.describing.request import DescribeRequest
from app.errors import ConfigurationError, InvalidFieldError
from app.settings import Settings, load_client_settings, load_settings
from app.types import DraftStatus
from deixis import AsyncClient, ClassifyOptions, ProblemError, answers

if TYPE_CHECKING:
    from app.selection.comparison import Comparison
    from app.selection.learning_curve import LearningCurve

_TIMEOUT_S = 120
_MAX_IMAGE_BYTES: int = Settings.model_fields["max_image_bytes"].default
# A busy server is waited for. A server that does not respond is an error at once, since its address may be wrong.
_RETRIES = 7


class _Client(AsyncClient):
    """A client that says on standard error if it has to wait for the server, once."""

    _is_announced = False

    async def _send(self, call: Any) -> Any:
        timer = asyncio.get_running_loop().call_later(SILENT_S, self._announce, call)
        try:
            return await super()._send(call)
        finally:
            timer.cancel()

    def _announce(self, call: Any) -> None:
        if not self._is_announced:
            self._is_announced = True
            request = f"{call.method} {call.path}"
            note(
                f"Waiting for {self._http.base_url} to answer {request}; without an answer, this ends after"
                f" {_TIMEOUT_S} s."
            )


class HttpBackend:
    """A server, reached by the public client.

    Args:
        client: of the server.
        max_image_bytes: files that are larger are not read.
    """

    def __init__(self, client: AsyncClient, max_image_bytes: int = _MAX_IMAGE_BYTES) -> None:
        self._client = client
        self.max_image_bytes = max_image_bytes

    async def classify(self, images: Sequence[bytes], request: ClassifyRequest) -> list[answers.ImageResult]:
        """POST /v1/classify, once; if it fails because of the images, once per image."""
        stream = self._client.stream(images, batch_size=max(1, len(images)), concurrency=1, **client_options(request))
        return [row.result async for row in stream]

    async def pin(self, request: ClassifyRequest) -> ClassifyRequest:
        """GET /v1/models and the label set."""
        reference = request.label_set
        if reference is not None:
            label_set = await self.label_set(reference)
            reference = f"{label_set.name}@{label_set.version}"
        model = request.model or (await self._client.models())[0].name
        return replace(request, model=model, label_set=reference)

    async def prepare_database(self, request: ClassifyRequest, on_progress: OnProgress) -> None:
        """Do nothing: a server builds the database when it starts."""

    async def classify_together(
        self, files: Sequence[Path], request: ClassifyRequest, on_progress: OnProgress
    ) -> tuple[list[answers.ImageResult], list[answers.SharedName]]:
        """POST /v1/classify with all images, whose number the server limits."""
        results, sent = await self._read_all(files, on_progress)
        if not sent:
            return results, []
        images = [image for _, image in sent]
        shared: list[answers.SharedName] = []
        try:
            classification = await self._client.classify(*images, **client_options(request))
            classified, shared = classification.results, classification.vocabulary or []
        except ProblemError as error:
            if not error.is_about_images:
                raise
            classified = await self.classify(images, request)
        for (index, _), result in zip(sent, classified, strict=True):
            results[index] = result
        return results, shared

    async def databases(self) -> list[answers.Database]:
        """GET /v1/databases."""
        return await self._client.databases.list()

    async def database(self, name: str) -> answers.Database:
        """GET /v1/databases/{name}."""
        return await self._client.databases.get(name)

    async def search_captions(self, query: CaptionQuery) -> answers.FoundCaptions:
        """POST /v1/databases/{name}/search."""
        assert query.image is None or isinstance(query.image, bytes)
        options: dict[str, Any] = {
            "model": query.model,
            "limit": query.limit,
            "offset": query.offset,
            "contains": query.contains,
            "min_score": query.min_score,
        }
        return await self._client.databases.search(query.database, query.text, image=query.image, **options)

    async def delete_database(self, name: str) -> None:
        """DELETE /v1/databases/{name}."""
        await self._client.databases.delete(name)

    async def label_sets(self) -> list[answers.LabelSetSummary]:
        """GET /v1/label-sets, all pages."""
        return [label_set async for label_set in self._client.label_sets.list()]

    async def label_set(self, reference: str) -> answers.LabelSet:
        """GET /v1/label-sets/{name}."""
        return await self._client.label_sets.get(reference)

    async def put_label_set(self, name: str, content: LabelSetInput) -> answers.LabelSet:
        """PUT /v1/label-sets/{name}."""
        return await self._client.label_sets.put(
            name,
            [{name: value for name, value in asdict(entry).items() if name != "prior"} for entry in content.classes],
            templates=content.templates,
            merge_synonyms=content.merge_synonyms.value,
            multi_label=content.multi_label or None,
            priors=content.priors,
        )

    async def compare(
        self,
        request: ClassifyRequest,
        files: Sequence[Path],
        classes: Sequence[str],
        on_progress: OnProgress,
    ) -> "tuple[Comparison, list[answers.ImageResult]]":
        """POST /v1/label-sets/{name}:evaluate with all images, and wait for the job."""
        from app.selection.comparison import Comparison  # noqa: PLC0415 - imports all methods

        if request.label_set is None:
            raise InvalidFieldError.of(
                "--labels", "a server compares methods on a stored label set only; pass --label-set"
            )
        results, sent = await self._read_all(files, on_progress)
        by_class: dict[str, list[bytes]] = {}
        indices: dict[str, list[int]] = {}
        for index, image in sent:
            by_class.setdefault(classes[index], []).append(image)
            indices.setdefault(classes[index], []).append(index)
        job = await self._client.label_sets.evaluate(
            request.label_set, by_class, model=request.model, template=request.template
        )
        result = dict((await job.wait()).result or {})
        order = [index for group in indices.values() for index in group]
        for skipped in result.pop("skipped"):
            results[order[skipped["image"]]] = failed_result(skipped["problem"], "The image is left out")
        return Comparison.from_json(result), results

    async def learning_curve(
        self,
        request: ClassifyRequest,  # noqa: ARG002 - refused
        images: CurveFiles,  # noqa: ARG002
        on_progress: OnProgress,  # noqa: ARG002
    ) -> "tuple[LearningCurve, list[answers.ImageResult]]":
        """Refuse: thousands of fits would slow down the other users of a server."""
        raise InvalidFieldError.of("--server", "learning curves run in this process only; leave out --server")

    async def add_examples(
        self, name: str, images: Sequence[bytes], classnames: Sequence[tuple[str, ...]]
    ) -> answers.AddedExamples:
        """POST /v1/label-sets/{name}/images, once; if it fails because of the images, once per image."""
        try:
            return await self._client.examples.add(name, images, label=classnames)
        except ProblemError as error:
            # Of several images, the number may exceed a limit; of one image, it is the limit of the label set.
            if not (error.is_about_images or (error.kind == "too-large" and len(images) > 1)):
                raise
            if len(images) == 1:
                skipped = answers.SkippedImage(image=0, problem=error.problem.detail)
                counts = await self.example_counts(name)
                return answers.AddedExamples(
                    added=0, duplicates=0, relabelled=0, skipped=[skipped], counts=counts, job=None
                )
        parts = [
            await self.add_examples(name, [image], [given]) for image, given in zip(images, classnames, strict=True)
        ]
        return answers.AddedExamples(
            added=sum(part.added for part in parts),
            duplicates=sum(part.duplicates for part in parts),
            relabelled=sum(part.relabelled for part in parts),
            skipped=[
                answers.SkippedImage(image=index, problem=skipped.problem)
                for index, part in enumerate(parts)
                for skipped in part.skipped
            ],
            counts=parts[-1].counts,
            job=next((part.job for part in reversed(parts) if part.job is not None), None),
        )

    async def select_methods(self, name: str, job_id: str | None, on_progress: OnProgress) -> None:  # noqa: ARG002
        """Wait for the job that the server started when the images were added."""
        if job_id is not None:
            await (await self._client.jobs.get(job_id)).wait(on_progress=on_progress)

    async def example_counts(self, name: str) -> answers.ExampleCounts:
        """GET /v1/label-sets/{name}/images."""
        return await self._client.examples.counts(name)

    async def delete_examples(
        self, name: str, *, classname: str | None, unlabelled: bool, everything: bool
    ) -> answers.DeletedExamples:
        """DELETE /v1/label-sets/{name}/images."""
        return await self._client.examples.delete(name, label=classname, unlabelled=unlabelled, everything=everything)

    async def selection(self, name: str, model: str | None) -> answers.Selection:
        """GET /v1/label-sets/{name}/selection."""
        return await self._client.label_sets.selection(name, model=model)

    async def thresholds(
        self, name: str, model: str | None, *, precision: float | None, recall: float | None
    ) -> answers.Thresholds:
        """GET /v1/label-sets/{name}/thresholds."""
        return await self._client.label_sets.thresholds(name, model=model, precision=precision, recall=recall)

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, version: int
    ) -> answers.LabelSet:
        """PATCH /v1/label-sets/{name}/thresholds."""
        return await self._client.label_sets.set_thresholds(name, thresholds, version=version)

    async def estimate_descriptions(self, name: str, request: DescribeRequest) -> answers.DescribeEstimate:
        """POST /v1/label-sets/{name}/descriptions:estimate."""
        options: dict[str, Any] = asdict(request)
        return await self._client.label_sets.estimate(name, **options)

    async def describe(
        self, name: str, request: DescribeRequest, on_progress: OnProgress, *, accept: bool
    ) -> Mapping[str, Any]:
        """POST /v1/label-sets/{name}/descriptions:generate, and wait for the job."""
        options: dict[str, Any] = asdict(request)
        job = await self._client.label_sets.describe(name, accept=accept, **options)
        return (await job.wait(on_progress=on_progress)).result or {}

    async def drafts(self, name: str, status: DraftStatus | None, classname: str | None) -> list[answers.Draft]:
        """GET /v1/label-sets/{name}/descriptions, all pages."""
        filters: dict[str, Any] = {"status": None if status is None else status.value, "label": classname}
        return [draft async for draft in self._client.label_sets.drafts(name, **filters)]

    async def accept_drafts(self, name: str, ids: Sequence[int] | None) -> answers.AcceptedDrafts:
        """POST /v1/label-sets/{name}/descriptions:accept."""
        return await self._client.label_sets.accept_drafts(name, ids)

    async def reject_drafts(self, name: str, ids: Sequence[int] | None) -> int:
        """POST /v1/label-sets/{name}/descriptions:reject."""
        return await self._client.label_sets.reject_drafts(name, ids)

    async def _read_all(
        self, files: Sequence[Path], on_progress: OnProgress
    ) -> tuple[list[answers.ImageResult], list[tuple[int, bytes]]]:
        """Return a result per file, with the error of those that cannot be read, and the contents of the others."""
        results: list[answers.ImageResult] = []
        read: list[tuple[int, bytes]] = []
        for index, file in enumerate(files):
            content = await asyncio.to_thread(read_image, file, self.max_image_bytes)
            if isinstance(content, bytes):
                read.append((index, content))
                content = answers.ImageResult(predictions=[])
            results.append(content)
            await on_progress(len(results), len(files))
        return results, read


@asynccontextmanager
async def open_http_backend(url: str) -> AsyncIterator[HttpBackend]:
    """Connect to a server, with the key and the namespace of the settings.

    Raises:
        ConfigurationError: the URL is none, the key or the namespace is not ASCII, or the settings are invalid.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"the server {url!r} is not a URL; write it as http://HOST:PORT")
    settings = load_client_settings()
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    try:
        client = _Client(
            url,
            api_key=key,
            namespace=settings.namespace or "",
            timeout_s=_TIMEOUT_S,
            retries=_RETRIES,
            connect_retries=0,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    async with client:
        yield HttpBackend(client, load_settings().max_image_bytes)


def client_options(request: ClassifyRequest) -> ClassifyOptions:
    """Return the request as the arguments of the client, without those that are not set."""
    fields = {name: getattr(request, name) for name in ClassifyOptions.__annotations__}
    given = {name: value for name, value in fields.items() if value is not None and value is not False and value != {}}
    if request.multi_label is not None:  # false overrides what the label set says
        given["multi_label"] = request.multi_label
    return cast("ClassifyOptions", given)
