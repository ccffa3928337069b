"""Reports about models: tokenisation, features, loading, caches and hubs, on models with random weights."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from app.errors import ModelUnavailableError
from tests.cli.output import assert_refused
from tests.conftest import picture
from tests.encoders import test_open_clip as tiny
from tests.encoders.test_hub import SPEC, blob_of, flip_a_byte, use_hub
from tests.field.asking import best_of, classify, embed, results_of
from tests.field.reports import report

WORDS = ("a", "photo", "of", "cat", "dog", "Cat", "Dog", ".", "!")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP with random weights."""
    return tiny.load(tiny.write_model(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A SigLIP with random weights: its text tower reads the last token of a padded text in lower case."""
    folder = tmp_path_factory.mktemp("models") / "siglip"
    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1} | {word: 2 + n for n, word in enumerate(WORDS)}, "<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {
        "context_length": 16,
        "vocab_size": 32,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "hf_tokenizer_name": "anything",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    }
    config = {"embed_dim": 8, "vision_cfg": tiny.VISION, "text_cfg": text, "init_logit_bias": -10, "custom_text": True}
    folder.mkdir()
    described = {"model_cfg": config, "preprocess_cfg": tiny.PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(described), "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds), "utf-8")
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tiny.weights_of(folder))
    return tiny.load(f"local-dir:{folder}")


# --- texts -----------------------------------------------------------------------------------------------------------


@report(
    "embeddings-benchmark/mteb#1424", "Texts that were not padded to the full length cost SigLIP 70 points of accuracy."
)
def test_siglip_texts_are_padded_to_the_full_length(siglip):
    tokens = siglip._tokenizer(["a photo of a cat", "dog"])
    assert tokens.shape == (2, 16)
    alone, together = siglip.encode_texts(["dog"]), siglip.encode_texts(["dog", "a photo of a cat"])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-6)


@report("google-research/big_vision#187", "SigLIP 2 was much worse than SigLIP for texts with capital letters.")
def test_siglip_texts_are_read_in_lower_case(siglip):
    lower, capital = siglip.encode_texts(["a photo of a cat", "A Photo of a CAT"])
    np.testing.assert_array_equal(lower, capital)


@report("NVlabs/RADIO#142", "Punctuation that SigLIP 2 was trained without cost 12 points of accuracy.")
def test_siglip_texts_are_read_without_punctuation(siglip):
    plain, marked, other = siglip.encode_texts(["a photo of a cat", "a photo of a cat!", "a photo of a dog"])
    np.testing.assert_array_equal(plain, marked)
    assert np.abs(plain - other).max() > 1e-4


@report("huggingface/transformers#26522", "A pipeline applied softmax to SigLIP, which has a sigmoid for each label.")
def test_scores_of_siglip_are_those_of_a_sigmoid(make_client, siglip):
    client = make_client([siglip])
    for each in results_of(classify(client, picture("red"), labels=["cat", "dog"]))[0]["predictions"]:
        logit = siglip.logit_scale * each["similarity"] + siglip.logit_bias
        assert each["score"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-3)


@report("openai/CLIP#468", "A text of more than 77 tokens raised an error.")
def test_a_text_beyond_the_context_is_cut(make_client, clip):
    reply = embed(make_client([clip]), ["word " * 500, "word " * 76]).json()["data"]
    assert reply[0]["embedding"] == pytest.approx(reply[1]["embedding"], abs=1e-6)


@report("openai/CLIP#212", "Text of few words with many numbers and rare names had too many tokens.")
def test_a_label_of_many_tokens_is_classified(make_client, clip):
    label = "Amendments Nos 1 4 9 11 13 15 19 23 39 40 41 49 51 59 61 64 66 70 71 72 74 77 83 87 90 91 92 95 97 98 81"
    assert len(results_of(classify(make_client([clip]), picture(), labels=[label, "dog"]))[0]["predictions"]) == 2


@report("weaviate/weaviate#2909", "One text that was too long failed the whole batch of an import with status 500.")
def test_one_long_text_among_others_changes_none_of_them(make_client, clip):
    client = make_client([clip])
    together = embed(client, ["a cat", "x" * 9_000, "a dog"]).json()["data"]
    alone = embed(client, ["a cat"]).json()["data"]
    assert together[0]["embedding"] == pytest.approx(alone[0]["embedding"], abs=1e-6)


# --- features --------------------------------------------------------------------------------------------------------


@report("openai/CLIP#114", "Features of the same image differed from run to run, with the size of the batch.")
def test_an_image_has_the_same_features_in_every_batch(clip):
    image = clip.transform(Image.new("RGB", (50, 40), "teal"))
    alone = clip.encode_images([image])[0]
    for size in (2, 3, 8):
        for row in clip.encode_images([image] * size):
            np.testing.assert_allclose(row, alone, atol=1e-6)


@report("openai/CLIP#147", "The features of a text differed between a single text and a batch.")
def test_a_text_has_the_same_features_in_every_batch(clip):
    alone = clip.encode_texts(["it is a sunny day today"])[0]
    for row in clip.encode_texts(["it is a sunny day today"] * 16):
        np.testing.assert_allclose(row, alone, atol=1e-6)


@report("huggingface/transformers#30443", "An image in a batch of three had other features than on its own.")
def test_scores_do_not_depend_on_the_other_images_of_a_request(make_client, clip):
    client = make_client([clip])
    images = [picture(colour, (60, 40), "JPEG") for colour in ("teal", "orange", "black")]
    together = results_of(classify(client, *images, labels=["cat", "dog", "sky"]))
    for image, result in zip(images, together, strict=True):
        (alone,) = results_of(classify(client, image, labels=["cat", "dog", "sky"]))
        assert [each["label"] for each in alone["predictions"]] == [each["label"] for each in result["predictions"]]
        scores = [each["score"] for each in alone["predictions"]]
        assert scores == pytest.approx([each["score"] for each in result["predictions"]], abs=1e-5)


# --- loading ---------------------------------------------------------------------------------------------------------


@report(
    "mlfoundations/open_clip#968", "In a container without a network, the tokenizer was still asked for at the hub."
)
def test_a_folder_with_a_tokenizer_needs_no_network(siglip, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:1")
    assert tiny.load(siglip.name).encode_texts(["cat"]).shape == (1, 8)


@report("immich-app/immich#8237", "Models were downloaded at each start, although they were in the cache.")
def test_a_cached_model_is_not_downloaded_again(hub, load):
    load()
    before = hub.requests["GET"]
    load()
    assert hub.requests["GET"] == before


@report("mlfoundations/open_clip#580", "Without a network, a model that had been downloaded could not be loaded.")
def test_a_downloaded_model_is_loaded_when_the_hub_is_gone(hub, load, monkeypatch):
    load()
    use_hub(monkeypatch, "http://127.0.0.1:1")
    assert load().encode_texts(["cat"]).shape == (1, 8)


@report(
    "immich-app/immich#5134", "Without a network, the log repeated that a model is downloaded, and not why it is not."
)
def test_a_hub_that_cannot_be_reached_is_one_line(download, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:1")
    assert_refused(download(), "http://127.0.0.1:1 cannot be reached")


@report("immich-app/immich#2951", "A damaged file in the cache failed at each start until somebody deleted it.")
def test_a_damaged_file_in_the_cache_is_named_for_deletion(hub, load, tmp_path):
    load()
    blob = blob_of(tmp_path)
    blob.write_bytes(blob.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailableError, match=r"damaged|delete"):
        load()


@report("microsoft/foundry-local#906", "Wrong bytes of the right length passed every check, and failed much later.")
def test_wrong_bytes_of_the_right_length_are_noticed(hub, load, tmp_path):
    load()
    flip_a_byte(blob_of(tmp_path))
    with pytest.raises(ModelUnavailableError, match="SHA-256"):
        load()


@report("qdrant/fastembed#88", "A download that was interrupted left a cache that could not be used.")
def test_an_interrupted_download_is_completed_later(hub, load):
    hub.sent = 1000
    with pytest.raises(ModelUnavailableError, match="cut off"):
        load()
    hub.sent = None
    assert load().encode_texts(["cat"]).shape == (1, 8)


@report("janhq/jan#6861", "A repository that needs a token gave `Model download error` and nothing else.")
def test_a_repository_that_needs_a_token_is_refused_with_the_variable(hub, download):
    hub.status, hub.error_code = 403, "GatedRepo"
    done = download()
    assert_refused(done, "HF_TOKEN")
    assert re.search(r"request access at http://\S+/some/model", done.stderr)
    assert SPEC in done.stderr


@report("mlfoundations/open_clip#594", "A published model could not be loaded: status 404 for `open_clip_config.json`.")
def test_a_repository_without_a_configuration_is_refused_by_its_name(hub, download, folder):
    hub.add("some/model", folder, without=("open_clip_config.json",))
    assert_refused(download(), "has no open_clip_config.json")


@report(
    "mlfoundations/open_clip#505", "The short name of a model on a hub was not found, and nothing said how to write it."
)
def test_an_unknown_architecture_is_refused_with_the_forms_of_names(download):
    done = download("BiomedCLIP-PubMedBERT_256-vit_base_patch16_224")
    assert done.exit_code == 2
    assert "hf-hub:" in done.stderr


@report("LAION-AI/CLIP_benchmark#5", "The texts of the same classes were encoded again for each call.")
def test_texts_are_kept_on_disk_for_the_next_start(make_client, encoder):
    first = make_client([encoder])
    results_of(classify(first, picture("red"), labels=["a red cup", "a blue cup"]))
    encoder.encoded_texts.clear()
    assert best_of(classify(make_client([encoder]), picture("red"), labels=["a red cup", "a blue cup"])) == [
        "a red cup"
    ]
    assert not any("cup" in text for text in encoder.encoded_texts)
