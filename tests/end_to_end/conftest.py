from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from sklearn.datasets import load_sample_images

from tests.conftest import photograph
from tests.end_to_end.server import Server, serving
from tests.postgres import postgres_server, postgres_url  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    """One real server with the embedded model for every test that does not end it."""
    with serving(data_dir=tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(scope="session")
def photographs() -> dict[str, bytes]:
    """Real photographs that come inside scikit-image and scikit-learn, as JPEG files."""
    china, flower = load_sample_images().images
    pixels: dict[str, np.ndarray] = {
        "chelsea": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "rocket": skimage.data.rocket(),
        "astronaut": skimage.data.astronaut(),
        "china": china,
        "flower": flower,
    }
    return {name: photograph(array) for name, array in pixels.items()}


@pytest.fixture(scope="session")
def photograph_folder(photographs, tmp_path_factory) -> Path:
    """The photographs in one subfolder per class, underscores for spaces."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, classname in TRUE_LABELS.items():
        place = folder / classname.replace(" ", "_")
        place.mkdir()
        (place / f"{name}.jpg").write_bytes(photographs[name])
    return folder


TRUE_LABELS = {
    "chelsea": "cat",
    "coffee": "coffee cup",
    "rocket": "rocket",
    "astronaut": "astronaut",
    "china": "temple",
    "flower": "flower",
}
