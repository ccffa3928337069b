"""The tools of the page in a real browser: importing, building, jobs, and the parts that views open."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.browser.test_playground import CONTRAST, built, choose, classify
from tests.end_to_end.server import serving

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

# Parts of the page that views open, without a view: `run` calls a function of a module in the page, with pictures by
# their bytes, and keeps what it returns and what its callbacks receive in `window`.
CALL = """async ([module, name, sent]) => {
    window.made = (bytes, name) => new File([Uint8Array.from(atob(bytes), (each) => each.charCodeAt(0))], name);
    window.pictures = sent.map(([name, bytes], id) => {
        const file = bytes && window.made(bytes, name);
        return { id, name, path: name, file, url: file && URL.createObjectURL(file), result: null };
    });
    window.received = [];
    const { [name]: call } = await import(`/playground/${module}.js`);
    return await call(...ARGUMENTS);
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving("--build-default-database", "false", data_dir=tmp_path_factory.mktemp("data")) as running:
        yield running


def run(page, module, name, pictures=(), more="[]"):
    """Call an exported function; `more` is an expression of JavaScript for its arguments."""
    sent = [(each.name, base64.b64encode(each.read_bytes()).decode()) for each in pictures]
    return page.evaluate(CALL.replace("ARGUMENTS", more), [module, name, sent])


def received(page, count=1):
    page.wait_for_function("count => window.received.length >= count", arg=count)
    return page.evaluate("window.received")


# --- label sets that come with Deixis --------------------------------------------------------------------------------


def test_a_label_set_that_comes_with_deixis_is_imported_by_a_button(open_page, client, server):
    page = open_page("#label-sets")
    expect(page.locator("#shipped-list h3")).to_have_count(7)
    expect(page.locator("#shipped-list li").first).to_contain_text("cat, dog, horse, ")
    expect(page.locator("#shipped-list li").first).to_contain_text("20 classes, 259 descriptions · Apache-2.0")
    page.click("[aria-label='Import animals']")
    expect(page.locator("#editor-title")).to_have_text("animals")
    assert page.url == f"{server.url}/#label-sets/animals"
    expect(page.locator("#editor-classes > li")).to_have_count(20)
    expect(page.locator("#label-set-list").get_by_role("link", name="animals", exact=True)).to_be_visible()
    page.click("#to-shipped a")
    expect(page.locator("[aria-label='Open animals']")).to_be_visible()
    expect(page.locator("#editor")).to_be_hidden()
    shipped = client.get("/v1/shipped-label-sets/animals").json()
    assert client.get("/v1/label-sets/animals").json()["classes"] == shipped["classes"]


def test_an_import_does_not_replace_what_somebody_else_has_written(open_page, client):
    page = open_page("#label-sets")
    client.put("/v1/label-sets/foods", json={"classes": ["soup", "bread"]}).raise_for_status()
    page.click("[aria-label='Import foods']")
    expect(page.locator("#shipped-list .problem:visible")).to_have_text("A label set “foods” exists already.")
    assert client.get("/v1/label-sets/foods").json()["version"] == 1


# --- caption databases and jobs --------------------------------------------------------------------------------------


def test_the_everyday_words_are_built_by_a_button_and_can_then_be_searched(open_page, client):
    page = open_page("#captions")
    expect(page.locator("#no-databases")).to_be_visible()
    row = page.locator("#build-sources li").first
    expect(row).to_contain_text("Not built yet.")
    # A limit that is reached for a second does not end the wait for the job.
    limited = {"type": "urn:deixis:problem:rate-limited", "title": "Rate limited", "detail": "1 per second"}
    page.route(
        "**/v1/jobs/*",
        lambda route: route.fulfill(status=429, json=limited, headers={"Retry-After": "1"}),
        times=1,
    )
    row.get_by_role("button", name="Build: everyday").click()
    built = re.compile(r"Built: [\d,]+ names, model embedded\.")
    expect(row.locator(".hint").last).to_contain_text(built, timeout=90_000)
    expect(row.get_by_role("button", name="Build again: everyday")).to_be_visible()
    expect(page.locator("#no-databases")).to_be_hidden()
    page.fill("#search-text", "a cat")
    page.click("#search button[type=submit]")
    expect(page.locator("#captions li").first).to_contain_text("cat")


def test_a_build_that_the_server_refuses_says_why(open_page):
    page = open_page("#captions")
    problem = {"title": "Not configured", "detail": "WordNet is not installed", "status": 501}
    page.route("**/v1/databases/wordnet", lambda route: route.fulfill(status=501, json=problem))
    row = page.locator("#build-sources li").nth(1)
    row.get_by_role("button", name="Build: wordnet").click()
    expect(row.get_by_role("alert")).to_have_text("Not configured: WordNet is not installed")
    expect(row.get_by_role("button", name="Build: wordnet")).to_be_enabled()


def test_running_jobs_are_listed_with_their_progress_and_can_be_stopped(open_page, client):
    captions = [f"{first} and {second}" for first in range(100) for second in range(100)]
    job = client.put("/v1/databases/long", json={"captions": captions}).raise_for_status().json()
    page = open_page("#classify")
    expect(page.locator(".jobs summary")).to_contain_text("Jobs: 1 running")
    page.click(".jobs summary")
    row = page.locator(".jobs li").first
    expect(row).to_contain_text("Caption database long")
    expect(row.locator(".hint")).to_have_text(re.compile(r"step [\d,]+ of [\d,]+"))
    row.get_by_role("button", name="Stop: Caption database long").click()
    expect(page.locator(".jobs")).to_be_hidden()
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_a_job_that_fails_stays_in_the_list_with_its_error_until_it_is_cleared(open_page):
    page = open_page("#classify")
    job = {"id": "1", "kind": "describe", "label_set": "pets", "database": None, "done": 1, "total": 4, "error": None}
    failed = {**job, "status": "failed", "error": "the language model is busy"}
    busy = {"status": 429, "json": {"title": "Too many requests", "detail": "wait a second", "status": 429}}
    running, ended = (
        {"json": {"jobs": [state], "next_after": None}} for state in ({**job, "status": "running"}, failed)
    )
    answers = iter([running, busy])
    page.route("**/v1/jobs*", lambda route: route.fulfill(**next(answers, ended)))
    page.evaluate("import('/playground/job_list.js').then(({ watchJobs }) => watchJobs())")
    expect(page.locator(".jobs summary")).to_have_text("Jobs: 1 failed")
    page.click(".jobs summary")
    expect(page.locator(".jobs li")).to_have_text("Descriptions of petsfailed: the language model is busy")
    page.click("text=clear failed jobs")
    expect(page.locator(".jobs")).to_be_hidden()


# --- the lightbox ----------------------------------------------------------------------------------------------------


def zoom(page) -> int:
    return int(page.inner_text(".level").split()[0])


@pytest.fixture
def turned(tmp_path):
    """A picture of 600 x 400 pixels, red above and blue below, stored lying on its side."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:200], pixels[200:] = (220, 30, 30), (30, 30, 220)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    file = tmp_path / "turned.jpg"
    Image.fromarray(np.rot90(pixels)).save(file, exif=exif, quality=95)
    return file


def test_a_region_of_an_upright_picture_is_cut_out_with_the_keyboard_alone(open_page, turned):
    page = open_page()
    run(page, "lightbox", "openLightbox", [turned], "[pictures[0], { onCrop: (file) => received.push(file) }]")
    expect(page.locator(".lightbox h2")).to_have_text("turned.jpg")
    expect(page.locator(".stage")).to_be_focused()
    page.wait_for_function("document.querySelector('.stage img').naturalWidth === 600")
    page.keyboard.press("r")
    expect(page.locator(".region")).to_be_focused()
    expect(page.locator(".lightbox .hint")).to_contain_text("Region of 300 \u00d7 200 pixels")
    for _ in range(20):
        page.keyboard.press("ArrowUp")  # to the edge, where it stays
    page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator(".lightbox .hint")).to_contain_text("Region of 292 \u00d7 200 pixels")
    page.keyboard.press("Enter")
    expect(page.locator("dialog")).to_have_count(0)
    received(page)
    name, content = page.evaluate(
        """async () => [received[0].name, await new Promise((done) => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(received[0]);
        })]"""
    )
    assert name == "turned (region).jpg"
    with Image.open(io.BytesIO(base64.b64decode(content))) as cropped:
        assert (cropped.format, cropped.size) == ("JPEG", (292, 200))
        red, _, blue = cropped.convert("RGB").getpixel((146, 190))
        assert (red > 180, blue < 80) == (True, True)


def test_a_region_is_drawn_with_the_mouse_and_stays_where_it_was_drawn(open_page, turned):
    page = open_page()
    run(page, "lightbox", "openLightbox", [turned], "[pictures[0], { onCrop: (file) => received.push(file.size) }]")
    page.wait_for_function("document.querySelector('.stage img').naturalWidth === 600")
    page.click("text=Select a region")
    box = page.locator(".stage img").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.up()
    expect(page.locator(".lightbox .hint")).to_contain_text("Region of 150 \u00d7 100 pixels")
    drawn = page.locator(".region").bounding_box()
    assert abs(drawn["x"] - (box["x"] + box["width"] / 4)) < 2
    page.keyboard.press("Escape")  # gives up the region, and not the dialog
    expect(page.locator(".region")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert page.evaluate("received") == []


def test_pictures_are_zoomed_moved_and_shown_one_after_the_other(open_page, pictures):
    page = open_page()
    files = [pictures / "chelsea.jpg", pictures / "coffee.jpg", pictures / "broken.jpg"]
    run(page, "lightbox", "openLightbox", files, "[pictures[0], { pictures }]")
    page.wait_for_function("document.querySelector('.stage img').naturalWidth > 0")
    expect(page.locator("text=Select a region")).to_have_count(0)  # nothing takes the region
    fitted = zoom(page)
    page.keyboard.press("+")
    assert zoom(page) > fitted
    page.keyboard.press("-")
    page.keyboard.press("0")
    assert zoom(page) == fitted
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 60)
    page.mouse.wheel(0, -600)
    page.wait_for_function("old => parseInt(document.querySelector('.level').textContent) > 2 * old", arg=fitted)
    before = page.locator(".stage img").bounding_box()
    page.mouse.down()
    page.mouse.move(box["x"] + 20, box["y"] + 40)
    page.mouse.up()
    after = page.locator(".stage img").bounding_box()
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (-30, -20)
    page.keyboard.press("ArrowRight")
    expect(page.locator(".lightbox h2")).to_have_text("coffee.jpg")
    expect(page.locator(".lightbox .hint")).to_have_text("Image 2 of 3")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".stage .note")).to_have_text("The browser cannot show this file.")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".lightbox h2")).to_have_text("chelsea.jpg")
    expect(page.locator(".stage .note")).to_be_hidden()


def test_two_fingers_zoom_a_picture(open_page, pictures):
    page = open_page(viewport={"width": 375, "height": 700}, has_touch=True)
    run(page, "lightbox", "openLightbox", [pictures / "chelsea.jpg"], "[pictures[0]]")
    page.wait_for_function("document.querySelector('.stage img').naturalWidth > 0")
    fitted = zoom(page)
    touch = page.context.new_cdp_session(page)
    box = page.locator(".stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 120)):
        points = [{"x": x - apart, "y": y, "id": 1}, {"x": x + apart, "y": y, "id": 2}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function("old => parseInt(document.querySelector('.level').textContent) > 2 * old", arg=fitted)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


# --- the camera ------------------------------------------------------------------------------------------------------

TRACKS = """() => {
    window.tracks = [];
    const original = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => {
        const stream = await original(wanted);
        tracks.push(...stream.getTracks());
        return stream;
    };
}"""


def test_pictures_are_taken_with_a_camera_which_is_off_afterwards(open_page):
    page = open_page(permissions=["camera"])
    page.evaluate(TRACKS)
    run(page, "camera", "openCamera", more="[{ onPictures: (files) => received.push(...files) }]")
    shoot = page.get_by_role("button", name="Take an image")
    expect(shoot).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Use this image")).to_be_visible()
    expect(shoot).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".camera .pictures li")).to_have_count(2)
    page.locator(".camera .remove").first.click()
    shoot.click()
    page.get_by_role("button", name="Use 2 images").click()
    received(page, 2)
    files = page.evaluate("received.map(({ name, type, size }) => ({ name, type, size }))")
    assert len({each["name"] for each in files}) == 2
    assert all(each["type"] == "image/jpeg" and each["size"] > 1000 for each in files)
    assert page.evaluate("tracks.map((track) => track.readyState)") == ["ended"]


def test_closing_the_camera_ends_it_without_a_picture(open_page):
    page = open_page(permissions=["camera"])
    page.evaluate(TRACKS)
    run(page, "camera", "openCamera", more="[{ onPictures: (files) => received.push(...files) }]")
    expect(page.get_by_role("button", name="Take an image")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert page.evaluate("tracks.map((track) => track.readyState)") == ["ended"]
    assert page.evaluate("received") == []


def test_only_the_camera_that_was_chosen_last_stays_on(open_page):
    page = open_page(permissions=["camera"])
    page.evaluate(
        """() => {
            window.tracks = [];
            window.waiting = [];
            const { mediaDevices } = navigator, original = mediaDevices.getUserMedia.bind(mediaDevices);
            const cameras = ["a", "b"].map((deviceId) => ({ kind: "videoinput", deviceId }));
            mediaDevices.enumerateDevices = async () => cameras;
            mediaDevices.getUserMedia = async () => {
                if (tracks.length) await new Promise((proceed) => waiting.push(proceed));
                const stream = await original({ video: true });
                tracks.push(...stream.getTracks());
                return stream;
            };
        }"""
    )
    run(page, "camera", "openCamera", more="[{ onPictures: () => {} }]")
    choice = page.get_by_label("Camera", exact=True)
    choice.select_option("b")
    choice.select_option("a")
    page.wait_for_function("() => waiting.length === 2")
    page.evaluate("waiting.forEach((proceed) => proceed())")
    page.wait_for_function(
        "() => tracks.length === 3 && tracks.filter((track) => track.readyState === 'live').length === 1"
    )
    expect(page.get_by_role("button", name="Take an image")).to_be_enabled()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NotAllowedError", "does not allow this page to use the camera. Allow it"),
        ("NotFoundError", "No camera was found."),
        ("NotReadableError", "Another program may be using it"),
        (None, "only to pages that are opened over HTTPS or from localhost"),
    ],
)
def test_a_camera_that_cannot_be_used_is_explained(open_page, name, sentence):
    page = open_page()
    if name is None:
        page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    else:
        page.evaluate(
            "name => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('no', name); }; }",
            name,
        )
    run(page, "camera", "openCamera", more="[{ onPictures: () => {} }]")
    expect(page.locator(".camera .problem")).to_contain_text(sentence)
    expect(page.get_by_role("button", name="Take an image")).to_be_disabled()
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_addresses_become_pictures_that_the_server_is_to_fetch(open_page):
    page = open_page()
    more = "[{ onPictures: (pictures) => received.push(...pictures) }]"
    run(page, "image_urls", "openImageUrls", more=more)
    page.keyboard.type("https://images.example.com/a%20cat.jpg?size=1\nimages.example.com/dog.jpg")
    page.get_by_role("dialog").get_by_role("button", name="Add").click()
    expect(page.locator("dialog .field-problem")).to_contain_text("1 line is not an address")
    expect(page.locator("dialog textarea")).to_be_focused()
    page.fill("dialog textarea", "https://images.example.com/a%20cat.jpg?size=1\nhttp://images.example.com/")
    page.get_by_role("dialog").get_by_role("button", name="Add").click()
    expect(page.locator("dialog")).to_have_count(0)
    found = received(page, 2)
    assert [each["name"] for each in found] == ["a cat.jpg", "images.example.com"]
    assert [each["remoteUrl"] for each in found] == [
        "https://images.example.com/a%20cat.jpg?size=1",
        "http://images.example.com/",
    ]
    assert [(each["file"], each["url"]) for each in found] == [(None, "")] * 2


# --- the history -----------------------------------------------------------------------------------------------------

SAVE = """async (count) => {
    const { save } = await import("/playground/history.js");
    for (let number = 0; number < count; number += 1) {
        const answer = { results: pictures.map(() => ({ predictions: [{ label: "cat", score: 0.9 }] })), number };
        await save({ pictures, labels: ["cat", "dog"], options: { method: "cupl" }, answer });
    }
}"""
SHOW = """async () => {
    const place = document.createElement("section");
    document.getElementById("main").prepend(place);
    const { showHistory } = await import("/playground/history.js");
    window.received = [];
    await showHistory(place, { onOpen: (run) => received.push(run) });
}"""


def test_the_last_twenty_results_survive_a_reload_and_can_be_deleted(open_page, pictures):
    page = open_page()
    run(page, "history", "list", [pictures / "chelsea.jpg", pictures / "broken.jpg"])
    page.evaluate(SAVE, 22)
    page.reload()
    page.evaluate(SHOW)
    expect(page.locator(".runs li")).to_have_count(20)
    first = page.locator(".runs li").first
    expect(first).to_contain_text("cat, dog")
    expect(first).to_contain_text("2 images")
    page.wait_for_function("document.querySelector('.runs img').naturalWidth > 0")
    first.locator(".run").click()
    (opened,) = received(page)
    assert (opened["answer"]["number"], opened["labels"], opened["options"]) == (21, ["cat", "dog"], {"method": "cupl"})
    assert [each["name"] for each in opened["pictures"]] == ["chelsea.jpg", "broken.jpg"]
    assert page.evaluate("received[0].pictures.map(({ small }) => small && small.size < 20_000)") == [True, None]
    first.get_by_role("button", name=re.compile("Delete")).click()
    expect(page.locator(".runs li")).to_have_count(19)
    page.click("text=delete all")
    expect(page.locator(".runs li")).to_have_count(0)
    page.reload()
    assert run(page, "history", "list") == []


def test_results_that_are_too_large_together_are_forgotten_from_the_oldest_on(open_page):
    page = open_page()
    kept = page.evaluate(
        """async () => {
            const { list, save } = await import("/playground/history.js");
            const large = "x".repeat(12 * 2 ** 20);
            for (let number = 0; number < 6; number += 1) {
                await save({ pictures: [], labels: [String(number)], options: {}, answer: { large } });
            }
            return (await list()).map(({ labels }) => labels[0]);
        }"""
    )
    assert kept == ["5", "4", "3", "2"]


def test_results_are_kept_in_memory_where_the_browser_denies_storage(open_page, pictures):
    page = open_page()
    page.evaluate("Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('denied'); } })")
    page.evaluate("performance.now = () => 1")  # two results within one tick of the clock
    run(page, "history", "list", [pictures / "chelsea.jpg"])
    page.evaluate(SAVE, 2)
    page.evaluate(SHOW)
    expect(page.locator(".runs li")).to_have_count(2)
    expect(page.locator("section:has(> .runs) > .hint")).to_contain_text("a reload loses them")
    page.locator(".runs .run").first.click()
    assert received(page)[0]["answer"]["number"] == 1


# --- the right label -------------------------------------------------------------------------------------------------

CORRECT = """[pictures[0], {
    result: { predictions: [{ label: "dog", score: 0.6 }, { label: "cat", score: 0.4 }] },
    labels: ["cat", "dog", "rocket"], labelSet: "%s", onLearned: (learned) => received.push(learned),
}]"""
COUNTER = """async (learned) => {
    const place = document.createElement("div");
    place.id = "counter";
    document.getElementById("main").prepend(place);
    const { showLearning } = await import("/playground/correct.js");
    await showLearning(place, learned);
}"""


def test_a_wrong_label_becomes_an_example_in_a_label_set_that_is_made_on_the_way(open_page, client, pictures):
    page = open_page()
    run(page, "correct", "openCorrection", [pictures / "chelsea-1.jpg"], CORRECT % "")
    choices = page.locator(".label-choices button")
    expect(choices).to_have_text(["cat", "rocket"])  # not the wrong one
    expect(choices.first).to_be_focused()
    expect(page.get_by_label("Name of the label set")).to_have_value("my-labels")
    page.keyboard.press("Enter")
    (learned,) = received(page)
    assert (learned["labelSet"], learned["label"], learned["counts"]["labelled"]) == ("my-labels", "cat", {"cat": 1})
    stored = client.get("/v1/label-sets/my-labels").json()
    assert [each["name"] for each in stored["classes"]] == ["cat", "dog", "rocket"]
    page.evaluate(COUNTER, learned)
    expect(page.locator("#counter")).to_have_text(
        "1 example in 1 class. Two of one class are needed before the server can check whether learning from them"
        " helps."
    )
    # The same labels again: the name is taken, nothing is overwritten, and the next free name is offered.
    run(page, "correct", "openCorrection", [pictures / "chelsea-2.jpg"], CORRECT % "")
    page.get_by_label("Or a new label").fill("kitten")
    page.get_by_role("button", name="It is this").click()
    expect(page.locator(".correction .problem")).to_contain_text("“my-labels” exists already, and is not changed")
    expect(page.get_by_label("Name of the label set")).to_have_value("my-labels-2")
    assert client.get("/v1/label-sets/my-labels").json()["version"] == 1
    page.get_by_role("button", name="It is this").click()
    (learned,) = received(page)
    assert (learned["labelSet"], learned["label"]) == ("my-labels-2", "kitten")
    assert client.get("/v1/label-sets/my-labels-2").json()["classes"][-1]["name"] == "kitten"


def test_an_example_that_was_refused_can_be_sent_again_to_the_label_set_made_for_it(open_page, client, pictures):
    page = open_page()
    problem = {"title": "Too many requests", "detail": "wait a second", "status": 429}
    page.route("**/label-sets/again/images", lambda route: route.fulfill(status=429, json=problem), times=1)
    run(page, "correct", "openCorrection", [pictures / "chelsea-1.jpg"], CORRECT % "")
    page.get_by_label("Name of the label set").fill("again")
    page.locator(".label-choices button").first.click()
    expect(page.locator(".correction .problem")).to_contain_text("wait a second")
    page.get_by_label("Or a new label").fill("kitten")
    page.get_by_role("button", name="It is this").click()
    (learned,) = received(page)
    assert (learned["labelSet"], learned["counts"]["labelled"]) == ("again", {"kitten": 1})


def test_the_counter_of_a_label_set_says_what_was_measured_on_its_examples(open_page, client, pictures):
    client.put("/v1/label-sets/learned", json={"classes": ["cat", "coffee cup"]}).raise_for_status()
    for label, motif in (("cat", "chelsea"), ("coffee cup", "coffee")):
        files = [("image", (file.name, file.read_bytes())) for file in sorted(pictures.glob(f"{motif}-?.jpg"))]
        client.post("/v1/label-sets/learned/images", files=files, data={"class": label}).raise_for_status()
    page = open_page()
    run(page, "correct", "openCorrection", [pictures / "coffee.jpg"], CORRECT % "learned@1")
    expect(page.get_by_label("Name of the label set")).to_have_count(0)
    expect(page.locator(".label-choices button")).to_have_text(["cat", "coffee cup"])
    page.get_by_label("Or a new label").fill("espresso")
    page.keyboard.press("Enter")
    (learned,) = received(page)
    assert client.get("/v1/label-sets/learned").json()["version"] == 2
    page.evaluate(COUNTER, learned)
    expect(page.locator("#counter")).to_contain_text("9 examples in 3 classes. Measured on these 9 examples, each held")
    selected = client.get("/v1/label-sets/learned/selection").json()
    rows = {each["method"]: each for each in selected["leaderboard"]}
    for method in {"zero-shot", selected["method"]}:
        expect(page.locator("#counter")).to_contain_text(f"{100 * rows[method]['accuracy']:.0f} % (95 % interval")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(403, "needs an API key of scope “write”; yours has scope “classify”"), (401, "requires an API key")],
)
def test_a_key_that_may_not_write_is_explained(open_page, pictures, status, sentence):
    page = open_page()
    detail = "this route needs a key of scope write; the key 'mine' has scope classify"
    problem = {"type": "urn:deixis:problem:forbidden", "title": "Not allowed", "detail": detail, "status": status}
    page.route("**/v1/label-sets/my-own", lambda route: route.fulfill(status=status, json=problem))
    run(page, "correct", "openCorrection", [pictures / "chelsea.jpg"], CORRECT % "")
    page.get_by_label("Name of the label set").fill("my-own")
    page.locator(".label-choices button").first.click()
    expect(page.locator(".correction .problem")).to_contain_text(sentence)
    expect(page.locator(".label-choices button").first).to_be_enabled()


# --- side by side ----------------------------------------------------------------------------------------------------

COMPARE = """[(() => {
    const place = document.createElement("section");
    place.id = "comparison";
    document.getElementById("view-classify").hidden = true;
    document.getElementById("main").prepend(place);
    return place;
})(), {
    pictures,
    async classify(pictures, options) {
        received.push(options);
        const form = new FormData();
        for (const { file, name } of pictures) form.append("image", file, name);
        if (!options.label_set) form.append("labels", "cat, dog, coffee cup");
        for (const [name, value] of Object.entries(options)) form.append(name, value);
        const response = await (await fetch("v1/classify", { method: "POST", body: form })).json();
        return response.results;
    },
}]"""


def test_two_ways_to_classify_are_compared_side_by_side(open_page, client, pictures):
    client.put("/v1/label-sets/other", json={"classes": ["kitten", "coffee cup"]}).raise_for_status()
    page = open_page()
    files = [pictures / "chelsea.jpg", pictures / "coffee.jpg", pictures / "broken.jpg"]
    run(page, "compare", "compare", files, COMPARE)
    page.click("text=Compare 3 images")
    expect(page.locator("#comparison .problem")).to_contain_text("A and B are the same.")
    page.locator("fieldset >> nth=1").get_by_label("Labels").select_option("other")
    page.locator("fieldset >> nth=1").get_by_label("Method").select_option("cupl")
    page.click("text=Compare 3 images")
    expect(page.locator(".compare-summary")).to_be_focused()
    expect(page.locator(".compare-summary")).to_have_text(
        re.compile(r"1 of 2 images differs(; [AB] is surer on 1)?; 1 image could not be compared\.")
    )
    assert page.evaluate("received") == [{}, {"method": "cupl", "label_set": "other"}]
    rows = page.locator(".compare-table tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("kitten")
    expect(rows.first).to_contain_text("\u2260")
    expect(rows.nth(1)).not_to_contain_text("\u2260")
    page.get_by_label("only images that differ").check()
    expect(rows).to_have_count(1)


def test_an_answer_is_all_labels_of_an_image_that_may_have_several(open_page, client, pictures):
    several = {"classes": [{"name": name, "threshold": 0.0} for name in ("cat", "kitten")], "multi_label": True}
    client.put("/v1/label-sets/some", json=several).raise_for_status()
    none = {"classes": [{"name": "rocket", "threshold": 1.0}], "multi_label": True}
    client.put("/v1/label-sets/nothing", json=none).raise_for_status()
    page = open_page()
    run(page, "compare", "compare", [pictures / "chelsea.jpg"], COMPARE)
    page.locator("fieldset >> nth=0").get_by_label("Labels").select_option("some")
    page.locator("fieldset >> nth=1").get_by_label("Labels").select_option("nothing")
    page.click("text=Compare 1 image")
    cells = page.locator(".compare-table tbody td")
    expect(cells.first).to_contain_text(re.compile("cat, kitten|kitten, cat"))
    expect(cells.nth(1)).to_contain_text("none of these")
    for name in ("some", "nothing"):
        client.delete(f"/v1/label-sets/{name}").raise_for_status()


# --- the tools in the view Classify ----------------------------------------------------------------------------------


def test_a_wrong_label_is_corrected_in_every_layout_and_the_pictures_are_classified_again(open_page, client, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "chelsea-1.jpg")
    page.fill("#new-labels", "dog, coffee cup")
    classify(page)
    page.click("[aria-label='Correct the label of chelsea.jpg']")
    page.get_by_label("Or a new label").fill("cat")
    page.get_by_label("Name of the label set").fill("corrected")
    page.get_by_role("button", name="It is this").click()
    expect(page.locator("#learning")).to_contain_text("1 example in 1 class.")
    expect(page.locator("#label-set")).to_have_value("corrected")
    expect(page.locator(".gallery .verdict strong")).to_have_text(["cat", "cat"])
    assert client.get("/v1/label-sets/corrected/images").json()["counts"]["labelled"] == {"cat": 1}
    page.check("input[name=layout][value=grid]")
    page.click(".tile-item [aria-label='Correct the label of chelsea-1.jpg']")  # now the label set is known
    expect(page.get_by_label("Name of the label set")).to_have_count(0)
    page.get_by_label("Or a new label").fill("cat")
    page.get_by_role("button", name="It is this").click()
    expect(page.locator("#learning")).to_contain_text("2 examples in 1 class. Measured on these 2 examples")
    page.check("input[name=layout][value=table]")
    # By the keyboard: a mouse may lose the button when the images are classified again and columns move.
    page.locator("td [aria-label='Correct the label of chelsea.jpg']").press("Enter")
    expect(page.locator("dialog h2")).to_have_text("chelsea.jpg: it is …")


def test_the_pictures_of_the_view_are_compared_in_a_dialog(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg", pictures / "broken.jpg")
    page.fill("#new-labels", "cat, coffee cup")
    classify(page)
    page.click("#compare")
    page.locator("fieldset >> nth=1").get_by_label("Method").select_option("cupl")
    page.click("text=Compare 2 images")
    expect(page.locator(".compare-summary")).to_have_text("All 2 images get the same label.")
    page.keyboard.press("Escape")
    expect(page.locator("#compare")).to_be_focused()


def images_in(request) -> int:
    if request.headers["content-type"] == "application/json":
        return len(request.post_data_json["images"])
    return request.post_data_buffer.count(b'name="image"')


def accept_two(route):
    """Let the server accept at most two images per request."""
    response = route.fetch()
    content = response.json()
    content["images"]["max_per_request"] = 2
    route.fulfill(response=response, json=content)


def posted(page):
    """Return a list of the POST requests from now on."""
    sent = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    return sent


def test_no_request_has_more_images_than_the_server_accepts(open_page, client, pictures):
    client.put("/v1/label-sets/few", json={"classes": ["cat", "coffee cup"]}).raise_for_status()
    built(client, "few", ["a photo of a cat", "a cup of coffee"])
    page = open_page()
    page.route("**/v1/models", accept_two)
    page.reload()
    sent = posted(page)
    choose(page, *sorted(pictures.glob("chelsea*.jpg")))
    page.click("#suggest")
    expect(page.locator("#suggestions")).to_be_visible()
    assert [images_in(request) for request in sent] == [2, 2, 1]
    page.fill("#new-labels", "cat, coffee cup")
    classify(page)
    page.click("#compare")
    page.locator("fieldset >> nth=1").get_by_label("Method").select_option("cupl")
    page.click("text=Compare 5 images")
    expect(page.locator(".compare-summary")).to_have_text("All 5 images get the same label.")
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '#label-sets/few'")
    page.locator("#test-zones input").first.set_input_files(sorted(pictures.glob("chelsea*.jpg")))
    page.click("text=Classify 5 test images")
    expect(page.locator("#test-status")).to_contain_text("5 of 5 correct")
    page.locator("#unlabelled-zone input").set_input_files(sorted(pictures.glob("chelsea*.jpg")))
    expect(page.locator("#unlabelled-status")).to_contain_text("5 images added")
    assert {request.url.split("/v1/")[1] for request in sent} == {"classify", "label-sets/few/images"}
    assert sorted(images_in(request) for request in sent) == [1] * 6 + [2] * 12


def test_images_wait_until_the_server_has_said_how_many_it_accepts(open_page, client, pictures):
    built(client, "few", ["a photo of a cat", "a cup of coffee"])
    page = open_page()
    held = []

    def hold(route):
        held.append(route)

    page.route("**/v1/models", hold)
    page.reload()
    sent = posted(page)
    choose(page, *sorted(pictures.glob("chelsea*.jpg")))
    page.fill("#new-labels", "rocket, clock")
    page.click("#suggest")
    page.click("#classify")
    page.wait_for_timeout(500)
    assert sent == []
    [models] = held
    accept_two(models)
    expect(page.locator("#suggestions")).to_be_visible()
    expect(page.locator("#up-to-date")).to_be_visible()
    assert sorted(images_in(request) for request in sent) == [1, 1, 2, 2, 2, 2]


def test_without_limits_of_the_server_the_page_says_why_and_tries_again(open_page, pictures):
    page = open_page()
    busy = {"title": "Too many requests", "detail": "wait a moment", "status": 429}
    page.route("**/v1/models", lambda route: route.fulfill(status=429, json=busy))
    page.reload()
    expect(page.locator("#load-error span")).to_have_text("Too many requests: wait a moment")
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, coffee cup")
    with page.expect_response("**/v1/models"):
        page.click("#classify")
    expect(page.locator("#load-error span")).to_have_text("Too many requests: wait a moment")
    expect(page.locator("#method option")).to_have_count(2)
    page.unroute("**/v1/models")
    page.click("#classify")
    expect(page.locator("#up-to-date")).to_be_visible()
    expect(page.locator("#load-error")).to_be_hidden()
    expect(page.locator("#method option").nth(2)).to_be_attached()


def test_results_of_the_view_can_be_looked_up_after_a_reload(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "broken.jpg")
    page.fill("#new-labels", "cat, rocket")
    classify(page)
    page.fill("#new-labels", "dog")  # replaces the result of the same pictures
    page.press("#new-labels", "Enter")
    expect(page.locator(".stale-tag")).to_have_count(0)
    # Not wait_for_function, for which a promise is true.
    page.evaluate("""async () => {
        const { list } = await import("/playground/history.js");
        for (let tries = 0; tries < 1000 && (await list())[0]?.labels.length !== 3; tries += 1)
            await new Promise((done) => setTimeout(done, 20));
    }""")
    page.reload()
    page.wait_for_load_state("networkidle")
    page.evaluate("""() => {
        window.urls = new Set();
        const { createObjectURL, revokeObjectURL } = URL;
        URL.createObjectURL = (blob) => {
            const url = createObjectURL(blob);
            urls.add(url);
            return url;
        };
        URL.revokeObjectURL = (url) => {
            urls.delete(url);
            revokeObjectURL(url);
        };
    }""")
    page.click("#remove-labels")
    page.click("#earlier")
    expect(page.locator(".runs li")).to_have_count(1)
    page.click(".runs .run")
    expect(page.locator(".run-pictures li").first).to_contain_text("cat")
    expect(page.locator(".run-pictures li").first).to_contain_text("chelsea.jpg")
    expect(page.locator(".run-pictures img")).to_have_js_property("naturalWidth", 160)
    page.click("text=Use these labels")
    expect(page.locator("#labels li")).to_have_count(3)
    expect(page.locator("dialog")).to_have_count(0)
    page.click("#earlier")
    expect(page.locator(".runs img")).to_have_js_property("naturalWidth", 160)
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    page.wait_for_function("urls.size === 0")


# --- phones and dark mode --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_tools_fit_a_phone_in_light_and_dark(open_page, client, pictures, scheme):
    page = open_page(viewport={"width": 375, "height": 740}, color_scheme=scheme, permissions=["camera"])
    shown = {
        "label sets": lambda: page.evaluate("location.hash = '#label-sets'"),
        "captions": lambda: page.evaluate("location.hash = '#captions'"),
        "lightbox": lambda: run(
            page, "lightbox", "openLightbox", [pictures / "chelsea.jpg"], "[pictures[0], { onCrop: () => {} }]"
        ),
        "camera": lambda: run(page, "camera", "openCamera", more="[{ onPictures: () => {} }]"),
        "urls": lambda: run(page, "image_urls", "openImageUrls", more="[{ onPictures: () => {} }]"),
        "correction": lambda: run(page, "correct", "openCorrection", [pictures / "chelsea.jpg"], CORRECT % ""),
        "comparison": lambda: compared(page, pictures),
    }
    for name, show in shown.items():
        show()
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
        widest = "Math.max(...[...document.querySelectorAll('dialog *')].map((each) => each.scrollWidth), 0)"
        if name != "lightbox":
            assert page.evaluate(widest) <= 375, name
        assert page.evaluate(CONTRAST) == [], name
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_have_count(0)


def compared(page, pictures):
    page.evaluate("location.hash = '#classify'")
    run(page, "compare", "compare", [pictures / "chelsea.jpg", pictures / "coffee.jpg"], COMPARE)
    page.locator("fieldset >> nth=1").get_by_label("Method").select_option("cupl")
    page.click("text=Compare 2 images")
    expect(page.locator(".compare-summary")).to_be_visible()
