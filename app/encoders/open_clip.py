"""Any model that open_clip can build, behind the encoder protocol."""

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
from PIL import Image
from torchvision.transforms import CenterCrop, Resize, v2

from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Tuning, model_source
from app.encoders.openvino_tower import load_openvino_tower
from app.encoders.torch_tower import TorchImageTower, use_threads
from app.encoders.tuning import fingerprint_of, model_precision, select
from app.errors import ModelUnavailableError
from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels, TextFeatures

_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class OpenClipEncoder:
    """An open_clip model that is loaded, in evaluation mode and on its device.

    Args:
        name: the name that callers use.
        model: an open_clip model with ``visual`` and ``encode_text``.
        preprocessing: size, resizing, mean and standard deviation of the images that the model was trained on.
        image_tower: runs its ``encode_image``.
        image_path: how that does it.
        tokenizer: texts to token ids (k, context_length).
        logit_scale: already exponentiated; None takes the model's own.
        tuning: what was measured of the ways to run the image tower.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        preprocessing: open_clip.transform.PreprocessCfg,
        image_tower: ImageTower,
        image_path: ImagePath,
        tokenizer: Callable[[list[str]], torch.Tensor],
        device: str,
        logit_scale: float | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self._model = model.eval()
        self._preprocessing = preprocessing
        # As the model's own preprocessing configuration says.
        self.transform = _geometry(preprocessing)
        self._image_tower = image_tower
        self.image_path = image_path
        self.tuning = tuning
        self._tokenizer = tokenizer
        self._text_threads = usable_cores()
        self.image_size_px = _square(model.visual.image_size)
        self.logit_scale = model.logit_scale.detach().exp().item() if logit_scale is None else logit_scale
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else bias.detach().item()
        if not (0 < self.logit_scale < math.inf and math.isfinite(self.logit_bias or 0)):
            raise ModelUnavailableError(
                f"model '{name}' is not usable: its logit_scale is {self.logit_scale} and its logit_bias"
                f" {self.logit_bias}; the scale must be above 0 and both finite; check its weights"
            )
        # One forward pass through both towers: a tokenizer that does not fit the text tower, or weights that
        # overflow in this precision, are found at start and not by the first caller.
        black = self.transform(Image.new("RGB", (self.image_size_px, self.image_size_px)))
        try:
            image, text = self.encode_images([black]), self.encode_texts(["a photo"])
        except Exception as error:
            raise ModelUnavailableError(
                f"model '{name}' is not usable: a trial ended in {type(error).__name__}: {_one_line(error)}; check that"
                " its tokenizer, its configuration and its weights belong together, and try DEIXIS_PRECISION=fp32"
            ) from error
        if image.shape != text.shape or not (np.isfinite(image).all() and np.isfinite(text).all()):
            raise ModelUnavailableError(
                f"model '{name}' is not usable: a trial gave image features {image.shape} and text features"
                f" {text.shape}, which must be finite and of one size; check its weights, and try DEIXIS_PRECISION=fp32"
            )
        self.embed_dim = image.shape[1]

    def begin_images(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding and return what waits for the unit rows (n, d), float32."""
        return self._image_tower.begin(pixels)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return unit rows (n, d), float32."""
        return self.begin_images(pixels)()

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32; texts beyond the tokenizer's context are truncated."""
        tokens = self._tokenizer(list(texts))
        text_tower = getattr(self._model, "text", None)
        if isinstance(text_tower, HFTextEncoder):
            # It masks padding, so that columns in which every text is padded change nothing but the time taken.
            longest = int((tokens != text_tower.config.pad_token_id).sum(dim=1).max())
            tokens = tokens[:, :longest]
        use_threads(self._text_threads)
        with torch.inference_mode():
            return _unit_rows(self._model.encode_text(tokens.to(self.device)))

    def image_fingerprint(self) -> str:
        """Return a hash of the image tower's weights in half precision, and of how pictures are brought to its size."""
        weights = (
            (name, each.half() if each.is_floating_point() else each)
            for name, each in self._model.visual.state_dict().items()
        )
        return fingerprint_of(weights, self._preprocessing)

    def text_fingerprint(self) -> str:
        """Return a hash of the text tower's weights, of what it makes of a sentence, and of the packages that run it.

        Everything but the image tower counts, since open_clip keeps text towers in several places. The sentence stands
        for the tokenizer, which has no weights.
        """
        weights = ((name, each) for name, each in self._model.state_dict().items() if not name.startswith("visual."))
        tried = self.encode_texts(["Zebra, which has black-and-white stripes; 3 of them."])
        packages = [version(each) for each in ("torch", "open_clip_torch")]
        return fingerprint_of(weights, tried.round(3).tolist(), self.device, packages)


def _unit_rows(features: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return rows


def _geometry(preprocessing: open_clip.transform.PreprocessCfg) -> Callable[[Image.Image], Pixels]:
    """Return open_clip's own way from a picture to the model's size; normalising is left to the image tower."""
    steps = open_clip.transform.image_transform_v2(preprocessing, is_train=False).transforms
    *geometry, to_tensor, normalize = steps
    assert "Tensor" in type(to_tensor).__name__, steps
    assert type(normalize).__name__ == "Normalize", steps
    resize, *others = geometry
    crops = [step for step in others if isinstance(step, CenterCrop)]
    if isinstance(resize, Resize) and len(crops) <= 1 and {type(step) for step in others} <= {CenterCrop, _TO_RGB}:
        return partial(_resize_and_crop, resize, crops[0] if crops else None)

    def with_pillow(image: Image.Image) -> Pixels:
        for step in geometry:
            image = step(image)
        return np.array(image)

    return with_pillow


_TO_RGB = open_clip.transform.MaybeConvertMode


def _resize_and_crop(resize: Resize, crop: CenterCrop | None, image: Image.Image) -> Pixels:
    """Do what the two steps do, to a level of 255, by torchvision's kernels for bytes, five times as fast as Pillow."""
    use_threads(1)  # one picture is too little for more, and there are others to decode
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    picture = v2.functional.resize(picture, resize.size, resize.interpolation, resize.max_size, antialias=True)
    if crop is not None:
        picture = v2.functional.center_crop(picture, list(crop.size))
    pixels: Pixels = picture.permute(1, 2, 0).contiguous().numpy()
    return pixels


def _square(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else max(size)


def pick_device(setting: str) -> str:
    """Return ``setting``, or for ``auto`` the best device here: cuda, mps, else cpu.

    Raises:
        ModelUnavailableError: a device was named that torch cannot use here.
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
            f"device '{setting}' cannot be used here: {reason}; set DEIXIS_DEVICE=auto to take what there is"
        ) from error
    return setting


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates, from open_clip's own list, with ``{}`` for the class name."""
    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def load_open_clip(spec: str, options: LoadOptions) -> OpenClipEncoder:
    """Load ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``, downloading weights that are not cached.

    On a CPU the text tower stays in single precision, whatever the image tower's: class embeddings are cached.

    Args:
        spec: the model's name, by which callers will know it.
        options: the settings.

    Raises:
        ModelUnavailableError: no such model, no weights, no network, or weights that do not fit the architecture.
    """
    device = pick_device(options.device)
    architecture, tag = _checked_source(spec)
    precision = model_precision(device, options)
    model = _create(spec, architecture, tag, precision, device, options.weights_dir)
    try:
        cache = None if options.weights_dir is None else str(options.weights_dir)
        tokenizer = open_clip.get_tokenizer(architecture, cache_dir=cache)
    except Exception as error:
        raise ModelUnavailableError(_why_not(spec, error)) from error
    preprocessing = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)

    def in_precision(wanted: str) -> Any:
        if wanted == precision:
            return model
        return _create(spec, architecture, tag, wanted, device, options.weights_dir)

    towers = ImageTowers(in_precision, preprocessing, _square(model.visual.image_size), device, options)
    tower, path, tuning = towers.best(spec)
    if path.backend != "torch" or path.precision != precision:
        model.visual = _size_of(model.visual)  # whose weights nobody needs now
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


def _create(
    spec: str, architecture: str, tag: str, precision: str, device: str, weights_dir: Path | None
) -> open_clip.CLIP:
    pretrained_config = open_clip.pretrained.get_pretrained_cfg(architecture, tag) if tag else {}
    try:
        with warnings.catch_warnings():
            # Third-party notices about their own future are not the operator's to act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return open_clip.create_model(
                architecture,
                pretrained=tag or None,
                precision=precision,
                device=device,
                cache_dir=None if weights_dir is None else str(weights_dir),
                # Weights trained with QuickGELU lose several points of accuracy under plain GELU, silently.
                force_quick_gelu=bool(pretrained_config.get("quick_gelu", False)),
                # Without it open_clip serves random weights when it finds none.
                require_pretrained=True,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=True,
            ).eval()
    except Exception as error:
        raise ModelUnavailableError(_why_not(spec, error)) from error


class ImageTowers:
    """The ways to run one model's image tower.

    Args:
        in_precision: returns the model with its image tower in a precision.
        preprocessing: mean and standard deviation.
        size_px: side of an image.
        device: as returned by ``pick_device``.
        options: the settings.
    """

    def __init__(
        self,
        in_precision: Callable[[str], Any],
        preprocessing: open_clip.transform.PreprocessCfg,
        size_px: int,
        device: str,
        options: LoadOptions,
    ) -> None:
        self._in_precision = in_precision
        self._mean, self._std = tuple(preprocessing.mean), tuple(preprocessing.std)
        self._size_px = size_px
        self._device = device
        self._options = options
        self._usual_precision = model_precision(device, options)
        self._fingerprint = ""

    def best(self, name: str) -> tuple[ImageTower, ImagePath, Tuning | None]:
        """Return the tower that is best on this machine, how it is run, and what was measured."""
        if self._options.data_dir is not None:
            weights = self._in_precision(self._usual_precision).visual.state_dict()
            self._fingerprint = fingerprint_of(weights.items(), self._mean, self._std, self._size_px)
        return select(
            name,
            self._device,
            build=self.build,
            size_px=self._size_px,
            fingerprint=self._fingerprint,
            options=self._options,
        )

    def build(self, way: Candidate) -> ImageTower:
        """Return the tower run in this way."""
        if way.backend == "openvino":
            folder = self._options.data_dir
            return load_openvino_tower(
                _image_tower_of(self._in_precision("fp32")),
                mean=self._mean,
                std=self._std,
                size_px=self._size_px,
                precision=way.precision,
                fingerprint=self._fingerprint,
                folder=None if folder is None else folder / "openvino",
            )
        encode = self._in_precision(way.precision).encode_image
        return TorchImageTower(
            torch.compile(encode, dynamic=True) if self._options.torch_compile else encode,
            mean=self._mean,
            std=self._std,
            device=self._device,
            dtype=_PRECISIONS[way.precision],
            threads=way.threads or None,
        )


def _image_tower_of(model: Any) -> torch.nn.Module:
    """Return the module that ``encode_image`` is, by itself: a converter must not meet the text tower."""
    if type(model) not in {open_clip.CLIP, open_clip.CustomTextCLIP}:
        msg = f"the image tower of a {type(model).__name__} is not converted"
        raise TypeError(msg)
    tower: torch.nn.Module = model.visual
    return tower


class _SizeOnly(torch.nn.Module):
    """Stands where an image tower was whose weights are no longer needed."""

    def __init__(self, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size


def _size_of(tower: Any) -> _SizeOnly:
    return _SizeOnly(tower.image_size)


def _checked_source(spec: str) -> tuple[str, str]:
    """Return open_clip's model name and tag (empty for hub and folder), or raise before anything is downloaded."""
    source, architecture, tag = model_source(spec)
    if source == "local-dir":
        if not Path(architecture).is_dir():
            raise ModelUnavailableError(f"model '{spec}': there is no folder {architecture}")
        return f"local-dir:{architecture}", ""
    if source == "hf-hub":
        return f"hf-hub:{architecture}", ""
    if open_clip.get_model_config(architecture) is None:
        close = [known for known in open_clip.list_models() if known.lower().startswith(architecture[:5].lower())]
        raise ModelUnavailableError(
            f"model '{spec}': open_clip knows no architecture '{architecture}'; near it: {', '.join(close) or 'none'};"
            " `deixis models list` shows models that are known to be good"
        )
    if not open_clip.pretrained.is_pretrained_cfg(architecture, tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ModelUnavailableError(
            f"model '{spec}': no weights are published as '{tag}' for {architecture}; known: {tags}"
        )
    return architecture, tag


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _why_not(spec: str, error: Exception) -> str:
    source, where, _ = model_source(spec)
    reason = _one_line(error) or type(error).__name__
    if source == "local-dir":
        way_out = f"{where} must hold open_clip_config.json, open_clip_model.safetensors and its tokenizer's files"
    else:
        way_out = (
            f"with a network, `deixis models download {spec}` fetches the weights; without one, copy the hub cache of a"
            " machine that has them (HF_HOME or DEIXIS_MODEL_CACHE_DIR) and set HF_HUB_OFFLINE=1;"
            " DEIXIS_MODELS=embedded needs no download"
        )
    return f"model '{spec}' cannot be loaded: {reason}; {way_out}"
