"""Every setting, read once from the environment (prefix ``DEIXIS_``) by main and cli only."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.api.auth.keys import KeyPolicy, read_rate
from app.encoders._base import model_source
from app.errors import ConfigurationError, InvalidFieldError, ModelUnavailableError
from app.runtime.cpu import usable_cores

_MIB = 1024 * 1024


_REPLICAS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


def _default_data_dir() -> Path:
    return user_data_path("deixis", appauthor=False)


def _expanded(path: Path) -> Path:
    return path.expanduser().absolute()


Folder = Annotated[Path, AfterValidator(_expanded)]


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many processes do the same: always so many, or from ``least`` to ``most`` as there is work."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"


def read_replicas(text: str) -> Replicas:
    """Return what ``2`` or ``1-8`` says; raises ValueError for anything else."""
    found = _REPLICAS.fullmatch(text.strip())
    if found is None or int(found[2] or found[1]) < int(found[1]):
        msg = f"'{text}' is no number of replicas; write 2, or 1-8 for as many as there is work for"
        raise ValueError(msg)
    return Replicas(int(found[1]), int(found[2] or found[1]))


def _replicas(value: object) -> object:
    return read_replicas(value) if isinstance(value, str) else value


_Replicas = Annotated[Replicas, BeforeValidator(_replicas), NoDecode]


class Settings(BaseSettings):
    """What an operator may choose; the descriptions are the text of docs/settings.md."""

    model_config = SettingsConfigDict(env_prefix="DEIXIS_", frozen=True, extra="forbid", validate_default=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    keys: KeyPolicy = Field(
        KeyPolicy.AUTO,
        description="Whether callers need an API key: `required`, `off`, or `auto`, which is required once there is"
        " one, and until then refuses to listen on other addresses than this machine's own.",
    )
    api_keys_file: Folder | None = Field(
        None, description="TOML file of API keys, beside those that `deixis keys create` makes; docs/security.md."
    )
    key_rate: str | None = Field(
        None, description="Requests of a key that has no rate of its own, as `60/min` or `10/second; 5000/day`."
    )
    key_image_rate: str | None = Field(None, description="The same for images.")
    key_concurrency: int | None = Field(
        None, ge=1, description="Requests of one key at a time, in each process, where the key says nothing of it."
    )
    rate_limit_storage: str = Field(
        "memory://",
        description="Where rates are counted: `memory://` in each process, or `redis://host:port` for all together,"
        " with the extra `redis`.",
    )
    max_label_sets: int = Field(10_000, ge=1, description="Label sets of one namespace; more get 413.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins, comma separated, whose pages may ask the service from a browser, as"
        " `https://app.example.com`; `*` is any. By default none may.",
    )
    data_dir: Folder = Field(
        default_factory=_default_data_dir,
        description="Folder of everything durable; by default the platform's data folder for `deixis`.",
    )
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        ("embedded",),
        description="Models to serve, comma separated, the first being the default: `embedded`, `architecture/tag`,"
        " `hf-hub:org/repo` or `local-dir:path`.",
    )
    database_url: SecretStr | None = Field(
        None,
        description="Where label sets are kept: `sqlite:///path` or `postgresql://user:password@host/name`; by default"
        " `deixis.sqlite3` in the data folder.",
    )
    model_cache_dir: Folder | None = Field(
        None, description="Folder of downloaded weights; by default the hub library's own (`HF_HOME`)."
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Of the image tower's arithmetic; `auto` is the fastest that changes no answers on a CPU, and fp16"
        " on CUDA.",
    )
    image_backend: Literal["auto", "torch", "openvino"] = Field(
        "auto", description="What runs the image tower; `auto` is what was measured to be fastest."
    )
    tuning_seconds: float = Field(
        20,
        ge=0,
        le=3600,
        description="For measuring at the first start of a model on a machine how it runs best; 0 measures nothing.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Let torch compile the image tower where torch runs it; needs a C++ compiler on a CPU.",
    )
    request_timeout_s: float | None = Field(
        30, gt=0, le=3600, description="A request whose images are not classified by then gets 504."
    )
    stall_timeout_s: float = Field(
        300, gt=0, le=86_400, description="A forward pass that takes longer makes `/healthz` answer 503."
    )
    canary_s: float = Field(
        30,
        ge=0,
        le=3600,
        description="A tower that encoded nothing for so long encodes a test, and `/healthz` answers 503 if that fails;"
        " 0 tests nothing.",
    )
    drain_s: float = Field(
        0,
        ge=0,
        le=3600,
        description="After SIGTERM, `/readyz` answers 503 for so long while requests are served on, so that a load"
        " balancer has time to see it. Without effect with `ray`, whose proxies send nothing to an edge that stops.",
    )
    shutdown_timeout_s: int = Field(30, ge=0, le=3600, description="Time that running requests get to finish at stop.")
    keep_alive_s: int = Field(
        75,
        ge=1,
        le=3600,
        description="An idle connection is closed after this; make it longer than what a load balancer in front keeps"
        " its own, or some requests meet a closing connection.",
    )
    max_connections: int = Field(
        1000, ge=1, le=100_000, description="Open connections; more get 503. Each needs a file descriptor."
    )
    head_timeout_s: float = Field(
        20, gt=0, le=3600, description="For a request's headers to arrive, from the connection on; then 408."
    )
    body_timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="For a request's body to arrive, and as long again for each MiB of it, so that 30 asks for 35 kB/s;"
        " also for each pause in it; then 408. An answer that the client does not read for so long is given up.",
    )
    max_body_mib: int = Field(
        1024,
        ge=1,
        description="Bodies of all requests under way together, MiB; more get 503. Files of a form above 1 MiB wait on"
        " the disk, others in memory.",
    )
    max_queued_images: int = Field(256, ge=1, description="Images admitted at once per model; more get 503.")
    max_image_bytes: int = Field(20 * _MIB, ge=1, description="Bytes of one encoded image; more get 413.")
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="Width times height of one image, read before decoding; more get 413."
    )
    allow_image_urls: bool = Field(
        default=False,
        description="Fetch images from URLs in JSON requests; only from public addresses, and without redirects.",
    )
    image_url_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="The only hosts that images are fetched from, comma separated, as `images.example.com` or"
        " `*.example.com`; by default all.",
    )
    image_url_timeout_s: float = Field(10, gt=0, le=600, description="For fetching one image.")
    # What lists in bodies may hold at most, names.class_names.MAX_ITEMS, bounds these three.
    max_images_per_request: int = Field(64, ge=1, le=100_000, description="Images in one request; more get 413.")
    max_evaluation_images: int = Field(
        5000, ge=1, le=100_000, description="Labelled images in one request to evaluate methods; more get 413."
    )
    max_request_bytes: int = Field(
        128 * _MIB, ge=1, description="Bytes of one request's body with images; more get 413."
    )
    max_json_bytes: int = Field(
        16 * _MIB, ge=1, description="Bytes of one request's body where it brings no images; more get 413."
    )
    max_labels: int = Field(1_000, ge=1, le=100_000, description="Inline labels in one request; more get 413.")
    max_classes: int = Field(10_000, ge=1, le=100_000, description="Classes in one label set; more get 413.")
    max_label_chars: int = Field(200, ge=1, le=10_000, description="Characters of one class name; more get 422.")
    class_embedding_cache_mib: int = Field(
        1024,
        ge=1,
        description="Memory for texts that are ready to use, MiB; half of it for label sets as a whole. One of 1,000"
        " classes takes 2 MiB at 512 dimensions, and 157 MiB with 80 templates for `autoclip`.",
    )
    text_feature_store_mib: int = Field(
        1024, ge=1, description="Disk for text features, so that a restart does not encode them again, MiB."
    )
    max_examples: int = Field(
        1_000_000, ge=1, le=100_000_000, description="Example images of one label set; more get 413."
    )
    max_pool_images: int = Field(
        100_000,
        ge=1,
        description="Unlabelled example images that a method learns from; of more, so many are taken evenly.",
    )
    keep_images: bool = Field(
        default=False,
        description="Keep the files of example images, so that their features can be made again for another model;"
        " else only features and hashes are kept.",
    )
    import_dir: Folder | None = Field(
        None,
        description="Folder of the server from which example images and files of captions may be read by name; by"
        " default none may.",
    )
    captions_dir: Folder | None = Field(
        None,
        description="Folder of the caption databases, in which names are found for images without labels; by default"
        " `captions` in the data folder. Processes that share a database of label sets must share it.",
    )
    default_database: str = Field(
        "wordnet", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="The caption database of requests that name none."
    )
    build_wordnet: bool = Field(
        default=True,
        description="Build the caption database `wordnet` in the background where it is missing and is the default;"
        " some minutes at the first start.",
    )
    wordnet_dir: Folder = Field(
        Path("/usr/share/wordnet"),
        description="Folder of WordNet 3.0's files, such as Debian's package `wordnet-base` installs.",
    )
    learned_cache_mib: int = Field(1024, ge=1, description="Memory for what methods learned from example images, MiB.")
    image_batch: int | None = Field(
        None, ge=1, le=1024, description="Images in one forward pass; by default what was measured to be best."
    )
    text_batch: int = Field(64, ge=1, le=4096, description="Texts in one forward pass.")
    decode_threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        description="Threads or processes that decode images; by default one per core, and two for an edge of `ray`.",
    )
    decode_timeout_s: float | None = Field(
        None,
        gt=0,
        le=600,
        description="Decode images in processes of their own, and kill one that takes longer, which refuses the image;"
        " by default in threads, which is quicker, and where nothing can be killed.",
    )
    llm_base_url: str | None = Field(
        None,
        description="The chat endpoint that describes classes, as `https://api.openai.com/v1`; anything that speaks"
        " OpenAI's protocol. Nothing is sent to it before somebody asks for descriptions.",
    )
    llm_api_key: SecretStr | None = Field(None, description="Its key, where it wants one.")
    llm_model: str | None = Field(None, description="The model to ask, as the endpoint names it.")
    llm_concurrency: int = Field(8, ge=1, le=256, description="Requests to it under way at once.")
    llm_timeout_s: float = Field(60, gt=0, le=3600, description="For one answer of it; tried again after that.")
    traces: bool = Field(
        default=False,
        description="Send traces by OpenTelemetry, with the extra `otel`, to where its own variables say"
        " (`OTEL_EXPORTER_OTLP_ENDPOINT`).",
    )
    engine: Literal["process", "ray"] = Field(
        "process",
        description="What `deixis serve` runs on: one process, or Ray Serve, with the extra `ray`, on one machine or"
        " many; docs/scaling.md.",
    )
    ray_address: str | None = Field(
        None,
        description="With `ray`: address of the cluster to run on, as `auto` or `ray://host:10001`; by default one on"
        " this machine that begins and ends with the command.",
    )
    ray_edges: _Replicas = Field(
        Replicas(1, 1),
        description="With `ray`: processes that take requests and decode, `2`, or `1-8` for as many as there is work"
        " for.",
    )
    ray_encoders: _Replicas = Field(
        Replicas(1, 1), description="With `ray`: processes that encode, for each model, or for all where they share."
    )
    ray_encoder_cpus: float = Field(1, gt=0, description="With `ray`: cores that each of them needs.")
    ray_encoder_gpus: float = Field(0, ge=0, description="With `ray`: GPUs that each of them needs.")
    ray_models_at_once: int | None = Field(
        None,
        ge=1,
        description="With `ray`: models that an encoder holds at once, where encoders share all models and load what is"
        " asked for; by default each model has its own encoders.",
    )
    ray_shards: int = Field(
        0,
        ge=0,
        le=1000,
        description="With `ray`: parts in which caption databases are searched; 0 searches at the edges.",
    )
    ray_shard_replicas: _Replicas = Field(
        Replicas(1, 1), description="With `ray`: processes that search, for each part."
    )
    log_format: Literal["json", "console"] = Field(
        "console", description="One JSON object or one readable line per event."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is logged.")

    @field_validator("models", "cors_origins", "image_url_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("key_rate", "key_image_rate")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        try:
            return read_rate(value, "rate")
        except InvalidFieldError as error:
            raise ValueError(error.problems[0].problem) from error

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            msg = "name at least one model, such as embedded"
            raise ValueError(msg)
        for name in value:
            try:
                model_source(name)
            except ModelUnavailableError as error:
                raise ValueError(error.message) from error
        if len(set(value)) != len(value):
            msg = f"a model is named twice: {', '.join(value)}"
            raise ValueError(msg)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                msg = f"'{origin}' is no origin; write scheme and host as https://app.example.com, without a path, or *"
                raise ValueError(msg)
        return value

    @field_validator("image_url_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST.fullmatch(host):
                msg = f"'{host}' is no host; write images.example.com or *.example.com, without a scheme or a port"
                raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_images_per_request > self.max_queued_images:
            msg = (
                f"max_images_per_request ({self.max_images_per_request}) is above max_queued_images"
                f" ({self.max_queued_images}), so that the largest request could never be admitted"
            )
            raise ValueError(msg)
        return self

    @property
    def effective_captions_dir(self) -> Path:
        """The folder of caption databases, the default filled in."""
        return self.captions_dir or self.data_dir / "captions"

    @property
    def effective_database_url(self) -> str:
        """The database to open, the default filled in."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data_dir / 'deixis.sqlite3'}"


# What Kubernetes tells every pod about a Service called deixis, and what commands show to a server.
_NO_SETTING = re.compile(r"DEIXIS_(SERVICE_|PORT_|API_KEY$|NAMESPACE$)")


def load_settings(**overrides: object) -> Settings:
    """Read the environment; ``overrides`` that are not None come first, as command-line flags do.

    Raises:
        ConfigurationError: a value breaks its rule, or a ``DEIXIS_`` variable is none of the settings.
    """
    known = {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
    ours = (name for name in os.environ if name.upper().startswith("DEIXIS_") and not _NO_SETTING.match(name))
    strange = sorted(name for name in ours if name.upper() not in known)
    if overrides.get("port") is None and os.environ.get("DEIXIS_PORT", "").startswith("tcp://"):
        raise ConfigurationError(
            f"DEIXIS_PORT is '{os.environ['DEIXIS_PORT']}', which Kubernetes sets for a Service called deixis; set"
            " enableServiceLinks: false in the pod's specification, or DEIXIS_PORT in the container's"
        )
    if strange:
        raise ConfigurationError(f"unknown setting {', '.join(strange)}; known: {', '.join(sorted(known))}")
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [
            f"{'DEIXIS_' + str(problem['loc'][0]).upper() if problem['loc'] else 'settings'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigurationError("; ".join(problems)) from error
