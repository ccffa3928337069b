"""The files of the playground: what they load, and that they contain no unsafe code."""

import hashlib
import posixpath
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.api.problems import problem_of

FOLDER = files("app.api.playground")
SCRIPTS = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".js"))
ASSETS = ("page.css", *SCRIPTS)
SUMS = dict(reversed(line.split("  ")) for line in FOLDER.joinpath("vendor", "SHA256SUMS").read_text().splitlines())


@pytest.fixture
def client(shared_client):
    return shared_client


def text_of(name: str) -> str:
    return FOLDER.joinpath(name).read_text("utf-8")


def test_the_page_loads_only_its_own_files(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    linked = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert {"playground/page.css", "playground/page.js", "playground/mark.svg", "docs"} <= set(linked)
    assert all(not link.startswith(("http", "/")) for link in linked)  # relative, for a proxy with a prefix
    for link in linked:
        if not link.startswith("data:"):
            assert client.get(f"/{link}").status_code == 200, link
    for path in ("/", *(f"/playground/{asset}" for asset in ASSETS)):
        response = client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy


def test_assets_have_the_content_types_that_browsers_require(client):
    for script in SCRIPTS:
        assert client.get(f"/playground/{script}").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/playground/page.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.get("/playground/mark.svg").headers["content-type"] == "image/svg+xml"
    assert client.get("/playground/samples/cat.jpg").headers["content-type"] == "image/jpeg"


def test_the_vendored_libraries_are_those_of_the_recorded_sums(client):
    vendor = FOLDER.joinpath("vendor")
    libraries = [folder for folder in vendor.iterdir() if folder.is_dir()]
    present = [path for library in libraries for path in Path(str(library)).rglob("*") if path.is_file()]
    assert {path.relative_to(str(vendor)).as_posix() for path in present} == set(SUMS)
    for name, recorded in SUMS.items():
        assert hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() == recorded, name
        if name.endswith(".js"):
            assert client.get(f"/playground/vendor/{name}").headers["content-type"].startswith("text/javascript")


def test_the_files_name_no_other_host_and_contain_no_inline_code():
    for name in ("page.html", *ASSETS):
        assert not re.search(r"https?://", text_of(name)), name
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", text_of("page.html"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_parse_text_as_markup_or_code(script):
    assert not re.search(r"(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text_of(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_import_of_a_script_exists(script):
    for names, module in re.findall(r'import \{([^}]+)\} from "\./([\w.]+)"', text_of(script)):
        assert module in SCRIPTS
        for name in names.split(","):
            imported = name.split(" as ")[0].strip()
            by_name = rf"export (async )?(const|function\*?|class|let) {imported}\b"
            declared = by_name + rf"|export \{{[^}}]*\b{imported}\b[^}}]*\}} from"
            assert re.search(declared, text_of(module)), imported


def loaded_at_first(script: str, found: set[str]) -> set[str]:
    """Return the paths of a script and of what it imports when it is loaded."""
    found.add(script)
    text = FOLDER.joinpath(*script.split("/")).read_text("utf-8")
    for module in re.findall(r'from ?"(\.[^"]+)"', text):
        path = posixpath.normpath(f"{posixpath.dirname(script)}/{module}").lstrip("/")
        if path not in found:
            loaded_at_first(path, found)
    return found


def test_the_first_view_is_small(client):
    samples = {f"samples/{name}" for name in re.findall(r'name: "([\w.]+)"', text_of("samples.js"))}
    assert len(samples) == 6
    paths = {"page.css", "tools.css", "mark.svg", *samples, *loaded_at_first("page.js", set())}
    assert {"vendor/lit-html/lit-html.js", "classify_view.js"} <= paths
    assert "vendor/client-zip/index.js" not in paths  # loaded when it is used
    sizes = {path: len(client.get(f"/playground/{path}").raise_for_status().content) for path in paths}
    sizes["/"] = len(client.get("/").content)
    assert sum(sizes.values()) < 300_000, sorted(sizes.items(), key=lambda item: -item[1])
    assert sum(sizes[path] for path in samples) < 90_000


def test_every_element_that_a_script_uses_exists():
    used = {element_id for script in SCRIPTS for element_id in re.findall(r'\bbyId\("([\w-]+)"\)', text_of(script))}
    ids = re.findall(r'id="([\w-]+)"', text_of("page.html"))
    assert len(used) > 50
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "asset",
    [
        *("page.html", "__init__.py", "nope.js", "..%2f__init__.py", "", "page.css%00", ".", "vendor", "vendor/"),
        *("vendor/README.md", "vendor/lit-html/LICENSE", "vendor/..%2fpage.css", "vendor//lit-html/directive.js"),
        *("samples/README.md", "%2fetc/passwd", "samples/%2e%2e/page.css", "SAMPLES/cat.jpg"),
    ],
)
def test_no_other_files_are_served(client, asset):
    problem_of(client.get(f"/playground/{asset}"), "unknown-route")
