"""Every code block of the documentation runs against a real server.

The blocks of a page run in their order in one folder, which contains the files that the page mentions. A block that
cannot run here has `<!-- not run: REASON -->` before it, which the rendered page does not show. A block whose request
is refused has `<!-- refused: STATUS -->`.
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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import skimage.data
import yaml

from app.integrations.label_studio_config import read_config
from app.label_sets.shipped import shipped_file
from tests.conftest import photograph
from tests.end_to_end.commands import environment
from tests.end_to_end.forked_commands import fork_server
from tests.end_to_end.server import serving
from tests.test_docs import PAGES, ROOT

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|refused): (?P<note>[^\n]*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
ADDRESS = "http://127.0.0.1:8000"
# Languages of blocks that are not run: output, and configuration of other programs.
NOT_RUN = {"text", "nginx", "console", ""}
TIMEOUT_S = 60


@dataclass(frozen=True)
class Block:
    """A fenced code block, with its mark and the mark's reason or status."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None
    note: str


def blocks_of(page):
    text = page.read_text("utf-8")
    for found in _BLOCK.finditer(text):
        code = re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("code"))
        yield Block(page, line, found["language"], code, found["mark"], found["note"] or "")


BLOCKS = {page: list(blocks_of(page)) for page in PAGES if page.name != "CHANGELOG.md"}
FIRST_HOUR = (ROOT / "README.md", ROOT / "docs" / "tutorial.md")
"""The pages that test_first_hour.py runs, in their order."""
RUN = [
    page
    for page, blocks in BLOCKS.items()
    if page not in FIRST_HOUR
    and any(block.language in {"sh", "python"} and block.mark != "not run" for block in blocks)
]


def name_of(page):
    return str(page.relative_to(ROOT))


# --- the folder and the server of a page -----------------------------------------------------------------------------


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
    """A folder for the PATH with `deixis`, `curl` and `python`; `deixis` uses the server of the test."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "deixis").symlink_to(fork_server().program)
    # A request that is refused fails its block, unless the block is marked as refused.
    curl = shutil.which("curl")
    (folder / "curl").write_text(
        f'#!/bin/bash\nexec {curl} --silent --show-error ${{REFUSED:---fail-with-body}} "$@"\n'
    )
    (folder / "python").symlink_to(sys.executable)
    (folder / "curl").chmod(0o755)
    return folder


TREES = ("clothes-by-class", "clothes/test", "clothes/train", "clothes/validation", "clothing/test")
# The classes that the photographs stand for; no test looks at the predictions.
CLOTHES = {"cat": "hat", "coffee cup": "outwear", "rocket": "longsleeve"}
PETS = {"cat": "cat", "coffee cup": "dog", "rocket": "dog"}


def fill(folder):
    """Write the files that pages mention."""
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
    clothing = json.loads(shipped_file("clothing").read_bytes())
    few = [
        {**each, "features": each["features"][:2], "descriptions": each["descriptions"][:1]}
        for each in clothing["classes"]
        if each["name"] in {"hat", "jacket", "long sleeve top"}
    ]
    (folder / "clothing.json").write_text(json.dumps({**clothing, "classes": few}))
    (folder / "birds.json").write_text('{"classes": ["wren", "robin"]}')
    captions = [
        f"a {colour} {thing}" for colour in ("striped", "red", "small") for thing in ("wild cat", "kettle", "rocket")
    ]
    (folder / "archive.txt").write_text("\n".join(captions))
    rows = io.StringIO("description,price\n" + "".join(f"{caption},1\n" for caption in captions))
    with gzip.open(folder / "products.csv.gz", "wt") as opened:
        opened.write(rows.getvalue())
    with gzip.open(folder / "titles.gz", "wt") as opened:
        opened.write("\n".join(captions))


def wait_for_jobs(client):
    give_up_at = time.monotonic() + TIMEOUT_S
    while any(job["status"] in {"queued", "running"} for job in client.get("/v1/jobs").json()["jobs"]):
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


LABEL_SETS = {
    "animals": {"classes": [{"name": name, "features": ["long whiskers"]} for name in ("cat", "dog", "tiger")]},
    "birds": {"classes": ["wren", "robin"]},
    "pets": {"classes": ["cat", "dog"]},
}
DATABASES = ("archive", "everyday", "products")


@pytest.fixture
def workspace(request, server, tmp_path):
    """A folder with files, and a server with the label sets and databases that the page does not create itself."""
    fill(tmp_path)
    text = request.getfixturevalue("page").read_text("utf-8")
    with server.client() as client:
        wait_for_jobs(client)
        for label_set in client.get("/v1/label-sets", params={"limit": 1000}).json()["label_sets"]:
            client.delete(f"/v1/label-sets/{label_set['name']}").raise_for_status()
        kept = {database["name"] for database in client.get("/v1/databases").json()["databases"]}
        for name in kept - set(DATABASES):
            client.delete(f"/v1/databases/{name}").raise_for_status()
        captions = (tmp_path / "archive.txt").read_text().splitlines()
        for name in set(DATABASES) - kept:
            client.put(f"/v1/databases/{name}", json={"captions": captions}).raise_for_status()
        # Version numbers are never reused, but pages expect version 1.
        with closing(sqlite3.connect(server.data_dir / "deixis.sqlite3", timeout=TIMEOUT_S)) as database:
            database.execute("DELETE FROM label_set_versions")
            database.execute("DELETE FROM label_sets")
            database.commit()
        for name, body in LABEL_SETS.items():
            if not re.search(rf'PUT [^\n]*label-sets/{name}\b|sets\.put\("{name}"', text):
                client.put(f"/v1/label-sets/{name}", json=body).raise_for_status()
        wait_for_jobs(client)
    return tmp_path


def run_block(block, workspace, server, commands):
    code = block.code.replace(ADDRESS, server.url).replace(".venv/bin/", "")
    # With all classes and descriptions, comparing every method takes twenty seconds.
    code = code.replace("label-sets import clothing\n", "label-sets import clothing clothing.json\n")
    settings = {
        "DEIXIS_DATA_DIR": str(server.data_dir),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COMMANDS_SERVER": server.url,
    }
    if block.mark == "refused":
        settings["REFUSED"] = "-w%{http_code}"
    command = (
        ["bash", "-euo", "pipefail", "-c", code]
        if block.language == "sh"
        else [
            sys.executable,
            "-c",
            code.replace("Client()", f'Client("{server.url}")'),
        ]
    )
    done = subprocess.run(
        command,
        cwd=workspace,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    where = f"{name_of(block.page)}:{block.line}\n{block.code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    if block.mark == "refused":
        assert block.note in done.stdout, where
    else:
        assert done.returncode == 0, where
    with server.client() as client:
        wait_for_jobs(client)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_code_blocks_of_a_page_run(page, workspace, server, commands):
    for block in BLOCKS[page]:
        if block.language in {"sh", "python"} and block.mark != "not run":
            run_block(block, workspace, server, commands)


@pytest.mark.parametrize("page", BLOCKS, ids=name_of)
def test_data_blocks_parse_and_other_blocks_have_a_known_language(page):
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
            assert block.language in {"sh", "python", *NOT_RUN}, f"{name_of(page)}:{block.line}"


def test_most_code_blocks_run_and_the_others_give_a_reason():
    programs = [block for blocks in BLOCKS.values() for block in blocks if block.language in {"sh", "python"}]
    reasons = [block.note for block in programs if block.mark == "not run"]
    assert len(reasons) < len(programs) / 2
    assert all(len(reason.split()) >= 2 for reason in reasons)
