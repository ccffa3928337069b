"""The files of the playground: what they load, and that they contain no unsafe code."""

import hashlib
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
    assert {"playground/page.css", "playground/page.js", "docs"} <= set(linked)
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
            assert re.search(rf"export (async )?(const|function\*?|class|let) {imported}\b", text_of(module)), imported


def test_every_element_that_a_script_uses_exists():
    used = {element_id for script in SCRIPTS for element_id in re.findall(r'\bbyId\("([\w-]+)"\)', text_of(script))}
    ids = re.findall(r'id="([\w-]+)"', text_of("page.html"))
    assert len(used) > 60
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
