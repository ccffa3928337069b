"""Fixtures for all folders of tests."""

import asyncio
import functools
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
from fastapi.testclient import TestClient
from hypothesis import settings as hypothesis_settings
from PIL import Image

from app.captions.cased.lexicon import WORDNET, Lexicon
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.runtime import cpu
from app.settings import Settings
from app.store.database import migrate, open_engine
from tests.event_loop_watchdog import (  # noqa: F401 - hooks
    pytest_addoption,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_runtestloop,
    pytest_terminal_summary,
)

# By default, an example has a limit of 200 ms; a busy machine is not a fault of the code.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")

# Each of many processes would otherwise compile the tests or the service again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Shells start background processes with interrupts ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Let the collector free what commands of this process have frozen; triton reports it as leaked at the exit."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Start one process more than there are cores, because tests often wait for processes; at most 4."""
    return min(4, cpu.usable_cores() + 1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True, scope="session")
def _plain_logs():
    """By default, structlog prints every local variable of a traceback, which takes seconds."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], renderer])


@pytest.fixture(autouse=True)
def _logs_as_they_were():
    """Commands and replicas that run in this process configure its logs."""
    root = logging.getLogger()
    handlers, level, configured = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configured)


@pytest.fixture(autouse=True, scope="session")
def _read_wordnet_once():
    """Reading it takes a third of a second, and each application reads it for itself."""
    load = Lexicon.load
    installed = functools.cache(functools.partial(load, WORDNET))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lexicon, "load", lambda folder=WORDNET: installed() if folder == WORDNET else load(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_priority():
    """Tests wait for the threads of background work, which the other test processes would keep waiting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_NICENESS", 0)
        yield


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    """Tests see the default settings, independent of the environment."""
    for name in list(os.environ):
        if name.upper().startswith("DEIXIS_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DEIXIS_CONFIG", "")  # not even the file in the user's folder
    monkeypatch.setenv("DEIXIS_SERVER", "local")  # not even one that happens to run on this machine
    monkeypatch.setenv("DEIXIS_BUILD_DEFAULT_DATABASE", "false")  # takes minutes, except with the fake encoder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """Return a migrated database to copy, because migrating takes longer than most tests."""
    file = tmp_path_factory.mktemp("database") / "deixis.sqlite3"

    async def make() -> None:
        engine = open_engine(f"sqlite:///{file}")
        await migrate(engine)
        await engine.dispose()

    asyncio.run(make())
    return file


@pytest.fixture
def settings(tmp_path, empty_database) -> Settings:
    shutil.copy(empty_database, tmp_path)
    return Settings(
        data_dir=tmp_path,
        models=("embedded",),
        build_default_database=False,
        max_images_per_request=8,
        max_queued_images=16,
    )


@pytest.fixture(scope="session", autouse=True)
def _no_negative_words():
    """The similarities of the fake encoder with photographs and everyday words say nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "encodes_negative_words", False)
        yield


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def make_client(settings, encoder) -> Iterator[Callable[..., httpx.Client]]:
    """Return a function that starts the whole application with the fake encoder; keyword arguments change settings."""
    opened = []

    def start(encoders=None, **changes) -> TestClient:
        changed = settings.model_copy(update=changes)
        app = create_app(changed, lambda _: encoders or [encoder])
        client = TestClient(app, "http://localhost", raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def lexicon_folder(tmp_path) -> Path:
    """Write files of WordNet with a few words each; other words are taken for nouns."""
    from tests.captions.cased.test_lexicon import LICENCE, SAMPLE

    place = tmp_path / "lexicon"
    place.mkdir()
    for name, text in SAMPLE.items():
        (place / name).write_text(text if name.endswith(".exc") else LICENCE + text)
    return place


@pytest.fixture
def client(make_client) -> httpx.Client:
    return make_client()


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory, empty_database) -> Iterator[httpx.Client]:
    """One application for the tests of a module that do not depend on what other tests have written."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.upper().startswith("DEIXIS_")]:
            patch.delenv(name)
        settings = Settings(
            data_dir=folder,
            models=("embedded",),
            build_default_database=False,
            max_images_per_request=8,
            max_queued_images=16,
        )
    encoder = FakeEncoder()
    app = create_app(settings, lambda _: [encoder])
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        yield client


def picture(colour="red", size=(32, 24), file_format="PNG") -> bytes:
    """Return a one-coloured image as the bytes of a file."""
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, file_format)
    return file.getvalue()


def photograph(pixels: np.ndarray, file_format="JPEG") -> bytes:
    """Return an array (h, w, 3) as the bytes of a file."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, file_format, quality=95)
    return file.getvalue()
