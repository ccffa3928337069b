"""Finds the files of a model of open_clip, and refuses configurations that are more than data.

open_clip and transformers pass parts of a configuration on as arguments, among them ``trust_remote_code``, which runs
Python from the folder or repository. So only the listed arguments are accepted, and names must be names.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer

from app.encoders._base import LoadOptions
from app.encoders.hub import HubFiles
from app.encoders.model_names import model_source
from app.errors import ModelUnavailableError, did_you_mean

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Files that tokenizers of transformers read; a repository has some of them.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_TOKENIZER_ARGUMENTS = {"additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token"}
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?")
_ARCHITECTURE = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine.

    Args:
        name: what open_clip loads: the name of an architecture, or ``local-dir:`` and a folder.
        weights: file of the weights; None lets open_clip find it in the folder.
        text_config: configuration of the text tower.
        arguments: other arguments of ``open_clip.create_model``.
        tokenizer_dir: folder of the tokenizer of transformers; None for open_clip's own.
    """

    name: str
    weights: Path | None
    text_config: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_dir: Path | None = None

    def load_tokenizer(self) -> Any:
        """Return a function from texts to token ids (k, context_length)."""
        if self.tokenizer_dir is None:
            return open_clip.get_tokenizer(self.name)
        return HFTokenizer(
            str(self.tokenizer_dir),
            context_length=self.text_config.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=self.text_config.get("tokenizer_mode"),
            **self.text_config.get("tokenizer_kwargs", {}),
        )


def find_files(spec: str, options: LoadOptions) -> ModelFiles:
    """Return the files of a model, and download those that are not cached.

    Raises:
        ModelUnavailableError: the model or a file does not exist, cannot be downloaded, is damaged, or would run code.
    """
    source, location, tag = model_source(spec)
    hub = HubFiles(spec, options.weights_dir, options.data_dir)
    if source == "local-dir":
        return _in_folder(spec, Path(location), hub)
    if source == "hf-hub":
        return _in_repository(spec, location, hub)
    return _published(spec, location, tag, hub)


def _in_folder(spec: str, folder: Path, hub: HubFiles) -> ModelFiles:
    if not (folder / _CONFIG).is_file() and (folder / "config.json").is_file():
        raise _transformers_layout(spec, f"the folder {folder}")
    config = _read_config(spec, folder / _CONFIG, local_folder_must_contain(folder))
    tokenizer = folder if config["text_cfg"].get("hf_tokenizer_name") else None
    return ModelFiles(
        f"local-dir:{folder}", None, config["text_cfg"], _text_arguments(config["text_cfg"], hub), tokenizer
    )


def _in_repository(spec: str, repository: str, hub: HubFiles) -> ModelFiles:
    file = hub.fetch(repository, _CONFIG)
    if file is None:
        if hub.fetch(repository, "config.json") is not None:
            raise _transformers_layout(spec, f"the repository {repository}")
        raise hub.missing(repository, _CONFIG)
    config = _read_config(spec, file, f"choose another repository than {repository}, or report it to its authors")
    weights = _first(hub, repository, _WEIGHTS)
    if weights is None:
        raise hub.missing(repository, f"weights ({' or '.join(_WEIGHTS)})")
    text = config["text_cfg"]
    return ModelFiles(f"local-dir:{weights.parent}", None, text, _text_arguments(text, hub), _tokenizer_dir(text, hub))


def _published(spec: str, architecture: str, tag: str, hub: HubFiles) -> ModelFiles:
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = [known for known in open_clip.list_models() if known.lower().startswith(architecture[:5].lower())]
        raise ModelUnavailableError(
            f"model '{spec}': open_clip has no architecture '{architecture}'; similar: {', '.join(close) or 'none'};"
            f" `deixis models list` shows recommended models{did_you_mean(architecture, open_clip.list_models())}"
        )
    if not open_clip.pretrained.is_pretrained_cfg(architecture, tag):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ModelUnavailableError(
            f"model '{spec}': open_clip has no weights '{tag}' for {architecture}; known: {', '.join(tags) or 'none'}"
            f"{did_you_mean(tag, tags)}"
        )
    published = open_clip.pretrained.get_pretrained_cfg(architecture, tag)
    repository, _, name = published["hf_hub"].rpartition("/")
    safe = re.sub(r"\.(bin|pth?)$", ".safetensors", name)
    names = tuple(dict.fromkeys((safe, name))) if name else _WEIGHTS
    weights = _first(hub, repository, names)
    if weights is None:
        raise hub.missing(repository, f"weights ({' or '.join(names)})")
    text = config["text_cfg"]
    arguments = {
        **_text_arguments(text, hub),
        # Without it, weights trained with QuickGELU silently lose several points of accuracy.
        "force_quick_gelu": bool(published.get("quick_gelu", False)),
        "force_preprocess_cfg": {key: value for key, value in published.items() if key != "size"},
    }
    return ModelFiles(architecture, weights, text, arguments, _tokenizer_dir(text, hub))


def _first(hub: HubFiles, repository: str, names: tuple[str, ...]) -> Path | None:
    return next((file for name in names if (file := hub.fetch(repository, name)) is not None), None)


def _tokenizer_dir(text: Mapping[str, Any], hub: HubFiles) -> Path | None:
    """Return the folder of the files of a tokenizer of transformers."""
    repository = text.get("hf_tokenizer_name")
    if not repository:
        return None
    files = [file for name in _TOKENIZER_FILES if (file := hub.fetch(repository, name)) is not None]
    if not files:
        raise hub.missing(repository, "tokenizer")
    return files[0].parent


def _text_arguments(text: Mapping[str, Any], hub: HubFiles) -> dict[str, Any]:
    """Return a text tower of transformers as arguments that name its configuration in the cache."""
    repository = text.get("hf_model_name")
    if not repository:
        return {}
    file = hub.fetch(repository, "config.json")
    if file is None:
        raise hub.missing(repository, "config.json")
    return {"text_cfg": {**text, "hf_model_name": str(file.parent), "hf_model_pretrained": False}}


def _read_config(spec: str, file: Path, way_out: str) -> dict[str, Any]:
    """Return the ``model_cfg`` of a configuration file.

    Raises:
        ModelUnavailableError: it is not such a file, or would run code or read other files.
    """
    try:
        config = json.loads(file.read_bytes())["model_cfg"]
        towers = [config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg", {})]
        complete = all(isinstance(tower, dict) for tower in towers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnavailableError(
            f"model '{spec}' cannot be loaded: {file} is no configuration of OpenCLIP"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {way_out}"
        ) from error
    if not complete:
        raise ModelUnavailableError(
            f"model '{spec}' cannot be loaded: {file} is no configuration of OpenCLIP (a tower is no object); {way_out}"
        )
    for tower in towers:
        _refuse_code(spec, file, tower)
    return dict(config)


def _refuse_code(spec: str, file: Path, tower: Mapping[str, Any]) -> None:
    arguments = tower.get("tokenizer_kwargs") or {}
    unknown = sorted(set(arguments) - _TOKENIZER_ARGUMENTS) if isinstance(arguments, dict) else [repr(arguments)[:100]]
    if unknown:
        raise ModelUnavailableError(
            f"model '{spec}' is refused: {file} sets {', '.join(unknown)} in tokenizer_kwargs, which can run code of"
            f" the model or read other files; Deixis accepts {', '.join(sorted(_TOKENIZER_ARGUMENTS))}: remove the"
            " others, or choose another model"
        )
    for key, pattern in (
        ("hf_model_name", _REPOSITORY),
        ("hf_tokenizer_name", _REPOSITORY),
        ("timm_model_name", _ARCHITECTURE),
    ):
        name = tower.get(key) or ""
        if not (isinstance(name, str) and (not name or pattern.fullmatch(name))):
            raise ModelUnavailableError(
                f"model '{spec}' is refused: {file} sets {key} to {name!r:.100}, which is not a plain name; Deixis"
                " loads no code and no files from other places: choose another model"
            )


@contextmanager
def remote_code_refused(spec: str) -> Iterator[None]:
    """Refuse models and tokenizers of transformers that need Python code of their repository.

    By default, transformers asks on the terminal whether to run it.

    Raises:
        ModelUnavailableError: the model needs such code.
    """
    try:
        from transformers import dynamic_module_utils  # noqa: PLC0415 - an optional dependency
    except ImportError:
        yield
        return
    seconds, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelUnavailableError(
                f"model '{spec}' is refused: it needs Python code of its own folder or repository, which Deixis does"
                " not run; choose another model"
            ) from error
        raise
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def local_folder_must_contain(folder: Path) -> str:
    """Return the way out for a folder that cannot be loaded."""
    return f"{folder} must contain {_CONFIG}, {_WEIGHTS[0]} and the tokenizer's files"


def _transformers_layout(spec: str, where: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"model '{spec}' cannot be loaded: {where} has the layout of transformers (config.json), and Deixis loads that"
        f" of OpenCLIP ({_CONFIG}); choose the OpenCLIP version of the model: `deixis models list` shows those of CLIP"
        " and SigLIP"
    )
