"""Builds heads.safetensors, the joint space of the embedded model, from names, WordNet and the weights of both towers.

    python models/embedded/build_heads.py --output models/embedded/heads.safetensors

Nothing is trained: the heads consist of means, covariances, eigendecompositions and lookups. Runs on the same machine
give the same file; a run takes about a minute on two CPU cores. The image head combines a concept head after ConSE
(Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", ICLR 2014) with projected image
features. The text head predicts the image features of words after Changpinyo et al., "Synthesized Classifiers for
Zero-Shot Learning", CVPR 2016. ``app.encoders.embedded_torch`` contains both heads; MODEL_CARD.md describes how the
constants were chosen.

Requires the extras ``embedded`` and ``torch`` and, in the folder of this file, imagenet_classes.json (class names;
lemmas, glosses and hypernyms of WordNet), everyday_words.toml, feature_mean.json, blur.json and config.json, into which
it writes the checksum. With ``--features`` it also computes feature_mean.json, blur.json and the logit scale, from
pooled image features in an .npz file with ``imagenet_samples`` (n, 1280), ``cifar100_train`` (n, 1280) and
``cifar100_label`` (n,).
"""

import argparse
import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save
from torch.nn.functional import normalize

from app.encoders.embedded import read_config, tower_files
from app.encoders.embedded_torch import ImageHead, TextHead, image_fingerprint, join_towers, open_towers
from app.runtime.checksums import sha256

FOLDER = Path(__file__).parent

WORD_SIZE, LOOK_SIZE = 192, 320
"""Dimensions of the two parts of the joint space."""

PHOTO = "a photo of a {}."
KEY_TEMPLATES = ("{}", PHOTO)
PHRASINGS = (
    *KEY_TEMPLATES,
    "a photo of the {}.",
    "a picture of {}.",
    "an image of a {}.",
    "{}, a type of thing.",
    "a bad photo of a {}.",
    "a drawing of a {}.",
    "a close-up photo of the {}.",
    "there is a {} in the scene.",
    "this is a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a product photo of a {}.",
    "a person with a {}.",
)
"""Phrasings of the same name; the directions in which they differ most are removed from the text space."""

PHRASING_DIRECTIONS = 2
WHITENING_POWER = 0.5
WHITENING_SHRINKAGE = 0.5
LOOK_CENTRING = 0.5
"""The share of the mean look of all class names that is subtracted from every look."""

MAX_CLASSES_OF_A_HYPERNYM = 400
"""Words with more classes, such as "artifact", have no typical look and are left out."""


class SentenceEncoder:
    """The text tower without a head: encodes texts as unit rows in double precision."""

    def __init__(self, model: open_clip.CustomTextCLIP, tokenizer_folder: Path) -> None:
        self._text = model.text
        self._tokenize = HFTokenizer(str(tokenizer_folder), context_length=128)

    def __call__(self, texts: Sequence[str]) -> Float[torch.Tensor, "k t"]:
        """Return one row per text; batches contain texts of similar length, to reduce padding."""
        tokens = self._tokenize(list(texts))
        lengths = (tokens != 0).sum(dim=1)
        order = lengths.argsort(stable=True)
        rows = torch.empty(len(texts), 384)
        projection, self._text.proj = self._text.proj, torch.nn.Identity()
        with torch.inference_mode():
            for batch in order.split(64):
                rows[batch] = self._text(tokens[batch, : int(lengths[batch].max())])
        self._text.proj = projection
        return normalize(rows.double(), dim=1)

    def of_names(self, names: Sequence[str], template: str) -> Float[torch.Tensor, "k t"]:
        """Return one row per name, formatted with a template."""
        return self([template.format(name) for name in names])


def words_with_classes(knowledge: dict[str, Any], everyday: dict[str, Any]) -> dict[str, set[int]]:
    """Return the words whose look can be derived from ImageNet classes, with these classes, sorted by word."""
    words: dict[str, set[int]] = defaultdict(set)
    below: dict[str, set[int]] = defaultdict(set)
    indices_of: dict[str, set[int]] = defaultdict(set)
    for index, entry in enumerate(knowledge["classes"]):
        indices_of[entry["name"]].add(index)
        for word in (entry["name"], *entry["lemmas"], *everyday["aliases"].get(str(index), ())):
            words[word.lower()].add(index)
        for synset in entry["hypernyms"]:
            below[synset].add(index)
    for synset, indices in below.items():
        if len(indices) <= MAX_CLASSES_OF_A_HYPERNYM:
            for lemma in knowledge["synsets"][synset]["lemmas"]:
                words[lemma.lower()] |= indices
    for word, names in everyday["composed"].items():
        for name in names:
            if name not in indices_of:
                raise ValueError(f"everyday_words.toml: '{word}' names '{name}', which is not a class of ImageNet")
            words[word.lower()] |= indices_of[name]
    return dict(sorted(words.items()))


def whitening(rows: Float[torch.Tensor, "n t"], size: int) -> Float[torch.Tensor, "t size"]:
    """Return the map to the leading principal axes, each scaled by its variance to the power -WHITENING_POWER / 2."""
    centred = rows - rows.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    variances = variances.clamp(min=0)
    scales = (variances + WHITENING_SHRINKAGE * variances.mean()) ** (-WHITENING_POWER / 2)
    return _signed((axes * scales).flip(dims=[1])[:, :size])


def build(
    encode: SentenceEncoder,
    class_weight: Float[torch.Tensor, "1000 f"],
    knowledge: dict[str, Any],
    everyday: dict[str, Any],
    *,
    sharpness: float,
    feature_mean: Float[torch.Tensor, " f"],
    blur: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the tensors of both heads, in half precision if this does not change a measured figure.

    Args:
        encode: the text tower.
        class_weight: weights of the image tower's classifier.
        knowledge: imagenet_classes.json.
        everyday: everyday_words.toml.
        sharpness: of the attention, as in config.json.
        feature_mean: mean of the square roots of the features.
        blur: blur.json, as from ``blur_directions``.
    """
    names = [entry["name"] for entry in knowledge["classes"]]
    photos = encode.of_names(names, PHOTO)
    text_mean = photos.mean(dim=0)

    some = names[::10]
    phrasings = torch.stack([encode.of_names(some, template).mean(dim=0) for template in PHRASINGS])
    directions = torch.linalg.svd(phrasings - phrasings.mean(dim=0)).Vh[:PHRASING_DIRECTIONS]
    without_phrasing = torch.eye(len(text_mean), dtype=torch.float64) - directions.T @ directions
    text_map = without_phrasing @ whitening(photos @ without_phrasing, WORD_SIZE)

    concepts = encode(names) + encode([f"{entry['name']}, {entry['gloss']}" for entry in knowledge["classes"]])
    for index, aliases in everyday["aliases"].items():
        concepts[int(index)] += normalize(encode(aliases).mean(dim=0), dim=0)
    concepts = normalize(concepts, dim=1)

    words = words_with_classes(knowledge, everyday)
    texts = torch.stack([encode.of_names(list(words), template) for template in KEY_TEMPLATES]).mean(dim=0)
    keys = normalize((normalize(texts, dim=1) - text_mean) @ text_map, dim=1)

    weight = class_weight.double()
    looks = weight - weight.mean(dim=0)
    roots = blur["root_direction"].double()
    looks = looks - torch.outer(looks @ roots, roots)
    basis = _signed(torch.linalg.svd(looks, full_matrices=False).Vh[:LOOK_SIZE].T)
    tensors = {
        "blur_direction": blur["feature_direction"].float(),
        "blur_offset": blur["feature_offset"].float(),
        "concepts": ((concepts - concepts.mean(dim=0)) @ text_map).half(),
        "feature_mean": feature_mean.float(),
        "key_classes": torch.tensor([index for indices in words.values() for index in sorted(indices)]).short(),
        "key_sizes": torch.tensor([len(indices) for indices in words.values()]).short(),
        "keys": keys.half(),
        "look_centre": torch.zeros(LOOK_SIZE),
        "text_map": text_map.half(),
        "text_mean": text_mean.float(),
        "visual_basis": basis.half(),
    }
    head = TextHead(tensors, class_weight, sharpness=sharpness, concept_share=0.5)
    looks = head.visual_part(head.semantic_part(photos.float()))
    tensors["look_centre"] = LOOK_CENTRING * looks.mean(dim=0)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def blur_directions(sharp: np.ndarray, blurred: np.ndarray) -> dict[str, Any]:
    """Return in which direction enlarging small images shifts the features, and the place of sharp images on it.

    Args:
        sharp: features of photographs (n, f).
        blurred: features of images that were enlarged (n, f).
    """
    feature_shift = blurred.mean(axis=0) - sharp.mean(axis=0)
    root_shift = np.sqrt(blurred).mean(axis=0) - np.sqrt(sharp).mean(axis=0)
    direction = feature_shift / np.linalg.norm(feature_shift)
    return {
        "feature_direction": [round(float(x), 5) for x in direction],
        "feature_offset": round(float(sharp.mean(axis=0) @ direction), 4),
        "root_direction": [round(float(x), 5) for x in root_shift / np.linalg.norm(root_shift)],
    }


def calibrated_logit_scale(image_head: ImageHead, text_head: TextHead, encode: SentenceEncoder, features: Any) -> float:
    """Return the scale at which zero-shot scores on CIFAR-100 have the lowest negative log-likelihood."""
    classnames, targets = np.unique(features["cifar100_label"], return_inverse=True)
    prompts = encode.of_names([name.replace("_", " ") for name in classnames], PHOTO)
    images = image_head(torch.from_numpy(features["cifar100_train"].astype(np.float32)))
    similarities = images @ text_head(prompts.float()).T
    scales = np.arange(5, 50, 0.1)
    losses = [
        torch.nn.functional.cross_entropy(float(scale) * similarities, torch.from_numpy(targets)).item()
        for scale in scales
    ]
    accuracy = (similarities.argmax(dim=1).numpy() == targets).mean()
    best = int(np.argmin(losses))
    print(f"CIFAR-100: top-1 {accuracy:.4f}, lowest loss {losses[best]:.4f} at scale {scales[best]:.1f}")  # noqa: T201
    return round(float(scales[best]), 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the heads, and write their checksum and the fingerprint of the image tower into config.json."""
    parser = argparse.ArgumentParser(description="Build the heads of the embedded model.")
    parser.add_argument("--classes", type=Path, default=FOLDER / "imagenet_classes.json")
    parser.add_argument(
        "--features", type=Path, help="pooled image features, to compute their mean and the logit scale"
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "heads.safetensors")
    given = parser.parse_args(arguments)

    config = read_config(FOLDER)
    image_weights, text_weights = tower_files(config)
    model, classifier = open_towers(config, image_weights, text_weights)
    encode = SentenceEncoder(model, text_weights.parent)
    features = np.load(given.features) if given.features else None
    if features is not None:
        sharp, blurred = (features[name].astype(np.float64) for name in ("imagenet_samples", "cifar100_train"))
        mean = np.sqrt(sharp).mean(axis=0)
        (FOLDER / "feature_mean.json").write_text(json.dumps([round(float(x), 4) for x in mean]) + "\n")
        (FOLDER / "blur.json").write_text(json.dumps(blur_directions(sharp, blurred)) + "\n")
    tensors = build(
        encode,
        classifier.weight,
        json.loads(given.classes.read_text(encoding="utf-8")),
        tomllib.loads((FOLDER / "everyday_words.toml").read_text(encoding="utf-8")),
        sharpness=config["joint_space"]["sharpness"],
        feature_mean=torch.tensor(json.loads((FOLDER / "feature_mean.json").read_text())),
        blur={name: torch.tensor(value) for name, value in json.loads((FOLDER / "blur.json").read_text()).items()},
    )
    given.output.write_bytes(save(tensors))
    if features is not None:
        join_towers(model, classifier, tensors, config["joint_space"])
        config["logit_scale"] = calibrated_logit_scale(model.visual.head, model.text.proj, encode, features)
    config["heads"] = {"file": given.output.name, "sha256": sha256(given.output)}
    config["image_fingerprint"] = image_fingerprint(config, tensors)
    if given.output.resolve().parent == FOLDER.resolve():
        (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _signed(columns: Float[torch.Tensor, "t s"]) -> Float[torch.Tensor, "t s"]:
    """Make the sign of a decomposition unique: the largest entry of every column is positive."""
    largest = columns.abs().argmax(dim=0, keepdim=True)
    return columns * columns.gather(0, largest).sign()


if __name__ == "__main__":
    main()
