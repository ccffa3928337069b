"""The charts of thresholds in a real browser: what they count, moving and storing thresholds, conflicts, the layout."""

import io
import json
import random
import re
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from tests.api.test_examples import finished
from tests.browser.test_playground import CONTRAST, WITH_SCREENSHOTS, save_screenshot

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

CLASSES = ["cat", "cup of coffee", "rocket"]
SOMEBODY_ELSE = "Somebody else has changed “{}” in the meantime, so nothing is stored. Your thresholds are kept here."


@pytest.fixture(scope="module")
def uploads(pictures):
    """The files of a request with example images, and the classes of each: a cat, a cup of coffee, or both."""
    by_motif = {motif: sorted(pictures.glob(f"{motif}-?.jpg")) for motif in ("chelsea", "coffee")}
    labelled = [(file.read_bytes(), ["cat"]) for file in by_motif["chelsea"]]
    labelled += [(file.read_bytes(), ["cup of coffee"]) for file in by_motif["coffee"]]
    for pair in zip(*by_motif.values(), strict=True):
        both = Image.new("RGB", (600, 300))
        for place, file in enumerate(pair):
            both.paste(Image.open(file).resize((300, 300)), (300 * place, 0))
        content = io.BytesIO()
        both.save(content, "JPEG")
        labelled.append((content.getvalue(), ["cat", "cup of coffee"]))
    return {
        "files": [("image", (f"{place}.jpg", content)) for place, (content, _) in enumerate(labelled)],
        "data": {"class": [json.dumps(classes) for _, classes in labelled]},
    }


def written(client, uploads, name):
    """Write a label set with a threshold and twelve example images, none of them of a rocket; return the job."""
    classes = [{"name": "cat", "threshold": 0.999}, *CLASSES[1:]]
    client.put(f"/v1/label-sets/{name}", json={"classes": classes, "multi_label": True}).raise_for_status()
    added = client.post(f"/v1/label-sets/{name}/images", **uploads).json()
    assert added["added"] == 12
    return added["job"]


@pytest.fixture
def desk(client, uploads, request):
    """A label set for one test, which may change it; its calibration may begin at any time."""
    name = re.sub(r"\W+", "-", request.node.name)[5:60]
    written(client, uploads, name)
    return name


@pytest.fixture(scope="module")
def shelf(client, uploads):
    """A label set that no test changes, whose scores are calibrated."""
    finished(client, written(client, uploads, "shelf"))
    return "shelf"


def measured(client, name):
    reply = client.get(f"/v1/label-sets/{name}/thresholds").raise_for_status().json()
    return {label["label"]: label for label in reply["labels"]}


def stored(client, name):
    label_set = client.get(f"/v1/label-sets/{name}").raise_for_status().json()
    return label_set["version"], [entry["threshold"] for entry in label_set["classes"]]


def opened(page):
    page.click("#thresholds summary")
    expect(page.locator(".curve").first).to_be_visible()
    return page


def card(page, label):
    return page.locator(".curve").filter(has=page.get_by_role("heading", name=label, exact=True))


def slider(page, label):
    return page.get_by_label(f"Threshold of {label}", exact=True)


def typed(page, label, text):
    field = page.get_by_label(f"Threshold of {label}, as a number")
    field.fill(text)
    field.press("Enter")
    return field


def status(page):
    return page.locator(".store-bar .status")


def share(numerator, denominator):
    value = 100 * numerator / denominator
    return f"{value:.0f} %" if value == 0 or value > 9.95 else f"{value:.1f} %"


def expect_counts(page, label, threshold):
    """Count anew at each point of the curve, and compare with what the card says."""
    name, images, curve = label["label"], label["images"], label["curve"]
    points = zip(*(curve[each] for each in ("thresholds", "predicted", "correct")), strict=True)
    found, right = next(((found, right) for score, found, right in points if score >= threshold), (0, 0))
    sentence = f"{right} of {found} found are right" if found else "none found"
    expect(card(page, name).locator(".counts")).to_have_text(f"{sentence}, {images - right} missed")
    expect(card(page, name).locator("dd")).to_have_text(
        [
            share(right, found) if found else "\u2013",
            share(right, images),
            f"{2 * right / (found + images):.2f}",
        ]
    )


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_curves_are_steps_that_end_where_no_image_reaches_the_threshold(open_page):
    drawn = open_page().evaluate(
        """async () => {
            const { figuresAt, ordered, pathsOf, shortened } = await import("./playground/threshold_curves.js");
            const curve = { thresholds: [0.2, 0.5, 0.9], predicted: [4, 2, 1], correct: [2, 2, 1] };
            const label = { label: "b", images: 4, average_precision: 0.5, curve };
            const empty = { thresholds: [0.3], predicted: [4], correct: [0] };
            const other = { label: "a10", images: 0, average_precision: null, curve: empty };
            const third = { ...label, label: "a9", images: 8, average_precision: 0.4 };
            const orders = ["given", "name", "images", "f1", "average_precision"];
            const names = (order) => ordered([label, other, third], order, () => 0.3).map((each) => each.label).join();
            return {
                paths: pathsOf(label),
                at: [0, 0.2, 0.21, 0.9, 0.91].map((each) => Object.values(figuresAt(label, each)).join(" ")),
                none: Object.values(figuresAt(other, 0.1)).join(" "),
                orders: orders.map(names),
                shortened: [0.31234567, 0.19996, 0.2].map((each) => shortened(label, each)),
            };
        }"""
    )
    assert drawn["paths"] == {"precision": "M0 250H200V0H500V0H900", "recall": "M0 250H200V250H500V375H900V500H1000"}
    # found, right, images, missed, precision, recall, F1
    at_first, at_last = "4 2 4 2 0.5 0.5 0.5", "1 1 4 3 1 0.25 0.4"
    assert drawn["at"] == [at_first, at_first, "2 2 4 2 1 0.5 0.6666666666666666", at_last, "0 0 4 4  0 0"]
    assert drawn["none"] == "4 0 0 0 0  "
    assert drawn["orders"] == ["b,a10,a9", "a9,a10,b", "a9,b,a10", "a9,b,a10", "a9,b,a10"]
    assert drawn["shortened"] == [0.312, 0.2, 0.2]


def test_dragging_typing_and_keys_move_a_threshold_and_its_counts(open_page, client, shelf):
    labels = measured(client, shelf)
    page = opened(open_page(f"#label-sets/{shelf}"))
    expect(page.locator(".curve h4")).to_have_text(CLASSES)
    for label in ("cat", "cup of coffee"):
        expect_counts(page, labels[label], labels[label]["threshold"])
    cup, chart = slider(page, "cup of coffee"), card(page, "cup of coffee").locator("svg").first.bounding_box()
    place = lambda threshold: (chart["x"] + threshold * chart["width"], chart["y"] + 40)  # noqa: E731
    page.mouse.move(*place(labels["cup of coffee"]["threshold"]))
    page.mouse.down()
    page.mouse.move(*place(0.9), steps=4)
    page.mouse.up()
    expect(cup).to_have_value("0.9")
    expect_counts(page, labels["cup of coffee"], 0.9)
    line = card(page, "cup of coffee").locator(".chosen").bounding_box()
    assert line["x"] + line["width"] / 2 == pytest.approx(place(0.9)[0], abs=1)
    expect(page.get_by_label("Threshold of cup of coffee, as a number")).to_have_value("0.90")
    page.mouse.click(*place(0.25))
    expect(cup).to_have_value("0.25")
    cup.press("ArrowRight")
    expect(cup).to_have_value("0.26")
    expect_counts(page, labels["cup of coffee"], 0.26)
    at = card(page, "cup of coffee").locator("dd").all_inner_texts()
    expect(cup).to_have_attribute("aria-valuetext", f"0.26: precision {at[0]}, recall {at[1]}")
    field = typed(page, "cup of coffee", "1.5")
    expect(card(page, "cup of coffee").locator("[role=alert]")).to_have_text("Enter a number from 0 to 1.")
    expect(field).to_have_value("1.5")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(cup).to_have_value("0.26")
    typed(page, "cup of coffee", "0,995")
    expect(card(page, "cup of coffee").locator("[role=alert]")).to_have_count(0)
    expect_counts(page, labels["cup of coffee"], 0.995)
    expect(status(page)).to_have_text("1 not stored")
    page.click("[aria-label='Automatic threshold for cat']")
    expect_counts(page, labels["cat"], labels["cat"]["automatic"])
    expect(card(page, "cat")).to_contain_text("Not stored yet; stored is 0.999.")
    expect(slider(page, "cat")).to_be_focused()
    page.click("[aria-label='Undo the threshold of cat']")
    expect_counts(page, labels["cat"], 0.999)
    expect(card(page, "cat")).not_to_contain_text("Not stored")
    page.click("text=Undo all…")
    page.click("dialog .danger")
    expect_counts(page, labels["cup of coffee"], labels["cup of coffee"]["automatic"])
    expect(page.locator("#thresholds-unstored")).to_be_hidden()
    expect(page.locator(".store")).to_be_focused()


def test_a_goal_moves_all_thresholds_that_can_reach_it(open_page, client, shelf):
    path = f"/v1/label-sets/{shelf}/thresholds"
    page = opened(open_page(f"#label-sets/{shelf}"))
    page.select_option(".goal select", "recall")
    page.fill(".goal input", "80")
    page.click(".goal button")
    outcome = page.locator(".goal [role=status]")
    expect(outcome).to_have_text("2 thresholds are set. 1 label keeps its threshold; the reason is next to each.")
    found = client.get(path, params={"recall": 0.8}).json()["labels"]
    for label in found[:2]:
        expect_counts(page, label, label["suggested"])
    assert found[2]["suggested"] is None
    expect(card(page, "rocket")).to_contain_text(f"Kept: {found[2]['reason']}.")
    expect(slider(page, "rocket")).to_have_value(f"{found[2]['automatic']:.2f}")
    page.fill(".goal input", "99")
    page.click(".goal button")  # more than eight images can reach
    expect(outcome).to_have_text("No threshold has to move. 3 labels keep theirs; the reason is next to each.")
    expect_counts(page, found[0], found[0]["suggested"])
    page.fill(".goal input", "0")
    page.click(".goal button")
    assert page.evaluate("document.querySelector('.goal input').validity.rangeUnderflow")
    page.select_option(".goal select", "f1")
    page.click(".goal button")
    expect(outcome).to_contain_text("1 label keeps its threshold")
    for label in client.get(path).json()["labels"][:2]:
        expect_counts(page, label, label["suggested"])


# --- storing ---------------------------------------------------------------------------------------------------------


def test_thresholds_are_stored_and_requests_use_them(open_page, client, desk, pictures):
    page = opened(open_page(f"#label-sets/{desk}"))
    page.click(".store")
    expect(status(page)).to_have_text("There are no changes to store.")
    page.locator("#editor-classes summary").nth(1).click()
    row = page.locator("#editor-classes > li").nth(1)
    row.get_by_label("Other names").fill("mug")  # an edit that is not saved
    typed(page, "cup of coffee", "0.123")
    page.click("[aria-label='Automatic threshold for cat']")
    page.click(".store")
    expect(status(page)).to_have_text(f"Stored as {desk}@2.")
    assert stored(client, desk) == (2, [None, 0.123, None])
    files = {"image": (pictures / "coffee.jpg").read_bytes()}
    reply = client.post("/v1/classify", files=files, data={"label_set": desk}).raise_for_status().json()
    used = {each["label"]: each["threshold"] for each in reply["results"][0]["predictions"]}
    assert used["cup of coffee"] == 0.123
    # The editor has the new version, without its thresholds as an edit, and with its own edit.
    expect(page.locator("#editor-version")).to_have_value("2")
    expect(row.get_by_label("Threshold")).to_have_value("0.123")
    expect(row.locator("summary")).to_contain_text("1 other name · from 0.123")
    expect(page.locator("#label-set-list li").filter(has_text=desk)).to_contain_text("version 2")
    row.get_by_label("Threshold").fill("0.2")
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 3.")
    assert stored(client, desk) == (3, [None, 0.2, None])
    # And the charts have that of the editor.
    expect(slider(page, "cup of coffee")).to_have_value("0.2")
    typed(page, "cup of coffee", "0.3")
    page.click(".store")
    expect(status(page)).to_have_text(f"Stored as {desk}@4.")
    assert stored(client, desk) == (4, [None, 0.3, None])
    expect(page.locator("#unsaved")).to_be_hidden()


def test_the_changes_of_somebody_else_are_kept_and_so_are_mine(open_page, client, desk):
    def put(cat, cup):
        classes = [{"name": "cat", "threshold": cat}, {"name": "cup of coffee", "threshold": cup}, "fox"]
        client.put(f"/v1/label-sets/{desk}", json={"classes": classes, "multi_label": True}).raise_for_status()

    def refused_until_loaded(label, threshold, version):
        page.click(".store")
        expect(page.locator(".store-bar [role=alert] p").first).to_have_text(SOMEBODY_ELSE.format(desk))
        expect(slider(page, label)).to_have_value(threshold)
        assert stored(client, desk)[0] == version
        page.click("text=Load the new version, keep my thresholds")
        expect(page.locator(".store")).to_be_focused()
        expect(slider(page, label)).to_have_value(threshold)
        return f"Version {version} is loaded, with your thresholds of 1 label. Check the result, and store it."

    page = opened(open_page(f"#label-sets/{desk}"))
    slider(page, "cat").fill("0.2")
    slider(page, "rocket").fill("0.9")
    put(0.6, 0.8)
    sentence = refused_until_loaded("cat", "0.2", 2)
    gone = "No longer in the label set, so their thresholds are dropped: rocket."
    expect(status(page)).to_have_text(f"{sentence} {gone}")
    expect(page.locator(".curve h4")).to_have_text(["cat", "cup of coffee", "fox"])
    expect(slider(page, "cup of coffee")).to_have_value("0.8")
    page.click(".store")
    expect(status(page)).to_have_text(f"Stored as {desk}@3.")
    assert stored(client, desk) == (3, [0.2, 0.8, None])
    expect(page.locator("#editor-version")).to_have_value("3")
    # Edits in the editor began with version 3, and saving them says so as ever.
    page.fill("#new-classes", "parrot")
    page.press("#new-classes", "Enter")
    slider(page, "fox").fill("0.3")
    put(0.6, 0.7)
    expect(status(page)).to_have_text("1 not stored")
    sentence = refused_until_loaded("fox", "0.3", 4)
    expect(status(page)).to_have_text(sentence)
    page.click(".store")
    expect(status(page)).to_have_text(f"Stored as {desk}@5.")
    assert stored(client, desk) == (5, [0.6, 0.7, 0.3])
    page.click("#save-label-set")
    expect(page.locator("#conflict")).to_contain_text("Another user saved version 5 while you edited version 3")
    page.click("#conflict >> text=Merge both")
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 6.")
    assert stored(client, desk) == (6, [0.6, 0.7, 0.3, None])


def test_changes_that_are_not_stored_survive_leaving_the_view(open_page, client, desk):
    page = opened(open_page(f"#label-sets/{desk}"))
    slider(page, "rocket").fill("0.9")
    entry = page.locator("#label-set-list li").filter(has_text=desk)
    expect(entry).to_contain_text("thresholds not stored")
    assert page.evaluate("!dispatchEvent(new Event('beforeunload', { cancelable: true }))")
    page.click("nav a[href='#classify']")
    page.click("nav a[href='#label-sets']")
    entry.locator("a").click()
    expect(slider(page, "rocket")).to_have_value("0.9")
    page.click("#delete-label-set")
    page.click("dialog .danger")
    expect(page.locator("#label-sets-status")).to_have_text(f"“{desk}” is deleted.")
    assert page.evaluate("dispatchEvent(new Event('beforeunload', { cancelable: true }))")


# --- states and layout -----------------------------------------------------------------------------------------------


def test_empty_states_and_errors_say_what_to_do(open_page, client, desk, uploads):
    client.put(f"/v1/label-sets/{desk}", json={"classes": CLASSES}).raise_for_status()
    page = opened(open_page(f"#label-sets/{desk}"))
    expect(page.locator("#threshold-charts")).to_contain_text("Thresholds only apply if an image may have several")
    page.click("text=Go to the switch in the editor")
    expect(page.locator("#editor-multi-label")).to_be_focused()
    expect(card(page, "rocket")).to_contain_text("No example image has this label, so there is no curve.")
    expect(card(page, "rocket").locator("path")).to_have_count(0)
    name = f"{desk}-2"
    client.put(f"/v1/label-sets/{name}", json={"classes": CLASSES, "multi_label": True}).raise_for_status()
    page.evaluate(f"location.hash = '#label-sets/{name}'")
    note = page.locator("#threshold-charts .note").filter(has_text="There are no labelled example images yet, so there")
    expect(note).to_be_visible()
    client.post(f"/v1/label-sets/{name}/images", **uploads).raise_for_status()
    note.get_by_text("Load again").click()
    expect(page.locator(".curve")).to_have_count(3)
    # The job that calibrates the scores is waited for, and then the curves are loaded again.
    expect(page.locator("#threshold-charts")).to_contain_text("The scores are calibrated by these images.")
    expect(note).to_have_count(0)
    client.delete(f"/v1/label-sets/{name}").raise_for_status()
    slider(page, "cat").fill("0.2")
    page.click(".store")
    expect(page.locator("#threshold-charts .problem")).to_contain_text(f"unknown label set '{name}'")
    expect(slider(page, "cat")).to_have_value("0.2")


def test_many_labels_are_searched_sorted_and_drawn_in_parts(open_page, client):
    names = [f"label {number}" for number in range(70)]
    client.put("/v1/label-sets/many", json={"classes": names, "multi_label": True}).raise_for_status()
    curve = {"thresholds": [0.1, 0.6], "predicted": [9, 4], "correct": [5, 4]}
    fixed = {"own": None, "threshold": 0.5, "automatic": 0.5, "suggested": None, "reason": "few images", "curve": curve}
    labels = [
        {"label": name, "images": 5 + number % 7, "average_precision": 1 - number / 100, **fixed}
        for number, name in enumerate(names)
    ]
    about = {"label_set": "many@1", "version": 1, "multi_label": True, "model": "embedded", "images": 90}
    page = open_page("#label-sets/many")
    page.route(
        "**/v1/label-sets/many/thresholds",
        lambda route: route.fulfill(json={**about, "calibrated": False, "labels": labels}, headers={"ETag": '"1"'}),
    )
    opened(page)
    expect(page.locator(".curve")).to_have_count(60)
    expect(page.locator("#threshold-charts")).to_contain_text("The scores are not calibrated by these images yet.")
    page.click("text=Show 10 more of 70")
    expect(page.locator(".curve")).to_have_count(70)
    expect(slider(page, "label 60")).to_be_focused()
    sort = page.get_by_label("Sort by")
    sort.select_option("average_precision")
    expect(page.locator(".curve h4").first).to_have_text("label 69")
    sort.select_option("images")
    assert page.locator(".curve h4").all_text_contents()[:2] == ["label 6", "label 13"]
    page.get_by_label("Search labels").fill("LABEL 6")
    expect(page.locator(".curve")).to_have_count(11)
    page.get_by_label("Search labels").fill("cat")
    expect(page.locator("#threshold-charts .nothing")).to_have_text("No label contains “cat”.")


def test_the_charts_fit_a_phone_and_axe_finds_no_serious_problem(open_page, shelf):
    page = opened(open_page(f"#label-sets/{shelf}", viewport={"width": 320, "height": 800}, color_scheme="dark"))
    slider(page, "cat").fill("0.2")
    typed(page, "cup of coffee", "much")
    page.route("**/v1/label-sets/shelf/thresholds", lambda route: route.fulfill(status=412, json={}))
    page.click(".store")
    expect(page.locator(".store-bar [role=alert]")).to_be_visible()
    for width, scheme in ((320, "dark"), (375, "light"), (1440, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == []
        chart, handle = page.locator(".chart svg").first.bounding_box(), slider(page, "cat").bounding_box()
        assert (handle["x"], handle["width"]) == pytest.approx((chart["x"] - 12, chart["width"] + 24), abs=0.5)
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [each["id"] for each in violations if each["impact"] in {"serious", "critical"}] == []


# --- the screenshot of the documentation -----------------------------------------------------------------------------

SUBJECTS = {
    "car": "car",
    "cat": "cat",
    "dog": "dog",
    "coffee": "cup of coffee",
    "parrot": "parrot",
    "sunflower": "sunflower",
    "balloon": "hot-air balloon",
    "bulb": "light bulb",
    "rocket": "rocket",
}


@pytest.fixture
def collages(client):
    """A label set with collages of one to four clippings of the example photographs, and a label for each of them."""
    photos = Path(__file__).parents[2] / "examples" / "photos"
    opened = {subject: Image.open(photos / f"{subject}.jpg").convert("RGB") for subject in SUBJECTS}
    classes = list(SUBJECTS.values())
    client.put("/v1/label-sets/collages", json={"classes": classes, "multi_label": True}).raise_for_status()
    drawn = random.Random(7)
    files, labels = [], []
    for number in range(150):
        shown = drawn.sample(list(SUBJECTS), drawn.choice((1, 2, 4)))
        canvas = Image.new("RGB", (400, 400))
        side = 400 if len(shown) == 1 else 200
        for place, subject in enumerate(shown):
            photo = opened[subject]
            size = drawn.uniform(0.35, 0.9) * min(photo.size)
            left, top = (drawn.uniform(0, length - size) for length in photo.size)
            part = photo.crop((int(left), int(top), int(left + size), int(top + size))).resize((side, side))
            canvas.paste(part, (place % 2 * 200, place // 2 * 200 + (100 if len(shown) == 2 else 0)))
        content = io.BytesIO()
        canvas.save(content, "JPEG")
        files.append(("image", (f"{number}.jpg", content.getvalue())))
        labels.append(json.dumps([SUBJECTS[subject] for subject in shown]))
    for first in range(0, len(files), 30):
        part = slice(first, first + 30)
        added = client.post("/v1/label-sets/collages/images", files=files[part], data={"class": labels[part]})
        job = added.raise_for_status().json()["job"]
    finished(client, job)
    return "collages"


@pytest.mark.skipif(not WITH_SCREENSHOTS, reason="TEST_SCREENSHOTS is not 1")
def test_the_screenshot_of_the_documentation_is_taken(open_page, collages):
    page = opened(open_page(f"#label-sets/{collages}", viewport={"width": 1180, "height": 820}))
    slider(page, "cat").fill("0.8")
    page.locator("#thresholds").evaluate("each => each.scrollIntoView()")
    save_screenshot(page, "page-thresholds-desktop")
