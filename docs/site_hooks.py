"""Hooks of mkdocs: files outside of docs/ that a page links to become pages of the site.

So the same links work in the repository and in the site, which needs no address of a repository. Markdown is shown as
it is, any other text as a listing.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# Where they are in the site.
OUTSIDE = "repository/"

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^( *)(```+).*?^\1\2$", re.DOTALL | re.MULTILINE)
_LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what these link to."""
    waiting = [f"{DOCS}{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for path in sorted(_outside(page) - seen):
            seen.add(path)
            if path.endswith(".md"):
                waiting.append(path)
            files.append(File.generated(config, _place(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where things are in the site."""
    del config, files
    folder = posixpath.dirname(page.file.src_uri) or "."
    return _with_links(markdown, _origin(page.file.src_uri), lambda path: posixpath.relpath(_place(path), folder))


def _origin(place: str) -> str:
    """Return the path in the repository of a page of the site."""
    return place.removeprefix(OUTSIDE) if place.startswith(OUTSIDE) else f"{DOCS}{place}"


def _place(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"{OUTSIDE}{path}" if path.endswith((".md", ".svg", ".png", ".jpg")) else f"{OUTSIDE}{path}.md"


def _content(path: str) -> str | bytes:
    file = ROOT / path
    if path.endswith((".svg", ".png", ".jpg")):
        return file.read_bytes()
    text = file.read_text("utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{_LANGUAGES.get(file.suffix, '')}\n{text}\n````\n"


def _outside(page: str) -> set[str]:
    """Return the files outside of docs/ that a page of the repository links to."""
    found: set[str] = set()
    _with_links((ROOT / page).read_text("utf-8"), page, lambda path: found.add(path) or path)
    return {path for path in found if not path.startswith(DOCS)}


def _with_links(markdown: str, origin: str, target: Callable[[str], str]) -> str:
    """Return a page with the links to files of the repository replaced; those in code are none."""

    def replaced(match: re.Match[str]) -> str:
        link, hash_sign, anchor = match[2].partition("#")
        if not link or re.match(r"[a-z][a-z0-9+.-]*:", link):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), unquote(link)))
        if path.startswith("..") or not (ROOT / path).is_file():
            return match[0]  # mkdocs tells that it leads nowhere
        return f"{match[1]}{target(path)}{hash_sign}{anchor}{match[3]}"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, markdown[end:])])
