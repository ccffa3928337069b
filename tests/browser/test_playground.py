"""The page in a real browser, headless Chromium, against a real server."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.server import serving

KEY = "a key of the browser's tests, long enough"


def choose(page, *files: Path):
    page.set_input_files("#files", [str(file) for file in files])


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("desktop", 1280, "light"), ("phone", 390, "light"), ("dark", 1280, "dark")]
)
def test_what_is_shown_in_the_documentation(open_page, pictures, shoot, server, name, width, scheme):
    page = open_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#word", "cat, dog, coffee cup, rocket")
    page.click("form details summary")
    page.fill("#reject-below", "0.3")
    classify(page)
    shoot(page, f"classify-{name}")
    with server.client() as client:
        described = {
            "classes": [
                {"name": "cat", "features": ["pointed ears", "long whiskers", "vertical pupils"]},
                {"name": "coffee cup", "features": ["a handle", "a saucer", "dark liquid inside"]},
            ]
        }
        client.put("/v1/label-sets/described", json=described).raise_for_status()
    page.check("input[value=label_set]")
    page.wait_for_selector("#label-set option[value=described]", state="attached")
    page.select_option("#label-set", "described")
    page.select_option("#method", "dclip")
    page.click("#classify")
    page.wait_for_selector("#status:has-text('dclip')")
    page.locator("#answers > li").first.locator("summary").click()
    assert "cat, which has" in page.locator("#answers > li").first.inner_text()
    shoot(page, f"explanation-{name}")
    page.fill("#template", "no place for the word")
    page.click("#classify")
    page.wait_for_selector("#error:not([hidden])")
    shoot(page, f"error-{name}")


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
    assert printed[0].label == "cat"


def test_label_sets_and_methods_can_be_chosen(open_page, pictures):
    page = open_page()
    choose(page, pictures / "coffee.jpg")
    page.check("input[value=label_set]")
    page.wait_for_selector("#label-set option", state="attached")
    page.select_option("#label-set", "things")
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
