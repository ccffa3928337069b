"""MkDocs hooks: put the pages of a folder into the navigation, and add the files outside docs/ that pages link to.

A folder in the navigation of mkdocs.yml, such as ``methods/``, stands for all of its pages, sorted by name.
Every file outside docs/ that a page links to becomes a page of the site.

The same relative links then work in the repository and on the site. Markdown files and images are added as they are,
other text files as a code listing.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# The folder of the site that holds the files from outside docs/.
EXTERNAL = "repository/"

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^( *)(```+).*?^\1\2$", re.DOTALL | re.MULTILINE)
_IMAGES = (".svg", ".png", ".jpg")
_LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the folders in the navigation by lists of their pages."""
    config.nav = _with_pages(config.nav)
    return config


def _with_pages(nav: Any) -> Any:
    if isinstance(nav, str):
        return sorted(f"{nav}{page.name}" for page in (ROOT / DOCS / nav).glob("*.md")) if nav.endswith("/") else nav
    if isinstance(nav, dict):
        return {title: _with_pages(each) for title, each in nav.items()}
    return [_with_pages(each) for each in nav]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, directly or through other added pages."""
    pending = [f"{DOCS}{file.src_uri}" for file in files.documentation_pages()]
    seen = set(pending)
    while pending:
        page = pending.pop()
        for path in sorted(_external_links(page) - seen):
            seen.add(path)
            if path.endswith(".md"):
                pending.append(path)
            files.append(File.generated(config, _site_path(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page to the paths of the site."""
    del config, files
    folder = posixpath.dirname(page.file.src_uri) or "."
    source = _repository_path(page.file.src_uri)
    return _rewrite_links(markdown, source, lambda path: posixpath.relpath(_site_path(path), folder))


def _repository_path(site_path: str) -> str:
    """Return the path in the repository of a page of the site."""
    return site_path.removeprefix(EXTERNAL) if site_path.startswith(EXTERNAL) else f"{DOCS}{site_path}"


def _site_path(path: str) -> str:
    """Return the path on the site of a file of the repository."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return f"{EXTERNAL}{path}" if path.endswith((".md", *_IMAGES)) else f"{EXTERNAL}{path}.md"


def _content(path: str) -> str | bytes:
    file = ROOT / path
    if path.endswith(_IMAGES):
        return file.read_bytes()
    text = file.read_text("utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{_LANGUAGES.get(file.suffix, '')}\n{text}\n````\n"


def _external_links(page: str) -> set[str]:
    """Return the files outside docs/ that a page of the repository links to."""
    links: set[str] = set()
    _rewrite_links((ROOT / page).read_text("utf-8"), page, lambda path: links.add(path) or path)
    return {path for path in links if not path.startswith(DOCS)}


def _rewrite_links(markdown: str, source: str, target: Callable[[str], str]) -> str:
    """Return the page with every link to a file of the repository replaced, except in code blocks."""

    def replaced(match: re.Match[str]) -> str:
        link, hash_sign, anchor = match[2].partition("#")
        if not link or re.match(r"[a-z][a-z0-9+.-]*:", link):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(link)))
        if path.startswith("..") or not (ROOT / path).is_file():
            return match[0]  # mkdocs reports the broken link
        return f"{match[1]}{target(path)}{hash_sign}{anchor}{match[3]}"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, markdown[end:])])
