import json
import re
from pathlib import Path

import pytest

from app.main import create_app
from app.names.class_names import MAX_ITEMS
from app.settings import Settings

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}

# The contract; a route that is missing here is one that callers were not promised.
ROUTES = {
    ("/v1/embeddings", "post"),
    ("/v1/zero-shot-image-classification", "post"),
    ("/healthz", "get"),
    ("/readyz", "get"),
    ("/metrics", "get"),
    ("/v1/classify", "post"),
    ("/v1/label-sets", "get"),
    ("/v1/label-sets/{name}", "get"),
    ("/v1/label-sets/{name}", "put"),
    ("/v1/label-sets/{name}", "delete"),
    ("/v1/label-sets/{name}/classes", "post"),
    ("/v1/label-sets/{name}/classes/{classname}", "delete"),
    ("/v1/label-sets/{name}/descriptions", "get"),
    ("/v1/label-sets/{name}/descriptions:accept", "post"),
    ("/v1/label-sets/{name}/descriptions:estimate", "post"),
    ("/v1/label-sets/{name}/descriptions:generate", "post"),
    ("/v1/label-sets/{name}/descriptions:reject", "post"),
    ("/v1/label-sets/{name}:evaluate", "post"),
    ("/v1/label-sets/{name}/images", "get"),
    ("/v1/label-sets/{name}/images", "post"),
    ("/v1/label-sets/{name}/images", "delete"),
    ("/v1/label-sets/{name}/images/{image_id}", "get"),
    ("/v1/label-sets/{name}/images/{image_id}", "delete"),
    ("/v1/label-sets/{name}/images/{image_id}/content", "get"),
    ("/v1/label-sets/{name}/selection", "get"),
    ("/v1/databases", "get"),
    ("/v1/databases/{name}", "get"),
    ("/v1/databases/{name}", "put"),
    ("/v1/databases/{name}", "delete"),
    ("/v1/databases/{name}/search", "post"),
    ("/v1/question-sets", "get"),
    ("/v1/jobs", "get"),
    ("/v1/jobs/{job_id}", "get"),
    ("/v1/jobs/{job_id}", "delete"),
    ("/v1/methods", "get"),
    ("/v1/models", "get"),
}


@pytest.fixture(scope="module")
def api():
    return create_app(Settings(data_dir="/nowhere")).openapi()


def operations(api):
    for path, item in api["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield path, method, operation


def parts(node, pointer=""):
    """Yield every object and list of the document with the place where it stands."""
    if isinstance(node, dict | list):
        yield pointer, node
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from parts(value, f"{pointer}/{key}")


def resolved(api, reference):
    assert reference.startswith("#/"), reference
    node = api
    for step in reference[2:].split("/"):
        node = node[step.replace("~1", "/").replace("~0", "~")]
    return node


def test_the_description_is_of_version_3_1_and_names_the_service(api):
    assert api["openapi"].startswith("3.1.")
    assert api["info"]["title"] == "Deixis"
    assert api["info"]["version"]


def test_every_reference_leads_somewhere(api):
    references = [(place, node["$ref"]) for place, node in parts(api) if isinstance(node, dict) and "$ref" in node]
    assert references
    for _, reference in references:
        assert isinstance(resolved(api, reference), dict), reference


def test_no_schema_brings_definitions_that_nothing_can_refer_to(api):
    assert [place for place, node in parts(api) if isinstance(node, dict) and "$defs" in node] == []


def test_what_is_described_is_what_was_promised(api):
    assert {(path, method) for path, method, _ in operations(api)} == ROUTES


def test_every_operation_has_a_name_of_its_own_that_a_generated_client_can_use(api):
    names = [operation["operationId"] for _, _, operation in operations(api)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert all(operation["summary"] and operation["description"] for _, _, operation in operations(api))


def test_every_place_in_a_path_is_a_required_parameter(api):
    for path, _, operation in operations(api):
        described = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert described == set(re.findall(r"\{(\w+)\}", path))
        assert all(each["required"] for each in operation.get("parameters", []) if each["in"] == "path")


def test_every_error_is_described_as_a_problem_and_as_nothing_else(api):
    for path, method, operation in operations(api):
        answers = operation["responses"]
        errors = {status: each for status, each in answers.items() if status[0] in "45"}
        assert {"4XX", "5XX"} <= set(errors), (path, method)
        for status, each in errors.items():
            assert set(each["content"]) == {"application/problem+json"}, (path, method, status)
        assert any(status[0] == "2" for status in answers), (path, method)
    assert "HTTPValidationError" not in api["components"]["schemas"]
    assert {"type", "title", "status", "detail", "request_id"} <= set(
        api["components"]["schemas"]["Problem"]["properties"]
    )


def test_the_three_forms_of_a_classify_request_are_shown_with_the_same_fields(api):
    body = api["paths"]["/v1/classify"]["post"]["requestBody"]
    assert body["required"]
    assert set(body["content"]) == {"multipart/form-data", "application/json", "image/*"}
    form = body["content"]["multipart/form-data"]["schema"]
    json_body = body["content"]["application/json"]["schema"]
    fields = {"labels", "label_set", "method", "model", "template", "top_k", "explain", "options"}
    fields |= {"reject_below", "false_rejection_rate", "coverage", "database", "group"}
    assert set(form["properties"]) == fields | {"image"}
    assert set(json_body["properties"]) == fields | {"images"}
    assert form["properties"]["image"]["items"] == {"type": "string", "format": "binary"}
    assert set(json_body["properties"]["images"]["items"]["properties"]) == {"base64", "url"}
    assert form["required"] == ["image"]
    assert json_body["required"] == ["images"]
    for schema in (form, json_body):
        assert schema["additionalProperties"] is False
        assert all(each["description"] for each in schema["properties"].values())


def test_lists_may_be_as_long_as_the_largest_setting_allows(api):
    longest = {
        bound.le
        for name in ("max_labels", "max_classes", "max_images_per_request")
        for bound in Settings.model_fields[name].metadata
        if hasattr(bound, "le")
    }
    assert longest == {MAX_ITEMS}
    lists = {node["maxItems"] for _, node in parts(api) if isinstance(node, dict) and "maxItems" in node}
    assert lists == longest


def test_a_class_may_be_described_by_its_name_or_as_an_object(api):
    (classes,) = {
        json.dumps(api["components"]["schemas"][name]["properties"]["classes"]["items"])
        for name in ("ClassesBody", "LabelSetBody")
    }
    assert json.loads(classes) == {"anyOf": [{"type": "string"}, {"$ref": "#/components/schemas/ClassBody"}]}


def test_a_request_may_hold_no_other_fields_than_those_described(api):
    for name in ("ClassesBody", "LabelSetBody", "ClassBody"):
        assert api["components"]["schemas"][name]["additionalProperties"] is False


def test_the_served_description_is_this_one(client, api):
    assert client.get("/openapi.json").json() == json.loads(json.dumps(api))


def test_the_committed_description_is_up_to_date(api):
    """`make docs` writes it."""
    assert json.loads(COMMITTED.read_text("utf-8")) == json.loads(json.dumps(api))
