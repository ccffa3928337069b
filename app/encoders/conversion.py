"""Converts the towers and the tokenizer of a model of open_clip, so that it is served without torch.

OpenVINO runs the towers, and the tokenizers of Hugging Face split the texts.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.processors import TemplateProcessing

from app.encoders.openvino_tower import import_openvino, reads_bytes
from app.encoders.preprocessing import Preprocessing
from app.encoders.tokenizing import TokenizerOptions

_CACHED_WORDS = 10_000
_CLEANINGS = ("whitespace", "lower", "canonicalize")
# As in open_clip's tokenizer, without the special tokens, which the tokenizer finds itself.
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class NotConvertibleError(Exception):
    """A part of the model has no equivalent without torch."""


def convert_image_tower(model: Any, *, mean: Sequence[float], std: Sequence[float], size_px: int) -> Any:
    """Return OpenVINO's model from uint8 images (n, h, w, 3) to features (n, d), not normalised.

    Args:
        model: of open_clip, in single precision on the CPU.
        mean: of each channel, in [0, 1].
        std: of each channel.
        size_px: side of an image.

    Raises:
        ImportError: OpenVINO is not installed.
        Exception: OpenVINO cannot convert the tower; it raises errors of any type.
    """
    if type(model) not in {open_clip.CLIP, open_clip.CustomTextCLIP}:
        raise NotConvertibleError(f"the image tower of a {type(model).__name__} cannot be converted")
    ov = import_openvino()
    example = torch.zeros(2, 3, size_px, size_px)
    return reads_bytes(_convert(ov, model.visual, example, [-1, 3, size_px, size_px]), mean, std)


def convert_text_tower(model: Any, context_length: int) -> Any:
    """Return OpenVINO's model from int64 token ids (k, length) to features (k, d), not normalised.

    The length is the context length, or any if the tower masks padding.

    Raises:
        ImportError: OpenVINO is not installed.
        Exception: OpenVINO cannot convert the tower; it raises errors of any type.
    """
    ov = import_openvino()
    example = torch.ones((2, context_length), dtype=torch.int64)
    length = -1 if masked_token(model) is not None else context_length
    return _convert(ov, _TextTower(model), example, ([-1, length], ov.Type.i64))


def masked_token(model: Any) -> int | None:
    """Return the token of padding that the text tower masks; None if it masks nothing."""
    text_tower = getattr(model, "text", None)
    return int(text_tower.config.pad_token_id) if isinstance(text_tower, HFTextEncoder) else None


def convert_preprocessing(preprocessing: open_clip.transform.PreprocessCfg) -> Preprocessing:
    """Return the preprocessing without torchvision.

    Raises:
        NotConvertibleError: it does something else than resizing and cropping to a square.
    """
    size, resize, how = preprocessing.size, preprocessing.resize_mode, preprocessing.interpolation
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1 or resize not in {"shortest", "squash"} or how not in {"bicubic", "bilinear"}:
        raise NotConvertibleError(f"its preprocessing ({size} px, {resize}, {how}) needs torchvision")
    return Preprocessing(
        size_px=sides.pop(),
        resize=resize,
        interpolation=how,
        mean=tuple(preprocessing.mean),
        std=tuple(preprocessing.std),
    )


def convert_tokenizer(tokenizer: SimpleTokenizer | HFTokenizer, model: Any) -> tuple[Tokenizer, TokenizerOptions]:
    """Return a tokenizer with the same tokens, without open_clip and transformers.

    The tokens of CLIP's tokenizer differ for U+0345 and for some code points that Unicode has not assigned.

    Raises:
        NotConvertibleError: the tokenizer has no equivalent.
    """
    clean = next((name for name in _CLEANINGS if get_clean_fn(name) is tokenizer.clean_fn), None)
    if clean is None:
        raise NotConvertibleError("its tokenizer cleans texts in a way of its own")
    zeroed = None
    if isinstance(tokenizer, SimpleTokenizer):
        fast = _fast_tokenizer(tokenizer)
    else:
        fast = _backend(tokenizer)
        if tokenizer.strip_sep_token:
            zeroed = int(tokenizer.tokenizer.sep_token_id)
    options = TokenizerOptions(
        clean=clean, context_length=tokenizer.context_length, pad_id=masked_token(model), zeroed_id=zeroed
    )
    return fast, options


def word_pieces(tokenizer: SimpleTokenizer) -> BPE:
    """Return the vocabulary of CLIP's tokenizer as one that splits words in linear time and caches a limited number."""
    return BPE(
        vocab=tokenizer.encoder,
        merges=list(tokenizer.bpe_ranks),
        end_of_word_suffix="</w>",
        cache_capacity=_CACHED_WORDS,
    )


def _fast_tokenizer(tokenizer: SimpleTokenizer) -> Tokenizer:
    if tokenizer.reduction_fn is not None:
        raise NotConvertibleError("its tokenizer drops random tokens")
    fast = Tokenizer(word_pieces(tokenizer))
    special = [text for text, token in tokenizer.encoder.items() if token in set(tokenizer.all_special_ids)]
    fast.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    fast.pre_tokenizer = Steps(
        [
            Split(Regex(_WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = special[:2]
    fast.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)]
    )
    fast.enable_truncation(tokenizer.context_length)
    fast.enable_padding(length=tokenizer.context_length, pad_id=0, pad_token="!")  # noqa: S106 - no password
    return fast


def _backend(tokenizer: HFTokenizer) -> Tokenizer:
    backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    if tokenizer.tokenizer_mode or not isinstance(backend, Tokenizer):
        raise NotConvertibleError(f"its tokenizer ({type(tokenizer.tokenizer).__name__}) needs transformers")
    tokenizer(["a photo"])  # sets the truncation and the padding
    return Tokenizer.from_str(backend.to_str())


def _convert(ov: Any, module: torch.nn.Module, example: torch.Tensor, shape: Any) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecation warnings of third-party packages, and warnings about sizes that are constant here.
        warnings.simplefilter("ignore")
        return ov.convert_model(module.eval(), example_input=example, input=[shape])


class _TextTower(torch.nn.Module):
    """The text tower of a model, wherever its parts are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.encode_text(tokens)
        return features.float()
