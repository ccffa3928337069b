"""The playground in a real browser: classifying, searching captions, API keys, navigation, and the layout."""

import base64
import csv
import io
import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from app.captions.cased.lexicon import WORDNET
from tests.end_to_end.commands import deixis
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
    """Classify and wait until every result answers the labels of now."""
    page.click("#classify")
    expect(page.locator("#up-to-date")).to_be_visible()


def verdicts(page) -> list[str]:
    return page.locator(".gallery .verdict strong").all_text_contents()  # also those that are not in the window


def focused(page) -> str:
    return page.evaluate("document.activeElement.id")


def requests_to_classify(page) -> list:
    sent = []
    page.on("request", lambda request: sent.append(request) if request.url.endswith("/v1/classify") else None)
    return sent


def test_one_click_on_the_samples_classifies_them_and_labels_change_the_results_at_once(open_page):
    page = open_page()
    sent = requests_to_classify(page)
    expect(page.locator("#key-field")).to_be_hidden()
    started = time.monotonic()
    page.click("#samples")
    expect(page.locator("#up-to-date")).to_be_visible()
    assert time.monotonic() - started < 10  # two seconds on an idle machine
    subjects = ["cat", "cup of coffee", "astronaut", "rocket launch", "outer space", "camera on a tripod"]
    assert verdicts(page) == subjects
    expect(page.locator("#labels li")).to_have_count(6)
    expect(page.locator("#results")).to_be_focused()
    assert re.fullmatch(r"(> )?\d+ %", page.locator(".card .score").first.inner_text())
    assert len(sent) == 1
    # Another label: the server has kept the features, so nothing is uploaded again.
    page.fill("#new-labels", "kitten, CAT")
    page.press("#new-labels", "Enter")
    expect(page.locator(".card").first).to_contain_text("kitten")
    expect(page.locator("#labels li")).to_have_count(7)
    expect(page.locator(".stale-tag")).to_have_count(0)
    assert [request.headers["content-type"].split(";")[0] for request in sent] == [
        "multipart/form-data",
        "application/json",
    ]
    assert all(image["id"].startswith("img_") for image in sent[1].post_data_json["images"])
    # A label alone has no score.
    page.click("#remove-labels")
    expect(page.locator(".stale-tag")).to_have_count(6)
    expect(page.locator("#results")).to_contain_text("These results are for earlier labels.")
    page.fill("#new-labels", "cat")
    page.press("#new-labels", "Enter")
    expect(page.locator(".card").first).to_contain_text("Similarity 0.66, number 1 of 6 images.")
    expect(page.locator("#one-label")).to_contain_text("One label has nothing to compete with")
    assert "100 %" not in page.inner_text("#results")


def test_a_sample_alone_is_classified_with_the_labels_of_the_user(open_page):
    page = open_page()
    page.fill("#new-labels", "dog, kitten, horse")
    page.click("[aria-label='Classify the photograph of a cat']")
    expect(page.locator("#up-to-date")).to_be_visible()
    assert verdicts(page) == ["kitten"]
    page.locator(".why summary").click()
    expect(page.locator(".why")).to_contain_text("a photo of a kitten.")

    def weaken(route):
        response = route.fetch()
        content = response.json()
        content["results"][0] |= {"weak_match": True, "warnings": ["probably none of the labels fits"]}
        route.fulfill(response=response, json=content)

    page.route("**/v1/classify", weaken, times=1)
    page.click("[aria-label='Remove kitten']")
    expect(page.locator(".card .verdict")).to_have_text("No good fit")
    expect(page.locator(".card")).to_contain_text("Closest: dog.")
    expect(page.locator("#results")).to_contain_text("Probably none of the labels fits.")

    page.route("**/v1/classify", weaken, times=1)
    page.click("[aria-label='Remove horse']")  # a label alone
    expect(page.locator(".card .verdict")).to_have_text("No good fit")
    expect(page.locator(".card .verdict-note")).to_have_text(re.compile(r"Closest: dog\. Similarity -?0\.\d\d\."))
    expect(page.locator(".card")).not_to_contain_text("100 %")
    page.check("input[name=layout][value=table]")
    expect(page.locator("tbody td.number").first).to_have_text("")
    page.check("input[name=layout][value=cards]")
    page.fill("#new-labels", "horse")
    page.press("#new-labels", "Enter")
    expect(page.locator(".card")).to_contain_text("horse")

    def reject(route):
        fields = route.request.post_data_json
        assert fields.pop("reject") == "auto"
        response = route.fetch(post_data=json.dumps(fields))
        content = response.json()
        content["results"][0]["rejected"] = True
        route.fulfill(response=response, json=content)

    page.route("**/v1/classify", reject)  # also the request of the explanation that is still open
    page.check("#reject-auto")
    expect(page.locator(".card .verdict")).to_have_text("None of these")
    expect(page.locator("#threshold")).to_have_count(0)


def test_results_are_sorted_filtered_searched_rejected_and_downloaded(open_page, pictures, tmp_path):
    page = open_page()
    folder = tmp_path / "photos" / "inner"
    folder.mkdir(parents=True)
    for file in sorted(pictures.glob("*.jpg")):
        shutil.copy(file, folder)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    page.set_input_files("#folder", str(tmp_path / "photos"))
    expect(page.locator("#left-out")).to_have_text("Skipped, not an image: notes.txt.")
    page.fill("#new-labels", "cup, pet, rocket")
    classify(page)
    counts = {each.get_attribute("data-group"): each.inner_text() for each in page.locator(".filter").all()}
    assert counts == {"all": "All 11", "label:pet": "pet 5", "label:cup": "cup 5", "errors": "Errors 1"}
    page.click("[data-group='label:pet']")
    expect(page.locator(".card")).to_have_count(5)
    page.fill("#search-files", "-2")
    expect(page.locator(".card")).to_have_count(1)
    page.fill("#search-files", "nowhere")
    page.click("text=Show all images")
    expect(page.locator(".card")).to_have_count(11)
    page.click("[data-group=errors]")
    expect(page.locator(".card")).to_have_count(1)
    expect(page.locator(".card")).to_contain_text("Not readable")
    page.click("[data-group=all]")
    # The table has a row per image, and the order is that of the scores.
    page.check("input[name=layout][value=table]")
    page.select_option("#order", "low")
    expect(page.locator("tbody tr")).to_have_count(11)
    page.select_option("#order", "label")
    expect(page.locator("tbody tr td:nth-child(3) strong").first).to_have_text("cup")
    # The threshold needs no request.
    sent = requests_to_classify(page)
    page.locator("#threshold").evaluate("each => { each.value = 0.99; each.dispatchEvent(new Event('input')); }")
    rejected = page.locator("[data-group=none]")
    expect(rejected).to_be_visible()
    assert f"{rejected.locator('.count').inner_text()} image" in page.inner_text(".threshold output")
    saved = download(page, "CSV", tmp_path)
    rows = list(csv.DictReader(saved.read_text().splitlines()))
    assert list(rows[0]) == ["path", "rank", "label", "score", "similarity", "rejected", "error"]
    files = sorted(f"photos/inner/{file.name}" for file in folder.iterdir())
    assert [row["path"] for row in rows if row["rank"] in {"", "1"}] == files
    assert [row["rejected"] for row in rows if row["error"]] == [""]
    assert {row["rejected"] for row in rows if row["rank"]} == {"no", "none of these"}
    results = json.loads(download(page, "JSON", tmp_path).read_text())
    assert results[0]["path"] == "photos/inner/broken.jpg"
    assert results[0]["error"]["title"] == "Not a readable image"
    page.locator("#threshold").evaluate("each => { each.value = 0; each.dispatchEvent(new Event('input')); }")
    with zipfile.ZipFile(download(page, "ZIP", tmp_path)) as archive:
        assert archive.testzip() is None
        names = sorted(archive.namelist())
        assert names[0] == "cup/coffee-1.jpg"
        assert "not classified/broken.jpg" in names
        assert archive.read("pet/chelsea.jpg") == (pictures / "chelsea.jpg").read_bytes()
    assert sent == []


def download(page, kind: str, folder: Path) -> Path:
    page.click(".menu summary")
    with page.expect_download() as started:
        page.locator(".menu-items button").filter(has_text=kind).click()
    saved = folder / started.value.suggested_filename
    started.value.save_as(saved)
    return saved


def test_results_of_earlier_labels_are_never_saved(open_page, pictures, tmp_path):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, dog")
    classify(page)
    page.route("**/v1/classify", lambda _: None)  # no answer
    page.fill("#new-labels", "kitten")
    page.press("#new-labels", "Enter")
    page.click(".menu summary")
    problem = page.locator("#download-problem")
    expect(problem).to_have_text("New results are on their way.")
    expect(page.locator(".menu-items button:disabled")).to_have_count(3)
    page.click("#stop")
    expect(problem).to_have_text("Some results are for earlier labels. Continue first.")
    page.unroute("**/v1/classify")
    page.click("#resume")
    expect(problem).to_have_text("")
    assert "kitten" in download(page, "JSON", tmp_path).read_text()
    page.click("#remove-labels")
    page.click(".menu summary")
    expect(problem).to_have_text("These results are for earlier labels. Update them first.")
    # An image whose request failed has the error in place of its earlier result.
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('no network')); }")
    page.fill("#new-labels", "cup of coffee")
    page.press("#new-labels", "Enter")
    expect(page.locator(".card.failed")).to_have_count(2)
    page.click(".menu summary")  # closes it
    results = json.loads(download(page, "JSON", tmp_path).read_text())
    assert {result["error"]["title"] for result in results} == {"Not classified"}
    assert [result["predictions"] for result in results] == [[], []]


def test_the_csv_is_that_of_the_command_line(open_page, pictures, server, tmp_path, monkeypatch):
    for name in ("chelsea", "coffee"):
        shutil.copy(pictures / f"{name}.jpg", tmp_path)
    shutil.copy(pictures / "coffee.jpg", tmp_path / "=cup, small.jpg")
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "broken.jpg", tmp_path)
    files = ["chelsea.jpg", "broken.jpg", "=cup, small.jpg"]
    command = ["classify", *files, "--labels", "cat,+1", "--top-k", "5", "--format", "csv", "--server", server.url]
    printed = deixis(*command, data_dir=tmp_path / "data").stdout
    page = open_page()
    choose(page, *(tmp_path / file for file in files))
    page.fill("#new-labels", "cat,+1")
    classify(page)
    (tmp_path / "saved").mkdir()
    assert download(page, "CSV", tmp_path / "saved").read_bytes().decode().splitlines() == printed.splitlines()


def test_the_path_of_a_hierarchy_is_downloaded_beside_that_of_the_file(open_page, pictures, client, server, tmp_path):
    classes = [{"name": "cat", "parent": "animal"}, {"name": "kitten", "parent": "animal"}, "rocket"]
    client.put("/v1/label-sets/with-parents", json={"classes": classes}).raise_for_status()
    file = shutil.copy(pictures / "chelsea.jpg", tmp_path)
    page = open_page()
    choose(page, file)
    page.locator("input[value=label_set]").check()
    page.select_option("#label-set", "with-parents")
    classify(page)
    (result,) = json.loads(download(page, "JSON", tmp_path).read_text())
    assert result["path"] == "chelsea.jpg"
    levels = [step["label"] for step in result["label_path"]]
    assert levels == ["animal", result["predictions"][0]["label"]]
    (tmp_path / "saved").mkdir()
    rows = list(csv.DictReader(download(page, "CSV", tmp_path / "saved").read_text("utf-8").splitlines()))
    assert list(rows[0]) == ["path", "rank", "label", "score", "similarity", "label path", "error"]
    assert {row["label path"] for row in rows} == {"|".join(levels)}
    # An image that the threshold of the page rejects has no label, and so no path.
    page.locator("#threshold").evaluate("each => { each.value = 0.99; each.dispatchEvent(new Event('input')); }")
    (result,) = json.loads(download(page, "JSON", tmp_path).read_text())
    assert (result["rejected"], result["label_path"]) == (True, [])
    client.delete("/v1/label-sets/with-parents").raise_for_status()


def test_many_images_are_sent_in_parts_that_can_be_stopped_continued_and_tried_again(open_page, pictures):
    page = open_page()
    photo = base64.b64encode((pictures / "coffee.jpg").read_bytes()).decode()
    page.evaluate(
        """base64 => {
            const bytes = Uint8Array.from(atob(base64), (each) => each.charCodeAt(0)), transfer = new DataTransfer();
            for (let number = 0; number < 70; number += 1) {
                transfer.items.add(new File([bytes], `photo ${number}.jpg`, { type: "image/jpeg" }));
            }
            const input = document.querySelector("#files");
            input.files = transfer.files;
            input.dispatchEvent(new Event("change"));
        }""",
        photo,
    )
    page.fill("#new-labels", "cat, coffee cup")
    sent = []

    def answer(route):
        # The first two parts arrive; the next ones wait until the run is stopped.
        sent.append(route)
        if len(sent) not in {3, 4}:
            route.continue_()

    page.route("**/v1/classify", answer)
    page.click("#classify")
    expect(page.locator(".progress")).to_contain_text("32 of 70")
    page.click("#stop")
    expect(page.locator(".progress")).to_contain_text("Stopped at 32 of 70")
    expect(page.locator(".card.match")).to_have_count(32)
    page.evaluate(
        """() => {
            const send = window.fetch;
            window.fetch = () => {
                window.fetch = send;
                return Promise.reject(new TypeError("no network"));
            };
        }"""
    )
    page.click("#resume")
    expect(page.locator("#results .problem").first).to_contain_text(
        "16 images were not classified. The server cannot be reached."
    )
    expect(page.locator(".card.match")).to_have_count(54)
    expect(page.locator(".card.failed")).to_have_count(16)
    expect(page.locator("#classify")).to_have_text("Classify 16 images")
    page.click("#retry")
    expect(page.locator(".card.match")).to_have_count(70)
    expect(page.locator(".progress")).to_have_count(0)
    expect(page.locator("#status")).to_have_text("70 images classified.")


def refuse_twice(retry_after: str):
    """Refuse the first two requests because of a limit."""
    left = [2]

    def answer(route):
        if not left[0]:
            route.continue_()
            return
        left[0] -= 1
        problem = {"type": "urn:deixis:problem:rate-limited", "title": "Rate limited", "detail": "20 images per day"}
        route.fulfill(status=429, json=problem, headers={"Retry-After": retry_after})

    return answer


@pytest.mark.parametrize(
    ("retry_after", "said"),
    [
        ("300", r"The limit of the server is reached\. The rest continues in [45] min\. \(20 images per day\)"),
        ("7200", r"The limit of the server is reached\. The rest continues at .* in 2 h\."),
        ("Fri, 31 Dec 2100 23:59:59 GMT", r"The rest continues at .* (2100|2101).* in \d+ h\."),
    ],
)
def test_a_server_that_asks_to_wait_is_waited_for_with_the_time_and_a_way_out(open_page, pictures, retry_after, said):
    page = open_page()
    page.clock.install()
    page.route("**/v1/classify", refuse_twice(retry_after))
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, dog")
    page.click("#classify")
    expect(page.locator("#wait")).to_have_text(re.compile(said))
    expect(page.locator("#status")).to_have_text(re.compile(said))
    expect(page.locator("#classify")).to_have_text("Waiting for the server…")
    assert verdicts(page) == ["Waiting…"]
    page.click("#stop")
    expect(page.locator("#wait")).to_have_count(0)
    page.unroute("**/v1/classify")
    page.click("#resume")
    expect(page.locator(".card.match")).to_have_count(1)


def test_a_run_continues_by_itself_after_the_wait_that_the_server_asked_for(open_page, pictures):
    page = open_page()
    page.clock.install()
    page.route("**/v1/classify", refuse_twice("100"))
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, dog")
    page.click("#classify")
    expect(page.locator("#wait")).to_contain_text("in 2 min")
    page.clock.fast_forward(60_000)
    expect(page.locator("#wait")).to_contain_text(re.compile("in [34][0-9] s"))
    page.clock.fast_forward(41_000)
    expect(page.locator("#wait")).to_contain_text("in 2 min")  # the second refusal
    page.clock.fast_forward(101_000)
    expect(page.locator(".card.match")).to_have_count(1)
    expect(page.locator(".progress, #wait")).to_have_count(0)


def test_images_whose_features_the_server_has_forgotten_are_sent_again(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, dog")
    classify(page)
    sent = requests_to_classify(page)

    def forget(route):
        body = route.request.post_data_json
        body["images"] = [{"id": "img_unknown"}, *body["images"][1:]]
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/classify", forget, times=1)
    page.fill("#new-labels", "cup of coffee")
    page.press("#new-labels", "Enter")
    expect(page.locator(".card .verdict strong").nth(1)).to_have_text("cup of coffee")
    expect(page.locator("#up-to-date")).to_be_visible()
    expect(page.locator(".stale-tag")).to_have_count(0)
    assert verdicts(page) == ["cat", "cup of coffee"]
    assert len(sent) == 2
    assert sent[1].headers["content-type"].startswith("multipart/form-data")


def test_files_and_urls_are_classified_and_asked_about_together(open_page, pictures):
    page = open_page()

    def allow_urls(route):
        response = route.fetch()
        content = response.json()
        content["images"]["urls"] = True
        route.fulfill(response=response, json=content)

    cup = {"base64": base64.b64encode((pictures / "coffee.jpg").read_bytes()).decode()}
    asked = []

    def fetch_urls(route):
        if route.request.headers["content-type"] == "application/json":
            body = route.request.post_data_json
            asked.append([*map(list, body["images"])])
            body["images"] = [cup if "url" in image else image for image in body["images"]]
            route.continue_(post_data=json.dumps(body))
        else:
            route.continue_()

    page.route("**/v1/models", allow_urls)
    page.reload()
    page.route("**/v1/classify", fetch_urls)
    choose(page, pictures / "chelsea.jpg")
    page.click("#image-urls")
    page.fill("dialog textarea", "https://images.example.com/cup.jpg")
    page.get_by_role("dialog").get_by_role("button", name="Add").click()
    page.click("#suggest")
    expect(page.locator("#suggestions")).to_be_visible()
    page.fill("#new-labels", "cat, cup of coffee")
    classify(page)
    assert verdicts(page) == ["cat", "cup of coffee"]
    assert asked == [[["base64"], ["url"]], [["url"]]]


def test_a_response_that_is_cut_off_is_reported_and_the_images_can_be_sent_again(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, dog")
    page.route("**/v1/classify", lambda route: route.fulfill(content_type="application/json", body="{"), times=1)
    page.click("#classify")
    expect(page.locator(".card.failed")).to_contain_text("The response of the server is incomplete.")
    page.click("#retry")
    expect(page.locator(".card.match")).to_have_count(1)


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


def test_an_image_with_several_labels_has_a_check_mark_for_each(open_page, pictures, tmp_path):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "coffee.jpg")
    page.fill("#new-labels", "cat, kitten, submarine")
    page.click("#options summary")
    page.check("#multi-label")
    classify(page)
    cat = page.locator(".card").first
    expect(cat.locator(".verdict")).to_have_text(re.compile("^✓ (cat, ✓ kitten|kitten, ✓ cat)$"))
    assert {text[0] for text in cat.locator(".runner").all_text_contents()} == {"✓", "s"}
    expect(page.locator(".filter[data-group='label:kitten'] .count")).to_have_text("1")
    with zipfile.ZipFile(download(page, "ZIP", tmp_path)) as archive:
        folders = {name.split("/")[0] for name in archive.namelist() if "chelsea" in name}
    assert folders == {"cat", "kitten"}
    rows = list(csv.DictReader(download(page, "CSV", tmp_path).read_text("utf-8").splitlines()))
    above = {row["label"] for row in rows if row["path"] == "chelsea.jpg" and row["above"] == "yes"}
    assert above == {"cat", "kitten"}
    page.locator("#threshold").evaluate("each => { each.value = 0.99; each.dispatchEvent(new Event('input')); }")
    expect(page.locator(".threshold output")).to_contain_text("1 image")  # has none of the labels
    page.reload()
    expect(page.locator("#multi-label")).to_be_checked()


def test_a_label_set_says_that_an_image_may_have_several_labels(open_page, pictures, client):
    classes = ["cat", "kitten", "submarine", "rocket", "tractor", "violin", "teapot"]
    client.put("/v1/label-sets/several", json={"classes": classes, "multi_label": True}).raise_for_status()
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.locator("input[value=label_set]").check()
    page.select_option("#label-set", "several")
    page.click("#options summary")
    expect(page.locator("#multi-label")).to_be_checked()
    expect(page.locator("#multi-label")).to_be_disabled()
    with page.expect_response("**/v1/classify") as answered:
        classify(page)
    (result,) = answered.value.json()["results"]
    assert len(result["predictions"]) == len(classes)  # the slider needs the scores of all
    expect(page.locator(".card .verdict")).to_have_text(re.compile("^✓ (cat, ✓ kitten|kitten, ✓ cat)$"))
    expect(page.locator(".tools")).to_contain_text(re.compile(r"Labels\s*from"))
    page.select_option("#label-set", "things")
    expect(page.locator("#multi-label")).not_to_be_checked()
    expect(page.locator("#multi-label")).to_be_enabled()
    expect(page.locator(".tools")).to_contain_text(re.compile(r"None of these\s*automatic\s*below"))
    client.delete("/v1/label-sets/several").raise_for_status()


def test_label_sets_methods_and_links_keep_the_question(open_page, pictures, server):
    page = open_page()
    choose(page, pictures / "coffee.jpg")
    page.locator("input[value=label_set]").check()
    expect(page.locator("#label-set")).to_have_value("things")
    page.click("#options summary")
    page.select_option("#method", "autoclip")
    assert "Metzen" in page.inner_text("#method-summary")
    classify(page)
    assert verdicts(page) == ["coffee cup"]
    # Labels and options survive a reload, and a link carries them.
    page.reload()
    expect(page.locator("#label-set")).to_have_value("things")
    expect(page.locator("#method")).to_have_value("autoclip")
    page.goto(f"{server.url}/#classify?label=cat&label=&label=+&label=cup%2C+blue&top_k=3&reject_below=0.4")
    expect(page.locator("#labels li span")).to_have_text(["cat", "cup, blue"])
    expect(page.locator("#method")).to_have_value("")
    assert page.url == f"{server.url}/#classify"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-link")
    expect(page.locator(".side-links")).to_contain_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"{server.url}/#classify?label=cat&label=cup%2C+blue&top_k=3&reject_below=0.4"


def test_a_change_of_the_label_set_renews_its_results(open_page, pictures, client):
    client.put("/v1/label-sets/changing", json={"classes": ["rocket", "coffee cup"]}).raise_for_status()
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.locator("input[value=label_set]").check()
    page.select_option("#label-set", "changing")
    classify(page)
    page.click(".views a[href='#label-sets']")
    client.put("/v1/label-sets/changing", json={"classes": ["cat", "coffee cup"]}).raise_for_status()
    page.click(".views a[href='#classify']")
    expect(page.locator(".card .verdict strong")).to_have_text("cat")
    expect(page.locator("#up-to-date")).to_be_visible()
    client.delete("/v1/label-sets/changing").raise_for_status()


def test_labels_can_change_while_an_explanation_is_loading(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, dog")
    classify(page)
    held = []

    def hold_the_first(route):
        if "explain" in (route.request.post_data or "") and not held:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/classify", hold_the_first)
    with page.expect_request("**/v1/classify"):
        page.click(".why summary")
    page.fill("#new-labels", "rocket")
    page.press("#new-labels", "Enter")
    page.click("[aria-label='Remove dog']")
    expect(page.locator(".why h4").first).to_have_text("cat, compared with rocket")


def test_folders_and_names_in_the_zip_file_suit_every_file_system(open_page, pictures, tmp_path):
    long = tmp_path / f"{'long ' * 40}.jpg"
    shutil.copy(pictures / "chelsea.jpg", long)
    page = open_page()
    choose(page, pictures / "chelsea.jpg", long)
    for label, folder in (("CON", "CON_"), ("x" + "\N{CAT FACE}" * 120, "x" + "\N{CAT FACE}" * 59), ("..", "_")):
        page.goto(page.url.split("#")[0] + f"#classify?label={label}")
        if label == "CON":  # results follow the labels after the first ones
            page.click("#classify")
        expect(page.locator(".card-body")).to_contain_text([label, label])
        with zipfile.ZipFile(download(page, "ZIP", tmp_path)) as archive:
            names = archive.namelist()
        assert names == [f"{folder}/chelsea.jpg", f"{folder}/{('long ' * 12).strip()}.jpg"]


def test_images_can_be_dropped_anywhere_and_removed(open_page, pictures, drop):
    page = open_page()
    drop(page, "#drop", pictures / "chelsea.jpg")
    drop(page, "#labels-title", pictures / "coffee.jpg")
    expect(page.locator(".card")).to_have_count(2)
    drop(page, "#drop", pictures / "broken.jpg", media_type="application/pdf")
    expect(page.locator("#left-out")).to_have_text("Skipped, not an image: broken.jpg.")
    page.focus("[aria-label='Remove chelsea.jpg']")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(1)
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove coffee.jpg"
    page.keyboard.press("Enter")
    expect(page.locator("#files")).to_be_focused()
    expect(page.locator("#samples")).to_be_visible()


def test_errors_are_shown_in_their_place_and_keep_the_results(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg", pictures / "broken.jpg")
    page.click("#classify")
    problem = page.locator("#labels-problem")
    expect(problem).to_have_text("Enter at least one label.")
    expect(page.locator("#new-labels")).to_be_focused()
    page.fill("#new-labels", "x" * 201)
    page.click("#classify")
    left_out = page.locator("#left-out-labels")
    expect(left_out).to_have_text(
        re.compile(r"1 label is left out\. 'x+'\.\.\. has 201 characters, at most 200 are allowed; shorten it\.")
    )
    page.click("#classify")
    expect(problem).to_have_text("Enter a label that the server accepts.")
    page.fill("#new-labels", "cat, sea\u202egull")  # the label that turns the direction of writing is left out as well
    page.press("#new-labels", "Enter")
    expect(left_out).to_contain_text("2 labels are left out.")
    expect(left_out).to_contain_text("U+202E RIGHT-TO-LEFT OVERRIDE")
    expect(page.locator("#labels .refused")).to_have_count(2)
    expect(page.locator("#up-to-date")).to_be_visible()
    assert verdicts(page) == ["cat", "Not readable"]
    assert "xxx" not in page.locator("#curl").text_content()
    for _ in range(2):
        page.locator("#labels .refused button").first.click()
    expect(left_out).to_have_count(0)
    page.fill("#new-labels", "dog")
    page.press("#new-labels", "Enter")
    page.click("#options summary")
    page.fill("#template", "a {thing} {}")
    page.press("#template", "Tab")
    page.click("#options summary")
    expect(page.locator("#options .field-problem")).to_contain_text("has a brace that is not part of {}")
    expect(page.locator("#template")).to_be_focused()  # the options were opened
    expect(page.locator(".stale-tag")).to_have_count(1)
    assert verdicts(page) == ["cat", "Not readable"]
    page.fill("#template", "")
    page.press("#template", "Tab")
    classify(page)
    expect(page.locator(".field-problem, [aria-invalid], #error, .stale-tag")).to_have_count(0)


def test_labels_are_shown_as_text_and_never_as_markup(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "<img src=x onerror=alert(1)>, <b>dog</b>")
    classify(page)
    expect(page.locator("#results b, #labels b, #labels img")).to_have_count(0)
    assert "<b>dog</b>" in page.inner_text("#results")


@pytest.mark.skipif(
    not (WORDNET / "data.noun").exists() and os.environ.get("TEST_REQUIRE_WORDNET") != "1",
    reason="WordNet's files are missing; install Debian's wordnet-base",
)
def test_labels_are_discovered_and_suggested(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.locator("input[value=none]").check()
    page.select_option("#database", "archive")
    classify(page)
    assert verdicts(page) == ["cat"]
    page.locator(".why summary").click()
    expect(page.locator(".why .prompts")).to_contain_text(CAPTIONS[0])
    page.locator("input[value=labels]").check()
    page.click("#suggest")
    page.click("#suggestions button >> text=cat")
    expect(page.locator("#labels li span")).to_have_text(["cat"])


def test_labels_cannot_be_suggested_for_images_that_are_known_to_be_unreadable(open_page, pictures):
    page = open_page()
    choose(page, pictures / "broken.jpg")
    page.fill("#new-labels", "cat")
    classify(page)
    page.click("#suggest")
    expect(page.locator("#source-labels .problem")).to_have_text("The server cannot read any of these images.")


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


def test_captions_can_be_searched_once_the_databases_are_known(open_page):
    page = open_page()
    held = []
    page.route("**/v1/databases", lambda route: held.append(route) or None)
    page.evaluate("location.hash = '#captions'")
    expect(page.locator("#view-captions")).to_be_visible()
    page.wait_for_timeout(300)
    expect(page.locator("#search")).to_be_hidden()
    held[0].continue_()
    page.fill("#search-text", "a cup of coffee")
    search(page)
    expect(page.locator("#captions li")).to_have_count(5)


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
    while "samples" not in reached:
        assert len(reached) < 14, reached
        page.keyboard.press("Tab")
        reached.append(focused(page))
    assert [each for each in reached if each] == [
        "new-labels",
        "add-labels",
        "earlier",
        "files",
        "folder",
        "camera",
        "samples",
    ]
    page.focus("#new-labels")
    page.keyboard.type("a circle")
    page.keyboard.press("Enter")
    expect(page.locator("#labels li")).to_have_count(1)
    page.focus("#samples")
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_be_focused()
    expect(page.locator("#up-to-date")).to_be_visible()
    page.focus("[aria-label='Remove a circle']")
    page.keyboard.press("Enter")
    expect(page.locator("#new-labels")).to_be_focused()


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
    expect(page.locator("#up-to-date")).to_be_visible()
    expect(page.locator("#new-labels")).to_be_focused()
    page.keyboard.type("ket")
    expect(page.locator("#new-labels")).to_have_value("rocket")


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


def test_a_view_whose_modules_cannot_be_loaded_says_so_and_is_loaded_later(open_page):
    page = open_page()
    page.route("**/playground/search.js", lambda route: route.fulfill(status=404))
    page.get_by_role("link", name="Captions").click()
    expect(page.locator("#search-error")).to_contain_text("This view cannot be loaded")
    page.unroute("**/playground/search.js")
    page.get_by_role("link", name="Classify").click()
    page.get_by_role("link", name="Captions").click()
    expect(page.locator("#search-error")).to_be_hidden()
    expect(page.locator("#search-database option").first).to_be_attached()


def test_axe_finds_no_serious_problem(open_page, pictures):
    page = open_page()
    found = []

    def check(place):
        violations = Axe().run(page).response["violations"]
        found.extend((place, each["id"]) for each in violations if each["impact"] in {"serious", "critical"})

    check("first view")
    choose(page, pictures / "broken.jpg")
    page.click("#classify")
    expect(page.locator(".field-problem")).to_be_visible()
    check("error")
    page.fill("#new-labels", "cat, rocket")
    choose(page, pictures / "chelsea.jpg")
    classify(page)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    expect(page.locator(".why .prompts").first).to_be_visible()
    for layout in ("cards", "grid", "table"):
        page.check(f"input[name=layout][value={layout}]")
        check(layout)
    for view in ("label-sets/things", "captions"):
        page.evaluate(f"location.hash = '#{view}'")
        page.wait_for_load_state("networkidle")
        check(view)
    assert found == []


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
    for layout in ("grid", "table", "cards"):
        page.check(f"input[name=layout][value={layout}]")
        page.wait_for_selector(".results-table" if layout == "table" else f".gallery.{layout}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, layout
        assert page.evaluate(CONTRAST) == [], layout
    for view in ("classify", "label-sets/things", "captions"):
        page.evaluate(f"location.hash = '#{view}'")
        page.wait_for_load_state("networkidle")
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        assert page.evaluate(CONTRAST) == [], view
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")


def test_on_a_phone_results_are_in_the_window_after_a_click(open_page, pictures):
    page = open_page(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    card, tools = page.locator(".card").first, page.locator(".tool-actions > *")
    choose(page, *sorted(pictures.glob("c*.jpg")))
    page.fill("#new-labels", "cat, cup of coffee")
    classify(page)
    expect(card).to_be_in_viewport()
    assert len({round(each.bounding_box()["y"] + each.bounding_box()["height"] / 2) for each in tools.all()}) == 1
    page.fill("#new-labels", "rocket")  # scrolls back to the labels
    page.press("#new-labels", "Enter")
    expect(page.locator("#labels li")).to_have_count(3)
    expect(card).not_to_be_in_viewport()
    page.click("#to-results")
    expect(card).to_be_in_viewport()
    # Many labels leave room for what is below them, and the last one is in sight.
    page.fill("#new-labels", ", ".join(f"thing {number}" for number in range(197)))
    page.press("#new-labels", "Enter")
    expect(page.locator("#labels-title")).to_have_text("Labels 200")
    expect(page.locator("#labels li").last).to_be_in_viewport()
    assert page.locator("#source-labels").bounding_box()["height"] < 500


def test_the_page_sends_an_api_key_and_does_not_store_it(open_page, pictures, tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(
        f"[[keys]]\nid = 'browser'\nkey = {json.dumps(KEY)}\nscope = 'write'\n"
        f"[[keys]]\nid = 'reader'\nkey = {json.dumps('reads and ' + KEY)}\nscope = 'classify'\n"
    )
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
        page.fill("#key", f"reads and {KEY}")
        page.press("#key", "Enter")
        expect(page.locator("#label-sets-error")).to_be_hidden()
        page.click("#save-label-set")
        expect(page.locator("#editor-error")).to_contain_text(
            "This needs an API key of scope “write”; yours has scope “classify”. Enter another one"
        )
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        expect(page.locator("#editor-name")).to_have_value("pets")  # typed text is kept
        page.click("#save-label-set")
        expect(page.locator("#editor-status")).to_have_text("Saved as version 1.")
        page.click("nav a[href='#classify']")
        choose(page, pictures / "chelsea.jpg")
        page.fill("#new-labels", "cat, dog")
        classify(page)
        assert verdicts(page) == ["cat"]
        page.click("#code summary")
        assert "$DEIXIS_API_KEY" in page.inner_text("#curl")
        assert KEY not in page.content()
        page.reload()
        expect(page.locator("#key")).to_have_value("")
        assert KEY not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")


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
    page.click("#samples")
    expect(page.locator("#up-to-date")).to_be_visible()
    expect(page.locator(".card img")).to_have_count(6)
    expect(page.locator(".jobs")).to_be_hidden(timeout=60_000)
    place(".gallery")
    save_screenshot(page, f"page-classify-{look}")
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
