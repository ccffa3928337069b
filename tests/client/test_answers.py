"""The client's types are those of the service's description, field by field."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import deixis
from deixis import AsyncClient, Client, _async_client, _calls, _client, answers
from deixis.extras import needs_extra

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))["components"]["schemas"]
NAMES = {
    answers.Problem: "Problem",
    answers.Prediction: "PredictionBody",
    answers.PathStep: "PathStepBody",
    answers.PromptContribution: "PromptContributionBody",
    answers.LabelExplanation: "LabelExplanationBody",
    answers.NearCaption: "NearCaptionBody",
    answers.NearWord: "NearWordBody",
    answers.Explanation: "ExplanationBody",
    answers.OutOfVocabulary: "OutOfVocabularyBody",
    answers.ImageResult: "ResultBody",
    answers.Calibration: "CalibrationBody",
    answers.ExamplesUsed: "ExamplesUsedBody",
    answers.SharedName: "SharedNameBody",
    answers.Classification: "ClassifyResponse",
    answers.LabelClass: "ClassBody",
    answers.LabelSet: "LabelSetResponse",
    answers.LabelSetSummary: "LabelSetSummaryBody",
    answers.ShippedLabelSet: "ShippedLabelSet",
    answers.ShippedLabelSetSummary: "ShippedLabelSetSummary",
    answers.ExampleCounts: "ExampleCountsBody",
    answers.Example: "ExampleBody",
    answers.SkippedImage: "SkippedImageBody",
    answers.AddedExamples: "AddedExamplesResponse",
    answers.DeletedExamples: "DeletedExamplesResponse",
    answers.LeaderboardRow: "LeaderboardRow",
    answers.Selection: "SelectionResponse",
    answers.ThresholdCurve: "CurveBody",
    answers.LabelThreshold: "LabelThresholdBody",
    answers.Thresholds: "ThresholdsResponse",
    answers.Draft: "DraftBody",
    answers.AcceptedDrafts: "AcceptedResponse",
    answers.DescribeEstimate: "EstimateBody",
    answers.JobState: "JobBody",
    answers.CaptionIndex: "IndexBody",
    answers.Database: "DatabaseBody",
    answers.FoundCaption: "FoundCaptionBody",
    answers.FoundCaptions: "SearchResponse",
    answers.ImagePath: "ImagePathBody",
    answers.Model: "ModelBody",
    answers.MethodOption: "OptionBody",
    answers.Method: "MethodBody",
    _calls.LabelSetPage: "LabelSetList",
    _calls.ExamplePage: "ExampleList",
    _calls.DraftPage: "DraftList",
    _calls.JobPage: "JobList",
}


def test_every_type_is_held_against_the_description():
    ours = {each for _, each in inspect.getmembers(answers, inspect.isclass) if issubclass(each, answers.Answer)}
    assert ours - {answers.Answer} <= NAMES.keys()


@pytest.mark.parametrize(("kind", "name"), NAMES.items(), ids=NAMES.values())
def test_a_type_has_the_fields_of_the_description(kind, name):
    schema = SCHEMAS[name]
    fields = {each.alias or field: each for field, each in kind.model_fields.items()}
    assert fields.keys() == schema["properties"].keys()
    # What the service may leave out must not be needed.
    for field, each in fields.items():
        if field not in schema.get("required", []):
            assert not each.is_required() or name == "LabelSetResponse", field
        may_be_none = any(option.get("type") == "null" for option in schema["properties"][field].get("anyOf", []))
        assert may_be_none == (type(None) in getattr(each.annotation, "__args__", ())), field


@pytest.mark.parametrize(
    ("kind", "path", "apart"),
    [
        (_calls.ClassifyOptions, "/v1/classify", {"images"}),
        (_calls.CaptionFilter, "/v1/databases/{name}/search", {"image", "text"}),
    ],
)
def test_questions_have_every_field(kind, path, apart):
    description = json.loads((ROOT / "docs/openapi.json").read_text("utf-8"))
    body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert kind.__annotations__.keys() == body["properties"].keys() - apart


def test_plans_and_describing_have_every_field():
    assert _calls.BuildPlan.__annotations__.keys() == SCHEMAS["BuildDatabaseBody"]["properties"].keys()
    assert _calls.DescribeOptions.__annotations__.keys() == SCHEMAS["DescribeBody"]["properties"].keys()


@pytest.mark.parametrize(
    ("sync", "other"),
    [
        (Client, AsyncClient),
        (_client.Job, _async_client.AsyncJob),
        (_client.LabelSets, _async_client.AsyncLabelSets),
        (_client.Examples, _async_client.AsyncExamples),
        (_client.Databases, _async_client.AsyncDatabases),
        (_client.Jobs, _async_client.AsyncJobs),
    ],
)
def test_both_clients_have_the_same_methods_with_the_same_arguments(sync, other):
    def signatures(kind):
        return {
            name: list(inspect.signature(each).parameters)
            for name, each in vars(kind).items()
            if inspect.isfunction(each) and not name.startswith("_")
        }

    assert signatures(sync) == signatures(other)


def test_the_client_imports_nothing_of_the_service():
    program = (
        "import sys; from deixis import AsyncClient, Client; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"httpx", "pydantic"} <= set(found)
    assert not {"app", "torch", "numpy", "fastapi", "PIL", "sklearn", "typer"} & set(found)


@pytest.mark.parametrize(("package", "arguments"), [("typer", ["--version"]), ("fastapi", ["serve", "--port", "0"])])
def test_where_only_the_client_is_installed_the_command_names_the_extra(package, arguments):
    hidden = f"import sys; sys.modules[{package!r}] = None; from deixis.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{needs_extra('the command line', 'all')}\n"
    assert "Traceback" not in done.stderr


def test_every_name_of_the_package_can_be_imported():
    assert set(deixis.__all__) == set(deixis._MODULES) <= set(dir(deixis))
    assert all(getattr(deixis, name).__name__ == name for name in deixis.__all__)


def test_names_that_are_not_there_are_errors_of_attributes():
    with pytest.raises(AttributeError, match="Clinet"):
        deixis.Clinet  # noqa: B018
