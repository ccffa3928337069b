"""The parts of the service that endpoint functions use: dependencies, and functions for ``DirectRoute``."""

from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import Annotated, Any

from fastapi import Depends, Request

from app.api.forms import ImageCountLimits
from app.captions.search import CaptionSearch
from app.classification.embeddings import Embedder
from app.classification.pipeline import Pipeline
from app.classification.resolve import Resolver
from app.describing.describer import Describer
from app.fewshot.examples import ExampleImages
from app.jobs.handlers import BuildCaptionsJobs, DescribeJobs, EvaluateJobs, ImportJobs, SelectMethodJobs
from app.jobs.queue import JobQueue
from app.label_sets.service import LabelSets
from app.models.registry import ModelRegistry
from app.observability.health import Health
from app.selection.selection_reader import SelectionReader
from app.selection.threshold_curves import ThresholdCurves
from app.store.drafts import DraftRepository


def _part(path: str) -> Callable[[Request], Awaitable[Any]]:
    get = attrgetter(path)

    # Asynchronous, because FastAPI runs other functions in a thread.
    async def part(request: Request) -> Any:
        return get(request.app.state)

    return part


ModelsDependency = Annotated[ModelRegistry, Depends(_part("service.models"))]
ResolverDependency = Annotated[Resolver, Depends(_part("service.resolver"))]
PipelineDependency = Annotated[Pipeline, Depends(_part("service.pipeline"))]
EmbedderDependency = Annotated[Embedder, Depends(_part("service.embedder"))]
LabelSetsDependency = Annotated[LabelSets, Depends(_part("service.label_sets"))]
DraftsDependency = Annotated[DraftRepository, Depends(_part("service.drafts"))]
DescriberDependency = Annotated[Describer, Depends(_part("service.describer"))]
ExamplesDependency = Annotated[ExampleImages, Depends(_part("service.examples"))]
ThresholdCurvesDependency = Annotated[ThresholdCurves, Depends(_part("service.threshold_curves"))]
SelectionReaderDependency = Annotated[SelectionReader, Depends(_part("service.selection_reader"))]
CaptionSearchDependency = Annotated[CaptionSearch, Depends(_part("service.caption_search"))]
HealthDependency = Annotated[Health, Depends(_part("service.health"))]
JobQueueDependency = Annotated[JobQueue, Depends(_part("service.jobs.queue"))]
DescribeJobsDependency = Annotated[DescribeJobs, Depends(_part("service.jobs.describe"))]
EvaluateJobsDependency = Annotated[EvaluateJobs, Depends(_part("service.jobs.evaluate"))]
SelectMethodJobsDependency = Annotated[SelectMethodJobs, Depends(_part("service.jobs.select_method"))]
ImportJobsDependency = Annotated[ImportJobs, Depends(_part("service.jobs.import_images"))]
BuildCaptionsJobsDependency = Annotated[BuildCaptionsJobs, Depends(_part("service.jobs.build_captions"))]


ImageCountLimitsDependency = Annotated[ImageCountLimits, Depends(_part("image_count_limits"))]
AcceptsImageUrlsDependency = Annotated[bool, Depends(_part("accepts_image_urls"))]


def classify_parts(request: Request) -> tuple[Resolver, Pipeline, ImageCountLimits]:
    """Return what classifies the images of a request."""
    state = request.app.state
    return state.service.resolver, state.service.pipeline, state.image_count_limits


def embedding_parts(request: Request) -> tuple[Embedder, ImageCountLimits]:
    """Return what encodes the texts or images of a request."""
    return request.app.state.service.embedder, request.app.state.image_count_limits
