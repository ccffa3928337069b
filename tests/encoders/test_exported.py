"""Exported models have the features of torch, need no torch, and are written again if damaged or outdated."""

import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import open_clip
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg
from PIL import Image
from structlog.testing import capture_logs
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.encoders import conversion, exported, loading, openvino, tuning
from app.encoders._base import Candidate, LoadOptions, Trial, Tuning
from app.encoders.conversion import NotConvertibleError, convert_preprocessing, convert_tokenizer
from app.encoders.exported import Export
from app.encoders.loading import export_model, load_encoder
from app.encoders.open_clip import OpenClipEncoder
from app.encoders.openvino import OpenVinoEncoder
from app.encoders.tokenizing import TextTokenizer, clean_text
from app.errors import ModelUnavailableError
from app.names.text import nfc
from tests.encoders.test_open_clip import TEXTS, images, write_model

FILES = ["export.json", "image.bin", "image.xml", "text.bin", "text.xml", "tokenizer.json"]


def options(folder, **others):
    return LoadOptions(
        **{"device": "cpu", "precision": "fp32", "data_dir": folder, "exports_dir": folder / "exports", **others}
    )


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def first(spec, folder):
    """The model of the first start, which exported it."""
    return load_encoder(spec, options(folder))


@pytest.fixture
def hide_torch(monkeypatch):
    """Return a function after which torch seems not to be installed, and which fails the test if it is asked for."""

    def hide():
        for module in (exported, loading, openvino, tuning):
            monkeypatch.setattr(module, "is_installed", lambda package: package == "openvino")
        monkeypatch.setitem(sys.modules, "app.encoders.open_clip", None)

    return hide


def the_export(folder):
    (found,) = (folder / "exports").iterdir()
    return found


def manifest(folder):
    return Export.model_validate_json((the_export(folder) / "export.json").read_bytes())


# --- features ------------------------------------------------------------------------------------------------------


def test_the_features_equal_those_of_torch(spec, first):
    reference = load_encoder(spec, LoadOptions(device="cpu", backend="torch", precision="fp32"))
    assert isinstance(first, OpenVinoEncoder)
    assert isinstance(reference, OpenClipEncoder)
    rows = first.encode_images([first.transform(image) for image in images()])
    wanted = reference.encode_images([reference.transform(image) for image in images()])
    assert (rows * wanted).sum(axis=1).min() > 0.9999
    rows, wanted = first.encode_texts(TEXTS), reference.encode_texts(TEXTS)
    assert (rows.dtype, rows.shape) == (np.float32, wanted.shape)
    assert (rows * wanted).sum(axis=1).min() > 0.99999
    for name in ("name", "embed_dim", "image_size_px", "logit_scale", "logit_bias"):
        assert getattr(first, name) == getattr(reference, name), name
    assert first.image_fingerprint() == reference.image_fingerprint()
    assert first.text_fingerprint() == reference.text_fingerprint()


def test_a_sigmoid_model_with_its_own_bias_is_exported(tmp_path):
    spec = write_model(tmp_path / "model", init_logit_bias=-10.0)
    assert load_encoder(spec, options(tmp_path)).logit_bias == pytest.approx(-10)


# --- pixels --------------------------------------------------------------------------------------------------------


def preprocessing(**others):
    return PreprocessCfg(**{"size": 64, "mean": (0, 0, 0), "std": (1, 1, 1), **others})


@given(width=st.integers(1, 400), height=st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_an_image_of_any_size_equals_that_of_pillow_up_to_one(width, height):
    """open_clip's own steps, which resize all of the image and then crop it."""
    cfg = preprocessing(interpolation="bilinear")
    image = Image.fromarray(
        (np.add.outer(np.arange(height) * 5, np.arange(width) * 3)[..., None] % [230, 240, 250]).astype(np.uint8)
    )
    resize, crop, *_ = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    wanted = np.array(crop(resize(image))).astype(int)
    assert np.abs(convert_preprocessing(cfg).transform(image) - wanted).max() <= 1


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_an_image_that_is_squashed_equals_that_of_open_clip(width, height, seed):
    cfg = preprocessing(resize_mode="squash", interpolation="bicubic")
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resize, *_ = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    image = Image.fromarray(noise)
    np.testing.assert_array_equal(convert_preprocessing(cfg).transform(image), np.array(resize(image)))


@pytest.mark.parametrize("others", [{"resize_mode": "longest"}, {"interpolation": "random"}, {"size": (64, 32)}])
def test_other_preprocessing_is_not_converted(others):
    with pytest.raises(NotConvertibleError, match="needs torchvision"):
        convert_preprocessing(preprocessing(**others))


# --- tokens --------------------------------------------------------------------------------------------------------

HARD_TEXTS = (
    *TEXTS,
    "Don't STOP, it's we'RE",
    "São Paulo &amp;amp; 東京 🙂",
    "<end_of_text> x <start_of_text><end_of_text>",
    "<|endoftext|> [CLS] [SEP] [PAD]",
    "x" * 500,
    "1234 5.6% a_b-c",
    "İstanbul ǅ \u017f '\u017f K\u212a",
    "e\u0301 \u200b\x00\x01 \ufeff",
    "naïve café's 3rd 'RE-do' ไทย 👩‍👩‍👧",
    "schÃ¶n â€™quotedâ€™",
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Tokenizers of open_clip, each with the converted one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    small = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "##b": 5, "x": 6}))
    small.normalizer, small.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    small.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    small.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",'
        ' "cls_token": "[CLS]", "sep_token": "[SEP]"}'
    )
    theirs = [
        open_clip.tokenizer.SimpleTokenizer(),
        open_clip.tokenizer.SimpleTokenizer(context_length=16, clean="canonicalize"),
        open_clip.tokenizer.SimpleTokenizer(additional_special_tokens=["<mask>"]),
        *(
            open_clip.tokenizer.HFTokenizer(str(folder), context_length=8, clean=clean, strip_sep_token=strip)
            for clean in ("whitespace", "lower", "canonicalize")
            for strip in (False, True)
        ),
    ]
    return [(each, TextTokenizer(*convert_tokenizer(each, None))) for each in theirs]


def test_tokens_equal_those_of_open_clip(pairs):
    for theirs, ours in pairs:
        np.testing.assert_array_equal(ours(HARD_TEXTS), theirs(list(HARD_TEXTS)).numpy())


@given(text=st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=40))
@example(text="Í\x85")  # U+0345 in UTF-8, read as Latin-1, which the cleaning repairs
@example(text="Ö\x8b:")  # likewise U+058B, which is not assigned
@settings(max_examples=300, deadline=None)
def test_tokens_of_any_text_equal_those_of_open_clip(pairs, text):
    cleaned = clean_text(text, "whitespace")
    assume(not any(character == "\u0345" or unicodedata.category(character) == "Cn" for character in cleaned))
    for theirs, ours in pairs[:2]:
        np.testing.assert_array_equal(ours([text]), theirs([nfc(text)]).numpy())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"reduction_mask": "random"}, "drops random tokens"),
        ({"clean_fn": str.strip}, "a way of its own"),
    ],
)
def test_a_tokenizer_without_an_equivalent_is_not_converted(change, problem):
    tokenizer = open_clip.tokenizer.SimpleTokenizer(reduction_mask=change.get("reduction_mask", ""))
    tokenizer.clean_fn = change.get("clean_fn", tokenizer.clean_fn)
    with pytest.raises(NotConvertibleError, match=problem):
        convert_tokenizer(tokenizer, None)


# --- the folder ----------------------------------------------------------------------------------------------------


def never(*_, **__):
    raise AssertionError("torch was asked for")


def test_the_next_start_asks_for_hide_torch(spec, folder, first, monkeypatch):
    assert sorted(file.name for file in the_export(folder).iterdir()) == FILES
    monkeypatch.setattr(loading, "_load_with_torch", never)
    again = load_encoder(spec, options(folder))
    pixels = [again.transform(image) for image in images()]
    np.testing.assert_allclose(again.encode_images(pixels), first.encode_images(pixels), atol=1e-6)


def test_an_exported_model_loads_in_a_process_without_torch(spec, folder, first):
    """In a new interpreter, in which every import of torch and its companions fails the test."""
    program = f"""
import sys
for name in ("torch", "torchvision", "open_clip", "timm", "transformers"):
    sys.modules[name] = None
from pathlib import Path
import app.main
from app.encoders._base import LoadOptions
from app.encoders.loading import load_encoder
folder = Path({str(folder)!r})
encoder = load_encoder({spec!r}, LoadOptions(device="cpu", data_dir=folder, exports_dir=folder / "exports"))
print(type(encoder).__name__, encoder.encode_texts(["a cat"]).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "OpenVinoEncoder (1, 8)"


def test_changed_weights_are_exported_again(tmp_path):
    spec = write_model(tmp_path / "model")
    before = load_encoder(spec, options(tmp_path))
    write_model(tmp_path / "model", seed=1)
    after = load_encoder(spec, options(tmp_path))
    assert np.abs(after.encode_texts(TEXTS) - before.encode_texts(TEXTS)).max() > 0.01
    assert manifest(tmp_path).image_fingerprint == after.image_fingerprint() != before.image_fingerprint()


def test_an_export_outlives_the_files_of_its_model(tmp_path, hide_torch):
    spec = write_model(tmp_path / "model")
    export_model(spec, options(tmp_path))
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    hide_torch()
    assert load_encoder(spec, options(tmp_path)).embed_dim == 8


DAMAGES = {
    "torn graph": lambda export: (export / "image.xml").write_bytes(b"<net"),
    "no weights": lambda export: (export / "text.bin").unlink(),
    "short weights": lambda export: (export / "image.bin").write_bytes((export / "image.bin").read_bytes()[:100]),
    "no tokenizer": lambda export: (export / "tokenizer.json").unlink(),
    "flipped bit": lambda export: flip_bit(export / "text.bin"),
    "no manifest": lambda export: (export / "export.json").unlink(),
    "torn manifest": lambda export: (export / "export.json").write_text('{"format": 1'),
    "manifest of a later release": lambda export: (export / "export.json").write_text('{"format": 2}'),
    "bytes as manifest": lambda export: (export / "export.json").write_bytes(b"\xff"),
}


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 3] ^= 0x40
    file.write_bytes(content)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return write_model(folder / "model"), folder


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    spec = write_model(folder / "model")
    export_model(spec, options(folder))
    return spec, folder


# Every kind of damage is found by the next test; what follows is the same.
@pytest.mark.parametrize("damage", ["torn graph", "no tokenizer", "flipped bit", "manifest of a later release"])
def test_a_damaged_export_is_written_again(damaged, damage):
    spec, folder = damaged
    wanted = load_encoder(spec, options(folder))
    DAMAGES[damage](the_export(folder))
    again = load_encoder(spec, options(folder))
    assert isinstance(again, OpenVinoEncoder)
    np.testing.assert_allclose(again.encode_texts(TEXTS), wanted.encode_texts(TEXTS), atol=1e-6)
    assert sorted(file.name for file in the_export(folder).iterdir()) == FILES


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_torch_a_damaged_export_has_an_error_with_the_way_out(exported_once, damage, hide_torch, tmp_path):
    spec, folder = exported_once
    shutil.copytree(folder / "exports", tmp_path / "exports")
    DAMAGES[damage](the_export(tmp_path))
    hide_torch()
    with pytest.raises(ModelUnavailableError, match=r"deixis models export|exported models run on a CPU"):
        load_encoder(spec, options(tmp_path))


def test_a_folder_that_cannot_be_written_does_not_prevent_serving(spec, tmp_path):
    (tmp_path / "exports").write_text("a file where the folder should be")
    with capture_logs() as logs:
        encoder = load_encoder(spec, options(tmp_path))
    assert isinstance(encoder, OpenClipEncoder)
    assert encoder.image_path.backend == "openvino"
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["model_not_exported"]


def test_a_model_whose_text_tower_changes_is_not_exported(spec, tmp_path, monkeypatch):
    """The features of the probes differ."""
    convert = conversion.convert_text_tower
    other = load_encoder(write_model(tmp_path / "other", seed=1), LoadOptions(device="cpu", backend="torch"))
    monkeypatch.setattr("app.encoders.open_clip.convert_text_tower", lambda _, length: convert(other._model, length))
    with pytest.raises(ModelUnavailableError, match="text features of OpenVINO and torch differ"):
        export_model(spec, options(tmp_path))
    assert not (tmp_path / "exports").exists()


def test_two_processes_may_export_a_model_at_the_same_time(spec, tmp_path):
    program = f"""
from pathlib import Path
from app.encoders._base import LoadOptions
from app.encoders.loading import load_encoder
folder = Path({str(tmp_path)!r})
print(load_encoder({spec!r}, LoadOptions(device="cpu", data_dir=folder, exports_dir=folder / "exports")).embed_dim)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        printed, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
        assert printed.splitlines()[-1] == "8"
    assert sorted(file.name for file in the_export(tmp_path).iterdir()) == FILES


def test_names_that_differ_only_in_characters_that_no_folder_may_have_get_folders_of_their_own(tmp_path):
    names = ["hf-hub:org/repo", "hf-hub:org-repo", "hf-hub:Org/repo", "local-dir:/" + "x" * 300, "local-dir:../.."]
    folders = [exported.export_folder(name, tmp_path).relative_to(tmp_path).as_posix() for name in names]
    assert len({name.lower() for name in folders}) == len(names)
    assert all(len(name) <= 80 and "/" not in name and not name.startswith(".") for name in folders)


# --- when it is used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [{"backend": "torch"}, {"precision": "fp16"}, {"device": "cuda"}, {"device": "mps"}, {"measure_again": True}],
)
def test_options_that_need_torch_do_not_use_the_export(spec, folder, first, others):
    assert exported.load_exported(spec, options(folder, **others)) is None


def test_a_machine_with_an_accelerator_does_not_use_the_export(spec, folder, first, monkeypatch):
    chosen = options(folder, device="auto")
    monkeypatch.setattr(openvino, "has_accelerator", lambda: True)
    assert exported.load_exported(spec, chosen) is None
    monkeypatch.setattr(openvino, "has_accelerator", lambda: False)
    assert exported.load_exported(spec, chosen) is not None


def test_torch_is_used_if_it_was_measured_to_be_faster(spec, folder, first, monkeypatch):
    candidate = Candidate("torch", "fp32", 2)
    trials = (Trial(candidate=candidate, min_cosine=1.0),)
    measured = Tuning(device="cpu", trials=trials, chosen=candidate, batch_size=1)
    monkeypatch.setattr(exported, "stored_tuning", lambda *_: measured)
    assert exported.load_exported(spec, options(folder)) is None
    assert exported.load_exported(spec, options(folder, backend="openvino")) is not None


def test_without_torch_and_openvino_the_error_names_the_extra_of_each(tmp_path, monkeypatch):
    for module in (exported, loading, openvino, tuning):
        monkeypatch.setattr(module, "is_installed", lambda _: False)
    for spec in ("embedded", "ViT-B-32/openai"):
        with pytest.raises(ModelUnavailableError, match=r"needs the extra 'torch'.*or the extra embedded"):
            load_encoder(spec, options(tmp_path))


def test_a_model_that_is_not_exported_needs_torch(tmp_path, hide_torch):
    hide_torch()
    with pytest.raises(ModelUnavailableError, match="needs the extra 'torch', which is not installed"):
        load_encoder("ViT-B-32/openai", options(tmp_path))


def test_the_embedded_model_needs_no_export(tmp_path):
    with pytest.raises(ModelUnavailableError, match="needs no export"):
        export_model("embedded", options(tmp_path))


def test_without_torch_the_candidates_of_openvino_are_measured(spec, folder, first, hide_torch):
    hide_torch()
    measured = load_encoder(spec, options(folder, tuning_seconds=1.0, measure_again=True))
    assert {trial.candidate.backend for trial in measured.tuning.trials} == {"openvino"}
    assert measured.tuning.chosen.backend == "openvino"
