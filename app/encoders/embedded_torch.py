"""The embedded model in torch, for accelerators, and as the reference for the graphs of OpenVINO."""

import importlib.util
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
from app.encoders.embedded import CONTEXT_LENGTH, heads_file, read_config, tower_files
from app.encoders.open_clip import ImageTowerFactory, OpenClipEncoder, select_device
from app.encoders.torch_tower import fingerprint_of
from app.errors import ModelUnavailableError
from app.runtime.data_files import resources
from deixis.extras import needs_extra


class ImageHead(torch.nn.Module):
    """Maps pooled features of the image tower to the joint space, which has a semantic and a visual part.

    The semantic part is ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", ICLR
    2014): the mean of the text embeddings of the ``top_k`` most probable ImageNet classes, weighted by their
    probability. Deviations: the probabilities have a temperature; the embeddings are centred and partly whitened. The
    visual part preserves details that class names lose: the square roots of the features, centred and projected to the
    subspace in which the classifier's weights vary most. Neither part depends on the direction in which enlarging small
    images shifts the features, because the classifier takes most of such images for a few classes.

    Args:
        tensors: uses ``concepts`` (1000, s), ``feature_mean`` (f,), ``visual_basis`` (f, v), ``blur_direction`` (f,)
            with unit length, and ``blur_offset``, the place of sharp images on it.
        class_weight: weights of the image tower's own classifier (1000, f).
        class_bias: its bias (1000,).
        top_k: number of classes in the mean.
        inverse_temperature: factor of the logits before the softmax.
        concept_share: share of the semantic part in a cosine, in (0, 1).
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
        blur = tensors["blur_direction"].float()
        effect = class_weight.float() @ blur
        self.register_buffer("class_weight", class_weight.float() - torch.outer(effect, blur))
        self.register_buffer("class_bias", class_bias.float() + effect * tensors["blur_offset"].float())
        for name in ("concepts", "feature_mean", "visual_basis"):
            self.register_buffer(name, tensors[name].float())

    def forward(self, features: Float[torch.Tensor, "n f"]) -> Float[torch.Tensor, "n d"]:
        """Return unit rows."""
        top = linear(features, self.class_weight, self.class_bias).topk(self.top_k, dim=1)
        probabilities = (self.inverse_temperature * top.values).softmax(dim=1)
        semantic = (probabilities[:, :, None] * self.concepts[top.indices]).sum(dim=1)
        visual = (features.clamp(min=0).sqrt() - self.feature_mean) @ self.visual_basis
        return _join(semantic, visual, self.concept_share)


class TextHead(torch.nn.Module):
    """Maps sentence embeddings to the joint space.

    The semantic part is the sentence embedding, centred and partly whitened. For the visual part, the text attends to
    key words with a known appearance: names of ImageNet classes, names of their hypernyms, and everyday words, each
    with the mean of the classifier's weights of its classes. Synthesizing the appearance of an unseen class from seen
    classes by semantic similarity follows Changpinyo et al., "Synthesized Classifiers for Zero-Shot Learning", CVPR
    2016. Deviation: no base classes are trained.

    Args:
        tensors: uses ``text_mean`` (t,), ``text_map`` (t, s), ``keys`` (w, s) with unit rows, ``key_classes`` (the
            classes of all keys, concatenated), ``key_sizes`` (the number of classes of each key), ``visual_basis``
            (f, v) and ``look_centre`` (v,).
        class_weight: weights of the image tower's own classifier (1000, f).
        sharpness: factor of the cosines with the keys before the softmax.
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
        class_visual = (class_weight.float() - class_weight.float().mean(dim=0)) @ tensors["visual_basis"].float()
        sizes, classes = tensors["key_sizes"].long(), tensors["key_classes"].long()
        keys = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sums = torch.zeros(len(sizes), class_visual.shape[1]).index_add(0, keys, class_visual[classes])
        self.register_buffer("key_looks", sums / sizes[:, None])

    def forward(self, sentences: Float[torch.Tensor, "k t"]) -> Float[torch.Tensor, "k d"]:
        """Return unit rows."""
        semantic = self.semantic_part(sentences)
        return _join(semantic, self.visual_part(semantic) - self.look_centre, self.concept_share)

    def semantic_part(self, sentences: Float[torch.Tensor, "k t"]) -> Float[torch.Tensor, "k s"]:
        """Return the semantic part, with unit rows."""
        return normalize((normalize(sentences, dim=1) - self.text_mean) @ self.text_map, dim=1)

    def visual_part(self, semantic: Float[torch.Tensor, "k s"]) -> Float[torch.Tensor, "k v"]:
        """Return the visual part before it is centred."""
        return (self.sharpness * (semantic @ self.keys.T)).softmax(dim=1) @ self.key_looks


def _join(semantic: torch.Tensor, visual: torch.Tensor, concept_share: float) -> torch.Tensor:
    """Concatenate the parts so that a cosine of the result is the weighted mean of the cosines of the parts."""
    parts = [
        math.sqrt(concept_share) * normalize(semantic, dim=1),
        math.sqrt(1 - concept_share) * normalize(visual, dim=1),
    ]
    return torch.cat(parts, dim=1)


def load_embedded_with_torch(options: LoadOptions, *, folder: Path | None = None) -> OpenClipEncoder:
    """Load the embedded model into torch; this takes about two seconds.

    Args:
        options: how to load it.
        folder: folder of config.json and the heads; None uses the installed one.

    Raises:
        ModelUnavailableError: a package is missing, or a file has another checksum than config.json.
    """
    device = select_device(options.device)
    folder = folder or resources("models") / "embedded"
    config = read_config(folder)
    if importlib.util.find_spec("transformers") is None:
        raise ModelUnavailableError(needs_extra("model 'embedded' with DEIXIS_IMAGE_BACKEND=torch", "torch"))
    image_weights, text_weights = tower_files(config)
    heads = heads_file(config, folder)
    with warnings.catch_warnings():
        # Operators cannot act on deprecation warnings of third-party packages.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model, classifier = open_towers(config, image_weights, text_weights)
        tokenizer = HFTokenizer(str(text_weights.parent), context_length=CONTEXT_LENGTH)
    join_towers(model, classifier, load_file(heads), config["joint_space"])
    torch.nn.init.constant_(model.logit_scale, math.log(config["logit_scale"]))
    model = model.to(device)
    preprocessing = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])

    def load_precision(precision: str) -> open_clip.CustomTextCLIP:
        if precision != "fp32":
            msg = "the embedded model only runs in fp32, because half precision changes 2 predictions in 100"
            raise ValueError(msg)
        return model

    size_px = preprocessing.size
    towers = ImageTowerFactory(load_precision, preprocessing, size_px, device, options, config["image_fingerprint"])
    return OpenClipEncoder(
        "embedded",
        model,
        preprocessing=preprocessing,
        image=towers.build_fastest("embedded"),
        tokenizer=tokenizer,
        device=device,
        logit_scale=config["logit_scale"],
    )


def image_fingerprint(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of all that features of images depend on, before anything is computed from it.

    Args:
        config: of the model.
        tensors: of its heads.
    """
    blur = sorted(name for name in tensors if name.startswith("blur_"))
    stored = (*blur, "concepts", "feature_mean", "visual_basis")
    space = [config["joint_space"][name] for name in ("top_k", "inverse_temperature", "concept_share")]
    others = config["image_tower"]["sha256"], config["preprocess_cfg"], space
    return fingerprint_of(((name, tensors[name]) for name in stored), *others)


def open_towers(
    config: Mapping[str, Any], image_weights: Path, text_weights: Path
) -> tuple[open_clip.CustomTextCLIP, torch.nn.Linear]:
    """Return the open_clip model with loaded towers and random heads, and the image tower's classifier."""
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
    model.visual.trunk.load_state_dict(_rename_weights(state, model.visual.trunk.state_dict()))
    # The fastest memory layout for convolutions; activations get the same one.
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
    """Replace the linear projections of open_clip by the two heads."""
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


def _rename_weights(weights: Mapping[str, torch.Tensor], timm: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of timm's model, which has the same layers in the same order."""
    pairs = list(zip(weights.items(), timm.items(), strict=True))
    for (name, tensor), (timm_name, timm_tensor) in pairs:
        if tensor.shape != timm_tensor.shape or name.split(".")[-1] != timm_name.split(".")[-1]:
            raise ModelUnavailableError(
                f"model 'embedded': {name} of the weights does not match {timm_name} of the installed timm; install"
                " the versions of constraints.txt"
            )
    return {timm_name: tensor for (_, tensor), (timm_name, _) in pairs}
