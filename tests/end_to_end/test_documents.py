"""Every code block of the documentation does what it says, on a real server.

A block stands in a page's order in one folder, in which there are the files that the page talks about. One that cannot
be run here has `<!-- not run: WHY -->` before it, which the rendered page does not show; one that shows a refusal has
`<!-- refused: STATUS -->`.
"""

import gzip
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import skimage.data
import yaml

from app.integrations.label_studio_config import read_config
from tests.conftest import photograph
from tests.end_to_end.forked_commands import Forking
from tests.end_to_end.server import environment, serving
from tests.test_docs import PAGES, ROOT

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|refused): (?P<why>[^\n]*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
ADDRESS = "http://127.0.0.1:8000"
# Shown, and nothing to be run: what came out, and a proxy's and the command line's own forms.
SHOWN = {"text", "nginx", "console", ""}
TIMEOUT_S = 60


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    why: str


def blocks_of(page):
    text = page.read_text("utf-8")
    for found in _BLOCK.finditer(text):
        code = re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("code"))
        yield Block(page, line, found["language"], code, found["mark"], found["why"] or "")


BLOCKS = {page: list(blocks_of(page)) for page in PAGES if page.name != "CHANGELOG.md"}
RUN = [
    page
    for page, blocks in BLOCKS.items()
    if any(each.language in {"sh", "python"} and each.mark != "not run" for each in blocks)
]


def name_of(page):
    return str(page.relative_to(ROOT))


# --- a desk to work on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    imports = tmp_path_factory.mktemp("imports")
    fill(imports)
    with serving("--import-dir", str(imports), "--keys", "off", data_dir=data) as running:
        running.data_dir = data
        yield running


@pytest.fixture(scope="module")
def commands(server, tmp_path_factory):
    """A folder with `deixis`, `curl` and `python` as the pages mean them."""
    folder = tmp_path_factory.mktemp("bin")
    forking = Forking(folder, url=server.url)
    # An answer that is a refusal ends a block, unless that is what it shows.
    curl = shutil.which("curl")
    (folder / "curl").write_text(
        f'#!/bin/bash\nexec {curl} --silent --show-error ${{REFUSED:---fail-with-body}} "$@"\n'
    )
    (folder / "python").symlink_to(sys.executable)
    (folder / "curl").chmod(0o755)
    yield folder
    forking.end()


TREES = ("clothes-by-class", "clothes/test", "clothes/train", "clothes/validation", "clothing/test")
# What the pictures stand for, whose answers nobody looks at here.
CLOTHES = {"cat": "hat", "coffee cup": "outwear", "rocket": "longsleeve"}
PETS = {"cat": "cat", "coffee cup": "dog", "rocket": "dog"}


def fill(folder):
    """Put the files there that pages talk about."""
    shots = {"cat": skimage.data.chelsea(), "coffee cup": skimage.data.coffee(), "rocket": skimage.data.rocket()}
    shutil.copytree(ROOT / "examples" / "photos", folder / "examples" / "photos")
    (folder / "photos").mkdir(parents=True)
    for number, (name, pixels) in enumerate(shots.items(), 1):
        content = photograph(pixels)
        for place in (f"{number}.jpg", f"photos/{name}.jpg"):
            (folder / place).write_bytes(content)
        for tree, classname in {**dict.fromkeys(TREES, CLOTHES[name]), "photos-by-class": PETS[name]}.items():
            (folder / tree / classname).mkdir(parents=True, exist_ok=True)
            for cut in (1, 5, 9):
                cropped = photograph(pixels[cut:-cut, cut:-cut])
                (folder / tree / classname / f"{number}-{cut}.jpg").write_bytes(cropped)
    for copy in ("cat.jpg", "chelsea.jpg", "dog.jpg", "4.jpg"):
        (folder / copy).write_bytes(photograph(shots["cat"][: 200 + len(copy)]))
    (folder / "invoice.pdf").write_bytes(b"%PDF-1.7")
    for more in ("more-cats", "unsorted", "inbox"):
        (folder / more).mkdir()
        (folder / more / "one.jpg").write_bytes(photograph(shots["cat"][3 + len(more) :]))
    (folder / "words.txt").write_text("cat\ndog\n")
    (folder / "pets.txt").write_text("cat\ndog\nhamster\n")
    (folder / "birds.json").write_text('{"classes": ["wren", "robin"]}')
    captions = [
        f"a {colour} {thing}" for colour in ("striped", "red", "small") for thing in ("wild cat", "kettle", "rocket")
    ]
    (folder / "archive.txt").write_text("\n".join(captions))
    rows = io.StringIO("description,price\n" + "".join(f"{each},1\n" for each in captions))
    with gzip.open(folder / "products.csv.gz", "wt") as opened:
        opened.write(rows.getvalue())
    with gzip.open(folder / "titles.gz", "wt") as opened:
        opened.write("\n".join(captions))


def wait_for_jobs(client):
    give_up_at = time.monotonic() + TIMEOUT_S
    while any(each["status"] in {"queued", "running"} for each in client.get("/v1/jobs").json()["jobs"]):
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


GIVEN = {
    "animals": {"classes": [{"name": name, "features": ["long whiskers"]} for name in ("cat", "dog", "tiger")]},
    "birds": {"classes": ["wren", "robin"]},
    "pets": {"classes": ["cat", "dog"]},
}
DATABASES = ("archive", "products", "wordnet")


@pytest.fixture
def desk(request, server, tmp_path):
    """A folder with files, and a server that has what a page takes for given and does not make itself."""
    fill(tmp_path)
    text = request.getfixturevalue("page").read_text("utf-8")
    with server.client() as client:
        wait_for_jobs(client)
        for each in client.get("/v1/label-sets", params={"limit": 1000}).json()["label_sets"]:
            client.delete(f"/v1/label-sets/{each['name']}").raise_for_status()
        kept = {each["name"] for each in client.get("/v1/databases").json()["databases"]}
        for name in kept - set(DATABASES):
            client.delete(f"/v1/databases/{name}").raise_for_status()
        captions = (tmp_path / "archive.txt").read_text().splitlines()
        for name in set(DATABASES) - kept:
            client.put(f"/v1/databases/{name}", json={"captions": captions}).raise_for_status()
        # Numbers of versions are never used again, and pages begin with 1.
        with closing(sqlite3.connect(server.data_dir / "deixis.sqlite3", timeout=TIMEOUT_S)) as database:
            database.execute("DELETE FROM label_set_versions")
            database.execute("DELETE FROM label_sets")
            database.commit()
        for name, body in GIVEN.items():
            if not re.search(rf'PUT [^\n]*label-sets/{name}\b|sets\.put\("{name}"', text):
                client.put(f"/v1/label-sets/{name}", json=body).raise_for_status()
        wait_for_jobs(client)
    return tmp_path


def run_block(block, desk, server, commands):
    code = block.code.replace(ADDRESS, server.url).replace(".venv/bin/", "")
    settings = {
        "DEIXIS_DATA_DIR": str(server.data_dir),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    if block.mark == "refused":
        settings["REFUSED"] = "-w%{http_code}"
    command = (
        ["bash", "-euo", "pipefail", "-c", code]
        if block.language == "sh"
        else [
            sys.executable,
            "-c",
            code.replace("deixis.Client()", f'deixis.Client("{server.url}")').replace(
                "deixis.AsyncClient()", f'deixis.AsyncClient("{server.url}")'
            ),
        ]
    )
    done = subprocess.run(
        command,
        cwd=desk,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    where = f"{name_of(block.page)}:{block.line}\n{block.code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    if block.mark == "refused":
        assert block.why in done.stdout, where
    else:
        assert done.returncode == 0, where
    with server.client() as client:
        wait_for_jobs(client)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_commands_and_programs_of_a_page_run(page, desk, server, commands):
    for block in BLOCKS[page]:
        if block.language in {"sh", "python"} and block.mark != "not run":
            run_block(block, desk, server, commands)


@pytest.mark.parametrize("page", BLOCKS, ids=name_of)
def test_data_of_a_page_parses_and_every_other_block_is_known(page):
    for block in BLOCKS[page]:
        if block.language == "json":
            json.loads(re.sub(r"(?<=[\[{,])\s*\.\.\.\s*(?=[\]},])", "", block.code))
        elif block.language == "yaml":
            assert yaml.safe_load(block.code)
        elif block.language == "xml":
            assert read_config(block.code)
        elif block.language == "toml":
            assert tomllib.loads(block.code)
        else:
            assert block.language in {"sh", "python", *SHOWN}, f"{name_of(page)}:{block.line}"


def test_most_blocks_are_run_and_those_that_are_not_say_why():
    told = Counter(
        "run" if each.mark != "not run" else "not run"
        for blocks in BLOCKS.values()
        for each in blocks
        if each.language in {"sh", "python"}
    )
    assert told["run"] > told["not run"]
    reasons = [each.why for blocks in BLOCKS.values() for each in blocks if each.mark == "not run"]
    assert all(len(each.split()) >= 2 for each in reasons)
