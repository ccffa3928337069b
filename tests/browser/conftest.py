"""A real browser, headless Chromium, and a real server that its pages are from."""

import io
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import photograph
from tests.end_to_end.server import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CAPTIONS = [
    *("a cat with green eyes", "a cat on a sofa", "a cup of coffee on a table", "a rocket at its launch"),
    *(f"a dog on beach number {number}" for number in range(40)),
]
IMAGES = Path(__file__).parents[2] / "docs/images"


@pytest.fixture(scope="package")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        assert os.environ.get("TEST_REQUIRE_CHROMIUM") != "1", "chromium is not on PATH"
        pytest.skip("chromium is not on PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    with serving(data_dir=tmp_path_factory.mktemp("data")) as running:
        with running.client() as client:
            client.put("/v1/label-sets/things", json={"classes": ["cat", "coffee cup"]}).raise_for_status()
            built = client.put("/v1/databases/photos", json={"captions": CAPTIONS}).raise_for_status().json()
            while built["status"] in {"queued", "running"}:
                built = client.get(f"/v1/jobs/{built['id']}").json()
            assert built["status"] == "succeeded"
        yield running


@pytest.fixture(scope="package")
def pictures(tmp_path_factory):
    import skimage.data

    folder = tmp_path_factory.mktemp("pictures")
    for name in ("chelsea", "coffee"):
        (folder / f"{name}.jpg").write_bytes(photograph(getattr(skimage.data, name)()))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture
def open_page(browser, server):
    """Open the page; what it asks of other hosts, and what the browser complains of, fails the test."""
    contexts, asked, complaints = [], [], []

    def opened(url=server.url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append((request.url, url.partition("#")[0])))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(each.startswith((url, "blob:", "data:")) for each, url in asked)


@pytest.fixture
def shoot():
    """Takes a screenshot for the documentation, where the environment asks for it."""

    def take(page, name):
        if os.environ.get("TEST_SCREENSHOTS") == "1":
            shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
            shot.quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"page-{name}.png", optimize=True)

    return take
