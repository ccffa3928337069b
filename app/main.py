"""Wires the parts: settings -> service -> application."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.middleware.cors import CORSMiddleware

from app import __version__
from app.api import documentation, errors, playground
from app.api.auth.access import NAMESPACE_HEADER, Gate
from app.api.auth.keys import KeyRing, load_keys_file
from app.api.auth.policy import KeyPolicy
from app.api.auth.quotas import DefaultQuotas, Quotas
from app.api.deadline import Deadline
from app.api.forms import ImageCountLimits
from app.api.hosts import HostCheck, HostRules
from app.api.middleware import AccessLog, BodyBudget, BodyLimits, BoundedBody, SecurityHeaders
from app.api.routes import ROUTERS
from app.api.routing import add_routes
from app.captions.catalogue import CaptionCatalogue, RemoteSearch
from app.captions.everyday import everyday_groups, everyday_names
from app.captions.search import CaptionSearch
from app.classification.classifiers import ClassifierCache
from app.classification.embeddings import Embedder
from app.classification.image_features import ImageFeatureCache
from app.classification.pipeline import Pipeline
from app.classification.prewarm import build_classifiers
from app.classification.resolve import Resolver
from app.describing.describer import Describer, LanguageModel
from app.describing.questions import load_feature_question, load_question_sets
from app.encoders._base import Encoder, LoadOptions, ModelInfo
from app.encoders.loading import imagenet_templates, load_encoder
from app.errors import ConfigurationError
from app.fewshot.examples import ExampleImages
from app.fewshot.fitting import FitCache
from app.images.decoder_pool import Decoders, ImageLimits, ProcessDecoders, ThreadDecoders
from app.images.fetch import ImageFetcher, RemoteImages
from app.jobs.handlers import BuildCaptionsJobs, DescribeJobs, EvaluateJobs, ImportJobs, SelectMethodJobs
from app.jobs.queue import JobHandler, JobQueue
from app.label_sets.prewarm import Prewarmer
from app.label_sets.service import LabelLimits, LabelSets
from app.models.background_tuning import measure_in_process, tune_when_idle
from app.models.negative_words import NegativeVocabulary
from app.models.registry import ModelRegistry
from app.models.served_model import ServedModel
from app.names.kinds import WordKinds
from app.observability.health import Health
from app.observability.loops import Loops
from app.observability.metrics import Metrics
from app.observability.tracing import enable_stages
from app.prompting.class_embeddings import ClassEmbeddingCache
from app.prompting.templates import TemplateLibrary
from app.prompting.text_feature_store import TextFeatureStore
from app.runtime.data_files import resources
from app.runtime.memory import trim_when_idle
from app.selection.comparison import MethodComparer
from app.selection.selection import MethodSelector
from app.selection.selection_reader import SelectionReader
from app.selection.threshold_curves import ThresholdCurves
from app.settings import Settings
from app.store.database import migrate, open_engine, ping
from app.store.drafts import DraftRepository
from app.store.examples import ExampleRepository, SelectionRepository
from app.store.jobs import JobRepository
from app.store.keys import KeyRepository
from app.store.label_sets import LabelSetRepository
from deixis.extras import needs_extra

log = structlog.get_logger()

# Example images encoded together, unless the queue is smaller.
_EXAMPLE_BATCH = 16

# Half of the everyday names, 1,159 of them, separate unknown images nearly as well as all, in half of the time.
_NEGATIVE_WORDS_STEP = 2
# One in six of them, 387, tells whether one label of several fits.
_COMMON_WORDS_STEP = 6

# Of images that requests may name by id: 25,000 images with features of 512 numbers.
_KEPT_FEATURES_BYTES = 64 * 1024 * 1024
_KEPT_FEATURES_S = 3600

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def load_options(settings: Settings) -> LoadOptions:
    """Return the settings for loading models."""
    return LoadOptions(
        device=settings.device,
        precision=settings.precision,
        backend="torch" if settings.image_backend == "torch-compile" else settings.image_backend,
        weights_dir=settings.model_cache_dir,
        data_dir=settings.data_dir,
        exports_dir=settings.exports_dir,
        tuning_seconds=settings.tuning_seconds,
        torch_compile=settings.image_backend == "torch-compile",
    )


def language_model(settings: Settings) -> LanguageModel:
    """Return the settings of the language model that describes classes."""
    return LanguageModel(
        base_url=settings.llm_base_url,
        api_key=None if settings.llm_api_key is None else settings.llm_api_key.get_secret_value(),
        model=settings.llm_model,
        concurrency=settings.llm_concurrency,
        timeout_s=settings.llm_timeout_s,
    )


def image_fetcher(settings: Settings) -> ImageFetcher | None:
    """Return the fetcher of image URLs; None if the settings do not allow URLs."""
    if not settings.allow_image_urls:
        return None
    return ImageFetcher(
        max_bytes=settings.max_image_bytes, timeout_s=settings.image_url_timeout_s, hosts=settings.image_url_hosts
    )


def load_encoders(settings: Settings) -> list[Encoder]:
    """Load every model of the settings, in order.

    Raises:
        ModelUnavailableError: a model cannot be loaded; then no model is served.
    """
    options = load_options(settings)
    encoders = []
    for spec in settings.models:
        encoder = load_encoder(spec, options)
        log.info("model_loaded", model=spec, **asdict(encoder.image_path))
        encoders.append(encoder)
    return encoders


def serve_here(
    encoder: Encoder, settings: Settings, metrics: Metrics, text_features: TextFeatureStore | None
) -> ServedModel:
    """Return a model that encodes in this process."""
    return ServedModel.here(
        encoder,
        metrics=metrics,
        max_queued_images=settings.max_queued_images,
        image_batch=settings.image_batch,
        text_batch=settings.text_batch,
        stalled_after_s=settings.stall_timeout_s,
        text_features=text_features,
    )


@dataclass(frozen=True, slots=True)
class RemoteSteps:
    """The steps of a request that may run in other processes; by default all run in this one.

    Args:
        serve_model: puts queues in front of the towers of a model.
        search_captions: searches caption databases; None searches them in this process.
        exposition: returns the metrics of all processes; None returns those of this process.
    """

    serve_model: Callable[[Any, Settings, Metrics, TextFeatureStore | None], ServedModel] = serve_here
    search_captions: RemoteSearch | None = None
    exposition: Callable[[], Awaitable[bytes]] | None = None


async def prepare(settings: Settings, *, is_local: bool) -> None:
    """Migrate the database, and refuse to expose the service without keys by oversight.

    Args:
        settings: as ``load_settings`` reads them.
        is_local: only this machine can reach the service.

    Raises:
        ConfigurationError: other machines can reach it, and there are no keys.
        StoreError: the database cannot be opened, or a newer release wrote it.
    """
    engine = open_engine(settings.effective_database_url)
    try:
        await migrate(engine)
        is_closed = settings.keys is not KeyPolicy.AUTO or settings.api_keys_file is not None
        if not (is_closed or is_local) and not await KeyRepository(engine).any():
            raise ConfigurationError(
                f"{settings.host} can be reached from other machines, and there are no API keys: create one with"
                " `deixis keys create --scope admin`, name a file of keys in DEIXIS_API_KEYS_FILE, or set"
                " DEIXIS_KEYS=off if access is controlled elsewhere"
            )
    finally:
        await engine.dispose()


@dataclass(frozen=True, slots=True)
class Jobs:
    """The job queue, and the handler of each kind of job."""

    queue: JobQueue
    describe: DescribeJobs
    evaluate: EvaluateJobs
    select_method: SelectMethodJobs
    import_images: ImportJobs
    build_captions: BuildCaptionsJobs

    @property
    def handlers(self) -> tuple[JobHandler, ...]:
        """The handler of each kind."""
        return self.describe, self.evaluate, self.select_method, self.import_images, self.build_captions


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that requests and commands use, wired by ``open_service``.

    Label sets and caption databases are addressed by the names they are stored under, which contain the namespace; only
    a ``ClassifyRequest`` has them as its caller wrote them.
    """

    models: ModelRegistry
    negative_words: NegativeVocabulary
    templates: TemplateLibrary
    label_sets: LabelSets
    drafts: DraftRepository
    describer: Describer
    examples: ExampleImages
    caption_search: CaptionSearch
    fits: FitCache
    classifiers: ClassifierCache
    resolver: Resolver
    pipeline: Pipeline
    embedder: Embedder
    comparer: MethodComparer
    selection_reader: SelectionReader
    method_selector: MethodSelector
    threshold_curves: ThresholdCurves
    prewarmer: Prewarmer
    jobs: Jobs
    loops: Loops
    health: Health
    engine: AsyncEngine


@asynccontextmanager
async def open_service(
    settings: Settings,
    encoders: Sequence[ModelInfo],
    metrics: Metrics | None = None,
    steps: RemoteSteps | None = None,
    *,
    runs_jobs: bool = False,
) -> AsyncIterator[Service]:
    """Open and migrate the database, start the queues, and close everything at the end.

    Args:
        settings: as ``load_settings`` reads them.
        encoders: the default first; none for commands that only read and write label sets.
        metrics: of the whole process; by default they are not exposed.
        steps: which steps run elsewhere; by default none.
        runs_jobs: whether this process will run jobs, so that requests may ask for them.

    Raises:
        StoreError: the database cannot be opened, or a newer release wrote it.
        ConfigurationError: a template file or a file of questions is wrong.
    """
    templates = TemplateLibrary(resources("prompts") / "templates", {"imagenet": imagenet_templates})
    questions = resources("prompts") / "questions"
    question_sets, feature_question = load_question_sets(questions), load_feature_question(questions)
    engine = open_engine(settings.effective_database_url)
    try:
        await migrate(engine)
    except BaseException:
        await engine.dispose()
        raise
    metrics, steps = metrics or Metrics(), steps or RemoteSteps()
    loops = Loops(metrics)
    text_features = TextFeatureStore(settings.data_dir / "text-features.sqlite3", settings.text_feature_store_bytes)
    models = ModelRegistry(
        {encoder.name: steps.serve_model(encoder, settings, metrics, text_features) for encoder in encoders},
        decoders=_decoders(settings),
        decoders_per_request=max(1, settings.decode_threads // 2),
        request_timeout_s=settings.request_timeout_s,
    )
    remote_images = RemoteImages(image_fetcher(settings), max_bytes=settings.max_request_bytes)
    job_repository = JobRepository(engine)
    drafts = DraftRepository(engine)
    example_repository = ExampleRepository(engine)
    selection_repository = SelectionRepository(engine)
    class_embedding_cache = ClassEmbeddingCache(settings.class_embedding_cache_bytes, metrics.class_embeddings)
    fits = FitCache(cache_bytes=settings.fit_cache_bytes, turns=models.turns)
    classifiers = ClassifierCache(
        models,
        negative_words=NegativeVocabulary(models, _read_negative_words),
        class_embedding_cache=class_embedding_cache,
        cache_bytes=settings.classifier_cache_bytes,
        fits=fits,
        examples=example_repository,
        max_pool=settings.max_pool_images,
        metrics=metrics,
        words=everyday_names()[::_COMMON_WORDS_STEP],
    )
    catalogue = CaptionCatalogue(
        settings.effective_captions_dir,
        default=settings.default_database,
        wordnet=settings.wordnet_dir,
        metrics=metrics,
        max_queued=settings.max_queued_images,
        stalled_after_s=settings.stall_timeout_s,
        remote_search=steps.search_captions,
    )
    caption_search = CaptionSearch(catalogue, models, remote_images, build_default=settings.build_default_database)
    pipeline = Pipeline(
        models,
        remote_images,
        classifiers=classifiers,
        fits=fits,
        catalogue=catalogue,
        class_embedding_cache=class_embedding_cache,
        image_features=ImageFeatureCache(max_bytes=_KEPT_FEATURES_BYTES, ttl_s=_KEPT_FEATURES_S),
        metrics=metrics,
    )
    prewarmer = Prewarmer(
        lambda label_set: build_classifiers(label_set, models=models, resolver=resolver, classifiers=classifiers)
    )
    label_limits = LabelLimits(settings.max_labels, settings.max_classes, settings.max_label_chars)
    label_sets = LabelSets(
        LabelSetRepository(engine),
        drafts,
        templates,
        limits=label_limits,
        max_label_sets=settings.max_label_sets,
        on_write=prewarmer.add,
        on_delete=fits.forget,
    )
    selection_reader = SelectionReader(selection_repository, models, job_repository if runs_jobs else None)
    resolver = Resolver(
        models, label_sets, selection_reader, templates, caption_search, label_limits, classifiers.negative_words
    )
    describer = Describer(drafts, question_sets, feature_question, language_model(settings))
    examples = ExampleImages(
        example_repository,
        models,
        fits,
        max_examples=settings.max_examples,
        max_pool=settings.max_pool_images,
        batch_size=min(_EXAMPLE_BATCH, settings.max_queued_images),
        keep_files=settings.keep_images,
    )
    comparer = MethodComparer(models, classifiers, pipeline, fits)
    method_selector = MethodSelector(
        comparer, models, label_sets, examples, resolver, classifiers, selection_repository
    )
    select_method = SelectMethodJobs(job_repository, method_selector)
    jobs = Jobs(
        JobQueue(job_repository, metrics=metrics, loops=loops, turns=models.turns),
        DescribeJobs(job_repository, describer, label_sets, drafts),
        EvaluateJobs(job_repository, comparer, label_sets, examples, resolver),
        select_method,
        ImportJobs(job_repository, label_sets, examples, models, select_method, settings.import_dir),
        BuildCaptionsJobs(job_repository, caption_search, settings.import_dir),
    )
    for handler in jobs.handlers:
        jobs.queue.register(handler)
    try:
        yield Service(
            models=models,
            negative_words=classifiers.negative_words,
            templates=templates,
            label_sets=label_sets,
            drafts=drafts,
            describer=describer,
            examples=examples,
            caption_search=caption_search,
            fits=fits,
            classifiers=classifiers,
            resolver=resolver,
            pipeline=pipeline,
            embedder=Embedder(models, remote_images, max_texts=settings.max_labels),
            comparer=comparer,
            selection_reader=selection_reader,
            method_selector=method_selector,
            threshold_curves=ThresholdCurves(pipeline, resolver, examples),
            prewarmer=prewarmer,
            jobs=jobs,
            loops=loops,
            health=Health(
                (lambda: models.problem, lambda: catalogue.problem), lambda: loops.problem, partial(ping, engine)
            ),
            engine=engine,
        )
    finally:
        await jobs.queue.close()
        await prewarmer.close()
        await selection_reader.close()
        await catalogue.close()
        remote_images.close()
        await fits.close()
        await asyncio.to_thread(models.close)
        await engine.dispose()
        await asyncio.to_thread(text_features.close)


def _read_negative_words() -> tuple[tuple[str, ...], WordKinds]:
    words = everyday_names()[::_NEGATIVE_WORDS_STEP]
    return words, WordKinds(words, everyday_groups())


async def _prewarm(service: Service, *, encodes_negative_words: bool) -> None:
    """Prepare what the first requests would otherwise wait for; failures are logged, and requests report them again."""
    steps: list[Callable[[], Awaitable[object]]] = [
        service.jobs.build_captions.add_default,
        service.caption_search.catalogue.open_all,
        partial(service.prewarmer.add_all, service.label_sets),
    ]
    if encodes_negative_words:
        steps.append(service.negative_words.prepare_all)
    for prepare in steps:
        try:
            await prepare()
        except Exception as error:
            log.warning("not_prewarmed", exc_info=error)


def _gate_of(app: FastAPI) -> Gate:
    gate: Gate = app.state.gate
    return gate


def _own_exposition(metrics: Metrics) -> Callable[[], Awaitable[bytes]]:
    async def exposition() -> bytes:
        return metrics.exposition()

    return exposition


_IMAGE_ROUTES = {"/", "/classify", "/v1/classify", "/v1/embeddings", "/v1/zero-shot-image-classification"}


def _takes_images(path: str) -> bool:
    return path in _IMAGE_ROUTES or path.startswith("/models/") or path.endswith((":evaluate", "/images", "/search"))


def _decoders(settings: Settings) -> Decoders:
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    if settings.decode_timeout_s is None:
        return ThreadDecoders(settings.decode_threads, limits)
    return ProcessDecoders(settings.decode_threads, limits, settings.decode_timeout_s)


def create_app(
    settings: Settings,
    load: Callable[[Settings], Sequence[ModelInfo]] = load_encoders,
    steps: RemoteSteps | None = None,
) -> FastAPI:
    """Return the application; models are loaded when it starts, before its port opens.

    Args:
        settings: as ``load_settings`` reads them.
        load: gives the encoders, the default first; for a server that has loaded them already, and for tests.
        steps: as for ``open_service``.
    """
    if settings.traces and find_spec("opentelemetry.sdk") is None:
        raise ConfigurationError(needs_extra("DEIXIS_TRACES", "otel"))
    if settings.traces:
        enable_stages()
    metrics = Metrics(__version__)
    file_keys = [] if settings.api_keys_file is None else load_keys_file(settings.api_keys_file)
    quotas = Quotas(
        DefaultQuotas(settings.key_rate, settings.key_image_rate, settings.key_concurrency),
        settings.rate_limit_storage,
        metrics.rate_limit_failures,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        encoders = await asyncio.to_thread(load, settings)
        async with open_service(settings, encoders, metrics, steps, runs_jobs=True) as service:
            app.state.service = service
            app.state.image_count_limits = ImageCountLimits(
                settings.max_images_per_request, settings.max_evaluation_images
            )
            app.state.accepts_image_urls = settings.allow_image_urls
            app.state.metrics = metrics
            app.state.exposition = (
                steps.exposition if steps is not None and steps.exposition else _own_exposition(metrics)
            )
            keys = KeyRing(KeyRepository(service.engine), file_keys, settings.keys)
            app.state.gate = Gate(keys, quotas)
            service.jobs.queue.start()
            background = [
                asyncio.create_task(_prewarm(service, encodes_negative_words=settings.encodes_negative_words)),
                asyncio.create_task(
                    trim_when_idle(lambda: not any(served.images.admitted for served in service.models))
                ),
            ]
            if settings.tuning_seconds and steps is None:
                measure = partial(measure_in_process, options=load_options(settings), log_format=settings.log_format)
                background.append(asyncio.create_task(tune_when_idle(service.models, measure)))
            if settings.health_probe_s:
                background.append(asyncio.create_task(service.models.watch(settings.health_probe_s, service.loops)))
            log.info("ready", models=[encoder.name for encoder in encoders], version=__version__)
            try:
                yield
            finally:
                await service.jobs.queue.close()
                await keys.close()
                await quotas.close()
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
                log.info("stopping")

    app = FastAPI(
        title="Deixis",
        version=__version__,
        summary="Zero-shot image classification: send images and labels, get a score per label.",
        lifespan=lifespan,
        telemetry={
            # Metrics are Prometheus's, and what went wrong is in the log, where no body is.
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": settings.traces,
            "exclude": lambda scope: scope["path"] in {"/healthz", "/readyz", "/metrics"},
        },
        # FastAPI's own pages load their scripts from elsewhere; documentation.py has ours.
        docs_url=None,
        openapi_url=None,
        redoc_url=None,
        # A redirect would name an address, and only a proxy in front knows the right one.
        redirect_slashes=False,
    )
    errors.install(app)
    # First, because a request is compared with one route after another.
    for router in ROUTERS:
        add_routes(app, router)
    documentation.install(app)
    playground.install(app)
    app.add_middleware(
        HostCheck,
        rules=HostRules(settings.host, settings.allowed_hosts, settings.cors_origins),
        needs_key=lambda: _gate_of(app).needs_key(),
    )
    app.add_middleware(Deadline, timeout_s=settings.request_timeout_s)
    # Added last is outermost: the id first, then the log that shows it, headers, then the bound on the body.
    app.add_middleware(
        BoundedBody,
        limits=BodyLimits(
            max_bytes=settings.max_request_bytes,
            max_json_bytes=settings.max_json_bytes,
            timeout_s=settings.body_timeout_s,
            budget=BodyBudget(settings.max_total_body_bytes),
            takes_images=_takes_images,
        ),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "If-Match",
                "If-None-Match",
                NAMESPACE_HEADER,
                "X-API-Key",
                "X-Request-ID",
            ],
            expose_headers=["ETag", "Location", "Retry-After", "X-Request-ID"],
        )
    app.add_middleware(SecurityHeaders, cross_origin=bool(settings.cors_origins))
    app.add_middleware(AccessLog, metrics=metrics)
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name="X-Request-ID",
        generator=lambda: uuid.uuid4().hex,
        validator=lambda given: _REQUEST_ID.fullmatch(given) is not None,
        transformer=lambda given: given,
    )
    return app
