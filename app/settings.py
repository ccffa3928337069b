"""The settings, read from ``DEIXIS_`` variables and a configuration file; only main and cli read them."""

import os
import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from platformdirs import user_config_path, user_data_path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.api.auth.policy import KeyPolicy, parse_rate
from app.encoders.model_names import catalogue_name, model_source
from app.errors import ConfigurationError, InvalidFieldError, ModelUnavailableError, did_you_mean, most_similar
from app.names.field_values import with_value
from app.runtime.cpu import usable_cores
from app.runtime.ray_layout import RayLayout, parse_layout

_MIB = 1024 * 1024

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*")
# Also an IPv6 address, and a name that is not in ASCII.
_OWN_HOST = re.compile(r"(\*\.)?[\w-]+(\.[\w-]+)*\.?|\[?[0-9A-Fa-f:.]+\]?")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


def _default_data_dir() -> Path:
    return user_data_path("deixis", appauthor=False)


def _expanded(path: Path) -> Path:
    return path.expanduser().absolute()


Folder = Annotated[Path, AfterValidator(_expanded)]


def _read_layout(value: object) -> object:
    return parse_layout(value) if isinstance(value, str) else value


class Settings(BaseSettings):
    """Settings of the service, grouped by the question that they answer; docs/settings.md is generated from this class.

    The constants at the end are limits that operators have no reason to change.
    """

    model_config = SettingsConfigDict(env_prefix="DEIXIS_", frozen=True, extra="forbid", validate_default=True)

    # Server
    host: str = Field("127.0.0.1", description="Address to listen on; `0.0.0.0` listens on every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; `0` selects a free port.")
    max_connections: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Maximum number of open connections; further connections get 503, except for health"
        " probes. Each needs a file descriptor.",
    )
    keep_alive_s: int = Field(
        75,
        ge=1,
        le=3600,
        description="Idle connections are closed after this time. Set it higher than the idle timeout of a load"
        " balancer in front, which otherwise sends requests on connections that are closing.",
    )
    request_timeout_s: float | None = Field(
        30,
        gt=0,
        le=3600,
        description="Deadline of a request, without the time in which its body arrives; after that it gets 504.",
    )
    drain_s: float = Field(
        0,
        ge=0,
        le=3600,
        description="Delay between SIGTERM and the end of listening. During it `/readyz` answers 503 and requests are"
        " still served, so that a load balancer stops sending requests. Not used by the engine `ray`.",
    )
    shutdown_timeout_s: int = Field(
        30, ge=0, le=3600, description="Time that running requests get to finish when the service stops."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call the service from a browser, comma separated, as"
        " `https://app.example.com`; `*` allows every origin. By default no origin is allowed.",
    )

    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Further host names under which a service without API keys is reached, comma separated, as"
        " `deixis.example.com` or `*.example.com`; `*` allows every name. Other names get 421, so that no web page can"
        " reach the service under its own name; see operations.md.",
    )

    # API keys and quotas
    keys: KeyPolicy = Field(
        KeyPolicy.AUTO,
        description="Whether requests need an API key: `required`, `off`, or `auto`. With `auto`, keys are required"
        " once one exists; until then the service only listens on this machine's own addresses.",
    )
    api_keys_file: Folder | None = Field(
        None, description="TOML file of API keys, used in addition to those of `deixis keys create`; see security.md."
    )
    key_rate: str | None = Field(
        None,
        description="Default request rate of a key, as `60/min` or `10/second; 5000/day`. By default it is unlimited.",
    )
    key_image_rate: str | None = Field(None, description="Default image rate of a key, in the same form.")
    key_concurrency: int | None = Field(
        None, ge=1, description="Default number of concurrent requests of a key, in each process."
    )
    rate_limit_storage: str = Field(
        "memory://",
        description="Where rates are counted: `memory://` counts in each process, `redis://host:port` counts for all"
        " processes and needs the extra `redis`.",
    )

    # Storage
    data_dir: Folder = Field(
        default_factory=_default_data_dir,
        description="Folder of all persistent data; by default the platform's data folder for `deixis`.",
    )
    database_url: SecretStr | None = Field(
        None,
        description="Database of label sets: `sqlite:///path` or `postgresql://user:password@host/name`; by default"
        " `deixis.sqlite3` in the data folder.",
    )
    captions_dir: Folder | None = Field(
        None,
        description="Folder of caption databases; by default `captions` in the data folder. Processes that share a"
        " database of label sets must share this folder.",
    )
    import_dir: Folder | None = Field(
        None,
        description="Folder on the server from which jobs may import example images and caption files. By default"
        " nothing can be imported.",
    )
    keep_images: bool = Field(
        default=False,
        description="Keep the files of example images, so that their features can be computed again for another model;"
        " otherwise only features and hashes are kept.",
    )

    # Models
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        ("embedded",),
        description="Models to serve, comma separated; the first is the default. Each is `embedded`,"
        " `architecture/tag`, `hf-hub:org/repo`, `local-dir:path`, or the hub id of a model of the catalogue.",
    )
    model_cache_dir: Folder | None = Field(
        None,
        description="Folder of downloaded weights and exported models; by default the cache of the Hugging Face library"
        " (`HF_HOME`), and `exports` in the data folder.",
    )
    device: str = Field("auto", description="Device that runs the models: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = Field(
        "auto",
        description="Precision of the image tower. On a CPU, `auto` is the fastest whose features have a cosine of at"
        " least 0.999 with `fp32`, or `int8` if `deixis models tune --calibration FOLDER` has accepted it; on CUDA it"
        " is `fp16`.",
    )
    image_backend: Literal["auto", "torch", "torch-compile", "openvino"] = Field(
        "auto",
        description="Library that runs the image tower; `auto` is the one measured to be fastest. `torch-compile`"
        " needs a C++ compiler on a CPU.",
    )
    tuning_seconds: float = Field(
        20,
        ge=0,
        le=3600,
        description="Time for measuring the fastest way to run a model, at its first start on a machine; `0` disables"
        " measuring.",
    )
    image_batch: int | None = Field(
        None, ge=1, le=1024, description="Maximum number of images in a forward pass; by default it is measured."
    )

    # Decoding and fetching images
    decode_threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        description="Threads or processes that decode images; by default one per core, and two per edge with the engine"
        " `ray`.",
    )
    decode_timeout_s: float | None = Field(
        None,
        gt=0,
        le=600,
        description="If set, images are decoded in separate processes, and a process that takes longer is killed and"
        " its image is refused. By default images are decoded in threads, which is faster but cannot be interrupted.",
    )
    max_image_bytes: int = Field(
        20 * _MIB, ge=1, description="Maximum size of an encoded image in bytes; larger ones get 413."
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="Maximum width times height of an image, checked before it is decoded; larger ones get 413.",
    )
    allow_image_urls: bool = Field(
        default=False,
        description="Fetch images from the URLs of JSON requests. Only public addresses are fetched, and redirects are"
        " not followed.",
    )
    image_url_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts that images may be fetched from, comma separated, as `images.example.com` or"
        " `*.example.com`; by default all hosts.",
    )

    # Limits on requests and memory
    max_queued_images: int = Field(
        256, ge=1, description="Maximum number of admitted images per model; further images get 503."
    )
    # The next three are at most MAX_ITEMS (app/names/class_names.py), the longest list that a JSON body may contain.
    max_images_per_request: int = Field(
        64, ge=1, le=100_000, description="Maximum number of images in a request; more get 413."
    )
    max_labels: int = Field(
        1_000, ge=1, le=100_000, description="Maximum number of inline labels in a request; more get 413."
    )
    max_classes: int = Field(
        10_000, ge=1, le=100_000, description="Maximum number of classes in a label set; more get 413."
    )
    max_examples: int = Field(
        1_000_000,
        ge=1,
        le=100_000_000,
        description="Maximum number of example images of a label set; more get 413.",
    )
    max_request_bytes: int = Field(
        128 * _MIB,
        ge=1,
        description="Maximum size of a request body in bytes; larger ones get 413. The limit for the bodies of all"
        " unfinished requests together is eight times as high; above it, requests get 503.",
    )
    cache_mib: int = Field(
        2048,
        ge=1,
        description="Memory for caches in MiB: a quarter for class embeddings, a quarter for the classifiers of label"
        " sets, and half for methods fitted to example images. The text features on disk get half of this size in"
        " addition.",
    )

    # Caption databases, for images without labels
    default_database: str = Field(
        "everyday",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        description="Caption database of requests that do not name one.",
    )
    build_default_database: bool = Field(
        default=True,
        description="Build the default caption database in the background if it does not exist, and is `everyday` or"
        " `wordnet`. The first takes some seconds, the second some minutes.",
    )
    wordnet_dir: Folder = Field(
        Path("/usr/share/wordnet"),
        description="Folder of the WordNet 3.0 files, as installed by the Debian package `wordnet-base`. They are not"
        " needed.",
    )

    # Language model, for class descriptions
    llm_base_url: str | None = Field(
        None,
        description="Base URL of an OpenAI-compatible chat endpoint that describes classes, as"
        " `https://api.openai.com/v1`. Nothing is sent to it until descriptions are requested.",
    )
    llm_api_key: SecretStr | None = Field(None, description="API key of that endpoint, if it needs one.")
    llm_model: str | None = Field(None, description="Name of the model at that endpoint.")

    # Logs and traces
    log_format: Literal["json", "console"] = Field(
        "console", description="Format of log events: `json` objects, or readable lines on a `console`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level of the events that are logged."
    )
    traces: bool = Field(
        default=False,
        description="Send OpenTelemetry traces to the endpoint of `OTEL_EXPORTER_OTLP_ENDPOINT`; needs the extra"
        " `otel`.",
    )

    # Ray
    engine: Literal["process", "ray"] = Field(
        "process",
        description="Where `deixis serve` runs the service: in one process, or on Ray Serve, which needs the extra"
        " `ray`; see scaling.md.",
    )
    ray_layout: Annotated[RayLayout, BeforeValidator(_read_layout), NoDecode] = Field(
        RayLayout(),
        description="Processes of the engine `ray`, as `edges=2,encoders=1-8,encoder_gpus=1,shards=2`; see ray.md. By"
        " default one edge, and one encoder per model.",
    )

    # Fixed limits: not settings, since their values follow from the protocol and not from the deployment.
    head_timeout_s: ClassVar[float] = 20
    """For the headers of a request to arrive; then 408."""
    body_timeout_s: ClassVar[float] = 30
    """For a body to arrive, once more for each MiB of it, and for each pause in it; then 408. Also for the client to
    continue reading a response."""
    health_probe_s: ClassVar[float] = 30
    """Interval of the health probe of a tower that encodes nothing else."""
    image_url_timeout_s: ClassVar[float] = 10
    """For fetching one image."""
    llm_timeout_s: ClassVar[float] = 60
    """For one response of the language model; it is requested again after that."""
    llm_concurrency: ClassVar[int] = 8
    """Concurrent requests to the language model."""
    encodes_negative_words: ClassVar[bool] = True
    """Whether a start encodes the words that compete with labels; False for encoders of tests."""
    text_batch: ClassVar[int] = 64
    """Texts in one forward pass."""
    max_json_bytes: ClassVar[int] = 16 * _MIB
    """Of a body without images, which is parsed on the event loop."""
    max_label_chars: ClassVar[int] = 200
    max_label_sets: ClassVar[int] = 10_000
    """Of one namespace."""
    max_evaluation_images: ClassVar[int] = 5000
    """Labelled images in one request to evaluate methods, or to add examples."""
    max_pool_images: ClassVar[int] = 100_000
    """Unlabelled images that a method is fitted to; more are sampled evenly."""

    @field_validator("models", "cors_origins", "allowed_hosts", "image_url_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("key_rate", "key_image_rate")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        try:
            return parse_rate(value, "rate")
        except InvalidFieldError as error:
            raise ValueError(error.problems[0].problem) from error

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            msg = "the list is empty; give at least one model, such as embedded"
            raise ValueError(msg)
        value = tuple(map(catalogue_name, value))
        for name in value:
            try:
                model_source(name)
            except ModelUnavailableError as error:
                raise ValueError(error.message) from error
        if len(set(value)) != len(value):
            msg = f"a model is repeated in {', '.join(value)}; list each model once"
            raise ValueError(msg)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                msg = f"'{origin}' is not an origin; write a scheme and a host as https://app.example.com, or *"
                raise ValueError(msg)
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if host != "*" and not _OWN_HOST.fullmatch(host):
                msg = f"'{host}' is not a host name; write deixis.example.com without scheme and port, or *.example.com"
                raise ValueError(msg)
        return value

    @field_validator("image_url_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not _HOST.fullmatch(host):
                msg = f"'{host}' is not a host name; write images.example.com or *.example.com"
                raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_images_per_request > self.max_queued_images:
            msg = (
                f"max_images_per_request ({self.max_images_per_request}) is above max_queued_images"
                f" ({self.max_queued_images}), so the largest request could never be admitted; lower the first or raise"
                " the second"
            )
            raise ValueError(msg)
        return self

    @property
    def class_embedding_cache_bytes(self) -> int:
        """The share of class embeddings in the memory for caches."""
        return int(self.cache_mib * _MIB) // 4

    @property
    def classifier_cache_bytes(self) -> int:
        """The share of the classifiers of label sets."""
        return int(self.cache_mib * _MIB) // 4

    @property
    def fit_cache_bytes(self) -> int:
        """The share of methods fitted to example images."""
        return int(self.cache_mib * _MIB) // 2

    @property
    def text_feature_store_bytes(self) -> int:
        """Disk for text features, which spares a restart from encoding them again."""
        return int(self.cache_mib * _MIB) // 2

    @cached_property
    def stall_timeout_s(self) -> float:
        """A forward pass that takes longer makes ``/healthz`` answer 503, since no request waits for it any more."""
        return 300.0 if self.request_timeout_s is None else max(60.0, 2 * self.request_timeout_s)

    @property
    def max_total_body_bytes(self) -> int:
        """All request bodies in progress together."""
        return 8 * self.max_request_bytes

    @property
    def effective_captions_dir(self) -> Path:
        """The folder of caption databases, or its default."""
        return self.captions_dir or self.data_dir / "captions"

    @property
    def exports_dir(self) -> Path:
        """The folder of exported models."""
        return (self.model_cache_dir or self.data_dir) / "exports"

    @property
    def effective_database_url(self) -> str:
        """The URL of the database, or its default."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data_dir / 'deixis.sqlite3'}"


SETTING_GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "host": "Server",
        "keys": "API keys and quotas",
        "data_dir": "Storage",
        "models": "Models",
        "decode_threads": "Decoding and fetching images",
        "max_queued_images": "Limits on requests and memory",
        "default_database": "Caption databases",
        "llm_base_url": "Language model",
        "log_format": "Logs and traces",
        "engine": "Ray",
    }
)
"""The title of each group of settings, by its first setting."""


class ClientSettings(BaseSettings):
    """How commands reach a server; the Python client reads the last two from the environment itself."""

    model_config = SettingsConfigDict(env_prefix="DEIXIS_", frozen=True, extra="forbid")

    server: str | None = Field(
        None, description="URL of the server that commands use; `local` runs them in their own process."
    )
    api_key: SecretStr | None = Field(None, description="API key that commands send to a server.")
    namespace: str | None = Field(None, description="Namespace that commands use with a key of scope `admin`.")


CONFIG_VARIABLE = "DEIXIS_CONFIG"

# Variables that Kubernetes sets in every pod for a Service called deixis, and variables of the commands and the client.
_OTHER_VARIABLES = re.compile(r"DEIXIS_(SERVICE_|PORT_|API_KEY$|NAMESPACE$|SERVER$|CONFIG$)")

_LIST_OF_SETTINGS = "`deixis serve --help` lists all settings"

_Loaded = TypeVar("_Loaded", Settings, ClientSettings)


def load_settings(**overrides: object) -> Settings:
    """Return the settings: ``overrides`` that are not None, else the environment, else the configuration file.

    Raises:
        ConfigurationError: a value is invalid, the name of a ``DEIXIS_`` variable or of a key of the file is not a
            setting, or the file cannot be read.
    """
    variables = (name for name in os.environ if name.upper().startswith("DEIXIS_") and not _OTHER_VARIABLES.match(name))
    given = {*variables, *(f"DEIXIS_{name.upper()}" for name in overrides)}
    unknown = sorted(
        name for name in given if name.upper().removeprefix("DEIXIS_").lower() not in Settings.model_fields
    )
    if overrides.get("port") is None and os.environ.get("DEIXIS_PORT", "").startswith("tcp://"):
        raise ConfigurationError(
            f"DEIXIS_PORT is '{os.environ['DEIXIS_PORT']}', which Kubernetes sets for a Service called deixis; set"
            " enableServiceLinks: false in the pod's specification, or DEIXIS_PORT in the container's"
        )
    if unknown:
        similar = [most_similar(name[len("DEIXIS_") :], Settings.model_fields) for name in unknown]
        meant = "".join(f"; did you mean 'DEIXIS_{name.upper()}'?" for name in similar if name is not None)
        raise ConfigurationError(f"unknown setting {', '.join(unknown)}; {_LIST_OF_SETTINGS}{meant}")
    return _load(Settings, overrides)


def load_client_settings() -> ClientSettings:
    """Return how commands reach a server: from the environment, else from the configuration file.

    Raises:
        ConfigurationError: the file cannot be read, or has an unknown key or an invalid value.
    """
    return _load(ClientSettings, {})


def config_file() -> Path | None:
    """Return the file of ``DEIXIS_CONFIG``, else ``deixis.toml`` in the user's folder of settings if there is one.

    A file in the working folder is not used: a folder of photographs from elsewhere could contain one. If the variable
    is empty, there is no file.
    """
    named = os.environ.get(CONFIG_VARIABLE)
    if named is not None:
        return _expanded(Path(named)) if named else None
    file = user_config_path("deixis", appauthor=False) / "deixis.toml"
    return file if os.path.isfile(file) else None  # noqa: PTH113 - False also where the folder cannot be read


def _load(kind: type[_Loaded], overrides: Mapping[str, object]) -> _Loaded:
    file = config_file()
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    set_elsewhere = given.keys() | {
        name[len("DEIXIS_") :].lower() for name in os.environ if name.upper().startswith("DEIXIS_")
    }
    content = {} if file is None else _read_config(file)
    from_file: dict[str, Any] = {
        name: value for name, value in content.items() if name in kind.model_fields and name not in set_elsewhere
    }

    def named(location: tuple[int | str, ...]) -> str:
        """Return the key or the variable, with the field of a layout, that a problem is about."""
        if not location:
            return "settings"
        first, *rest = map(str, location)
        if first in from_file:
            return f"{'.'.join([first, *rest])} in {file}"
        return ".".join([f"DEIXIS_{first.upper()}", *rest])

    try:
        return kind(**from_file, **given)
    except ValidationError as error:
        problems = [
            f"{named(problem['loc'])}: {_message(kind, problem)}{_choice_meant(problem)}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(problems)) from error


def _message(kind: type[BaseModel], problem: ErrorDetails) -> str:
    """Return the message of a problem, with the value if it has the wrong type and is not secret."""
    message = problem["msg"].removeprefix("Value error, ").removesuffix(f" for {Path!r}")
    field = kind.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    is_secret = field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
    return message if is_secret else with_value(message, problem["input"])


def _choice_meant(problem: ErrorDetails) -> str:
    """Return the suggestion for a value that is not one of the choices; nothing for another problem."""
    choices = re.findall("'([^']+)'", problem.get("ctx", {}).get("expected", ""))
    return did_you_mean(str(problem["input"]), choices)


def _read_config(file: Path) -> Mapping[str, object]:
    """Return the keys of the configuration file.

    Raises:
        ConfigurationError: the file cannot be read or is not TOML, or it has an unknown key.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"the configuration file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # the message contains no values, which may be secret
        raise ConfigurationError(f"the configuration file {file} is not TOML: {error}") from None
    known = {**Settings.model_fields, **ClientSettings.model_fields}
    for name, value in content.items():
        if name not in known:
            raise ConfigurationError(
                f"unknown setting '{name}' in {file}; {_LIST_OF_SETTINGS}{did_you_mean(name, known)}"
            )
        if isinstance(value, bool) and known[name].annotation is not bool:  # which pydantic takes for a number
            raise ConfigurationError(f"{name} in {file}: {with_value('Input should not be a boolean', value)}")
    return content
