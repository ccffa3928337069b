"""What every refusal has in common."""

from app.api.problems import KINDS

STATUS_BY_TYPE = {f"urn:deixis:problem:{kind.slug}": kind.status for kind in KINDS.values()}


def problem_of(response, slug=None):
    """Return the members of a response's problem, after checking what every problem must have."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    members = response.json()
    assert members["status"] == response.status_code
    assert STATUS_BY_TYPE[members["type"]] == response.status_code
    assert members["request_id"] == response.headers["x-request-id"]
    assert members["title"]
    assert members["detail"]
    assert ("retry-after" in response.headers) == (response.status_code in {429, 503, 504})
    if slug is not None:
        assert members["type"] == f"urn:deixis:problem:{slug}", members
    return members


def fields_of(response):
    """Return the names of the fields that a 422 complains of."""
    return {each["field"] for each in problem_of(response, "invalid-field")["errors"]}
