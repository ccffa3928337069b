"""Encoders for the models of open_clip."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from tokenizers.models import BPE
from torchvision.transforms import CenterCrop, Resize, v2

from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Tuning
from app.encoders.model_files import ModelFiles, find_files, local_folder_must_contain, remote_code_refused
from app.encoders.model_names import model_source
from app.encoders.openvino_tower import load_openvino_tower
from app.encoders.torch_tower import TorchImageTower, use_threads
from app.encoders.tuning import fingerprint_of, model_precision, select_tower
from app.errors import ModelUnavailableError
from app.names.text import nfc
from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels, TextFeatures

_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A token has about four characters in English and fewer in other languages; no text has so many on average.
_MAX_CHARS_PER_TOKEN = 32
_CACHED_WORDS = 10_000


class OpenClipEncoder:
    """A loaded open_clip model.

    Args:
        name: the name in the settings and in requests.
        model: an open_clip model with ``visual`` and ``encode_text``.
        preprocessing: image size, interpolation, mean and standard deviation that the model was trained with.
        image_tower: runs the model's ``encode_image``.
        image_path: how the image tower runs.
        tokenizer: maps texts to token ids (k, context_length), in a time linear in their length.
        device: of the model's weights.
        logit_scale: already exponentiated; None uses the model's own.
        tuning: the measurements that ``image_path`` was selected from.

    Raises:
        ModelUnavailableError: one forward pass of each tower fails or returns invalid features.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        preprocessing: open_clip.transform.PreprocessCfg,
        image_tower: ImageTower,
        image_path: ImagePath,
        tokenizer: SimpleTokenizer | HFTokenizer,
        device: str,
        logit_scale: float | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self._model = model.eval()
        self._preprocessing = preprocessing
        self.transform = _image_transform(preprocessing)
        self._image_tower = image_tower
        self.image_path = image_path
        self.tuning = tuning
        self._tokenizer = tokenizer
        self._max_text_chars = _MAX_CHARS_PER_TOKEN * tokenizer.context_length
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
            image, text = self.encode_images([black]), self.encode_texts(["a photo"])
        except Exception as error:
            raise ModelUnavailableError(
                f"model '{name}' cannot be used: a test ended with {type(error).__name__}: {_one_line(error)}; check"
                " that its tokenizer, configuration and weights belong together, and try DEIXIS_PRECISION=fp32"
            ) from error
        if image.shape != text.shape or not (np.isfinite(image).all() and np.isfinite(text).all()):
            raise ModelUnavailableError(
                f"model '{name}' cannot be used: a test returned image features {image.shape} and text features"
                f" {text.shape}; they must be finite and have the same size; check its weights, and try"
                " DEIXIS_PRECISION=fp32"
            )
        self.embed_dim = image.shape[1]

    def begin_images(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding and return a function that waits for the unit rows (n, d), float32."""
        return self._image_tower.begin(pixels)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return unit rows (n, d), float32."""
        return self.begin_images(pixels)()

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32; texts beyond the tokenizer's context are truncated."""
        tokens = self._tokenizer([nfc(text[: self._max_text_chars]) for text in texts])
        text_tower = getattr(self._model, "text", None)
        if isinstance(text_tower, HFTextEncoder):
            # It masks padding, so columns that are padding in every text only cost time.
            longest = int((tokens != text_tower.config.pad_token_id).sum(dim=1).max())
            tokens = tokens[:, :longest]
        use_threads(self._text_threads)
        with torch.inference_mode():
            return _unit_rows(self._model.encode_text(tokens.to(self.device)))

    def image_fingerprint(self) -> str:
        """Return a hash of the image tower's weights in half precision and of its preprocessing."""
        weights = (
            (name, tensor.half() if tensor.is_floating_point() else tensor)
            for name, tensor in self._model.visual.state_dict().items()
        )
        return fingerprint_of(weights, self._preprocessing)

    def text_fingerprint(self) -> str:
        """Return a hash of the text tower's weights, of the features of a sentence, and of the package versions.

        All weights outside the image tower count, since open_clip has text towers in several places. The sentence
        represents the tokenizer, which has no weights.
        """
        weights = ((name, each) for name, each in self._model.state_dict().items() if not name.startswith("visual."))
        sample = self.encode_texts(["Zebra, which has black-and-white stripes; 3 of them."])
        packages = [version(package) for package in ("torch", "open_clip_torch")]
        return fingerprint_of(weights, sample.round(3).tolist(), self.device, packages)


def _bound_word_cost(tokenizer: SimpleTokenizer | HFTokenizer) -> None:
    """Let CLIP's tokenizer split words in linear time and cache a limited number of them; the tokens stay the same.

    open_clip's own function takes time that is quadratic in the length of a word, and caches every word.
    """
    if not isinstance(tokenizer, SimpleTokenizer):
        return  # those of Hugging Face do so already
    words = BPE(
        vocab=tokenizer.encoder,
        merges=list(tokenizer.bpe_ranks),
        end_of_word_suffix="</w>",
        cache_capacity=_CACHED_WORDS,
    )
    special_tokens = frozenset(tokenizer.cache)

    def split(word: str) -> str:
        return word if word in special_tokens else " ".join(token.value for token in words.tokenize(word))

    tokenizer.bpe = split


def _unit_rows(features: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return rows


def _image_transform(preprocessing: open_clip.transform.PreprocessCfg) -> Callable[[Image.Image], Pixels]:
    """Return open_clip's resizing and cropping to the model's size; the image tower normalises."""
    steps = open_clip.transform.image_transform_v2(preprocessing, is_train=False).transforms
    *resizing, to_tensor, normalize = steps
    assert "Tensor" in type(to_tensor).__name__, steps
    assert type(normalize).__name__ == "Normalize", steps
    resize, *others = resizing
    crops = [step for step in others if isinstance(step, CenterCrop)]
    if isinstance(resize, Resize) and len(crops) <= 1 and {type(step) for step in others} <= {CenterCrop, _TO_RGB}:
        return partial(_resize_and_crop, resize, crops[0] if crops else None)

    def with_pillow(image: Image.Image) -> Pixels:
        for step in resizing:
            image = step(image)
        return np.array(image)

    return with_pillow


_TO_RGB = open_clip.transform.MaybeConvertMode


def _resize_and_crop(resize: Resize, crop: CenterCrop | None, image: Image.Image) -> Pixels:
    """Resize and crop with torchvision's kernels for bytes, five times as fast as Pillow, up to a difference of 1."""
    use_threads(1)  # more threads do not speed up one image, and other images are being decoded
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    picture = v2.functional.resize(picture, resize.size, resize.interpolation, resize.max_size, antialias=True)
    if crop is not None:
        picture = v2.functional.center_crop(picture, list(crop.size))
    pixels: Pixels = picture.permute(1, 2, 0).contiguous().numpy()
    return pixels


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


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates from open_clip, with ``{}`` for the class name."""
    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


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
    tower, path, tuning = towers.build_fastest(spec)
    if path.backend != "torch" or path.precision != precision:
        model.visual = _SizeOnly(model.visual.image_size)  # releases the weights
    return OpenClipEncoder(
        spec,
        model,
        preprocessing=preprocessing,
        image_tower=tower,
        image_path=path,
        tokenizer=tokenizer,
        device=device,
        tuning=tuning,
    )


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
    """

    def __init__(
        self,
        load_precision: Callable[[str], Any],
        preprocessing: open_clip.transform.PreprocessCfg,
        size_px: int,
        device: str,
        options: LoadOptions,
    ) -> None:
        self._load_precision = load_precision
        self._mean, self._std = tuple(preprocessing.mean), tuple(preprocessing.std)
        self._size_px = size_px
        self._device = device
        self._options = options
        self._default_precision = model_precision(device, options)
        self._fingerprint = ""

    def build_fastest(self, name: str) -> tuple[ImageTower, ImagePath, Tuning | None]:
        """Return the fastest tower on this machine, how it runs, and the measurements."""
        if self._options.data_dir is not None:
            weights = self._load_precision(self._default_precision).visual.state_dict()
            self._fingerprint = fingerprint_of(weights.items(), self._mean, self._std, self._size_px)
        return select_tower(
            name,
            self._device,
            build=self.build,
            size_px=self._size_px,
            fingerprint=self._fingerprint,
            options=self._options,
        )

    def build(self, candidate: Candidate) -> ImageTower:
        """Return the tower with the options of a candidate."""
        if candidate.backend == "openvino":
            folder = self._options.data_dir
            return load_openvino_tower(
                _convertible_tower(self._load_precision("fp32")),
                mean=self._mean,
                std=self._std,
                size_px=self._size_px,
                precision=candidate.precision,
                fingerprint=self._fingerprint,
                folder=None if folder is None else folder / "openvino",
            )
        encode = self._load_precision(candidate.precision).encode_image
        return TorchImageTower(
            torch.compile(encode, dynamic=True) if self._options.torch_compile else encode,
            mean=self._mean,
            std=self._std,
            device=self._device,
            dtype=_PRECISIONS[candidate.precision],
            threads=candidate.threads or None,
        )


def _convertible_tower(model: Any) -> torch.nn.Module:
    """Return the module of ``encode_image`` without the text tower, which cannot be converted."""
    if type(model) not in {open_clip.CLIP, open_clip.CustomTextCLIP}:
        msg = f"the image tower of a {type(model).__name__} cannot be converted"
        raise TypeError(msg)
    tower: torch.nn.Module = model.visual
    return tower


class _SizeOnly(torch.nn.Module):
    """Replaces an image tower whose weights are no longer needed."""

    def __init__(self, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _load_failure(spec: str, error: Exception) -> str:
    source, where, _ = model_source(spec)
    reason = _one_line(error) or type(error).__name__
    if source == "local-dir":
        way_out = local_folder_must_contain(Path(where))
    else:
        way_out = "its configuration, weights and tokenizer must belong together; choose another model"
    return f"model '{spec}' cannot be loaded: {reason}; {way_out}"
