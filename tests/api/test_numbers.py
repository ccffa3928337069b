"""Numbers in request bodies: a boolean is none, and the message shows what was given."""

import json
from importlib import import_module
from pkgutil import iter_modules

import pytest
from pydantic import ValidationError

import app.api.schemas
from app.api.schemas._base import Request
from tests.api.problems import problem_of

for _module in iter_modules(app.api.schemas.__path__):
    import_module(f"app.api.schemas.{_module.name}")


def bodies(kind=Request):
    for each in kind.__subclasses__():
        yield each
        yield from bodies(each)


def number_fields():
    """Every field of a request body that has numbers, by OpenAPI's description, and a boolean in its place."""
    for kind in bodies():
        for name, field in kind.model_json_schema()["properties"].items():
            for form in field.get("anyOf", [field]):
                inner = form.get("items") or form.get("additionalProperties") or form
                if inner.get("type") in {"number", "integer"}:
                    value = {"array": [True], "object": {"x": True}}.get(form["type"], True)
                    yield pytest.param(kind, name, value, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize(("kind", "name", "value"), list(number_fields()))
def test_a_boolean_is_not_a_number(kind, name, value):
    with pytest.raises(ValidationError) as raised:
        kind.model_validate_json(json.dumps({name: value}))
    messages = [each["msg"] for each in raised.value.errors() if each["loc"][0] == name]
    assert messages == ["Input should be a number; given: true"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"classes": [{"name": "a", "threshold": True}]}, "classes.0.threshold: Input should be a number; given: true"),
        ({"classes": [{"name": "a", "threshold": 7}]}, "less than or equal to 1; given: 7"),
        ({"classes": [{"name": "a", "threshold": "high"}]}, "unable to parse string as a number; given: 'high'"),
        ({"classes": [{"name": "a", "threshold": [0.5]}]}, "should be a valid number; given: a list"),
        ({"classes": ["a", "b"], "priors": {"a": 1, "b": False}}, "priors.b: Input should be a number; given: false"),
        ({"classes": ["a"], "merge_synonyms": "all"}, "should be 'max' or 'mean'; given: 'all'"),
    ],
)
def test_a_message_about_a_value_shows_it(shared_client, body, problem):
    reply = shared_client.put("/v1/label-sets/numbers", json=body)
    assert problem in problem_of(reply, "invalid-field")["detail"]


def test_a_message_about_a_query_field_shows_its_value(shared_client):
    reply = shared_client.get("/v1/label-sets", params={"limit": "all"})
    assert "limit: Input should be a valid integer, unable to parse string as an integer; given: 'all'" in reply.text
    refused = shared_client.post("/v1/embeddings", json={"input": "cat", "dimensions": 10**400})
    problem_of(refused, "invalid-field")
