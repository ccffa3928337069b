"""Clients that public generators make from docs/openapi.json: they import, and their requests are understood."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
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
    return run(sys.executable, "-m", module, *arguments)


def run(*command, **options):
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, **options)
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


TYPESCRIPT = """
import { ClassifyApi, Configuration, EmbeddingsApi, ResponseError } from "./index.ts";
const [basePath, picture] = Deno.args;
const configuration = new Configuration({ basePath });
const image = new Blob([await Deno.readFile(picture)], { type: "image/png" });
const answer = await new ClassifyApi(configuration).classify({ image: [image, image], labels: "red, blue" });
const embeddings = await new EmbeddingsApi(configuration).createEmbeddings({ embeddingsBody: { input: ["red"] } });
const failed = await new ClassifyApi(configuration)
    .classify({ image: [image], labels: "red, blue", model: "nope" })
    .catch((error: ResponseError) => error.response.json());
const labels: string[] = answer.results.map((result) => result.predictions[0].label);
console.log(JSON.stringify({ labels, vectors: embeddings.data.length, problem: failed.detail }));
"""
# The generator's own files are not written for every check that Deno makes by default.
DENO = {"compilerOptions": {"lib": ["esnext", "dom", "deno.ns"], "noImplicitOverride": False}}


@pytest.fixture(scope="module")
def typescript(tmp_path_factory):
    """A function that runs Deno in a folder with a client of openapi-generator (typescript-fetch)."""
    generator = files(pytest.importorskip("openapi_generator_cli")) / "openapi-generator.jar"
    deno = pytest.importorskip("deno").find_deno_bin()
    if shutil.which("java") is None:
        assert os.environ.get("TEST_REQUIRE_JAVA") != "1", "java is not on PATH"
        pytest.skip("java is not on PATH")
    folder = tmp_path_factory.mktemp("typescript")
    run(
        *("java", "-jar", generator, "generate", "-g", "typescript-fetch", "-i", DESCRIPTION, "-o", folder),
        "--additional-properties=importFileExtension=.ts",
    )
    (folder / "classify.ts").write_text(TYPESCRIPT, "utf-8")
    (folder / "deno.json").write_text(json.dumps(DENO), "utf-8")
    environment = os.environ | {"DENO_DIR": str(folder / "cache"), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    return lambda *arguments: run(deno, *arguments, cwd=folder, env=environment)


def test_a_typescript_client_has_consistent_types_and_classifies_files(typescript, settings, tmp_path):
    typescript("check", "classify.ts")
    (tmp_path / "red.png").write_bytes(picture("red"))
    with live(create_app(settings, lambda _: [CaptionEncoder()])) as (host, port):
        shown = typescript(
            *("run", "--no-check", "--allow-net", "--allow-read", "classify.ts"),
            *(f"http://{host}:{port}", tmp_path / "red.png"),
        )
    answer = json.loads(shown.splitlines()[0])
    assert (answer["labels"], answer["vectors"]) == (["red", "red"], 1)
    assert answer["problem"].startswith("unknown model 'nope'; known: ")
