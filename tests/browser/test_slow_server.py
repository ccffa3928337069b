"""The page in a real browser while the server is slow, fails once, or answers out of order."""

import io
import re

import pytest
from PIL import Image

from tests.browser.test_playground import built, choose, classify
from tests.end_to_end.server import serving

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

INCOMPLETE = "The response of the server is incomplete. Try again."
BUSY = {"status": 429, "json": {"title": "Too many requests", "detail": "wait a moment", "status": 429}}
REFUSED = "Too many requests: wait a moment"


@pytest.fixture
def pets(client, request):
    """A new label set for each test."""
    return new_label_set(client, re.sub(r"\W+", "-", request.node.name)[5:60])


def new_label_set(client, name, *classes):
    client.put(f"/v1/label-sets/{name}", json={"classes": classes or ["cat", "dog"]}).raise_for_status()
    return name


def hold(page, url, method="GET"):
    """Return a list of the requests of a method to a URL from now on, which wait until the test answers them."""
    held = []
    page.route(url, lambda route: held.append(route) if route.request.method == method else route.fallback())
    return held


def wait_for(page, condition):
    """Wait until a condition of the test holds, while the page goes on."""
    for _ in range(400):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("the condition did not come true")


def refuse_once(page, url, method="GET", **answer):
    """Answer the next request of a method to a URL with an error."""
    answers = [answer or BUSY]

    def refuse(route):
        if route.request.method == method and answers:
            route.fulfill(**answers.pop())
        else:
            route.fallback()

    page.route(url, refuse)


def cut_once(page, url, method="GET"):
    """Let the server answer the next request of a method to a URL, and cut the answer off."""
    left = [True]

    def cut(route):
        if route.request.method == method and left:
            left.clear()
            response = route.fetch()
            route.fulfill(response=response, body=response.body()[:-5])
        else:
            route.fallback()

    page.route(url, cut)


def go(page, address):
    page.evaluate("address => { location.hash = address; }", address)


def opened(page, name):
    expect(page.locator("#editor-title")).to_have_text(name)


# --- answers that are cut off ----------------------------------------------------------------------------------------


def test_a_response_that_is_cut_off_is_a_sentence_in_every_view(open_page, client, pets):
    page = open_page("#label-sets")
    cut_once(page, f"**/v1/label-sets/{pets}")
    go(page, f"#label-sets/{pets}")
    expect(page.locator("#editor-failed")).to_contain_text(INCOMPLETE)
    go(page, "#label-sets")
    go(page, f"#label-sets/{pets}")
    opened(page, pets)
    cut_once(page, f"**/v1/label-sets/{pets}/thresholds")
    page.click("#thresholds summary")
    expect(page.locator("#threshold-charts .problem")).to_contain_text(INCOMPLETE)
    page.click("text=Load again")
    expect(page.locator("#threshold-charts .problem")).to_be_hidden()


@pytest.mark.parametrize(
    "detail", ["the model is loading; try again later", "the model is loading", "the model is loading."]
)
def test_an_error_names_the_time_after_which_to_try_again(open_page, detail):
    page = open_page()
    busy = {"title": "Not ready", "detail": detail, "status": 429}
    refuse_once(page, re.compile(r"/v1/databases$"), status=429, headers={"retry-after": "5"}, json=busy)
    go(page, "#captions")
    expect(page.locator("#search-error")).to_contain_text("Not ready: the model is loading. Try again in 5 s.")


def test_a_sample_that_cannot_be_loaded_is_a_sentence(open_page):
    page = open_page()
    page.route("**/samples/cat.jpg", lambda route: route.fulfill(**BUSY))
    page.click(".sample >> nth=0")
    expect(page.locator("#error")).to_have_text(REFUSED)
    page.unroute("**/samples/cat.jpg")
    page.click(".sample >> nth=0")
    expect(page.locator("#up-to-date")).to_be_visible()


def test_a_label_set_that_was_imported_needs_no_complete_response(open_page, client):
    page = open_page("#label-sets")
    cut_once(page, "**/v1/label-sets/animals", "PUT")
    page.click("[aria-label='Import animals']")
    opened(page, "animals")


# --- the editor of label sets ----------------------------------------------------------------------------------------


def test_the_editor_never_shows_another_label_set_than_the_address_says(open_page, client, pets):
    other = new_label_set(client, f"{pets}-2", "fox")
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)
    held = hold(page, f"**/v1/label-sets/{other}")
    go(page, f"#label-sets/{other}")
    expect(page.locator("#editor-loading")).to_be_visible()
    expect(page.locator("#label-set-form, #editor-tools")).to_have_count(2)
    expect(page.locator("#label-set-form")).to_be_hidden()
    expect(page.locator("#editor-tools")).to_be_hidden()
    wait_for(page, lambda: held)
    held[0].fulfill(**BUSY)
    expect(page.locator("#editor-failed")).to_contain_text(REFUSED)
    expect(page.locator("#editor-loading")).to_be_hidden()
    page.click("#editor-failed >> text=Try again")
    wait_for(page, lambda: len(held) == 2)
    held[1].continue_()
    opened(page, other)
    expect(page.locator("#editor-failed")).to_be_hidden()


def test_an_older_version_that_arrives_late_replaces_nothing(open_page, client, pets):
    new_label_set(client, pets, "cat", "dog", "fox")
    other = new_label_set(client, f"{pets}-2", "parrot")
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)
    held = hold(page, "**?version=1")
    page.select_option("#editor-version", "1")
    expect(page.locator("#editor-status")).to_have_text("Loading…")
    assert page.evaluate("document.getElementById('label-set-form').inert")
    wait_for(page, lambda: held)
    go(page, f"#label-sets/{other}")
    opened(page, other)
    assert not page.evaluate("document.getElementById('label-set-form').inert")
    with page.expect_response("**?version=1"):
        held[0].continue_()
    page.wait_for_timeout(200)
    opened(page, other)


def test_edits_are_kept_while_the_label_set_is_loaded_again(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)
    held = hold(page, f"**/v1/label-sets/{pets}")
    go(page, "#classify")
    page.go_back()
    wait_for(page, lambda: held)
    page.fill("#new-classes", "fox")
    page.press("#new-classes", "Enter")
    page.type("#new-classes", "parr")
    with page.expect_response(f"**/v1/label-sets/{pets}"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#editor-classes summary strong")).to_have_text(["cat", "dog", "fox"])
    page.keyboard.type("ot")
    expect(page.locator("#new-classes")).to_have_value("parrot")


def test_a_version_that_was_saved_is_not_replaced_by_an_older_one(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)
    held = hold(page, f"**/v1/label-sets/{pets}")
    go(page, "#classify")
    page.go_back()
    wait_for(page, lambda: held)
    before = held[0].fetch()
    page.fill("#new-classes", "fox")
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 2.")
    with page.expect_response(f"**/v1/label-sets/{pets}"):
        held[0].fulfill(response=before)
    page.wait_for_timeout(200)
    expect(page.locator("#editor-version")).to_have_value("2")
    expect(page.locator("#editor-classes summary strong")).to_have_text(["cat", "dog", "fox"])


def test_a_slow_save_leaves_the_label_set_alone_that_is_shown_by_then(open_page, client, pets):
    other = new_label_set(client, f"{pets}-2", "parrot")
    page = open_page(f"#label-sets/{pets}")
    held = hold(page, f"**/v1/label-sets/{pets}", "PUT")

    def save_and_leave(label):
        go(page, f"#label-sets/{pets}")
        opened(page, pets)
        page.fill("#new-classes", label)
        page.click("#save-label-set")
        wait_for(page, lambda: held)
        go(page, f"#label-sets/{other}")
        opened(page, other)
        page.fill("#new-classes", "tit")  # not inert
        return held.pop()

    save_and_leave("fox").continue_()
    expect(page.locator("#label-set-list li").filter(has_text=re.compile(f"{pets} "))).to_contain_text("version 2")
    expect(page.locator("#label-set-list [aria-current]")).to_have_text(other)
    opened(page, other)
    lists = hold(page, "**/v1/label-sets?*")
    save_and_leave("hen").fulfill(**BUSY)
    expect(page.locator("#label-sets-error")).to_have_text(f"“{pets}” is not saved. {REFUSED}")
    with page.expect_response("**/v1/label-sets?*"):
        lists[-1].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#label-sets-error")).to_have_text(f"“{pets}” is not saved. {REFUSED}")
    expect(page.locator("#editor-error")).to_be_hidden()
    expect(page.locator("#new-classes")).to_have_value("tit")
    go(page, f"#label-sets/{pets}")
    page.click("#save-label-set")
    wait_for(page, lambda: held)
    held.pop().continue_()
    expect(page.locator("#editor-status")).to_have_text("Saved as version 3.")


def test_a_new_label_set_that_is_saved_slowly_does_not_take_the_view_over(open_page, client, pets):
    page = open_page("#new-label-set")
    name = f"{pets}-2"
    held = hold(page, f"**/v1/label-sets/{name}", "PUT")
    page.fill("#editor-name", name)
    page.fill("#new-classes", "fox")
    page.press("#new-classes", "Enter")
    page.press("#editor-name", "Enter")
    page.keyboard.press("Enter")
    wait_for(page, lambda: held)
    go(page, "#classify")
    expect(page.locator("#view-classify")).to_be_visible()
    with page.expect_response("**/v1/label-sets?*"):
        held[0].continue_()
    expect(page.locator("#view-classify")).to_be_visible()
    assert page.evaluate("location.hash") == "#classify"
    assert len(held) == 1


def test_saving_again_after_an_answer_was_lost_is_no_conflict(open_page, client, pets):
    page = open_page(f"#label-sets/{pets}")
    cut_once(page, f"**/v1/label-sets/{pets}", "PUT")
    page.fill("#new-classes", "fox")
    page.click("#save-label-set")
    expect(page.locator("#editor-error")).to_have_text(INCOMPLETE)
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 2.")
    go(page, "#new-label-set")
    page.fill("#editor-name", f"{pets}-2")
    page.fill("#new-classes", "fox")
    cut_once(page, f"**/v1/label-sets/{pets}-2", "PUT")
    page.click("#save-label-set")
    expect(page.locator("#editor-error")).to_have_text(INCOMPLETE)
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 1.")
    assert page.evaluate("location.hash") == f"#label-sets/{pets}-2"


def test_the_focus_stays_where_it_was_when_the_server_refuses(open_page, client, pets):
    stored = client.get(f"/v1/label-sets/{pets}")
    changed = {"classes": ["cat", "dog", "fox"]}
    client.put(f"/v1/label-sets/{pets}", json=changed, headers={"If-Match": stored.headers["etag"]}).raise_for_status()
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)

    def refused(control, method, act):
        held = hold(page, f"**/v1/label-sets/{pets}", method)
        act()
        wait_for(page, lambda: held)
        wait_for(page, lambda: page.evaluate("document.activeElement === document.body"))
        held[0].fulfill(**BUSY)
        expect(page.locator("#editor-error")).to_have_text(REFUSED)
        expect(page.locator(control)).to_be_focused()
        page.unroute(f"**/v1/label-sets/{pets}")

    def delete():
        page.click("#delete-label-set")
        page.click("dialog .danger")

    def choose_version():
        page.focus("#editor-version")
        page.select_option("#editor-version", "1")

    def save():
        page.fill("#new-classes", "hen")
        page.click("#save-label-set")

    refused("#delete-label-set", "DELETE", delete)
    refused("#editor-version", "GET", choose_version)
    refused("#save-label-set", "PUT", save)


def test_undoing_discards_the_classes_that_were_typed_and_not_added(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    opened(page, pets)
    page.fill("#new-classes", "fox")
    page.press("#new-classes", "Enter")
    page.fill("#new-classes", "hen")
    page.click("#undo-changes")
    page.click("dialog .danger")
    expect(page.locator("#editor-classes summary strong")).to_have_text(["cat", "dog"])
    expect(page.locator("#new-classes")).to_have_value("")


def test_a_slow_deletion_happens_once_and_leaves_the_view_alone(open_page, client, pets):
    other = new_label_set(client, f"{pets}-2", "parrot")
    page = open_page(f"#label-sets/{pets}")
    held = hold(page, f"**/v1/label-sets/{pets}", "DELETE")
    page.click("#delete-label-set")
    page.click("dialog .danger")
    expect(page.locator("#editor-status")).to_have_text("Deleting…")
    assert page.evaluate("document.getElementById('label-set-form').inert")
    wait_for(page, lambda: held)
    client.delete(f"/v1/label-sets/{pets}").raise_for_status()  # as if the answer to an earlier attempt was lost
    go(page, f"#label-sets/{other}")
    opened(page, other)
    held[0].continue_()
    expect(page.locator("#label-sets-status")).to_have_text(f"“{pets}” is deleted.")
    expect(page.locator("#label-set-list").get_by_role("link", name=pets, exact=True)).to_have_count(0)
    opened(page, other)


def test_the_list_of_label_sets_is_the_newest_and_is_loaded_again(open_page, client, pets):
    page = open_page()
    held = hold(page, "**/v1/label-sets?*")
    go(page, "#new-label-set")
    page.fill("#editor-name", f"{pets}-2")
    page.fill("#new-classes", "fox")
    page.press("#new-classes", "Enter")
    wait_for(page, lambda: held)
    expect(page.locator("#no-label-sets-yet")).to_be_hidden()
    before = held[0].fetch()
    page.click("#save-label-set")
    expect(page.locator("#editor-status")).to_have_text("Saved as version 1.")
    wait_for(page, lambda: len(held) == 2)
    entry = page.locator("#label-set-list").get_by_role("link", name=f"{pets}-2", exact=True)
    held[1].continue_()
    expect(entry).to_be_visible()
    with page.expect_response("**/v1/label-sets?*"):
        held[0].fulfill(response=before)
    page.wait_for_timeout(200)
    expect(entry).to_be_visible()
    go(page, "#label-sets")
    wait_for(page, lambda: len(held) == 3)
    held[2].fulfill(**BUSY)
    expect(page.locator("#label-sets-error")).to_contain_text(REFUSED)
    page.click("#label-sets-error >> text=Try again")
    wait_for(page, lambda: len(held) == 4)
    held[3].continue_()
    expect(page.locator("#label-sets-error")).to_be_hidden()


def test_the_focus_stays_near_what_is_tried_again(open_page, pets):
    page = open_page()
    for _ in range(2):
        refuse_once(page, "**/v1/label-sets?*")
    go(page, "#label-sets")
    again = page.locator("#label-sets-error button")
    again.press("Enter")
    expect(again).to_be_focused()
    again.press("Enter")
    expect(page.locator("#label-sets-error")).to_be_hidden()
    expect(page.locator("#view-label-sets")).to_be_focused()


def test_a_view_whose_modules_cannot_be_loaded_can_be_tried_again_there(open_page):
    page = open_page()
    page.route("**/playground/label_sets.js", lambda route: route.fulfill(status=404))
    go(page, "#label-sets")
    expect(page.locator("#label-sets-error")).to_contain_text("This view cannot be loaded")
    page.unroute("**/playground/label_sets.js")
    page.click("#label-sets-error >> text=Try again")
    expect(page.locator("#shipped-list li").first).to_be_visible()
    expect(page.locator("#label-sets-error")).to_be_hidden()
    expect(page.locator("#view-label-sets")).to_be_focused()


# --- example images --------------------------------------------------------------------------------------------------


@pytest.fixture
def with_examples(client, pictures, pets):
    """A label set with 27 example images of a cat, which are more than a page shows, and an unlabelled one."""
    pixels = Image.open(pictures / "chelsea.jpg")
    images = []
    for number in range(27):
        content = io.BytesIO()
        pixels.crop((number, 0, 200 + number, 200)).save(content, "JPEG")
        images.append(("image", (f"{number}.jpg", content.getvalue())))
    url = f"/v1/label-sets/{pets}/images"
    assert client.post(url, files=images[:16], data={"class": "cat"}).json()["added"] == 16
    assert client.post(url, files=images[16:], data={"class": "cat"}).json()["added"] == 11
    assert client.post(url, files={"image": (pictures / "coffee.jpg").read_bytes()}).json()["added"] == 1
    return pets


def open_class(page, name):
    row = page.locator("#editor-classes > li").filter(has=page.get_by_text(name, exact=True))
    row.locator("summary").click()
    return row


def labelled(client, name):
    return client.get(f"/v1/label-sets/{name}/images").raise_for_status().json()["counts"]


def test_example_images_are_shown_once_however_often_they_are_asked_for(open_page, with_examples):
    page = open_page(f"#label-sets/{with_examples}")
    refuse_once(page, "**/images?class=*")
    row = open_class(page, "cat")
    expect(row.locator(".problem")).to_contain_text(REFUSED)
    row.get_by_text("Try again").click()
    expect(row.locator(".problem")).to_be_hidden()
    expect(row.locator(".pictures li")).to_have_count(24)
    held = hold(page, "**/images?class=*")
    row.get_by_text("Show more").dblclick()
    wait_for(page, lambda: len(held) == 2)
    for route in held:
        route.continue_()
    expect(row.get_by_text("Show more")).to_be_hidden()
    page.wait_for_timeout(200)
    expect(row.locator(".pictures li")).to_have_count(27)


def test_counts_that_arrive_late_do_not_replace_newer_ones(open_page, client, with_examples, pictures):
    page = open_page("#label-sets")
    held = hold(page, "**/images?limit=1")
    go(page, f"#label-sets/{with_examples}")
    row = open_class(page, "cat")
    expect(row.locator(".pictures li")).to_have_count(24)
    # The question has the number also if the counts of the label set are not there yet.
    row.get_by_text("Delete all images of cat…").click()
    expect(page.locator("dialog")).to_contain_text("Delete all 27 example images of cat")
    page.keyboard.press("Escape")
    before = held[0].fetch()
    row.locator("input[type=file]").set_input_files(pictures / "chelsea.jpg")
    expect(page.locator("#examples-counts")).to_contain_text("28 labelled images")
    with page.expect_response("**/images?limit=1"):
        held[0].fulfill(response=before)
    page.wait_for_timeout(200)
    expect(page.locator("#examples-counts")).to_contain_text("28 labelled images")


def test_counts_can_be_loaded_again_and_an_error_stays_with_its_label_set(open_page, client, pets):
    other = new_label_set(client, f"{pets}-2", "fox")
    page = open_page("#label-sets")
    held = hold(page, f"**/{pets}/images?limit=1")
    go(page, f"#label-sets/{pets}")
    wait_for(page, lambda: held)
    held[0].fulfill(**BUSY)
    expect(page.locator("#examples-error")).to_contain_text(REFUSED)
    page.click("#examples-error >> text=Try again")
    wait_for(page, lambda: len(held) == 2)
    go(page, f"#label-sets/{other}")
    opened(page, other)
    expect(page.locator("#examples-counts")).to_have_text("There are no example images yet.")
    with page.expect_response(f"**/{pets}/images?limit=1"):
        held[1].fulfill(**BUSY)
    page.wait_for_timeout(200)
    expect(page.locator("#examples-error")).to_be_hidden()


def test_images_are_deleted_from_the_label_set_that_was_asked_about(open_page, client, with_examples, pictures):
    other = new_label_set(client, f"{with_examples}-2")
    content = (pictures / "coffee.jpg").read_bytes()
    client.post(f"/v1/label-sets/{other}/images", files={"image": content}).raise_for_status()
    page = open_page(f"#label-sets/{other}")
    go(page, f"#label-sets/{with_examples}")
    opened(page, with_examples)
    page.click("#delete-unlabelled")
    page.go_back()  # while the question is open
    opened(page, other)
    expect(page.locator("#examples-counts")).to_contain_text("1 unlabelled")
    with page.expect_response(lambda response: response.request.method == "DELETE"):
        page.click("dialog .danger")
    page.wait_for_timeout(200)
    expect(page.locator("#examples-counts")).to_have_text("0 labelled images in 0 classes, 1 unlabelled.")
    expect(page.locator("#unlabelled-status")).to_be_empty()
    assert labelled(client, other)["unlabelled"] == 1
    assert labelled(client, with_examples)["unlabelled"] == 0


def test_a_slow_deletion_of_an_image_is_not_sent_twice(open_page, client, with_examples):
    page = open_page(f"#label-sets/{with_examples}")
    row = open_class(page, "cat")
    held = hold(page, "**/images/*", "DELETE")
    first = row.locator(".pictures .remove").first
    first.click()
    page.click("dialog .danger")
    expect(row.locator("[role=status]")).to_have_text("Deleting…")
    first.click()
    expect(page.locator("dialog")).to_have_count(0)
    wait_for(page, lambda: held)
    held[0].continue_()
    expect(row.locator("[role=status]")).to_have_text("1 image deleted.")
    expect(row.locator(".pictures li")).to_have_count(23)


def test_a_slow_addition_reports_where_it_can_be_seen(open_page, client, pets, pictures):
    other = new_label_set(client, f"{pets}-2", "fox")
    page = open_page(f"#label-sets/{pets}")
    row = open_class(page, "cat")
    held = hold(page, f"**/{pets}/images", "POST")
    row.locator("input[type=file]").set_input_files(pictures / "chelsea.jpg")
    expect(row.locator("[role=status]")).to_have_text("Adding 1 of 1…")
    wait_for(page, lambda: held)
    page.fill("#new-classes", "hen")
    page.click("#save-label-set")  # draws the rows again
    expect(page.locator("#editor-status")).to_have_text("Saved as version 2.")
    held.pop().fulfill(**BUSY)
    expect(page.locator("#examples-error")).to_have_text(REFUSED)
    row.locator("input[type=file]").set_input_files(pictures / "chelsea.jpg")
    wait_for(page, lambda: held)
    go(page, f"#label-sets/{other}")
    opened(page, other)
    held.pop().fulfill(**BUSY)
    expect(page.locator("#label-sets-error")).to_have_text(f"“{pets}”: The images are not added. {REFUSED}")
    expect(page.locator("#examples-error")).to_be_hidden()


def test_kept_images_belong_to_the_label_set_that_was_opened(browser, tmp_path, pictures):
    with serving("--keep-images", "true", data_dir=tmp_path) as server, server.client() as client:
        for name, file in (("cats", "chelsea-1.jpg"), ("cups", "coffee-1.jpg")):
            new_label_set(client, name, "thing")
            files = {"image": (pictures / file).read_bytes()}
            client.post(f"/v1/label-sets/{name}/images", files=files, data={"class": "thing"}).raise_for_status()
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "content" in request.url else None)
        page.goto(f"{server.url}/#label-sets/cats")
        opened(page, "cats")
        held = hold(page, "**/cats/images?class=*")
        open_class(page, "thing")
        wait_for(page, lambda: held)
        go(page, "#label-sets/cups")
        opened(page, "cups")
        with page.expect_request("**/content"):
            held[0].continue_()
        assert asked == [f"{server.url}/v1/label-sets/cats/images/1/content"]
        page.close()


# --- jobs ------------------------------------------------------------------------------------------------------------

JOB = {"id": "1", "kind": "build-captions", "label_set": None, "database": "everyday", "done": 1, "total": 4}
RUNNING, SUCCEEDED = ({**JOB, "error": None, "status": status} for status in ("running", "succeeded"))


def job_list(*jobs):
    return {"json": {"jobs": jobs, "next_after": None}}


def watch_jobs(page):
    page.evaluate("() => { import('/playground/job_list.js').then(({ watchJobs }) => watchJobs()); }")


def test_an_older_list_of_jobs_does_not_replace_a_newer_one(open_page):
    page = open_page()
    held = hold(page, "**/v1/jobs?*")
    for count in (1, 2):
        watch_jobs(page)
        wait_for(page, lambda count=count: len(held) == count)
    held[1].fulfill(**job_list(RUNNING))
    with page.expect_response("**/v1/jobs?*"):
        held[0].fulfill(**job_list())
    wait_for(page, lambda: len(held) == 3)  # the job is still watched
    held[2].fulfill(**job_list(RUNNING))
    expect(page.locator(".jobs summary")).to_contain_text("Jobs: 1 running")


def test_why_a_job_cannot_be_stopped_stays_in_the_list_and_one_that_has_ended_is_no_error(open_page):
    page = open_page()
    page.route("**/v1/jobs?*", lambda route: route.fulfill(**job_list(RUNNING)))
    page.route("**/v1/jobs/1", lambda route: route.fulfill(**BUSY))
    watch_jobs(page)
    page.click(".jobs summary")
    stop = page.get_by_role("button", name="Stop: Caption database everyday")
    stop.click()
    refusal = page.locator(".jobs .field-problem")
    for _ in range(2):
        with page.expect_response("**/v1/jobs?*"):
            pass
    expect(refusal).to_have_text(REFUSED)
    page.unroute("**/v1/jobs/1")
    ended = {"title": "Conflict", "detail": "job '1' has already cancelled", "status": 409}
    page.route("**/v1/jobs/1", lambda route: route.fulfill(status=409, json=ended))
    with page.expect_response("**/v1/jobs/1"):
        stop.dblclick()
    expect(refusal).to_be_hidden()
    with page.expect_response("**/v1/jobs?*"):
        pass
    expect(refusal).to_be_hidden()


def test_a_build_is_started_once_and_followed_although_the_jobs_cannot_be_read_at_first(open_page):
    page = open_page("#captions")
    answers = [BUSY, job_list(RUNNING), job_list(SUCCEEDED)]
    page.route("**/v1/jobs?*", lambda route: route.fulfill(**(answers.pop(0) if answers else job_list())))
    held = hold(page, "**/v1/databases/everyday", "PUT")
    row = page.locator("#build-sources li").first
    row.get_by_role("button", name="Build: everyday").dblclick()
    wait_for(page, lambda: held)
    page.wait_for_timeout(200)
    assert len(held) == 1
    held[0].fulfill(json={**RUNNING, "status": "queued"})
    expect(row.get_by_role("button", name="Stop building everyday")).to_be_visible()
    expect(row.get_by_role("button", name="Build: everyday")).to_be_visible()
    expect(row.locator("progress")).to_be_hidden()


def test_a_build_that_runs_is_not_taken_for_none_when_the_view_is_opened(open_page):
    page = open_page()
    page.route("**/v1/databases/everyday", lambda route: route.fulfill(json=RUNNING))
    page.route("**/v1/jobs?*", lambda route: route.fulfill(**job_list(RUNNING)), times=1)
    go(page, "#captions")
    row = page.locator("#build-sources li").first
    row.get_by_role("button", name="Build: everyday").click()
    state = row.locator(".hint").last
    expect(state).to_have_text("Encoding: 1 of 4.")
    jobs = hold(page, "**/v1/jobs?*")
    wait_for(page, lambda: jobs)
    with page.expect_response("**/v1/databases"):
        go(page, "#classify")
        go(page, "#captions")
    page.wait_for_timeout(200)
    expect(state).to_have_text("Encoding: 1 of 4.")


def test_jobs_are_read_when_a_key_is_entered(open_page):
    page = open_page()
    page.route("**/v1/*", lambda route: route.fulfill(status=401))
    page.reload()
    expect(page.locator("#key")).to_be_visible()
    page.unroute("**/v1/*")
    page.route("**/v1/jobs?*", lambda route: route.fulfill(**job_list(RUNNING)))
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    expect(page.locator(".jobs summary")).to_contain_text("Jobs: 1 running")


def test_an_evaluation_goes_on_when_a_poll_fails_and_ends_with_its_label_set(open_page, client, with_examples):
    page = open_page(f"#label-sets/{with_examples}")
    opened(page, with_examples)
    started = hold(page, "**:evaluate", "POST")
    cut_once(page, "**/v1/jobs/*")
    page.click("#evaluate")
    wait_for(page, lambda: started)
    started[0].continue_()
    expect(page.locator("#evaluate-status")).to_contain_text("Compared on 27 images", timeout=60_000)
    expect(page.locator("#evaluate-error")).to_be_hidden()
    assert len(started) == 1
    page.click("#delete-label-set")
    page.click("dialog .danger")
    expect(page.locator("#label-sets-status")).to_have_text(f"“{with_examples}” is deleted.")
    new_label_set(client, with_examples)
    go(page, f"#label-sets/{with_examples}")
    opened(page, with_examples)
    expect(page.locator("#evaluation")).to_be_hidden()
    expect(page.locator("#evaluate-status")).to_be_empty()


def test_an_evaluation_that_was_left_does_not_end_the_next_one(open_page, pets):
    page = open_page(f"#label-sets/{pets}")
    refuse_once(page, "**/images?limit=1")  # so that the page does not say that there are no images
    page.reload()
    opened(page, pets)
    held = hold(page, "**:evaluate", "POST")
    page.click("#evaluate")
    wait_for(page, lambda: held)
    go(page, "#new-label-set")
    expect(page.locator("#editor-title")).to_have_text("New label set")
    refuse_once(page, "**/images?limit=1")
    go(page, f"#label-sets/{pets}")
    opened(page, pets)
    page.click("#evaluate")
    wait_for(page, lambda: len(held) == 2)
    with page.expect_response("**:evaluate"):
        held[0].fulfill(**BUSY)
    page.wait_for_timeout(200)
    expect(page.locator("#evaluate-error")).to_be_hidden()
    expect(page.locator("#evaluate")).to_be_disabled()
    held[1].fulfill(**BUSY)
    expect(page.locator("#evaluate-error")).to_have_text(REFUSED)
    expect(page.locator("#evaluate")).to_be_enabled()


# --- test images -----------------------------------------------------------------------------------------------------


def test_a_slow_test_of_another_label_set_says_and_stops_nothing(open_page, client, pets, pictures):
    other = new_label_set(client, f"{pets}-2", "fox")
    page = open_page()
    models = hold(page, "**/v1/models")
    tests = hold(page, "**/v1/classify", "POST")
    page.reload()
    go(page, f"#label-sets/{pets}")
    page.set_input_files("#test-zones li:has-text('cat') input", pictures / "chelsea.jpg")
    page.click("#test")
    go(page, f"#label-sets/{other}")
    opened(page, other)
    expect(page.locator("#test")).to_be_enabled()
    wait_for(page, lambda: models)
    models[0].continue_()
    expect(page.locator("#test-method option").nth(2)).to_be_attached()
    expect(page.locator("#test-status")).to_be_empty()
    assert tests == []


def test_the_methods_for_test_images_can_be_loaded_again(open_page, pets):
    page = open_page()
    page.route("**/v1/models", lambda route: route.fulfill(**BUSY))
    page.reload()
    go(page, f"#label-sets/{pets}")
    expect(page.locator("#test-error")).to_contain_text(REFUSED)
    page.unroute("**/v1/models")
    page.click("#test-error >> text=Try again")
    expect(page.locator("#test-method option").nth(2)).to_be_attached()
    expect(page.locator("#test-error")).to_be_hidden()


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(client):
    """A caption database of three pages of ten."""
    built(client, "archive", [f"a photo of {number} cats" for number in range(30)])


def test_pages_of_captions_stay_in_order_with_double_clicks_and_errors(open_page, archive):
    page = open_page("#captions")
    page.fill("#search-text", "cats")
    page.press("#search-text", "Enter")
    status = page.locator("#search-status")
    expect(status).to_contain_text("Captions 1 to 10")
    refuse_once(page, "**/search", "POST")
    page.click("#next-captions")
    expect(page.locator("#search-error")).to_have_text(REFUSED)
    expect(status).not_to_contain_text("Searching")
    held = hold(page, "**/search", "POST")

    def twice(button):
        page.locator(button).evaluate("button => { button.click(); button.click(); }")
        wait_for(page, lambda: len(held) == 2)
        for _ in range(2):
            held.pop().continue_()

    twice("#next-captions")
    expect(status).to_contain_text("Captions 11 to 20")
    twice("#previous-captions")
    expect(status).to_contain_text("Captions 1 to 10")
    expect(page.locator("#previous-captions")).to_be_hidden()
    # The pages are those of the captions that are shown, also if another search has failed.
    page.fill("#search-text", "dogs")
    page.press("#search-text", "Enter")
    wait_for(page, lambda: held)
    held.pop().fulfill(**BUSY)
    expect(page.locator("#search-error")).to_have_text(REFUSED)
    page.click("#next-captions")
    wait_for(page, lambda: held)
    assert held[0].request.post_data_json["text"] == "cats"
    held[0].continue_()
    expect(status).to_contain_text("Captions 11 to 20")


def test_databases_can_be_loaded_again_and_the_newest_answer_is_shown(open_page, archive):
    page = open_page()
    held = hold(page, "**/v1/databases")
    go(page, "#captions")
    wait_for(page, lambda: held)
    held[0].fulfill(**BUSY)
    expect(page.locator("#search-error")).to_contain_text(REFUSED)
    page.click("#search-error >> text=Try again")
    wait_for(page, lambda: len(held) == 2)
    go(page, "#classify")
    go(page, "#captions")
    wait_for(page, lambda: len(held) == 3)
    held[2].continue_()
    expect(page.locator("#search")).to_be_visible()
    with page.expect_response("**/v1/databases"):
        held[1].fulfill(json={"databases": []})
    page.wait_for_timeout(200)
    expect(page.locator("#search")).to_be_visible()


def test_a_database_that_is_chosen_while_they_are_loaded_stays_chosen(open_page, client, archive):
    built(client, "archive-2", ["a dog", "a cat"])
    page = open_page("#captions")
    held = hold(page, "**/v1/databases")
    go(page, "#classify")
    go(page, "#captions")
    wait_for(page, lambda: held)
    page.select_option("#search-database", "archive-2")
    with page.expect_response("**/v1/databases"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#search-database")).to_have_value("archive-2")


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_curves(client, with_examples):
    classes = ["cat", "dog"]
    client.put(f"/v1/label-sets/{with_examples}", json={"classes": classes, "multi_label": True}).raise_for_status()
    return with_examples


def open_thresholds(page):
    page.click("#thresholds summary")
    return page.get_by_label("Threshold of dog", exact=True)


def test_thresholds_that_are_stored_slowly_are_not_replaced_by_older_ones(open_page, client, with_curves):
    other = new_label_set(client, f"{with_curves}-2", "fox")
    page = open_page(f"#label-sets/{with_curves}")
    open_thresholds(page).fill("0.9")
    curves = hold(page, f"**/{with_curves}/thresholds")
    patches = hold(page, f"**/{with_curves}/thresholds", "PATCH")
    page.locator(".store").evaluate("button => { button.click(); button.click(); }")
    wait_for(page, lambda: patches)
    go(page, f"#label-sets/{other}")
    opened(page, other)
    assert not page.evaluate("document.getElementById('threshold-charts').inert")
    go(page, f"#label-sets/{with_curves}")
    opened(page, with_curves)
    assert page.evaluate("document.getElementById('threshold-charts').inert")
    wait_for(page, lambda: curves)
    before = curves[0].fetch()
    assert len(patches) == 1
    patches[0].continue_()
    sentence = f"Stored as {with_curves}@3."
    expect(page.locator(".store-bar .status")).to_have_text(sentence)
    with page.expect_response("**/thresholds"):
        curves[0].fulfill(response=before)
    page.wait_for_timeout(200)
    expect(page.locator(".store-bar .status")).to_have_text(sentence)
    expect(page.get_by_label("Threshold of dog", exact=True)).to_have_value("0.9")
    assert not page.evaluate("document.getElementById('threshold-charts').inert")


def test_storing_thresholds_again_after_an_answer_was_lost_is_no_conflict(open_page, client, with_curves):
    page = open_page(f"#label-sets/{with_curves}")
    slider = open_thresholds(page)
    slider.fill("0.9")
    cut_once(page, f"**/{with_curves}/thresholds", "PATCH")
    page.click(".store")
    expect(page.locator(".store-bar .problem")).to_contain_text(INCOMPLETE)
    page.click(".store")
    expect(page.locator(".store-bar .status")).to_have_text(f"Stored as {with_curves}@3.")
    slider.fill("0.8")
    page.click(".store")
    expect(page.locator(".store-bar .status")).to_have_text(f"Stored as {with_curves}@4.")


def test_what_somebody_types_is_kept_while_the_page_changes(open_page, client, with_curves, pictures):
    page = open_page(f"#label-sets/{with_curves}")
    slider = open_thresholds(page)
    field = page.get_by_label("Threshold of cat, as a number")
    field.press_sequentially("0")
    typed = field.input_value()
    slider.evaluate("each => { each.value = 0.9; each.dispatchEvent(new Event('input', { bubbles: true })); }")
    expect(page.get_by_label("Threshold of dog, as a number")).to_have_value("0.90")
    expect(field).to_have_value(typed)
    go(page, "#classify")
    choose(page, pictures / "chelsea.jpg")
    page.click("text=Options")
    page.locator("#template").press_sequentially("a drawing of")
    choose(page, pictures / "coffee.jpg")
    expect(page.locator("#classify")).to_have_text("Classify 2 images")
    expect(page.locator("#template")).to_have_value("a drawing of")
    for entered, used in (("500", "100"), ("700", "100"), ("", "5")):
        page.fill("#top-k", entered)
        page.locator("#top-k").press("Tab")
        expect(page.locator("#top-k")).to_have_value(used)


def test_thresholds_of_a_label_set_that_was_left_move_no_focus(open_page, client, with_curves):
    other = new_label_set(client, f"{with_curves}-2", "fox")
    page = open_page(f"#label-sets/{with_curves}")
    open_thresholds(page).fill("0.9")
    changed = {"classes": ["cat", "dog", "hen"], "multi_label": True}
    client.put(f"/v1/label-sets/{with_curves}", json=changed).raise_for_status()
    page.click(".store")
    held = hold(page, f"**/{with_curves}/thresholds")
    page.click("text=Load the new version, keep my thresholds")
    wait_for(page, lambda: held)
    go(page, f"#label-sets/{other}")
    opened(page, other)
    with page.expect_response(f"**/{with_curves}/thresholds"):
        held[0].continue_()
    page.wait_for_timeout(200)  # an error of the page fails the test
    opened(page, other)


# --- classifying -----------------------------------------------------------------------------------------------------


def test_samples_that_are_clicked_twice_are_added_once(open_page):
    page = open_page()
    held = hold(page, "**/samples/cat.jpg")
    page.locator(".sample").first.evaluate("button => { button.click(); button.click(); }")
    wait_for(page, lambda: held)
    page.wait_for_timeout(200)
    for route in held:
        route.continue_()
    expect(page.locator("#up-to-date")).to_be_visible()
    expect(page.locator(".card")).to_have_count(1)


def test_a_dialog_that_is_clicked_twice_opens_once_and_only_in_its_view(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    held = hold(page, "**/playground/lightbox.js")
    enlarge = page.get_by_role("button", name="Enlarge chelsea.jpg")
    enlarge.dblclick()
    wait_for(page, lambda: held)
    go(page, "#captions")
    expect(page.locator("#view-captions")).to_be_visible()
    with page.expect_response("**/playground/lightbox.js"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("dialog")).to_have_count(0)
    go(page, "#classify")
    enlarge.evaluate("button => { button.click(); button.click(); }")
    expect(page.locator("dialog")).to_have_count(1)


@pytest.mark.parametrize(("button", "module"), [("#earlier", "history"), ("#camera", "camera")])
def test_a_dialog_whose_module_cannot_be_loaded_says_so_and_opens_later(open_page, button, module):
    page = open_page()
    page.route(f"**/playground/{module}.js", lambda route: route.fulfill(status=404))
    page.click(button)
    expect(page.locator("#error")).to_contain_text("This dialog cannot be loaded.")
    page.unroute(f"**/playground/{module}.js")
    page.click(button)
    expect(page.locator("dialog")).to_be_visible()


def test_names_that_cannot_be_loaded_are_loaded_again_by_a_button(open_page, pets):
    page = open_page()
    refuse_once(page, "**/v1/label-sets?*")
    page.check("input[name=source][value=label_set]", force=True)
    expect(page.locator("#load-error")).to_contain_text(REFUSED)
    expect(page.get_by_text("Loading…")).to_be_hidden()
    page.click("#load-error >> text=Try again")
    expect(page.locator("#label-set")).to_be_visible()
    expect(page.locator("#load-error")).to_be_hidden()
    expect(page.locator("#results")).to_be_focused()


def test_an_older_list_of_label_sets_does_not_change_the_choice(open_page, client, pets):
    page = open_page()
    held = hold(page, "**/v1/label-sets?*")
    page.check("input[name=source][value=label_set]", force=True)
    wait_for(page, lambda: held)
    before = held[0].fetch()
    name = new_label_set(client, f"{pets}-2", "fox")
    go(page, f"#classify/{name}")
    wait_for(page, lambda: len(held) == 2)
    held[1].continue_()
    expect(page.locator("#label-set")).to_have_value(name)
    with page.expect_response("**/v1/label-sets?*"):
        held[0].fulfill(response=before)
    page.wait_for_timeout(200)
    expect(page.locator("#label-set")).to_have_value(name)


def test_suggestions_for_images_that_were_removed_are_not_shown(open_page, archive, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    held = hold(page, "**/v1/classify", "POST")
    page.click("#suggest")
    wait_for(page, lambda: held)
    page.click("#remove-pictures")
    choose(page, pictures / "coffee.jpg")
    expect(page.locator("#suggest")).to_be_enabled()
    with page.expect_response("**/v1/classify"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#suggestions")).to_be_hidden()


def test_an_explanation_that_cannot_be_loaded_can_be_loaded_again(open_page, pictures):
    page = open_page()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, coffee cup")
    classify(page)
    refuse_once(page, "**/v1/classify", "POST")
    page.click("text=Why?")
    expect(page.locator(".why .problem")).to_contain_text(REFUSED)
    page.click(".why >> text=Try again")
    expect(page.locator(".why .prompts").first).to_be_visible()


def test_a_label_can_be_typed_before_the_label_set_is_known_or_if_it_cannot_be_loaded(
    open_page, client, pets, pictures
):
    page = open_page(f"#classify/{pets}")
    expect(page.locator("#label-set")).to_have_value(pets)
    choose(page, pictures / "chelsea.jpg")
    classify(page)
    held = hold(page, f"**/v1/label-sets/{pets}")
    page.click("text=Wrong? It is …")
    wait_for(page, lambda: held)
    page.type("#right-label", "ki")
    held.pop().continue_()
    expect(page.locator(".label-choices button").first).to_be_visible()
    page.keyboard.type("t")
    expect(page.locator("#right-label")).to_have_value("kit")
    page.keyboard.press("Escape")
    page.click("text=Wrong? It is …")
    wait_for(page, lambda: held)
    held.pop().fulfill(**BUSY)
    expect(page.locator("dialog .problem")).to_have_text(REFUSED)
    page.fill("#right-label", "kitten")
    page.press("#right-label", "Enter")
    wait_for(page, lambda: held)
    held.pop().continue_()
    expect(page.locator("#learning")).to_contain_text("1 example in 1 class.")
    assert labelled(client, pets)["labelled"] == {"kitten": 1}


def test_classifying_waits_for_the_label_sets_and_for_the_limits_of_the_server(open_page, client, pictures, pets):
    page = open_page()
    models = hold(page, "**/v1/models")
    page.reload()
    choose(page, pictures / "chelsea.jpg")
    lists = hold(page, "**/v1/label-sets?*")
    page.check("input[name=source][value=label_set]", force=True)
    page.click("#classify")
    wait_for(page, lambda: models)
    page.wait_for_timeout(200)
    expect(page.locator("#error")).to_be_hidden()
    models[0].continue_()
    wait_for(page, lambda: lists)
    page.wait_for_timeout(200)
    expect(page.locator("#error")).to_be_hidden()
    for route in lists:
        route.continue_()
    page.unroute("**/v1/label-sets?*")
    expect(page.locator("#up-to-date")).to_be_visible()


def test_a_click_on_classify_shows_that_the_page_waits_for_the_server(open_page, pictures):
    page = open_page()
    models = hold(page, "**/v1/models")
    page.reload()
    choose(page, pictures / "chelsea.jpg")
    page.fill("#new-labels", "cat, coffee cup")
    page.click("#classify")
    expect(page.locator("#classify")).to_have_text("Waiting for the server…")
    expect(page.locator("#classify")).to_be_disabled()
    wait_for(page, lambda: models)
    models[0].fulfill(**BUSY)
    expect(page.locator("#load-error")).to_contain_text(REFUSED)
    page.unroute("**/v1/models")
    page.click("#classify")
    expect(page.locator("#up-to-date")).to_be_visible()


# --- label sets that come with the server ----------------------------------------------------------------------------


def test_a_slow_import_is_sent_once_and_leaves_the_view_alone(open_page, client):
    page = open_page("#label-sets")
    held = hold(page, "**/v1/label-sets/foods", "PUT")
    page.click("[aria-label='Import foods']")
    wait_for(page, lambda: held)
    go(page, "#new-label-set")
    go(page, "#label-sets")
    expect(page.locator("#shipped")).to_be_visible()
    with page.expect_response("**/v1/label-sets?*"):
        go(page, "#captions")
        go(page, "#label-sets")
    expect(page.locator("[aria-label='Import foods']")).to_be_disabled()
    go(page, "#classify")
    expect(page.locator("#view-classify")).to_be_visible()
    held.pop().fulfill(**BUSY)
    go(page, "#label-sets")
    expect(page.locator("#shipped-list .problem:visible")).to_have_text(REFUSED)
    page.click("[aria-label='Import foods']")
    wait_for(page, lambda: held)
    go(page, "#new-label-set")
    page.fill("#editor-name", "mine")
    held.pop().continue_()
    expect(page.locator("#label-set-list").get_by_role("link", name="foods", exact=True)).to_be_visible()
    assert page.evaluate("location.hash") == "#new-label-set"
    expect(page.locator("#editor-name")).to_have_value("mine")
