import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from app.encoders.catalogue import ModelCard, load_catalogue
from app.encoders.model_names import HUB_IDS, catalogue_name
from app.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
CARDS = load_catalogue(ROOT / "models")

MINIMAL = {
    "name": '"ViT-B-32/laion2b_s34b_b79k"',
    "title": '"a title"',
    "family": '"a family"',
    "year": "2022",
    "paper": '"https://example.org/paper"',
    "licence": '"MIT"',
    "licence_url": '"https://example.org/licence"',
    "commercial_use": "true",
    "embed_dim": "512",
    "image_size_px": "224",
    "params_millions": "151.28",
    "probability": '"softmax"',
    "languages": '"English"',
    "training_data": '"images"',
    "notes": '"a note"',
}


def write_card(file: Path, **changes: str | None) -> None:
    fields = {key: value for key, value in (MINIMAL | changes).items() if value is not None}
    file.write_text("\n".join(f"{key} = {value}" for key, value in fields.items()), encoding="utf-8")


def test_a_card_has_the_fields_of_its_file(tmp_path):
    write_card(tmp_path / "one.toml")
    card = load_catalogue(tmp_path)["ViT-B-32/laion2b_s34b_b79k"]
    assert (card.architecture, card.pretrained, card.embed_dim) == ("ViT-B-32", "laion2b_s34b_b79k", 512)
    assert card.float32_bytes == 605_120_000
    assert card.imagenet_zero_shot_top1 is None


def test_other_files_and_folders_are_ignored(tmp_path):
    (tmp_path / "embedded").mkdir()
    write_card(tmp_path / "embedded" / "inner.toml", year='"broken"')
    (tmp_path / "README.md").write_text("not a card")
    assert load_catalogue(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"notes": None}, "notes"),
        ({"licence": None}, "licence"),
        ({"imagenet": "63.3"}, "imagenet"),
        ({"year": '"2022"'}, "year"),
        ({"year": "2019"}, "year"),
        ({"embed_dim": "512.0"}, "embed_dim"),
        ({"embed_dim": "true"}, "embed_dim"),
        ({"commercial_use": '"yes"'}, "commercial_use"),
        ({"probability": '"tanh"'}, "probability"),
        ({"name": '"ViT-B-32"'}, "name"),
        ({"paper": '"arXiv 2103.00020"'}, "paper"),
        ({"imagenet_zero_shot_top1": "0.0", "imagenet_source": '"a table"'}, "imagenet_zero_shot_top1"),
        ({"imagenet_zero_shot_top1": "66.6"}, "imagenet_source"),
        ({"imagenet_source": '"a table"'}, "imagenet_zero_shot_top1"),
    ],
)
def test_the_error_for_an_invalid_key_names_key_and_file(tmp_path, changes, key):
    write_card(tmp_path / "broken.toml", **changes)
    with pytest.raises(ConfigurationError, match=rf"broken\.toml: .*\b{key}\b"):
        load_catalogue(tmp_path)


def test_all_invalid_keys_of_a_file_are_listed(tmp_path):
    write_card(tmp_path / "broken.toml", notes=None, year='"2022"')
    with pytest.raises(ConfigurationError, match=r"year: .*; .*notes: "):
        load_catalogue(tmp_path)


def test_two_cards_with_the_same_name_are_rejected(tmp_path):
    write_card(tmp_path / "one.toml")
    write_card(tmp_path / "two.toml")
    with pytest.raises(ConfigurationError, match=r"two\.toml: name: .*also in one\.toml"):
        load_catalogue(tmp_path)


@pytest.mark.parametrize("content", [b"name = ", b'name = "\xff"'])
def test_the_error_for_a_file_that_is_not_toml_names_it(tmp_path, content):
    (tmp_path / "broken.toml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"broken\.toml: not a TOML file"):
        load_catalogue(tmp_path)


def test_the_error_for_a_missing_folder_names_it(tmp_path):
    with pytest.raises(ConfigurationError, match="nowhere"):
        load_catalogue(tmp_path / "nowhere")


def test_reading_the_catalogue_does_not_import_torch():
    code = "import sys, app.encoders.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_table_in_the_guide_has_a_row_per_card():
    table = runpy.run_path(str(ROOT / "docs" / "generate.py"))["models_table"](CARDS)
    assert len(table.splitlines()) == len(CARDS) + 2
    assert all(f"| `{name}` |" in table for name in CARDS)


def test_every_hub_id_stands_for_a_model_of_the_catalogue():
    assert {catalogue_name(hub_id) for hub_id in HUB_IDS} <= CARDS.keys()
    assert catalogue_name("openai/clip-vit-base-patch32") == "ViT-B-32-quickgelu/openai"
    assert [catalogue_name(name) for name in ("embedded", *CARDS)] == ["embedded", *CARDS]


@pytest.fixture(scope="module")
def open_clip():
    import open_clip  # imported here, because it takes seconds and only the last class uses it

    return open_clip


def test_a_hub_id_that_open_clip_knows_stands_for_the_weights_of_that_repository(open_clip):
    known = {
        open_clip.get_pretrained_cfg(*name.split("/")).get("hf_hub", "").removesuffix("/"): name
        for name in ("/".join(pair) for pair in open_clip.list_pretrained())
    }
    shared = HUB_IDS.keys() & known.keys()
    assert {hub_id: HUB_IDS[hub_id] for hub_id in shared} == {hub_id: known[hub_id] for hub_id in shared}
    assert len(shared) >= 5


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
class TestACardEqualsOpenClip:
    def test_in_its_name(self, card: ModelCard, open_clip):
        assert (card.architecture, card.pretrained) in open_clip.list_pretrained()

    def test_in_its_sizes(self, card: ModelCard, open_clip):
        config = open_clip.get_model_config(card.architecture)
        assert card.embed_dim == config["embed_dim"]
        assert card.image_size_px == config["vision_cfg"]["image_size"]

    def test_in_its_score_function(self, card: ModelCard, open_clip):
        has_bias = "init_logit_bias" in open_clip.get_model_config(card.architecture)
        assert card.probability == ("sigmoid" if has_bias else "softmax")

    def test_in_its_activation(self, card: ModelCard, open_clip):
        """A tag that was trained with QuickGELU loads into an architecture without it, but is less accurate."""
        trained_with = open_clip.get_pretrained_cfg(card.architecture, card.pretrained).get("quick_gelu", False)
        assert trained_with == open_clip.get_model_config(card.architecture).get("quick_gelu", False)
