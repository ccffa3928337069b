"""Any model that open_clip can build, behind the encoder protocol."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from PIL import Image

from app.cores import usable_cores
from app.encoders._base import ImagePath, model_source
from app.encoders.torch_tower import TorchImageTower, use_threads
from app.errors import ModelUnavailableError
from app.task import ImageFeatures, Pixels, TextFeatures

_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class OpenClipEncoder:
    """An open_clip model that is loaded, in evaluation mode and on its device.

    Args:
        name: the name that callers use.
        model: an open_clip model with ``visual``, ``encode_image`` and ``encode_text``.
        preprocessing: size, resizing, mean and standard deviation of the images that the model was trained on.
        tokenizer: texts to token ids (k, context_length).
        logit_scale: already exponentiated; None takes the model's own.
        image_threads: for the arithmetic of the image tower on a CPU; None takes one per core.
        dtype: of the image tower's weights.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        preprocessing: open_clip.transform.PreprocessCfg,
        tokenizer: Callable[[list[str]], torch.Tensor],
        device: str,
        dtype: torch.dtype = torch.float32,
        logit_scale: float | None = None,
        image_threads: int | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self._model = model.eval()
        self._geometry = _geometry(preprocessing)
        self._image_tower = TorchImageTower(
            model.encode_image,
            mean=preprocessing.mean,
            std=preprocessing.std,
            device=device,
            dtype=dtype,
            threads=image_threads,
        )
        self.image_path = ImagePath(
            "torch", device, next(name for name, each in _PRECISIONS.items() if each is dtype), 4
        )
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

    def transform(self, image: Image.Image) -> Pixels:
        """Resize and crop, as the model's own preprocessing configuration says."""
        for step in self._geometry:
            image = step(image)
        return np.array(image)

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


def _unit_rows(features: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    return rows


def _geometry(preprocessing: open_clip.transform.PreprocessCfg) -> tuple[Callable[[Image.Image], Image.Image], ...]:
    """Return open_clip's own steps from picture to picture; normalising is left to the image tower."""
    steps = open_clip.transform.image_transform_v2(preprocessing, is_train=False).transforms
    *geometry, to_tensor, normalize = steps
    assert "Tensor" in type(to_tensor).__name__, steps
    assert type(normalize).__name__ == "Normalize", steps
    return tuple(geometry)


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


def load_open_clip(spec: str, *, device: str, precision: str, cache_dir: Path | None) -> OpenClipEncoder:
    """Load ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``, downloading weights that are not cached.

    Args:
        spec: the model's name, by which callers will know it.
        device: as returned by ``pick_device``.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``auto`` for fp16 on CUDA and fp32 elsewhere.
        cache_dir: where hub files are kept; None leaves it to the hub library (``HF_HOME``).

    Raises:
        ModelUnavailableError: no such model, no weights, no network, or weights that do not fit the architecture.
    """
    if precision == "auto":
        precision = "fp16" if device.startswith("cuda") else "fp32"
    architecture, tag = _checked_source(spec)
    cache = None if cache_dir is None else str(cache_dir)
    pretrained_config = open_clip.pretrained.get_pretrained_cfg(architecture, tag) if tag else {}
    try:
        with warnings.catch_warnings():
            # Third-party notices about their own future are not the operator's to act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            model = open_clip.create_model(
                architecture,
                pretrained=tag or None,
                precision=precision,
                device=device,
                cache_dir=cache,
                # Weights trained with QuickGELU lose several points of accuracy under plain GELU, silently.
                force_quick_gelu=bool(pretrained_config.get("quick_gelu", False)),
                # Without it open_clip serves random weights when it finds none.
                require_pretrained=True,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(architecture, cache_dir=cache)
    except Exception as error:
        raise ModelUnavailableError(_why_not(spec, error)) from error
    return OpenClipEncoder(
        spec,
        model,
        preprocessing=open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg),
        tokenizer=tokenizer,
        device=device,
        dtype=_PRECISIONS[precision],
    )


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
