"""One application for all tests of a module that do not depend on each other's writes."""

import os
import shutil
from collections.abc import Iterator

import httpx
import pytest
from fastapi.testclient import TestClient

from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory, empty_database) -> Iterator[httpx.Client]:
    """The whole application with the fake encoder and the settings of the fixture ``settings``."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper().startswith("DEIXIS_")]:
            patch.delenv(name)
        settings = Settings(
            data_dir=folder, models=("embedded",), build_wordnet=False, max_images_per_request=8, max_queued_images=16
        )
    encoder = FakeEncoder()
    with TestClient(create_app(settings, lambda _: [encoder]), raise_server_exceptions=False) as client:
        yield client
