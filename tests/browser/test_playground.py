"""The page in a real browser, headless Chromium, against a real server."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import photograph
from tests.end_to_end.server import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
KEY = "a key of the browser's tests, long enough"


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        assert os.environ.get("TEST_REQUIRE_CHROMIUM") != "1", "chromium is not on PATH"
        pytest.skip("chromium is not on PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(data_dir=tmp_path_factory.mktemp("data")) as running:
        with running.client() as client:
            client.put("/v1/label-sets/things", json={"classes": ["cat", "coffee cup"]}).raise_for_status()
        yield running


@pytest.fixture(scope="module")
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
        page.on("request", lambda request: asked.append((request.url, url)))
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


def choose(page, *files: Path):
    page.set_input_files("#files", [str(file) for file in files])


def classify(page):
    page.click("#classify")
    page.wait_for_selector("#answers > li")


def best(page) -> list[str]:
    return page.locator("#answers .bars li:first-child .bar span").all_inner_texts()


def test_pictures_are_classified_among_words_with_scores_and_reasons(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#word", "cat, dog\ncoffee cup")
    page.click("#add")
    assert page.locator("#chips li").count() == 3
    page.click("[aria-label='Remove dog']")
    page.fill("#word", "Cat, rocket")
    classify(page)
    assert page.locator("#chips li").count() == 3  # a word is taken once, and what was typed is added
    assert best(page) == ["cat", "coffee cup"]
    assert re.fullmatch(r"\d+ %|\d\.\d %", page.locator(".score").first.inner_text())
    why = page.locator("#answers > li").first.locator("details")
    why.locator("summary").click()
    assert "a photo of a cat." in why.inner_text()
    assert "zero-shot with embedded" in page.inner_text("#status")


def test_what_is_shown_to_copy_asks_the_same(open_page, pictures, server, monkeypatch, tmp_path):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#word", "cat, it's a dog")
    classify(page)
    page.click("#code summary")
    curl, python = page.inner_text("#curl"), page.inner_text("#python")
    assert f"{server.url}/v1/classify" in curl
    assert "image=@'chelsea.jpg'" in curl
    shutil.copy(pictures / "chelsea.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    printed = []
    exec(python, {"print": printed.append})
    assert printed[0]["label"] == "cat"


def test_label_sets_and_methods_can_be_chosen(open_page, pictures):
    page = open_page()
    choose(page, pictures / "coffee.jpg")
    page.check("input[value=label_set]")
    page.wait_for_selector("#label-set option", state="attached")
    page.click("form details summary")
    page.select_option("#method", "autoclip")
    assert "Metzen" in page.inner_text("#method-summary")
    page.fill("#reject-below", "1")
    classify(page)
    assert best(page) == ["coffee cup"]
    assert "autoclip with embedded" in page.inner_text("#status")
    assert "None of these" in page.inner_text("#answers")


def test_errors_are_sentences_in_the_place_they_belong_to(open_page, pictures):
    page = open_page()
    page.click("#classify")
    assert page.inner_text("#error") == "Choose at least one picture."
    choose(page, pictures / "chelsea.jpg", pictures / "broken.jpg")
    page.click("#classify")
    assert page.inner_text("#error") == "Say at least one word."
    page.fill("#word", "cat, dog")
    classify(page)
    assert not page.is_visible("#error")
    assert "This is not an image that can be read" in page.locator("#answers > li").nth(1).inner_text()
    page.click("form details summary")
    page.fill("#template", "no place for the word")
    page.click("#classify")
    page.wait_for_selector("#error:not([hidden])")
    assert "unknown template set 'no place for the word'" in page.inner_text("#error")


def test_words_of_others_are_text_and_never_markup(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#word", "<img src=x onerror=alert(1)>, <b>dog</b>")
    classify(page)
    assert page.locator("#answers b, #chips b, #chips img").count() == 0
    assert "<b>dog</b>" in page.inner_text("#answers")


def test_everything_can_be_done_with_the_keyboard(open_page):
    page = open_page()
    page.focus("#samples")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pictures li:nth-child(10)")
    page.focus("#word")
    page.keyboard.type("red circle, blue square")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answers > li:nth-child(10)")
    assert page.evaluate("document.activeElement.id") == "results"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input:not([type=file]), select, textarea')]"
        ".filter((each) => !each.labels?.length && !each.getAttribute('aria-label') && !each.textContent.trim())"
        ".map((each) => each.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(open_page, pictures, scheme, width):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    choose(page, pictures / "chelsea.jpg")
    page.fill("#word", "cat, a word that is very much longer than most words that anybody would ever want to use here")
    classify(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")


def test_a_server_that_asks_for_a_key_gets_it_from_the_page_which_forgets_it(open_page, pictures, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f"[[keys]]\nid = 'browser'\nkey = {json.dumps(KEY)}\n")
    with serving("--api-keys-file", str(file), data_dir=tmp_path / "data") as closed:
        page = open_page(closed.url)
        page.wait_for_selector("#error:not([hidden])")
        assert "A key is needed" in page.inner_text("#error")
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        page.wait_for_selector("#method option[value=autoclip]", state="attached")
        choose(page, pictures / "chelsea.jpg")
        page.fill("#word", "cat, dog")
        classify(page)
        assert best(page) == ["cat"]
        page.click("#code summary")
        assert "$DEIXIS_API_KEY" in page.inner_text("#curl")
        assert KEY not in page.content()
        page.reload()
        assert page.input_value("#key") == ""
