"""Encoders for the models of open_clip."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import structlog
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image

from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Tuning
from app.encoders.catalogue import load_catalogue
from app.encoders.conversion import (
    NotConvertibleError,
    convert_image_tower,
    convert_preprocessing,
    convert_text_tower,
    convert_tokenizer,
    masked_token,
    word_pieces,
)
from app.encoders.exported import write_export
from app.encoders.model_files import ModelFiles, find_files, local_folder_must_contain, remote_code_refused
from app.encoders.model_names import model_source
from app.encoders.openvino import ModelDescription
from app.encoders.openvino_tower import compile_image_tower, compile_text_tower
from app.encoders.tokenizing import TextTokenizer, shortened
from app.encoders.torch_tower import TorchImageTower, compiled, fingerprint_of, use_threads
from app.encoders.tuning import model_precision, select_tower
from app.errors import ModelUnavailableError, one_line
from app.runtime.cpu import usable_cores
from app.runtime.data_files import resources
from app.types import ImageFeatures, Pixels, TextFeatures

log = structlog.get_logger()

_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Texts on which an exported model must agree with the one that it was exported from.
_PROBES = ("a photo", "Zebra, which has black-and-white stripes; 3 of them.", "São Paulo's café &amp; 鳥", "a " * 500)
_MIN_TEXT_COSINE = 0.9999


@dataclass(frozen=True, slots=True)
class SelectedTower:
    """The image tower that a model runs with.

    Args:
        tower: runs the model's ``encode_image``.
        path: how it runs.
        tuning: the measurements that ``path`` was selected from.
        fingerprint: hash of the weights and of the preprocessing.
        converted: OpenVINO's model of the tower, if OpenVINO runs it.
    """

    tower: ImageTower
    path: ImagePath
    tuning: Tuning | None
    fingerprint: str
    converted: Any = None


class OpenClipEncoder:
    """A loaded open_clip model.

    Args:
        name: the name in the settings and in requests.
        model: an open_clip model with ``visual`` and ``encode_text``.
        preprocessing: image size, interpolation, mean and standard deviation that the model was trained with.
        image: the tower that runs the model's ``encode_image``.
        tokenizer: maps texts to token ids (k, context_length), in a time linear in their length.
        device: of the model's weights.
        logit_scale: already exponentiated; None uses the model's own.

    Raises:
        ModelUnavailableError: one forward pass of each tower fails or returns invalid features.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        preprocessing: open_clip.transform.PreprocessCfg,
        image: SelectedTower,
        tokenizer: SimpleTokenizer | HFTokenizer,
        device: str,
        logit_scale: float | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self._model = model.eval()
        self._preprocessing = preprocessing
        self.transform = _image_transform(preprocessing)
        self._image = image
        self.image_path = image.path
        self.tuning = image.tuning
        self._tokenizer = tokenizer
        self._masked_token = masked_token(model)
        self._text_threads = usable_cores()
        self.image_size_px = _square(model.visual.image_size)
        self.logit_scale = model.logit_scale.detach().exp().item() if logit_scale is None else logit_scale
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else bias.detach().item()
        if not (0 < self.logit_scale < math.inf and math.isfinite(self.logit_bias or 0)):
            raise ModelUnavailableError(
                f"model '{name}' cannot be used: its logit_scale is {self.logit_scale} and its logit_bias"
                f" {self.logit_bias}; both must be finite and the scale above 0; check its weights"
            )
        # One forward pass of each tower finds a wrong tokenizer, and weights that overflow in this precision, at start.
        black = self.transform(Image.new("RGB", (self.image_size_px, self.image_size_px)))
        try:
            rows, text = self.encode_images([black]), self.encode_texts(["a photo"])
        except Exception as error:
            raise ModelUnavailableError(
                f"model '{name}' cannot be used: a test ended with {type(error).__name__}: {one_line(error)}; check"
                " that its tokenizer, configuration and weights belong together, and try DEIXIS_PRECISION=fp32"
            ) from error
        if rows.shape != text.shape or not (np.isfinite(rows).all() and np.isfinite(text).all()):
            raise ModelUnavailableError(
                f"model '{name}' cannot be used: a test returned image features {rows.shape} and text features"
                f" {text.shape}; they must be finite and have the same size; check its weights, and try"
                " DEIXIS_PRECISION=fp32"
            )
        self.embed_dim = rows.shape[1]

    @property
    def image_streams(self) -> int:
        """Number of batches that are encoded at the same time."""
        return self._image.tower.streams

    def begin_images(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        """Start encoding and return a function that waits for the unit rows (n, d), float32."""
        return self._image.tower.begin(pixels, alone=alone)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return unit rows (n, d), float32."""
        return self.begin_images(pixels)()

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32; texts beyond the tokenizer's context are truncated."""
        tokens = self._tokenizer([shortened(text, self._tokenizer.context_length) for text in texts])
        if self._masked_token is not None:
            # Columns that are padding in every text only cost time.
            tokens = tokens[:, : int((tokens != self._masked_token).sum(dim=1).max())]
        use_threads(self._text_threads)
        with torch.inference_mode():
            return _unit_rows(self._model.encode_text(tokens.to(self.device)))

    def image_fingerprint(self) -> str:
        """Return a hash of the image tower's weights in half precision and of its preprocessing."""
        return self._image.fingerprint

    def text_fingerprint(self) -> str:
        """Return a hash of the text tower's weights, of the features of a sentence, and of the package versions.

        All weights outside the image tower count, since open_clip has text towers in several places. The sentence
        represents the tokenizer, which has no weights.
        """
        weights = ((name, each) for name, each in self._model.state_dict().items() if not name.startswith("visual."))
        sample = self.encode_texts(["Zebra, which has black-and-white stripes; 3 of them."])
        packages = [version(package) for package in ("torch", "open_clip_torch")]
        return fingerprint_of(weights, sample.round(3).tolist(), self.device, packages)

    def export(self, exports_dir: Path) -> Path:
        """Write what is needed to serve the model without torch, and return its folder.

        Raises:
            NotConvertibleError: a part of the model has no equivalent without torch.
            Exception: OpenVINO cannot convert the text tower, or a file cannot be written.
        """
        if self._image.converted is None:
            raise NotConvertibleError("OpenVINO does not run its image tower")
        tokenizer, options = convert_tokenizer(self._tokenizer, self._model)
        converted = convert_text_tower(self._model, self._tokenizer.context_length)
        rows = compile_text_tower(converted).encode(TextTokenizer(tokenizer, options)(_PROBES))
        cosine = float((rows * self.encode_texts(_PROBES)).sum(axis=1).min())
        if not cosine >= _MIN_TEXT_COSINE:  # also true for NaN
            raise NotConvertibleError(f"text features of OpenVINO and torch differ: cosine {cosine:.5f}")
        card = load_catalogue(resources("models")).get(self.name)
        description = ModelDescription(
            model=self.name,
            embed_dim=self.embed_dim,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            preprocessing=convert_preprocessing(self._preprocessing),
            tokenizer=options,
            image_fingerprint=self.image_fingerprint(),
            text_fingerprint=self.text_fingerprint(),
        )
        return write_export(
            exports_dir,
            description,
            image_tower=self._image.converted,
            text_tower=converted,
            tokenizer=tokenizer,
            licence=card.licence if card else None,
        )


def _bound_word_cost(tokenizer: SimpleTokenizer | HFTokenizer) -> None:
    """Let CLIP's tokenizer split words in linear time and cache a limited number of them; the tokens stay the same.

    open_clip's own function takes time that is quadratic in the length of a word, and caches every word.
    """
    if not isinstance(tokenizer, SimpleTokenizer):
        return  # those of Hugging Face do so already
    words = word_pieces(tokenizer)
    special_tokens = frozenset(tokenizer.cache)

    def split(word: str) -> str:
        return word if word in special_tokens else " ".join(token.value for token in words.tokenize(word))

    tokenizer.bpe = split


def _unit_rows(features: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return rows


def _image_transform(preprocessing: open_clip.transform.PreprocessCfg) -> Callable[[Image.Image], Pixels]:
    """Return open_clip's resizing and cropping to the model's size; the image tower normalises."""
    try:
        return convert_preprocessing(preprocessing).transform
    except NotConvertibleError:
        *steps, to_tensor, normalize = open_clip.transform.image_transform_v2(preprocessing, is_train=False).transforms
    assert "Tensor" in type(to_tensor).__name__, steps
    assert type(normalize).__name__ == "Normalize", steps

    def transform(image: Image.Image) -> Pixels:
        for step in steps:
            image = step(image)
        return np.array(image)

    return transform


def _square(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else max(size)


def select_device(setting: str) -> str:
    """Return ``setting``, or for ``auto`` the best available device: cuda, mps or cpu.

    Raises:
        ModelUnavailableError: torch cannot use this device here.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=setting)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelUnavailableError(
            f"device '{setting}' cannot be used here: {reason}; set DEIXIS_DEVICE=auto to use an available one"
        ) from error
    return setting


def load_open_clip(spec: str, options: LoadOptions) -> OpenClipEncoder:
    """Load ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``, and download weights that are not cached.

    On a CPU the text tower always runs in single precision, since class embeddings are cached.

    Args:
        spec: the model's name.
        options: how to load it.

    Raises:
        ModelUnavailableError: the model or its weights do not exist, cannot be downloaded, or do not match.
    """
    device = select_device(options.device)
    files = find_files(spec, options)
    precision = model_precision(device, options)
    model = _create(spec, files, precision, device)
    try:
        with remote_code_refused(spec):
            tokenizer = files.load_tokenizer()
        _bound_word_cost(tokenizer)
    except ModelUnavailableError:
        raise
    except Exception as error:
        raise ModelUnavailableError(_load_failure(spec, error)) from error
    preprocessing = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)

    def load_precision(other: str) -> Any:
        if other == precision:
            return model
        return _create(spec, files, other, device)

    towers = ImageTowerFactory(load_precision, preprocessing, _square(model.visual.image_size), device, options)
    image = towers.build_fastest(spec)
    if image.path.backend != "torch" or image.path.precision != precision:
        model.visual = _SizeOnly(model.visual.image_size)  # releases the weights
    return OpenClipEncoder(spec, model, preprocessing=preprocessing, image=image, tokenizer=tokenizer, device=device)


def _create(spec: str, files: ModelFiles, precision: str, device: str) -> open_clip.CLIP:
    try:
        with warnings.catch_warnings(), remote_code_refused(spec):
            # Operators cannot act on deprecation warnings of third-party packages.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return open_clip.create_model(
                files.name,
                pretrained=None if files.weights is None else str(files.weights),
                precision=precision,
                device=device,
                # Without it, open_clip uses random weights if it finds none.
                require_pretrained=True,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=True,
                **files.arguments,
            ).eval()
    except ModelUnavailableError:
        raise
    except Exception as error:
        raise ModelUnavailableError(_load_failure(spec, error)) from error


class ImageTowerFactory:
    """Builds the image tower of one model with the options of a candidate.

    Args:
        load_precision: returns the model with its image tower in a precision.
        preprocessing: mean and standard deviation.
        size_px: side of an image.
        device: as returned by ``select_device``.
        options: how to load the model.
        fingerprint: of the weights and the preprocessing, for weights that are computed when the model is loaded: their
            last bits depend on the machine. By default, a hash of the weights.
    """

    def __init__(
        self,
        load_precision: Callable[[str], Any],
        preprocessing: open_clip.transform.PreprocessCfg,
        size_px: int,
        device: str,
        options: LoadOptions,
        fingerprint: str | None = None,
    ) -> None:
        self._load_precision = load_precision
        self._preprocessing = preprocessing
        self._mean, self._std = tuple(preprocessing.mean), tuple(preprocessing.std)
        self._size_px = size_px
        self._device = device
        self._options = options
        self._fingerprint = fingerprint

    def build_fastest(self, name: str) -> SelectedTower:
        """Return the fastest tower on this machine."""
        fingerprint = self._fingerprint or self._hash_of_weights()
        tower, path, tuning = select_tower(
            name,
            self._device,
            build=self.build,
            size_px=self._size_px,
            fingerprint=fingerprint,
            options=self._options,
        )
        return SelectedTower(tower, path, tuning, fingerprint, self._converted if path.backend == "openvino" else None)

    def _hash_of_weights(self) -> str:
        weights = self._load_precision(model_precision(self._device, self._options)).visual.state_dict()
        # In half precision, so that the device of the weights does not count.
        return fingerprint_of(
            ((name, each.half() if each.is_floating_point() else each) for name, each in weights.items()),
            self._preprocessing,
        )

    def build(self, candidate: Candidate) -> ImageTower:
        """Return the tower with the options of a candidate."""
        if candidate.backend == "openvino":
            return compile_image_tower(self._converted, candidate.precision)
        encode = self._load_precision(candidate.precision).encode_image
        if self._options.torch_compile:
            log.info("compiling", precision=candidate.precision, threads=candidate.threads, expect="minutes")
            encode = compiled(encode)
        return TorchImageTower(
            encode,
            mean=self._mean,
            std=self._std,
            device=self._device,
            dtype=_PRECISIONS[candidate.precision],
            threads=candidate.threads or None,
        )

    @cached_property
    def _converted(self) -> Any:
        model = self._load_precision("fp32")
        return convert_image_tower(model, mean=self._mean, std=self._std, size_px=self._size_px)


class _SizeOnly(torch.nn.Module):
    """Replaces an image tower whose weights are no longer needed."""

    def __init__(self, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size


def _load_failure(spec: str, error: Exception) -> str:
    source, where, _ = model_source(spec)
    reason = one_line(error)
    if source == "local-dir":
        way_out = local_folder_must_contain(Path(where))
    else:
        way_out = "its configuration, weights and tokenizer must belong together; choose another model"
    return f"model '{spec}' cannot be loaded: {reason}; {way_out}"
