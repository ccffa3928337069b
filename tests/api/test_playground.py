import re
from importlib.resources import files

import pytest

from tests.api.problems import problem_of

SCRIPTS = ("ask.js", "captions.js", "classify.js", "label_sets.js", "page.js")
ASSETS = ("page.css", *SCRIPTS)


def test_the_page_and_its_files_come_from_here_and_may_load_nothing_else(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    linked = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert {"playground/page.css", "playground/page.js", "docs"} <= set(linked)
    assert all(not each.startswith(("http", "/")) for each in linked)  # relative, for a proxy with a prefix
    for each in linked:
        if not each.startswith("data:"):
            assert client.get(f"/{each}").status_code == 200, each
    for path in ("/", *(f"/playground/{asset}" for asset in ASSETS)):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy


def test_nothing_in_it_names_another_host_or_is_inline():
    folder = files("app.api.playground")
    for name in ("page.html", *ASSETS):
        text = folder.joinpath(name).read_text("utf-8")
        assert not re.search(r"https?://", text), name
    page = folder.joinpath("page.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", page)
    for name in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text_of(name)), name


def text_of(name):
    return files("app.api.playground").joinpath(name).read_text("utf-8")


def test_every_element_that_a_script_asks_for_is_there():
    asked = {each for name in SCRIPTS for each in re.findall(r'\b(?:at|showIn)\("([\w-]+)"', text_of(name))}
    assert len(asked) > 50
    assert asked <= set(re.findall(r'id="([\w-]+)"', text_of("page.html")))


def test_every_script_that_another_one_needs_is_sent(client):
    for name in SCRIPTS:
        for needed in re.findall(r'from "\./([\w.]+)"', text_of(name)):
            assert client.get(f"/playground/{needed}").status_code == 200, (name, needed)


@pytest.mark.parametrize("asset", ["page.html", "__init__.py", "nope.js", "..%2f__init__.py"])
def test_other_files_are_not_sent(client, asset):
    problem_of(client.get(f"/playground/{asset}"), "unknown-route")
