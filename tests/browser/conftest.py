"""Headless Chromium, a server, and photographs."""

import base64
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import photograph
from tests.end_to_end.server import serving

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        assert os.environ.get("TEST_REQUIRE_CHROMIUM") != "1", "chromium is not on PATH"
        pytest.skip("chromium is not on PATH")
    # The default of five seconds is too short on a busy machine.
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(data_dir=tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Photographs of a cat and of a cup of coffee, several crops of each, and a broken file."""
    import skimage.data

    folder = tmp_path_factory.mktemp("pictures")
    for name in ("chelsea", "coffee"):
        pixels = getattr(skimage.data, name)()
        (folder / f"{name}.jpg").write_bytes(photograph(pixels))
        for cut in range(1, 5):
            (folder / f"{name}-{cut}.jpg").write_bytes(photograph(pixels[cut * 9 :, cut * 7 :]))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture(scope="module")
def shared_context(browser, server):
    """A context with an open page, so that the process of the browser with the compiled scripts is kept."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    context.new_page().goto(f"{server.url}/healthz")
    yield context
    context.close()


@pytest.fixture
def open_page(browser, server, shared_context):
    """Open the page; requests to other hosts and errors or warnings of the browser fail the test.

    The first page of a test has the shared context, without what earlier tests stored. Further pages are those of other
    users, and have contexts of their own, as have pages with options.
    """
    contexts, requests, complaints = [], [], []

    def on_console(message):
        # The browser logs every response with an error status; the tests check what the page shows for it.
        refusal = "Failed to load resource: the server responded with a status of"
        is_refusal = message.text.startswith((f"{refusal} 4", f"{refusal} 501"))
        if message.type in {"error", "warning"} and not is_refusal:
            complaints.append(message.text)

    def new_page(url, options):
        if options or url != server.url or len(shared_context.pages) > 1:
            context = browser.new_context(**options)
            context.set_default_timeout(20_000)
            contexts.append(context)
            return context.new_page()
        page = shared_context.new_page()
        shared_context.clear_permissions()
        stored = {"origin": url, "storageTypes": "cookies,local_storage,indexeddb"}
        shared_context.new_cdp_session(page).send("Storage.clearDataForOrigin", stored)
        return page

    def open_view(view="", url=server.url, **options):
        page = new_page(url, options)
        page.on("request", lambda request: requests.append((request.url, url)))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", on_console)
        page.goto(f"{url}/{view}")
        page.wait_for_load_state("networkidle")
        return page

    yield open_view
    for page in shared_context.pages[1:]:
        page.close()
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(each.startswith((url, f"blob:{url}", "data:")) for each, url in requests)


@pytest.fixture
def drop():
    """Drop files on the element that a selector finds."""

    def dropped(page, selector: str, *files: Path, media_type: str = "image/jpeg"):
        contents = [
            {"name": file.name, "type": media_type, "base64": base64.b64encode(file.read_bytes()).decode()}
            for file in files
        ]
        transfer = page.evaluate_handle(
            """files => {
                const transfer = new DataTransfer();
                for (const { name, type, base64 } of files) {
                    const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0));
                    transfer.items.add(new File([bytes], name, { type }));
                }
                return transfer;
            }""",
            contents,
        )
        page.locator(selector).dispatch_event("drop", {"dataTransfer": transfer})

    return dropped
