import re
from importlib.resources import files

import pytest

from tests.api.problems import problem_of

FOLDER = files("app.api.playground")
SCRIPTS = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".js"))
ASSETS = ("page.css", *SCRIPTS)


def text_of(name: str) -> str:
    return FOLDER.joinpath(name).read_text("utf-8")


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
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy


def test_scripts_are_sent_as_what_a_browser_runs(client):
    for script in SCRIPTS:
        assert client.get(f"/playground/{script}").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/playground/page.css").headers["content-type"] == "text/css; charset=utf-8"


def test_nothing_in_it_names_another_host_or_is_inline():
    for name in ("page.html", *ASSETS):
        assert not re.search(r"https?://", text_of(name)), name
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", text_of("page.html"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_text_is_read_as_markup_or_code(script):
    assert not re.search(r"(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text_of(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_module_that_a_script_imports_is_there_and_has_what_is_taken_of_it(script):
    for names, module in re.findall(r'import \{([^}]+)\} from "\./([\w.]+)"', text_of(script)):
        assert module in SCRIPTS
        for name in names.split(","):
            taken = name.split(" as ")[0].strip()
            assert re.search(rf"export (async )?(const|function\*?|class|let) {taken}\b", text_of(module)), taken


def test_every_element_that_a_script_asks_for_is_there():
    asked = {each for script in SCRIPTS for each in re.findall(r'\bat\("([\w-]+)"\)', text_of(script))}
    ids = re.findall(r'id="([\w-]+)"', text_of("page.html"))
    assert len(asked) > 60
    assert asked <= set(ids)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("asset", ["page.html", "__init__.py", "nope.js", "..%2f__init__.py", "", "page.css%00", "."])
def test_other_files_are_not_sent(client, asset):
    problem_of(client.get(f"/playground/{asset}"), "unknown-route")
