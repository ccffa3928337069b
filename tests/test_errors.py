import inspect
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import errors
from app.api.errors import problem_response
from app.api.problems import KINDS, kind_of, problem
from app.errors import DeixisError, FieldProblem, InvalidFieldError, OverloadedError, RateLimitedError, UnknownNameError

PROBLEMS_PAGE = Path(__file__).parents[1] / "docs" / "problems.md"

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, DeixisError)]
RAISED = [entry for entry in CLASSES if entry not in (DeixisError, errors.ClientError, errors.ServerError)]

# From the HTTP contract.
STATUSES = {
    "MalformedRequestError": 400,
    "UnauthenticatedError": 401,
    "ForbiddenError": 403,
    "CrossSiteError": 403,
    "MisdirectedRequestError": 421,
    "UnknownNameError": 404,
    "UnknownImageError": 404,
    "UnknownRouteError": 404,
    "MethodNotAllowedError": 405,
    "RequestTimeoutError": 408,
    "ConflictError": 409,
    "PreconditionFailedError": 412,
    "TooLargeError": 413,
    "BodyTooLargeError": 413,
    "ImageTooLargeError": 413,
    "NotAnImageError": 415,
    "UnsupportedMediaTypeError": 415,
    "InvalidFieldError": 422,
    "UnreachableImageError": 422,
    "RateLimitedError": 429,
    "HeadTooLargeError": 431,
    "OverloadedError": 503,
    "NotReadyError": 503,
    "NotConfiguredError": 501,
    "StatementRefusedError": 500,
    "StoreError": 503,
    "ModelUnavailableError": 503,
    "DeadlineExceededError": 504,
    "ConfigurationError": 500,
}


def one_of(error_class):
    """Return an instance, with arguments for every constructor."""
    if issubclass(error_class, InvalidFieldError):
        return error_class.of("labels", "is odd")
    if issubclass(error_class, UnknownNameError):
        return error_class("model", "clap", ["clip"])
    if issubclass(error_class, OverloadedError | RateLimitedError):
        return error_class("no room", retry_after_s=7)
    return error_class("it went wrong")


def drawn_tree():
    """Return the parent of each class in the tree of the module's docstring."""
    parents, above = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"([\s│├└─]*)(\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            del above[depth:]
            parents[found[2]] = above[-1] if above else None
            above.append(found[2])
    return parents


def test_the_docstring_shows_the_class_tree():
    assert drawn_tree() == {
        entry.__name__: None if entry is DeixisError else entry.__base__.__name__ for entry in CLASSES
    }


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_every_error_except_the_root_is_either_a_client_or_a_service_error(error_class):
    sides = [side for side in (errors.ClientError, errors.ServerError) if issubclass(error_class, side)]
    assert len(sides) == (0 if error_class is DeixisError else 1)


def test_the_table_of_the_contract_has_every_error_class():
    assert sorted(STATUSES) == sorted(item.__name__ for item in RAISED)


@pytest.mark.parametrize("error_class", RAISED, ids=lambda error_class: error_class.__name__)
def test_every_error_has_the_status_of_the_contract(error_class):
    kind = kind_of(one_of(error_class))
    assert kind.status == STATUSES[error_class.__name__]
    assert (kind.status >= 500) == issubclass(error_class, errors.ServerError)


def test_every_row_of_the_table_is_an_error_class_with_a_unique_slug():
    assert set(KINDS) <= set(CLASSES)
    slugs = [kind.slug for kind in KINDS.values()]
    assert len(set(slugs)) == len(slugs)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", slug) for slug in slugs)


def test_a_subclass_without_a_row_is_reported_as_its_parent():
    class Odd(errors.NotAnImageError):
        pass

    assert kind_of(Odd("odd")) is KINDS[errors.NotAnImageError]


@pytest.mark.parametrize("error_class", RAISED, ids=lambda error_class: error_class.__name__)
def test_a_problem_has_the_members_of_rfc_9457_and_a_request_id(error_class):
    error = one_of(error_class)
    members = problem(error)
    assert {"type", "title", "status", "detail", "request_id"} <= set(members)
    assert members["type"].startswith("urn:deixis:problem:")
    assert members["detail"] == error.message == str(error)
    assert ("errors" in members) == isinstance(error, InvalidFieldError)


@pytest.mark.parametrize("error_class", RAISED, ids=lambda error_class: error_class.__name__)
def test_temporary_errors_have_a_retry_after(error_class):
    response = problem_response(one_of(error_class))
    assert response.media_type == "application/problem+json"
    assert ("Retry-After" in response.headers) == (response.status_code in {429, 503, 504})


@pytest.mark.parametrize("error_class", [OverloadedError, RateLimitedError])
def test_an_explicit_retry_after_is_used(error_class):
    assert problem_response(error_class("full", retry_after_s=7)).headers["Retry-After"] == "7"


def test_a_missing_key_returns_the_authentication_scheme():
    assert problem_response(errors.UnauthenticatedError("no key")).headers["WWW-Authenticate"].startswith("Bearer")


def test_an_unknown_name_error_lists_at_most_twenty_known_names_sorted():
    assert UnknownNameError("model", "clap", ["b", "a"]).message == "unknown model 'clap'; known: a, b"
    assert UnknownNameError("model", "clap", []).message == "unknown model 'clap'; known: none"
    assert UnknownNameError("job", "1", way_out="look").message == "unknown job '1'; look"
    many = UnknownNameError("model", "clap", [f"{number:03}" for number in range(25)], way_out="or look").message
    assert many.endswith("018, 019 and 5 more; or look")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("pest", ["birds", "pets"], "pets"),
        ("ZLP", ["autoclip", "zlap"], "zlap"),
        ("vit-b-32/openai", ["ViT-B-16/openai", "ViT-B-32/openai"], "ViT-B-32/openai"),
        ("zebra", ["birds", "pets"], None),
        ("x" * 65, ["x" * 64], None),
        ("last", [*(f"{number:05}" for number in range(30)), "lasts"], "lasts"),
        ("pest", [*("a" * number for number in range(2000)), "pets"], None),
    ],
)
def test_an_unknown_name_error_suggests_the_most_similar_of_the_first_known_names(name, known, meant):
    message = UnknownNameError("model", name, known, way_out="or look").message
    assert message.endswith("or look" if meant is None else f"or look; did you mean '{meant}'?")


@given(st.lists(st.builds(FieldProblem, st.text(), st.text()), min_size=1, max_size=5))
def test_a_field_error_lists_every_problem(problems):
    error = InvalidFieldError(problems)
    assert all(item.field[:200] in error.message and item.problem in error.message for item in problems)
    assert error.problems == tuple(problems)


def test_every_problem_has_one_heading_in_the_documentation():
    headings = re.findall(r"^## `?([a-z-]+)`?\s*$", PROBLEMS_PAGE.read_text("utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(kind.slug for kind in KINDS.values())
