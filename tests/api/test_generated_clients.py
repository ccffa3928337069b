"""Clients that public generators make from docs/openapi.json: they import, and their requests are understood."""

import importlib
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

from app.main import create_app
from tests.api.live import live
from tests.captions_made import CaptionEncoder, made
from tests.conftest import picture

DESCRIPTION = Path(__file__).parents[2] / "docs" / "openapi.json"
SEVERAL_CONTENT_TYPES = {"classify", "search_database", "add_images", "evaluate_label_set"}


def generate(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The operations of a client of openapi-python-client by name, and its module of models."""
    pytest.importorskip("openapi_python_client")
    folder = tmp_path_factory.mktemp("generated")
    (folder / "config.yml").write_text("post_hooks: []\n", "utf-8")
    output = generate(
        "openapi_python_client",
        *("generate", "--path", DESCRIPTION, "--output-path", folder / "client", "--config", folder / "config.yml"),
    )
    warnings = [line for line in output.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert len(warnings) == output.count("Unsupported content type image/*") == 2, output
    sys.path.insert(0, str(folder / "client"))
    try:
        package = folder / "client" / "deixis_client"
        names = [file.relative_to(package.parent).with_suffix("") for file in package.glob("api/*/[a-z]*.py")]
        operations = {name.name: importlib.import_module(".".join(name.parts)) for name in names}
        yield operations, importlib.import_module("deixis_client")
    finally:
        sys.path.remove(str(folder / "client"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "deixis_client"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def models(generated):
    return importlib.import_module("deixis_client.models")


@pytest.fixture
def call(generated, settings):
    """A function that calls an operation of a live service by its name, and returns status and parsed response."""
    operations, package = generated
    made(settings.data_dir / "captions" / "things")
    with (
        live(create_app(settings, lambda _: [CaptionEncoder()])) as (host, port),
        package.Client(base_url=f"http://{host}:{port}") as client,
    ):

        def named(operation, *path, **arguments):
            response = operations[operation].sync_detailed(*path, client=client, **arguments)
            return int(response.status_code), response.parsed

        yield named


def test_every_operation_of_a_generated_client_can_be_imported(generated):
    operations, _ = generated
    assert operations.keys() >= SEVERAL_CONTENT_TYPES
    assert all(hasattr(operation, "sync_detailed") for operation in operations.values())


def test_a_generated_client_sends_images_as_forms_and_json_to_a_live_service(generated, call, models):
    types = importlib.import_module("deixis_client.types")

    def red():
        return types.File(BytesIO(picture("red")), "red.png", "image/png")

    form = models.ClassifyFilesBody(image=[red(), red()], labels="red, blue")
    status, answer = call("classify", body=form)
    assert status == 200, answer
    assert [result.predictions[0].label for result in answer.results] == ["red"] * 2

    json_body = {"images": [{"base64": "aGVsbG8="}], "labels": ["red"]}
    status, answer = call("classify", body=models.ClassifyJsonClassifyBody.from_dict(json_body))
    assert (status, answer.type_.rpartition(":")[2]) == (415, "not-an-image")

    text = models.SearchDatabaseJsonBody.from_dict({"text": "a dog"})
    assert call("search_database", "things", body=text)[0] == 200
    status, answer = call("search_database", "things", body=models.SearchDatabaseFilesBody(image=[red()]))
    assert status == 200, answer
    assert answer.results

    classes = models.LabelSetBody.from_dict({"classes": ["red", "blue"]})
    assert call("put_label_set", "colours", body=classes)[0] == 201
    examples = models.AddImagesFilesBody(image=[red()], class_=["red"])
    status, answer = call("add_images", "colours", body=examples)
    assert (status, answer.added) == (201, 1), answer
    questions = models.EvaluateLabelSetFilesBody(image=[red()], class_=["red"])
    assert call("evaluate_label_set", "colours", body=questions)[0] == 202


def test_generated_models_contain_the_form_and_the_json_of_each_request(tmp_path, monkeypatch):
    pytest.importorskip("datamodel_code_generator")
    output = tmp_path / "generated_models.py"
    generate(
        "datamodel_code_generator",
        *("--input", DESCRIPTION, "--input-file-type", "openapi", "--output", output, "--formatters", "builtin"),
        *("--output-model-type", "pydantic_v2.BaseModel", "--openapi-scopes", "schemas", "paths"),
    )
    monkeypatch.syspath_prepend(tmp_path)
    content = vars(importlib.import_module("generated_models"))
    for path in ("Classify", "DatabasesNameSearch", "LabelSetsNameImages", "LabelSetsNameEvaluate"):
        assert {f"V1{path}PostRequest", f"V1{path}PostRequest1"} <= content.keys()
