"""The real open_clip code, on models of a few thousand weights that the tests create."""

import json
import pickle
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.encoders._base import LoadOptions
from app.encoders.loading import imagenet_templates, load_encoder
from app.encoders.open_clip import _image_transform, select_device
from app.encoders.tuning import probe_images
from app.errors import ModelUnavailableError, NotConfiguredError
from app.main import create_app, load_encoders
from tests.conftest import picture

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
COLOURS = ("red", "navy", "olive", "white", "black")
TEXTS = ("a photo of a cat", "dog", "", "犬 🐕", "word " * 500)


def write_model(folder, *, seed=0, vision=(), text=(), weights=None, **options):
    """Write a CLIP with random weights as a folder that open_clip can load, and return its name as a setting."""
    config = {"embed_dim": 8, "vision_cfg": {**VISION, **dict(vision)}, "text_cfg": {**TEXT, **dict(text)}, **options}
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    torch.manual_seed(seed)
    state = open_clip.CLIP(**config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in (state | (weights or {})).items()}, weights_of(folder))
    return f"local-dir:{folder}"


def weights_of(folder):
    return folder / "open_clip_model.safetensors"


def load(spec, *, device="cpu", precision="fp32", backend="torch", **options):
    return load_encoder(spec, LoadOptions(device=device, precision=precision, backend=backend, **options))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def encoder(spec):
    return load(spec)


def images():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8))
    return [noise, *(Image.new("RGB", (40, 30), colour) for colour in COLOURS)]


def refusal_of(spec, **options):
    with pytest.raises(ModelUnavailableError) as caught:
        load(spec, **options)
    assert spec in caught.value.message
    return caught.value.message


# --- a model that loads --------------------------------------------------------------------------------------------


def test_a_loaded_model_has_its_own_sizes_and_scale(spec, encoder):
    assert (encoder.name, encoder.embed_dim, encoder.image_size_px) == (spec, 8, 32)
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)  # the initial value of CLIP
    assert encoder.logit_bias is None


def test_both_towers_return_unit_rows_in_float32(encoder):
    pixels = [encoder.transform(image) for image in images()]
    for rows, count in [(encoder.encode_images(pixels), len(pixels)), (encoder.encode_texts(TEXTS), len(TEXTS))]:
        assert rows.shape == (count, 8)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_the_features_equal_those_of_open_clip(spec, encoder):
    model, _, preprocess = open_clip.create_model_and_transforms(spec)
    model.eval()
    with torch.inference_mode():
        wanted_images = model.encode_image(torch.stack([preprocess(image) for image in images()]), normalize=True)
        wanted_texts = model.encode_text(open_clip.get_tokenizer(spec)(list(TEXTS)), normalize=True)
    pixels = [encoder.transform(image) for image in images()]
    np.testing.assert_allclose(encoder.encode_images(pixels), wanted_images.numpy(), atol=1e-3)  # one level of 255
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), wanted_texts.numpy(), atol=1e-5)


def test_a_row_is_the_same_alone_in_a_batch_and_when_repeated(encoder):
    pixels = [encoder.transform(image) for image in images()]
    for encode, items in [(encoder.encode_images, pixels), (encoder.encode_texts, TEXTS)]:
        together = encode(items)
        alone = np.concatenate([encode([item]) for item in items])
        np.testing.assert_allclose(alone, together, atol=1e-5)
        np.testing.assert_array_equal(encode(items), together)


def test_different_inputs_give_different_rows(encoder):
    rows = np.concatenate(
        [encoder.encode_texts(TEXTS), encoder.encode_images([encoder.transform(image) for image in images()])]
    )
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2) + 10 * np.eye(len(rows))
    assert distances.min() > 1e-4


def test_the_transform_returns_bytes_in_the_size_of_the_model(encoder):
    pixels = encoder.transform(Image.new("RGB", (40, 30), (255, 128, 0)))
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert (pixels == [255, 128, 0]).all()


def photographs():
    """Return images of many shapes, smaller and larger than that of the model, with the structure of photographs."""
    return [
        Image.fromarray(item)
        for width, height in [(450, 300), (300, 451), (32, 32), (33, 500), (20, 24), (640, 31), (1200, 900), (1, 7)]
        for item in [np.ascontiguousarray(probe_images(max(width, height), count=1)[0][:height, :width])]
    ]


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_transform_equals_that_of_open_clip_up_to_one(mode, interpolation):
    cfg = open_clip.transform.PreprocessCfg(
        size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    reference = open_clip.transform.image_transform_v2(cfg, is_train=False)
    for image in photographs():
        wanted = 255 * reference(image).permute(1, 2, 0).numpy()
        pixels = _image_transform(cfg)(image)
        assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
        assert pixels.flags.c_contiguous
        assert np.abs(pixels - wanted).max() <= 1.01, image.size


def test_features_equal_those_of_open_clip_with_its_transform(encoder):
    """Geometry before the queue and normalisation after it equal the transform of open_clip."""
    cfg = open_clip.transform.PreprocessCfg(**encoder._model.visual.preprocess_cfg)
    reference = open_clip.transform.image_transform_v2(cfg, is_train=False)
    pictures = [*images(), *photographs()]
    with torch.inference_mode():
        wanted = encoder._model.encode_image(torch.stack([reference(image) for image in pictures]), normalize=True)
    got = encoder.encode_images([encoder.transform(image) for image in pictures])
    assert (got * wanted.numpy()).sum(axis=1).min() >= 0.9999


def test_a_second_batch_may_start_before_the_first_has_finished(encoder):
    pixels = [encoder.transform(image) for image in images()]
    first, second = encoder.begin_images(pixels[:2]), encoder.begin_images(pixels[2:])
    rows = np.concatenate([first(), second()])
    np.testing.assert_allclose(rows, encoder.encode_images(pixels), atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
)
def test_running_out_of_memory_raises_memory_error(encoder, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(encoder._image.tower, "_encode", full)
    with pytest.raises(MemoryError, match="alloca"):
        encoder.encode_images([encoder.transform(image) for image in images()])


def test_the_transform_may_be_called_from_several_threads(encoder):
    wanted = [encoder.transform(image) for image in images()] * 10
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(encoder.transform, images() * 10))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_encoding_does_not_change_its_input(encoder):
    pixels = [encoder.transform(image) for image in images()]
    before = [pixel.copy() for pixel in pixels]
    encoder.encode_images(pixels)
    encoder.encode_images(pixels[:1])
    for one, other in zip(pixels, before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_a_sigmoid_model_has_a_bias(tmp_path, bias):
    encoder = load(write_model(tmp_path, init_logit_bias=bias))
    assert encoder.logit_bias == bias


def test_the_scale_is_read_from_the_weights(tmp_path):
    weights = {"logit_scale": torch.tensor(2.5)}
    assert load(write_model(tmp_path, weights=weights)).logit_scale == pytest.approx(np.exp(2.5), rel=1e-6)


def test_half_precision_on_a_cpu_changes_features_little(spec, encoder):
    half = load(spec, precision="bf16")
    pixels = [encoder.transform(image) for image in images()]
    for exact, rough in [
        (encoder.encode_images(pixels), half.encode_images(pixels)),
        (encoder.encode_texts(TEXTS), half.encode_texts(TEXTS)),
    ]:
        assert rough.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-5)
        assert (exact * rough).sum(axis=1).min() > 0.99


def test_the_default_precision_on_a_cpu_is_fp32(spec, encoder):
    chosen = load(spec, device="auto" if not torch.cuda.is_available() else "cpu", precision="auto")
    np.testing.assert_array_equal(chosen.encode_texts(TEXTS), encoder.encode_texts(TEXTS))


# --- invalid folders -----------------------------------------------------------------------------------------------


def test_a_missing_folder_is_rejected(tmp_path):
    assert f"the folder {tmp_path}/none does not exist" in refusal_of(f"local-dir:{tmp_path}/none")


@pytest.mark.parametrize(
    "config", [None, "", "no JSON", "[]", "{}", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 8}}']
)
def test_the_error_for_a_folder_without_configuration_lists_the_required_files(tmp_path, config):
    spec = write_model(tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    if config is not None:
        (tmp_path / "open_clip_config.json").write_text(config, encoding="utf-8")
    assert "must contain open_clip_config.json, open_clip_model.safetensors" in refusal_of(spec)


def test_a_folder_without_weights_is_rejected(tmp_path):
    spec = write_model(tmp_path)
    weights_of(tmp_path).unlink()
    assert "must contain open_clip_config.json, open_clip_model.safetensors" in refusal_of(spec)


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"x" * len(whole)]
)
def test_damaged_weights_are_rejected(tmp_path, damage):
    spec = write_model(tmp_path)
    weights_of(tmp_path).write_bytes(damage(weights_of(tmp_path).read_bytes()))
    assert "must contain" in refusal_of(spec)


def test_weights_of_another_architecture_are_rejected(tmp_path):
    spec = write_model(tmp_path / "wanted")
    write_model(tmp_path / "other", vision={"layers": 2})
    weights_of(tmp_path / "other").replace(weights_of(tmp_path / "wanted"))
    refusal_of(spec)


def test_incomplete_weights_are_rejected(tmp_path):
    spec = write_model(tmp_path)
    state = load_file(weights_of(tmp_path))
    del state["text_projection"]
    save_file(state, weights_of(tmp_path))
    refusal_of(spec)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (exec, (f"open({str(self.file)!r}, 'w').close()",))


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pth"])
def test_a_pickle_instead_of_weights_is_rejected_and_not_executed(tmp_path, name):
    spec = write_model(tmp_path / "model")
    weights_of(tmp_path / "model").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    refusal_of(spec)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "model" / name).read_bytes())
    assert (tmp_path / "executed").exists()  # verifies that the pickle is malicious


def test_weights_with_nan_are_rejected(tmp_path):
    spec = write_model(tmp_path, weights={"text_projection": torch.full((16, 8), torch.nan)})
    assert "DEIXIS_PRECISION=fp32" in refusal_of(spec)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_invalid_scale_is_rejected(tmp_path, value):
    assert "logit_scale" in refusal_of(write_model(tmp_path, weights={"logit_scale": torch.tensor(value)}))


def test_a_tokenizer_that_does_not_match_the_text_tower_is_rejected(tmp_path):
    """A folder without a tokenizer uses that of CLIP, whose token ids go up to 49407."""
    refusal_of(write_model(tmp_path, text={"vocab_size": 1000}))


# --- names and the network -----------------------------------------------------------------------------------------


def test_the_error_for_an_unknown_architecture_lists_similar_ones():
    message = refusal_of("ViT-B-23/openai")
    assert "no architecture 'ViT-B-23'" in message
    assert "ViT-B-32" in message
    assert "similar: none" in refusal_of("Zzz/openai")


def test_the_error_for_an_unknown_tag_lists_the_known_ones():
    message = refusal_of("ViT-B-32/laion3b")
    assert "'laion3b'" in message
    assert "laion2b_s34b_b79k" in message


def test_an_architecture_without_published_weights_is_rejected():
    architecture = next(
        list_model for list_model in open_clip.list_models() if not open_clip.list_pretrained_tags_by_model(list_model)
    )
    assert "known: none" in refusal_of(f"{architecture}/openai")


@pytest.mark.parametrize(
    "spec", ["", "clip", "ViT-B-32", "/openai", "ViT-B-32/", "hf-hub:", "local-dir:", "ftp:a/b", "http://a/b"]
)
def test_the_error_for_an_invalid_model_name_lists_the_valid_forms(spec):
    assert "is not a model name; write embedded, architecture/tag" in refusal_of(spec)


@pytest.mark.parametrize("spec", ["ViT-B-32/laion2b_s34b_b79k", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"])
def test_the_error_without_a_network_says_how_to_get_the_weights(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal_of(spec, weights_dir=tmp_path)
    assert "HF_HUB_OFFLINE is set; unset it" in message
    assert "copy the hub cache of a machine that has the files (HF_HOME or DEIXIS_MODEL_CACHE_DIR)" in message


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "", "cpu:x"])
def test_the_error_for_an_unavailable_device_recommends_auto(device):
    with pytest.raises(ModelUnavailableError, match=rf"device '{device}' cannot be used here: .*DEIXIS_DEVICE=auto"):
        select_device(device)


def test_the_automatic_device_can_be_used():
    torch.empty(1, device=select_device("auto"))
    assert select_device("cpu") == "cpu"


# --- in the service ------------------------------------------------------------------------------------------------


def test_several_models_are_served_and_the_first_is_the_default(make_client, tmp_path):
    specs = [write_model(tmp_path / "first"), write_model(tmp_path / "second", seed=1, init_logit_bias=-5.0)]
    client = make_client(encoders=[load(spec) for spec in specs])
    models = client.get("/v1/models").json()["models"]
    assert [(model["name"], model["default"], model["probability"]) for model in models] == [
        (specs[0], True, "softmax"),
        (specs[1], False, "sigmoid"),
    ]
    answers = [
        client.post("/v1/classify", files={"image": picture()}, data={"labels": "cat, dog"} | fields).json()
        for fields in ({}, {"model": specs[0]}, {"model": specs[1]})
    ]
    assert [answer["model"] for answer in answers] == [specs[0], specs[0], specs[1]]
    assert answers[0]["results"] == answers[1]["results"] != answers[2]["results"]


def test_the_models_of_the_settings_are_loaded_in_their_order(settings, tmp_path):
    specs = (write_model(tmp_path / "b"), write_model(tmp_path / "a"))
    chosen = settings.model_copy(update={"models": specs, "device": "cpu"})
    assert [item.name for item in load_encoders(chosen)] == list(specs)


def test_no_model_is_served_if_one_cannot_be_loaded(settings, tmp_path):
    specs = (write_model(tmp_path / "good"), f"local-dir:{tmp_path}/none")
    with pytest.raises(ModelUnavailableError, match=r"the folder .* does not exist"):
        load_encoders(settings.model_copy(update={"models": specs, "device": "cpu"}))
    assert create_app(settings)  # loads nothing before the start


def test_there_are_eighty_imagenet_templates_with_one_placeholder():
    templates = imagenet_templates()
    assert len(templates) == len(set(templates)) == 80
    assert all(template.count("{}") == 1 and template.count("{") == 1 for template in templates)
    assert templates[0] == "a bad photo of a {}."


def test_without_open_clip_its_templates_are_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr("app.encoders.loading.find_spec", lambda _: None)
    with pytest.raises(NotConfiguredError, match=r"needs the extra 'embedded'.* --no-deps .*open_clip_torch"):
        imagenet_templates()


# --- texts that are slow to tokenize ------------------------------------------------------------------------------


def random_word(length):
    return "".join(random.Random(length).choices("etaoinshrdlu", k=length))


def test_words_get_the_tokens_that_open_clip_gives_them(encoder):
    texts = [
        *TEXTS,
        *imagenet_templates(),
        "<end_of_text> x",
        "naïve café's 3rd 'RE-do'",
        "ไทย ภาษา " * 20,
        "👩‍👩‍👧" * 30,
    ]
    texts += [random_word(length) for length in (1, 2, 30, 77, 300, 1000)]
    reference = open_clip.tokenizer.SimpleTokenizer()
    assert torch.equal(encoder._tokenizer(texts), reference(texts))


def test_a_batch_of_long_words_is_encoded_in_linear_time_and_not_kept(encoder):
    """With open_clip's own function, one such text takes more than a minute."""
    texts = ["".join(chr(0x4E00 + 37 * (index + each) % 20_000) for each in range(10_000)) for index in range(20)]
    texts += [random_word(10_000 + index) for index in range(20)]
    texts += ["a" + "\u0301" * 5000 + "\u0316" * 5000 for _ in range(20)]
    before = len(encoder._tokenizer.cache)
    began = time.thread_time()
    assert np.isfinite(encoder.encode_texts(texts)).all()
    assert time.thread_time() - began < 10
    assert len(encoder._tokenizer.cache) == before


def test_the_part_of_a_text_beyond_the_context_does_not_count(encoder):
    texts = ["word " * 200, "word " * 5000]
    first, second = encoder.encode_texts(texts)
    assert np.allclose(first, second, atol=1e-6)


def test_the_error_for_a_library_that_cannot_be_loaded_has_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "app.encoders.open_clip", None)
    with pytest.raises(
        ModelUnavailableError, match=r"PyTorch or OpenCLIP cannot be loaded: .*; give the process more mem"
    ):
        load_encoder("embedded", LoadOptions(backend="torch"))
