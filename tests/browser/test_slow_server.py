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
