"""The playground in a real browser: classifying, searching captions, API keys, navigation, and the layout."""

import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from app.captions.cased.lexicon import WORDNET
from tests.end_to_end.server import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

KEY = "a key of the browser's tests, long enough"
CAPTIONS = [
    "a tabby cat looks into the camera",
    "a cat and a kitten share a basket",
    "a cup of coffee on a wooden table",
    "a dog runs along a beach",
    "a rocket starts in the morning",
]
SCREENSHOTS = Path(__file__).parents[2] / "docs" / "images"
WITH_SCREENSHOTS = os.environ.get("TEST_SCREENSHOTS") == "1"


@pytest.fixture(scope="module", autouse=True)
def contents(client):
    """A label set with descriptions and example images to come, and a caption database."""
    described = {
        "name": "cat",
        "descriptions": [
            "A cat has a short face with whiskers and slit pupils.",
            "A cat has pointed ears and soft fur.",
        ],
        "features": ["whiskers", "slit pupils", "pointed ears"],
    }
    cup = {
        "name": "coffee cup",
        "synonyms": ["espresso cup"],
        "descriptions": ["A coffee cup is round, with a handle and dark liquid in it."],
        "features": ["round handle", "white saucer"],
    }
    client.put("/v1/label-sets/things", json={"classes": [described, cup, "rocket"]}).raise_for_status()
    built(client, "archive", CAPTIONS)


def built(client, name, captions):
    job = client.put(f"/v1/databases/{name}", json={"captions": captions}).raise_for_status().json()
    deadline = time.monotonic() + 60
    while job["status"] not in {"succeeded", "failed"}:
        assert time.monotonic() < deadline
        job = client.get(f"/v1/jobs/{job['id']}").json()
    assert job["status"] == "succeeded", job["error"]


def choose(page, *files: Path):
    page.set_input_files("#files", [str(file) for file in files])


def classify(page):
    page.click("#classify")
    page.wait_for_selector("#answers > li")


def best(page) -> list[str]:
    return page.locator("#answers .bars li:first-child .bar span").all_inner_texts()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id")


def test_images_are_classified_with_scores_and_an_explanation(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, dog\ncoffee cup")
    page.click("#add-labels")
    expect(page.locator("#labels li")).to_have_count(3)
    page.click("[aria-label='Remove dog']")
    page.fill("#new-labels", "Cat, rocket")
    classify(page)
    expect(page.locator("#labels li")).to_have_count(3)  # duplicates are ignored, and typed labels are added
    assert best(page) == ["cat", "coffee cup"]
    assert re.fullmatch(r"\d+ %|\d\.\d %", page.locator(".score").first.inner_text())
    explanation = page.locator("#answers > li").first.locator("details")
    explanation.locator("summary").click()
    assert "a photo of a cat." in explanation.inner_text()
    assert "Method zero-shot, model embedded" in page.inner_text("#status")


def test_the_code_to_copy_sends_the_same_request(open_page, pictures, server, monkeypatch, tmp_path):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, it's a dog")
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
    page.click("#classify-form details summary")
    page.select_option("#method", "autoclip")
    assert "Metzen" in page.inner_text("#method-summary")
    page.fill("#reject-below", "1")
    classify(page)
    assert best(page) == ["coffee cup"]
    assert "Method autoclip, model embedded" in page.inner_text("#status")
    assert "Rejected: the best score is below the threshold" in page.inner_text("#answers")


def test_images_can_be_dropped_anywhere_and_other_files_are_named(open_page, pictures, drop):
    page = open_page()
    drop(page, "#drop", pictures / "chelsea.jpg")
    drop(page, "#results", pictures / "coffee.jpg")
    expect(page.locator("#pictures li")).to_have_count(2)
    drop(page, "#drop", pictures / "broken.jpg", media_type="application/pdf")
    expect(page.locator("#left-out")).to_have_text("Skipped, not an image: broken.jpg.")
    expect(page.locator("#pictures li")).to_have_count(2)


def test_the_samples_add_their_labels_unless_there_are_labels(open_page):
    page = open_page()
    page.click("#samples")
    expect(page.locator("#pictures li")).to_have_count(10)
    expect(page.locator("#labels li")).to_have_count(10)
    expect(page.locator("#left-out")).to_contain_text("These are drawings")
    page.click("#remove-labels")
    expect(page.locator("#new-labels")).to_be_focused()
    page.fill("#new-labels", "circle, square")
    page.click("#samples")
    expect(page.locator("#pictures li")).to_have_count(20)
    expect(page.locator("#labels li")).to_have_count(0)


def test_errors_are_shown_as_sentences_in_their_place(open_page, pictures):
    page = open_page()
    page.click("#classify")
    assert page.inner_text("#error") == "Select at least one image."
    choose(page, pictures / "chelsea.jpg", pictures / "broken.jpg")
    page.click("#classify")
    assert page.inner_text("#error") == "Enter at least one label."
    page.fill("#new-labels", "cat, dog")
    classify(page)
    expect(page.locator("#error")).to_be_hidden()
    assert "Not a readable image" in page.locator("#answers > li").nth(1).inner_text()
    page.click("#classify-form details summary")
    page.fill("#template", "no place for the label")
    page.click("#classify")
    page.wait_for_selector("#error:not([hidden])")
    assert "unknown template set 'no place for the label'" in page.inner_text("#error")
    expect(page.locator("#answers > li")).to_have_count(0)  # results of the earlier request


def test_an_invalid_field_shows_its_error_and_has_the_focus(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", f"cat, {'x' * 201}")
    page.click("#classify")
    note = page.locator("#source-labels .field-problem")
    expect(note).to_contain_text("has 201 characters, at most 200 are allowed")
    assert page.get_attribute("#new-labels", "aria-describedby") == note.get_attribute("id")
    assert page.inner_text("#error") == "1 entry is invalid; see the message next to it."
    expect(page.locator("#new-labels")).to_be_focused()
    page.locator("#labels button").nth(1).click()
    options = page.locator("#classify-form details")
    options.locator("summary").click()
    page.fill("#template", "a {thing} {}")
    options.locator("summary").click()
    page.click("#classify")
    expect(options.locator(".field-problem")).to_contain_text("has a brace that is not part of {}")  # it was opened
    expect(page.locator("#template")).to_be_focused()
    expect(note).to_have_count(0)
    page.fill("#template", "")
    classify(page)
    expect(page.locator(".field-problem, [aria-invalid]")).to_have_count(0)
    expect(page.locator("#error")).to_be_hidden()


def test_labels_are_shown_as_text_and_never_as_markup(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "<img src=x onerror=alert(1)>, <b>dog</b>")
    classify(page)
    expect(page.locator("#answers b, #labels b, #labels img")).to_have_count(0)
    assert "<b>dog</b>" in page.inner_text("#answers")


@pytest.mark.skipif(
    not (WORDNET / "data.noun").exists() and os.environ.get("TEST_REQUIRE_WORDNET") != "1",
    reason="WordNet's files are missing; install Debian's wordnet-base",
)
def test_labels_are_discovered_in_the_selected_database(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.check("input[value=none]")
    page.wait_for_selector("#database option[value=archive]", state="attached")
    page.select_option("#database", "archive")
    classify(page)
    assert best(page) == ["cat"]
    assert "Method cased" in page.inner_text("#status")
    page.locator("#answers summary").first.click()
    assert CAPTIONS[0] in page.inner_text("#answers .prompts")


# --- captions --------------------------------------------------------------------------------------------------------


def captions(page) -> list[str]:
    return page.locator("#captions .bar span").all_inner_texts()


def search(page):
    page.click("#search button[type=submit]")


def test_captions_are_searched_by_text_one_page_at_a_time(open_page):
    page = open_page("#captions")
    expect(page.locator("#search-database")).to_have_value("archive")
    page.fill("#search-text", "a cat")
    page.click("#search details summary")
    page.fill("#search-limit", "2")
    search(page)
    expect(page.locator("#search-status")).to_contain_text("Captions 1 to 2, nearest first")
    first = captions(page)
    assert set(first) == set(CAPTIONS[:2])
    scores = [float(each) for each in page.locator("#captions .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    expect(page.locator("#previous-captions")).to_be_hidden()
    page.click("#next-captions")
    expect(page.locator("#search-status")).to_contain_text("Captions 3 to 4")
    assert not set(captions(page)) & set(first)
    page.click("#next-captions")
    expect(page.locator("#search-status")).to_contain_text("Captions 5 to 5")
    expect(page.locator("#next-captions")).to_be_hidden()
    page.click("#previous-captions")
    page.click("#previous-captions")
    expect(page.locator("#search-status")).to_contain_text("Captions 1 to 2")
    assert captions(page) == first


def test_captions_are_searched_by_an_image_and_filtered(open_page, pictures, drop):
    page = open_page("#captions")
    drop(page, "#found-captions", pictures / "coffee.jpg")
    expect(page.locator("#search-picture img")).to_be_visible()
    search(page)
    expect(page.locator("#captions li")).to_have_count(5)
    assert captions(page)[0] == CAPTIONS[2]
    page.click("#search details summary")
    page.fill("#search-contains", "CAT")
    search(page)
    expect(page.locator("#captions li")).to_have_count(2)
    page.fill("#search-min-score", "0.99")
    search(page)
    expect(page.locator("#search-status")).to_contain_text("No caption matches, among the 5 nearest")
    assert captions(page) == []


def test_an_invalid_search_shows_the_reason(open_page):
    page = open_page("#captions")
    search(page)
    expect(page.locator("#search-text-field .field-problem")).to_have_text("Enter a text to search for.")
    expect(page.locator("#search-text")).to_be_focused()
    page.check("#search-by-picture")
    search(page)
    expect(page.locator("#search-error")).to_have_text("Select an image.")
    page.check("input[name=search-by][value=text]")
    page.fill("#search-text", "x" * 1001)
    search(page)
    expect(page.locator("#search-text-field .field-problem")).to_contain_text("at most 1000 are allowed")


# --- navigation -------------------------------------------------------------------------------------------------------


def test_views_have_addresses_for_links_and_the_back_button(open_page, server):
    page = open_page()
    assert page.title() == "Classify · Deixis"
    page.click("nav a[href='#captions']")
    expect(page.locator("#view-captions")).to_be_visible()
    assert page.locator(".views [aria-current]").all_inner_texts() == ["Captions"]
    expect(page.locator("#view-captions")).to_be_focused()
    page.click("nav a[href='#label-sets']")
    page.click("#label-set-list a >> text=things")
    expect(page.locator("#editor-title")).to_have_text("things")
    assert page.url == f"{server.url}/#label-sets/things"
    assert page.title() == "things · Deixis"
    page.go_back()
    expect(page.locator("#editor")).to_be_hidden()
    page.go_back()
    expect(page.locator("#view-captions")).to_be_visible()
    page.goto(f"{server.url}/#classify/things")
    expect(page.locator("#label-set")).to_have_value("things")
    page.goto(f"{server.url}/#nowhere")
    page.reload()
    expect(page.locator("#view-classify")).to_be_visible()


def test_everything_works_with_the_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    reached = []
    while "add-labels" not in reached:
        assert len(reached) < 12, reached
        page.keyboard.press("Tab")
        reached.append(focused(page))
        if focused(page) == "samples":
            page.keyboard.press("Enter")
            page.wait_for_selector("#pictures li:nth-child(10)")
            page.focus("#new-labels")  # past ten images and ten labels, each with a remove button
            reached.append("new-labels")
    assert [each for each in reached if each] == ["files", "samples", "new-labels", "add-labels"]
    page.focus("#new-labels")
    page.keyboard.type("a circle")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answers > li:nth-child(10)")
    expect(page.locator("#results")).to_be_focused()


def test_results_that_arrive_leave_the_focus_where_somebody_types(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, dog")
    held = []
    page.route("**/v1/classify", lambda route: held.append(route))  # noqa: PLW0108 - playwright marks the function
    with page.expect_request("**/v1/classify"):
        page.click("#classify")
    page.locator("#new-labels").press_sequentially("roc")
    for route in held:
        route.continue_()
    page.wait_for_selector("#answers > li")
    expect(page.locator("#new-labels")).to_be_focused()
    page.keyboard.type("ket")
    expect(page.locator("#new-labels")).to_have_value("rocket")


def test_removing_with_the_keyboard_keeps_the_focus_in_place(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, dog")
    page.click("#add-labels")
    page.focus("[aria-label='Remove chelsea.jpg']")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove coffee.jpg"
    page.keyboard.press("Enter")
    expect(page.locator("#files")).to_be_focused()
    page.focus("[aria-label='Remove dog']")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove cat"


@pytest.mark.parametrize("view", ["#classify", "#label-sets/things", "#new-label-set", "#captions"])
def test_every_control_has_a_name_and_every_image_an_alternative_text(open_page, view):
    page = open_page(view)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    page.click("#samples", force=True) if view == "#classify" else None
    page.wait_for_load_state("networkidle")
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, a, input, select, textarea, summary, progress, table, dialog')]
            .filter((each) => ![...(each.labels || [])].some((label) => label.textContent.trim())
                && !each.getAttribute('aria-label') && !each.textContent.trim())
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    expect(page.locator("img:not([alt])")).to_have_count(0)


CONTRAST = """() => {
    const channels = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
        .map((each) => (each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
        .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const found = channels(getComputedStyle(each).backgroundColor);
            if (found.length === 3 || found[3] > 0) return found;
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const each of document.querySelectorAll('body *')) {
        const text = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        const isApart = each.closest('.bar, .wrong, .right, :disabled, option');
        if (!text || isApart || !each.checkVisibility()) continue;
        const [one, other] = [light(channels(getComputedStyle(each).color)), light(ground(each))];
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${each.tagName} ${each.textContent.slice(0, 40)}`);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_layout_fits_phones_and_desktops_in_light_and_dark(open_page, pictures, scheme, width):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    choose(page, pictures / "chelsea.jpg", pictures / "broken.jpg")
    page.fill(
        "#new-labels", "cat, a label that is very much longer than most labels that anybody would ever want to use"
    )
    classify(page)
    for view in ("classify", "label-sets/things", "captions"):
        page.evaluate(f"location.hash = '#{view}'")
        page.wait_for_load_state("networkidle")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        assert page.evaluate(CONTRAST) == [], view
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")


def test_the_page_sends_an_api_key_and_does_not_store_it(open_page, pictures, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f"[[keys]]\nid = 'browser'\nkey = {json.dumps(KEY)}\nscope = 'write'\n")
    with serving("--api-keys-file", str(file), data_dir=tmp_path / "data") as closed:
        required = "The server requires an API key."
        page = open_page("#captions", url=closed.url)
        expect(page.locator("#search-error")).to_contain_text(required)
        expect(page.locator("#key")).to_be_focused()
        page.click("nav a[href='#label-sets']")
        expect(page.locator("#label-sets-error")).to_contain_text(required)
        expect(page.locator("#key")).to_be_focused()
        page.goto(f"{closed.url}/#new-label-set")
        page.fill("#editor-name", "pets")
        page.fill("#new-classes", "cat, dog")
        page.click("#save-label-set")
        expect(page.locator("#editor-error")).to_contain_text(required)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("not the key of anybody here")
        page.keyboard.press("Enter")
        expect(page.locator("#label-sets-error")).to_contain_text("does not accept this API key")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        expect(page.locator("#label-sets-error")).to_be_hidden()
        expect(page.locator("#editor-name")).to_have_value("pets")  # typed text is kept
        page.click("#save-label-set")
        expect(page.locator("#editor-status")).to_have_text("Saved as version 1.")
        page.click("nav a[href='#classify']")
        page.wait_for_selector("#method option[value=autoclip]", state="attached")
        choose(page, pictures / "chelsea.jpg")
        page.fill("#new-labels", "cat, dog")
        classify(page)
        assert best(page) == ["cat"]
        page.click("#code summary")
        assert "$DEIXIS_API_KEY" in page.inner_text("#curl")
        assert KEY not in page.content()
        page.reload()
        expect(page.locator("#key")).to_have_value("")
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


# --- screenshots for the documentation -------------------------------------------------------------------------------

LOOKS = {
    "desktop": {"viewport": {"width": 1180, "height": 820}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
    "dark": {"viewport": {"width": 1180, "height": 820}, "color_scheme": "dark"},
}


@pytest.mark.skipif(not WITH_SCREENSHOTS, reason="TEST_SCREENSHOTS is not 1")
@pytest.mark.parametrize("look", LOOKS)
def test_the_screenshots_of_the_documentation_are_taken(open_page, pictures, client, look):
    for classname, motif in (("cat", "chelsea"), ("coffee cup", "coffee")):
        files = [("image", (file.name, file.read_bytes())) for file in sorted(pictures.glob(f"{motif}-?.jpg"))]
        client.post("/v1/label-sets/things/images", files=files, data={"class": classname}).raise_for_status()
    page = open_page(**LOOKS[look])
    # On a phone the views are longer than the window, so it is scrolled to the subject of the screenshot.
    place = (
        (lambda selector: page.locator(selector).evaluate("each => each.scrollIntoView()")) if look == "phone" else id
    )
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, dog, coffee cup, rocket")
    classify(page)
    place("#results")
    save_screenshot(page, f"page-classify-{look}")
    page.evaluate("location.hash = '#classify/things'")
    page.click("#classify-form details summary")
    page.select_option("#method", "dclip")
    page.click("#classify")
    expect(page.locator("#status")).to_contain_text("dclip")
    page.locator("#answers summary").first.click()
    page.evaluate("scrollTo(0, 0)")
    place("#results")
    save_screenshot(page, f"page-explanation-{look}")
    page.evaluate("location.hash = '#label-sets/things'")
    page.locator("#editor-classes summary").first.click()
    page.wait_for_selector("#editor-classes .tile")
    page.evaluate("scrollTo(0, 0)")
    place("#editor")
    save_screenshot(page, f"page-label-sets-{look}")
    page.locator("#editor-classes textarea").nth(1).fill("A cat has pointed ears. " * 50)
    page.click("#save-label-set")
    page.wait_for_selector(".field-problem")
    page.evaluate("scrollTo(0, 0)")
    place("#editor")
    save_screenshot(page, f"page-error-{look}")


def save_screenshot(page, name: str) -> None:
    """Save a screenshot with 256 colours."""
    page.wait_for_load_state("networkidle")
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    shown.save(SCREENSHOTS / f"{name}.png", optimize=True)
