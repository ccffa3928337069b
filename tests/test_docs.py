"""The documentation matches the code: generated parts are fresh, and links, commands, routes and settings exist."""

import json
import re
import runpy
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

from app import __version__
from app.api.problems import KINDS, TYPE_PREFIX
from app.classification.methods import CASED, METHODS
from app.cli import command_tree
from app.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    + [file for folder in ("docs", "models", "examples") for file in (ROOT / folder).rglob("*.md")]
)
COMMANDS = command_tree()
OPENAPI = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
ROUTES = {path: {method.upper() for method in methods} for path, methods in OPENAPI["paths"].items()} | {
    "/classify": {"POST"},
    "/": {"GET", "POST"},
    "/docs": {"GET"},
    "/openapi.json": {"GET"},
}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# typer bundles its own copy of click, whose base class of usage errors has no public name.
(UsageError,) = typer.BadParameter.__bases__

_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_SEPARATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "(", ")"}


def on_every_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced code blocks of a page in the given languages."""
    fences = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE) for fence in fences if fence[2] in languages]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield each simple command of the shell blocks as a list of words, without leading variable assignments."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in _SEPARATORS:
                    if words:
                        yield words
                    words = []
                elif words or not _ASSIGNMENT.match(word):
                    words.append(word)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings in the form that GitHub and GitLab generate."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = [c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN"]
        slug = "".join(kept).replace(" ", "-")
        anchors.add(slug if slug not in anchors else f"{slug}-{sum(anchor.startswith(slug) for anchor in anchors)}")
    return anchors


def test_generated_documentation_is_up_to_date():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert generate["stale"]() == [], "run: make docs"


def test_a_page_without_table_markers_is_an_error():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    with pytest.raises(ValueError, match="table of settings: begin"):
        generate["with_table"]("no marker", "settings", "| a |")


@on_every_page
def test_every_link_has_a_target(page):
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    for target in targets:
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme in {"https", "mailto"}, target
            continue
        file = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
        assert file.exists(), f"{target} does not exist"
        assert file.is_relative_to(ROOT), f"{target} is outside the repository"
        if parts.fragment:
            assert parts.fragment in anchors_of(file), f"{target} names no heading"


def parse(words: list[str]) -> None:
    """Parse a `deixis` command line without running it.

    Raises:
        AssertionError: the command does not exist.
        UsageError: a flag or argument is wrong.
    """
    command, rest = COMMANDS, words
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if "--help" in rest or hasattr(command, "commands"):
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert set(rest) <= known
        return
    command.make_context("deixis", rest)


def deixis_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `deixis` command in shell blocks, also of those run in a container."""
    for words in command_lines(page):
        if Path(words[0]).name == "deixis":
            yield words[1:]
        elif words[:2] == ["docker", "run"] and "deixis" in words:
            yield words[words.index("deixis") + 1 :]


@on_every_page
def test_every_command_in_a_shell_block_parses(page):
    for words in deixis_commands(page):
        try:
            parse(words)
        except UsageError as error:
            pytest.fail(f"deixis {shlex.join(words)}: {error.format_message()}")


@on_every_page
def test_every_command_named_in_a_sentence_exists(page):
    for code in re.findall(r"`(?:\.venv/bin/)?deixis ([^`]+)`", prose(page)):
        words = shlex.split(code)
        if words == ["..."]:
            continue
        try:
            parse(words)
        except UsageError as error:
            # A sentence may name a command without its arguments.
            if not error.format_message().startswith("Missing argument"):
                pytest.fail(f"deixis {code}: {error.format_message()}")


def test_methods_and_method_pages_match():
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {name.replace("+", "-") for name in (*METHODS, CASED.name)}
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for part in ("```text", "**It helps**: ", "**It hurts**: ", "**Cost**: ", "## Options", "## Source"):
            assert part in text, (page.name, part)


def test_the_citation_has_the_current_version_and_licence():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "type", "authors"} <= citation.keys()


def test_the_parser_rejects_unknown_commands_and_flags():
    with pytest.raises(AssertionError):
        parse(["label-sets", "rename"])
    for words in (["classify", "--nonsense", "a.jpg"], ["serve", "--port"], ["models", "show"]):
        with pytest.raises(UsageError):
            parse(words)


@on_every_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [word for words in command_lines(page) if words[0] == "make" for word in words[1:] if "=" not in word]
    shown += re.findall(r"`make ([a-z]+)`", prose(page))
    assert set(shown) <= targets


def _route_of(path: str) -> str | None:
    for last in ("[^/]+", ".+"):  # the last part may be a path, but a route of its own comes first
        for route in ROUTES:
            pattern = re.sub(r"\{[^}]*\}$", last, route)
            if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", pattern), path):
                return route
    return None


@on_every_page
def test_every_route_exists(page):
    for method, path in re.findall(r"`(GET|PUT|PATCH|POST|DELETE) (/[^`? ]*)[^`]*`", prose(page)):
        assert method in ROUTES.get(path, ROUTES.get(_route_of(path) or "", set())), f"{method} {path}"


@on_every_page
def test_every_curl_command_requests_an_existing_route(page):
    for words in command_lines(page):
        if words[0] != "curl":
            continue
        addresses = [word for word in words if re.match(r"(http://)?127\.0\.0\.1:8000", word)]
        assert addresses, shlex.join(words)
        route = _route_of(urlsplit(addresses[0]).path)
        assert route, shlex.join(words)
        if "-X" in words:
            assert words[words.index("-X") + 1] in ROUTES[route], shlex.join(words)


@on_every_page
def test_every_json_block_parses(page):
    for block in blocks(page, "json"):
        json.loads(block)


SETTINGS = {f"DEIXIS_{name.upper()}" for name in Settings.model_fields}
# Not settings: set by Kubernetes for a Service called deixis, or read by the client.
OTHER_VARIABLES = {"DEIXIS_SERVICE_HOST", "DEIXIS_CONFIG", "DEIXIS_SERVER", "DEIXIS_API_KEY", "DEIXIS_NAMESPACE"}
OPERATOR_FILES = [ROOT / name for name in ("Dockerfile", "docker-compose.yml", "Makefile", ".ci/run")]


# The changelog names settings that were removed.
PAGES_OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("file", [*PAGES_OF_TODAY, *OPERATOR_FILES], ids=lambda file: str(file.relative_to(ROOT)))
def test_every_setting_exists(file):
    named = set(re.findall(r"DEIXIS_[A-Z0-9_]*[A-Z0-9]", file.read_text(encoding="utf-8")))
    assert named <= SETTINGS | OTHER_VARIABLES


def test_every_problem_type_has_a_section_with_its_status():
    page = (ROOT / "docs" / "problems.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert set(sections) == {kind.slug for kind in KINDS.values()}
    for kind in KINDS.values():
        assert f"**{kind.status}**" in sections[kind.slug], kind.slug
        assert kind.title in sections[kind.slug], kind.slug


def test_every_problem_shown_has_the_status_and_title_of_its_type():
    known = {TYPE_PREFIX + kind.slug: kind for kind in KINDS.values()}

    def problems_in(value: object) -> Iterator[dict]:
        if isinstance(value, dict):
            if str(value.get("type", "")).startswith(TYPE_PREFIX):
                yield value
            for member in value.values():
                yield from problems_in(member)
        elif isinstance(value, list):
            for item in value:
                yield from problems_in(item)

    for page in PAGES:
        for block in blocks(page, "json"):
            for problem in problems_in(json.loads(block)):
                kind = known[problem["type"]]
                assert (problem["status"], problem["title"]) == (kind.status, kind.title), page


@on_every_page
def test_no_page_has_a_todo(page):
    assert not re.search(r"\b(TODO|FIXME)\b", page.read_text(encoding="utf-8"))


def test_the_index_links_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")  # whose table lists the pages of docs/methods/
    linked = set(re.findall(r"\]\(([^)#\s]+)", index + methods))
    pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages <= linked


def test_files_copied_into_the_container_image_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
        assert f"!{source.rstrip('/')}" in ignored, source
