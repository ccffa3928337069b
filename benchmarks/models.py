"""Writes models of a real architecture with random weights, which are as fast as trained ones."""

import json
from pathlib import Path

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


def write_transformers(folder: Path) -> Path:
    """Write a CLIPModel with the shape of ViT-B/32 and its processor, for servers that use transformers.

    Its tokenizer has byte-level tokens without merges. This does not change the speed: texts are padded to 77 tokens.
    """
    from transformers import (  # noqa: PLC0415
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
        letters += [chr(256 + number) for number in range(256 - len(letters))]
        vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
        config = CLIPConfig()  # the default is ViT-B/32
        config.text_config.vocab_size = 49408
        config.text_config.eos_token_id = tokenizer.eos_token_id
        config.text_config.bos_token_id = tokenizer.bos_token_id
        config.text_config.pad_token_id = tokenizer.pad_token_id
        CLIPModel(config).save_pretrained(folder)
        CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder
