"""Commands import only what they need: most of the time of a short command is that of its imports."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from app.cli import _ENTRIES, command_tree
from app.encoders.fake import FakeEncoder
from app.main import create_app
from app.settings import Settings
from tests.api.live import live
from tests.conftest import picture

TORCH = {"torch", "torchvision", "open_clip", "timm", "transformers"}
SERVICE = TORCH | {"fastapi", "starlette", "uvicorn", "scipy", "faiss", "app.main"}
EVERYTHING = SERVICE | {"sqlalchemy", "alembic", "numpy", "structlog"}
PROGRAM = """
import contextlib, gc, json, sys
from deixis.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["deixis", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{arguments}: {end.code}")
print("frozen:", gc.get_freeze_count(), "modules:", *sys.modules)
"""


def run(*commands, **environment):
    """Run commands in one new process, and return their output and the modules that were imported."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("DEIXIS_")}
    settings |= {"DEIXIS_CONFIG": "", "DEIXIS_SERVER": "local"} | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([list(map(str, command)) for command in commands])],
        capture_output=True,
        text=True,
        env=settings,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    output, _, modules = done.stdout.rpartition("modules:")
    output, _, frozen = output.rpartition("frozen:")
    # The garbage collector never looks at the modules of a command; `--help` and `--version` of all have none.
    assert (int(frozen) > 10_000) == any(name.startswith("app.cli.") for name in modules.split())
    return output, set(modules.split())


@pytest.fixture
def url(tmp_path, empty_database):
    """The URL of a server with the fake encoder."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder)
    encoder = FakeEncoder()
    with live(create_app(Settings(data_dir=folder), lambda _: [encoder])) as (host, port):
        yield f"http://{host}:{port}"


def test_help_and_version_import_no_command():
    output, modules = run(["--version"], ["--help"])
    assert "evaluate" in output
    assert not (EVERYTHING | {"httpx", "pydantic"}) & modules
    assert not {f"app.cli.{entry.module}" for entry in _ENTRIES.values()} & modules


@pytest.mark.parametrize(
    ("words", "completions"),
    [(["deixis", "cla"], ["classify"]), (["deixis", "classify", "--tem"], ["--template"])],
)
def test_completions_import_at_most_the_declaration_of_their_command(words, completions):
    output, modules = run(
        [], _DEIXIS_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1)
    )
    assert output.split() == completions
    assert not (EVERYTHING | {"httpx", "deixis.answers"}) & modules


def test_the_help_of_a_command_imports_only_its_declaration():
    output, modules = run(*([name, "--help"] for name in _ENTRIES))
    assert "--reject-below" in output
    assert not (EVERYTHING | {"httpx", "deixis.answers"}) & modules


def test_the_list_of_commands_has_the_first_paragraph_of_the_help_of_each():
    paragraphs = {
        name: " ".join(command.help.partition("\n\n")[0].split()) for name, command in command_tree().commands.items()
    }
    assert paragraphs == {name: entry.summary for name, entry in _ENTRIES.items()}


def test_commands_on_a_server_import_nothing_of_the_service(url, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(picture())
    labels = tmp_path / "labels.txt"
    labels.write_text("red\nblue\n")
    server = ["--server", url]
    output, modules = run(
        ["classify", photo, "-l", "red, blue", *server],
        ["label-sets", "import", "colours", labels, *server],
        ["label-sets", "list", *server],
        ["examples", "add", "colours", photo, "--class", "red", *server],
        ["examples", "count", "colours", *server],
        ["drafts", "list", "colours", *server],
        ["captions", "list", *server],
        ["watch", tmp_path, "-s", "colours", "--once", *server],
        DEIXIS_DATA_DIR=str(tmp_path / "data"),
    )
    assert "red" in output
    assert "httpx" in modules
    assert not EVERYTHING & modules


def test_evaluation_on_a_server_imports_no_methods(url, tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / "pictures" / colour).mkdir(parents=True)
        (tmp_path / "pictures" / colour / "a.png").write_bytes(picture(colour))
    output, modules = run(["evaluate", tmp_path / "pictures", "--server", url])
    assert "top-1 1.0000" in output
    assert not (SERVICE | {"sqlalchemy", "alembic"}) & modules


def test_commands_that_read_shipped_files_import_nothing_of_the_service():
    output, modules = run(["models", "list"], ["label-sets", "shipped"], ["drafts", "questions"])
    assert "ViT-B-32" in output
    assert not (EVERYTHING | {"httpx", "deixis.answers"}) & modules


def test_commands_on_the_database_import_no_encoder_and_no_web_server(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path)
    output, modules = run(["keys", "list"], ["database", "show"], DEIXIS_DATA_DIR=str(tmp_path))
    assert str(tmp_path) in output
    assert not SERVICE & modules
