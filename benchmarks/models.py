"""Writes models of a real architecture with random weights, which are as fast as trained ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VIT_B_32 = "ViT-B-32"


def write_open_clip(folder: Path, architecture: str = VIT_B_32) -> str:
    """Write the folder unless it exists, and return its name as a model setting."""
    import open_clip  # noqa: PLC0415 - takes seconds
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    weights = folder / "open_clip_model.safetensors"
    if not weights.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shape = open_clip.get_model_config(architecture)
        torch.manual_seed(0)
        state = open_clip.CLIP(**shape).state_dict()
        preprocessing = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
        model_description = {"model_cfg": shape, "preprocess_cfg": preprocessing}
        (folder / "open_clip_config.json").write_text(json.dumps(model_description), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    return f"local-dir:{folder}"


def write_transformers(folder: Path, source: Path) -> Path:
    """Write the ViT-B-32 of ``write_open_clip`` as a CLIPModel and its processor, for servers that use transformers."""
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - takes seconds
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        words = SimpleTokenizer()
        special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {special.get(token, token): index for token, index in words.encoder.items()}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *map(" ".join, words.bpe_ranks)])
        (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
        activation = {"hidden_act": "gelu"}  # as in open_clip
        model = CLIPModel(CLIPConfig(text_config=activation, vision_config=activation))  # the default is ViT-B/32
        state = {
            new: tensor
            for old, weights in load_file(source / "open_clip_model.safetensors").items()
            for new, tensor in _in_transformers(old, weights)
        }
        model.load_state_dict(state, strict=True)
        model.save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NAMES_IN_LAYERS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _in_transformers(name: str, weights: Any) -> Iterator[tuple[str, Any]]:
    """Return names and tensors of a CLIPModel for one tensor of open_clip, whose projections are transposed."""
    prefix = next(prefix for prefix in _NAMES if name.startswith(prefix))
    new = _NAMES[prefix] + name.removeprefix(prefix)
    for old_part, new_part in _NAMES_IN_LAYERS.items():
        new = new.replace(old_part, new_part)
    if "in_proj_" in new:
        for head, part in zip("qkv", weights.chunk(3), strict=True):
            yield new.replace("in_proj_", f"{head}_proj."), part.contiguous()
    else:
        yield new, weights.T.contiguous() if name in {"visual.proj", "text_projection"} else weights
