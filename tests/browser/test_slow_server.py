"""The page in a real browser while the server is slow, fails once, or answers out of order."""

import re

import pytest

from tests.browser.test_playground import choose, classify

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
    save_and_leave("hen").fulfill(**BUSY)
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


def test_a_view_whose_modules_cannot_be_loaded_can_be_tried_again_there(open_page):
    page = open_page()
    page.route("**/playground/label_sets.js", lambda route: route.fulfill(status=404))
    go(page, "#label-sets")
    expect(page.locator("#label-sets-error")).to_contain_text("This view cannot be loaded")
    page.unroute("**/playground/label_sets.js")
    page.click("#label-sets-error >> text=Try again")
    expect(page.locator("#shipped-list li").first).to_be_visible()
    expect(page.locator("#label-sets-error")).to_be_hidden()
