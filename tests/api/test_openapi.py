"""The OpenAPI description: complete, consistent, and equal to the committed one."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from app.api.schemas.classification import ClassifyBody, ClassifyFields
from app.classification.request import ClassifyRequest
from app.main import create_app
from app.names.class_names import MAX_ITEMS
from app.settings import Settings
from tests.api.problems import problem_of

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}

# The contract: every public route.
ROUTES = {
    ("/v1/embeddings", "post"),
    ("/v1/zero-shot-image-classification", "post"),
    ("/", "post"),
    ("/models/{model}", "post"),
    ("/healthz", "get"),
    ("/readyz", "get"),
    ("/metrics", "get"),
    ("/v1/classify", "post"),
    ("/v1/label-sets", "get"),
    ("/v1/shipped-label-sets", "get"),
    ("/v1/shipped-label-sets/{name}", "get"),
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
    ("/v1/label-sets/{name}/thresholds", "get"),
    ("/v1/label-sets/{name}/thresholds", "patch"),
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
    """Yield every object and list of the document with its JSON pointer."""
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


def test_the_description_uses_openapi_3_1_and_names_the_service(api):
    assert api["openapi"].startswith("3.1.")
    assert api["info"]["title"] == "Deixis"
    assert api["info"]["version"]


def test_every_reference_resolves(api):
    references = [(place, node["$ref"]) for place, node in parts(api) if isinstance(node, dict) and "$ref" in node]
    assert references
    for _, reference in references:
        assert isinstance(resolved(api, reference), dict), reference


def test_no_schema_contains_nested_definitions(api):
    assert [place for place, node in parts(api) if isinstance(node, dict) and "$defs" in node] == []


def test_exactly_the_public_routes_are_described(api):
    assert {(path, method) for path, method, _ in operations(api)} == ROUTES


def test_every_operation_has_a_unique_identifier_as_its_id(api):
    names = [operation["operationId"] for _, _, operation in operations(api)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert all(operation["summary"] and operation["description"] for _, _, operation in operations(api))


def test_every_path_parameter_is_described_and_required(api):
    for path, _, operation in operations(api):
        described = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"}
        assert described == set(re.findall(r"\{(\w+)\}", path))
        assert all(parameter["required"] for parameter in operation.get("parameters", []) if parameter["in"] == "path")


def test_every_error_is_described_as_a_problem(api):
    for path, method, operation in operations(api):
        responses = operation["responses"]
        errors = {status: error for status, error in responses.items() if status[0] in "45"}
        assert {"4XX", "5XX"} <= set(errors), (path, method)
        for status, error in errors.items():
            assert set(error["content"]) == {"application/problem+json"}, (path, method, status)
        assert any(status[0] == "2" for status in responses), (path, method)
    assert "HTTPValidationError" not in api["components"]["schemas"]
    assert {"type", "title", "status", "detail", "request_id"} <= set(
        api["components"]["schemas"]["Problem"]["properties"]
    )


def test_the_three_forms_of_a_classify_request_have_the_same_fields(api):
    body = api["paths"]["/v1/classify"]["post"]["requestBody"]
    assert body["required"]
    assert set(body["content"]) == {"multipart/form-data", "application/json", "image/*"}
    form = body["content"]["multipart/form-data"]["schema"]
    json_body = body["content"]["application/json"]["schema"]
    fields = {"labels", "label_set", "method", "model", "template", "top_k", "explain", "options"}
    fields |= {
        "reject_below",
        "false_rejection_rate",
        "multi_label",
        "reject",
        "coverage",
        "database",
        "group",
        "keep_features",
        "priors",
        "min_score",
    }
    assert set(form["properties"]) == fields | {"image"}
    assert set(json_body["properties"]) == fields | {"images"}
    assert form["properties"]["image"]["items"] == {"type": "string", "format": "binary"}
    assert set(json_body["properties"]["images"]["items"]["properties"]) == {"base64", "url", "id"}
    assert form["required"] == ["image"]
    assert json_body["required"] == ["images"]
    for schema in (form, json_body):
        assert schema["additionalProperties"] is False
        assert all(field["description"] for field in schema["properties"].values())


def test_the_fields_of_a_request_are_those_that_the_resolver_takes():
    resolved = {field.name for field in dataclasses.fields(ClassifyRequest)}
    assert set(ClassifyFields.model_fields) == resolved - {"namespace"}
    assert set(ClassifyBody.model_fields) == set(ClassifyFields.model_fields) | {"images"}


def test_the_maximum_length_of_lists_is_that_of_the_largest_setting(api):
    longest = {
        bound.le
        for name in ("max_labels", "max_classes", "max_images_per_request")
        for bound in Settings.model_fields[name].metadata
        if hasattr(bound, "le")
    }
    assert longest == {MAX_ITEMS}
    lists = {node["maxItems"] for _, node in parts(api) if isinstance(node, dict) and "maxItems" in node}
    assert lists == longest


def test_a_class_is_given_as_a_name_or_as_an_object(api):
    (classes,) = {
        json.dumps(api["components"]["schemas"][name]["properties"]["classes"]["items"])
        for name in ("ClassesBody", "LabelSetBody")
    }
    assert json.loads(classes) == {
        "anyOf": [{"type": "string", "maxLength": 10_000}, {"$ref": "#/components/schemas/ClassBody"}]
    }


def test_request_bodies_allow_no_additional_fields(api):
    for name in ("ClassesBody", "LabelSetBody", "ClassBody"):
        assert api["components"]["schemas"][name]["additionalProperties"] is False


def test_the_served_description_is_the_generated_one(client, api):
    assert client.get("/openapi.json").json() == json.loads(json.dumps(api))


def test_the_committed_description_is_up_to_date(api):
    """`make docs` writes it."""
    assert json.loads(COMMITTED.read_text("utf-8")) == json.loads(json.dumps(api))


def json_bodies(document):
    """Yield the path and the schema of every JSON body, with references resolved."""

    def resolved(schema):
        if isinstance(schema, list):
            return [resolved(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return resolved(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        return {name: resolved(each) for name, each in schema.items()}

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                yield method, path, resolved(content["application/json"]["schema"])


def objects_in(schema, place=()):
    """Yield every object of a schema that refuses unknown fields, and where it is in a body."""
    if schema.get("additionalProperties") is False:
        yield place, schema["properties"]
    for name, each in schema.get("properties", {}).items():
        yield from objects_in(each, (*place, name))
    if "items" in schema:
        yield from objects_in(schema["items"], (*place, 0))
    for branch in schema.get("anyOf", ()):
        yield from objects_in(branch, place)


def test_an_unknown_field_is_reported_with_the_fields_of_the_object_that_contains_it(shared_client, api):
    shared_client.put("/v1/label-sets/pets", json={"classes": ["cat"]})
    tried = set()
    for method, path, schema in json_bodies(api):
        for place, properties in objects_in(schema):
            misspelled = f"{max(properties, key=len)}x"
            body = {misspelled: None}
            for part in reversed(place):
                body = [body] if part == 0 else {part: body}
            answer = shared_client.request(method, path.replace("{name}", "pets"), json=body)
            field = ".".join(map(str, (*place, misspelled)))
            problems = {each["field"]: each["problem"] for each in problem_of(answer, "invalid-field")["errors"]}
            expected = f"unknown field; known: {', '.join(sorted(properties))}; did you mean '{misspelled[:-1]}'?"
            assert problems[field] == expected, (method, path)
            assert not any(re.search("constrained|list\\[|function", name) for name in problems), problems
            tried.add((path, place))
    assert len({path for path, _ in tried}) >= 12
    assert {("/v1/classify", ("images", 0)), ("/v1/zero-shot-image-classification", ("parameters",))} <= tried
    assert ("/v1/label-sets/{name}", ("classes", 0)) in tried


@pytest.mark.parametrize(
    ("path", "body", "field", "problem"),
    [
        ("/v1/classify", {"labels": ["a"], "image": "AAAA"}, "image", "did you mean 'images'?"),
        ("/v1/classify", {"label": ["a"], "images": []}, "label", "did you mean 'label"),
        ("/v1/embeddings", {"input": [[57668, 53901]]}, "input", "check_embedding_ctx_length=False"),
        ("/v1/embeddings", {"input": [1, 2]}, "input", "token ids"),
        ("/v1/embeddings", {"input": 3}, "input", "must be a string or a list of strings"),
        ("/v1/embeddings", {"input": ["a", 3]}, "input.1", "valid string"),
        ("/v1/embeddings", {"input": ""}, "input", "at least 1 character"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input.1", "at least 1 character"),
        ("/v1/embeddings", {"input": []}, "input", "at least 1 item"),
        ("/v1/classify", {"labels": ["a"], "images": ["AAAA"]}, "images.0", "object"),
        ("/v1/classify", {"labels": ["a"], "images": [], "{0}": 1}, "{0}", "unknown field; known: "),
        ("/v1/classify", {"labels": ["a"], "images": [], "body": 1}, "body", "unknown field; known: "),
    ],
)
def test_an_invalid_field_is_reported_by_its_own_name(shared_client, path, body, field, problem):
    problems = {each["field"]: each["problem"] for each in problem_of(shared_client.post(path, json=body))["errors"]}
    assert problem in problems[field]
    assert not any("[" in name or "constrained" in name for name in problems)
