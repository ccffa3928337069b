"""Retries, and the errors for responses that are missing or not from Deixis."""

import email.utils
import json
import time

import httpx
import pytest

import deixis
from tests.conftest import picture

PROBLEM = {"type": "urn:deixis:problem:overloaded", "title": "Service overloaded", "status": 503, "detail": "later"}
ANSWER = {"model": "m", "label_set": None, "method": "zero-shot", "results": [], "timing_ms": {}}


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the client would have waited before each retry."""
    waits = []

    async def asleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("deixis._client.time.sleep", waits.append)
    monkeypatch.setattr("deixis._async_client.asyncio.sleep", asleep)
    return waits


@pytest.fixture
def answering(connect, slept):
    """A function that returns a client of a service with given responses, the last repeated, and its requests."""

    def make(*responses, **arguments):
        requests = []

        def handle(request):
            requests.append(request)
            response = responses[min(len(requests), len(responses)) - 1]
            if isinstance(response, Exception):
                raise response
            return response if isinstance(response, httpx.Response) else httpx.Response(200, json=response)

        return connect("http://service", transport=httpx.MockTransport(handle), **arguments), requests

    return make


def refusal(status=503, retry_after=None, **problem):
    headers = {"content-type": "application/problem+json"} | (
        {} if retry_after is None else {"Retry-After": retry_after}
    )
    return httpx.Response(status, content=json.dumps({**PROBLEM, "status": status, **problem}), headers=headers)


def ask(client):
    return client.classify(picture(), labels=["a", "b"])


@pytest.mark.parametrize("status", [429, 503])
def test_a_temporary_refusal_is_retried_after_the_time_it_names(answering, slept, status):
    client, requests = answering(refusal(status, "3"), refusal(status, "2"), ANSWER)
    assert ask(client).model == "m"
    assert len(requests) == 3
    assert 3 <= slept[0] <= 3.75
    assert 2 <= slept[1] <= 2.5
    assert requests[0].read() != b""
    assert len({request.read()[-200:].split(b"--")[0] for request in requests}) == 1  # every retry sends the whole body


def test_retry_after_may_be_a_date_and_other_values_are_ignored(answering, slept):
    at = email.utils.formatdate(time.time() + 10, usegmt=True)
    client, _ = answering(refusal(503, at), refusal(503, "soon"), refusal(503), refusal(503, "-5"), ANSWER)
    ask(client)
    assert 8 <= slept[0] <= 12.5
    assert all(0 < each <= 8 for each in slept[1:])
    assert slept[1] < 1


def test_waits_above_max_wait_s_and_retries_above_the_limit_raise_the_refusal(answering, slept):
    client, requests = answering(refusal(429, "3600"))
    with pytest.raises(deixis.ProblemError) as caught:
        ask(client)
    assert (len(requests), slept, caught.value.retry_after_s) == (1, [], 3600)
    client, requests = answering(refusal(503, "1"), retries=2)
    with pytest.raises(deixis.ProblemError, match="Service overloaded: later"):
        ask(client)
    assert len(requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 412, 413, 415, 422, 500, 501])
def test_a_permanent_refusal_is_not_retried(answering, status):
    client, requests = answering(refusal(status, "1"))
    with pytest.raises(deixis.ProblemError) as caught:
        ask(client)
    assert caught.value.status == status
    assert len(requests) == 1


@pytest.mark.parametrize("status", [502, 504])
def test_a_request_with_a_lost_response_is_retried_only_if_it_is_repeatable(answering, status):
    client, requests = answering(refusal(status), ANSWER)
    ask(client)
    assert len(requests) == 2
    client, requests = answering(refusal(status))
    with pytest.raises(deixis.ProblemError):
        client.label_sets.add_classes("x", ["a"])
    assert len(requests) == 1


def test_a_request_without_a_connection_is_always_retried(answering, slept):
    client, requests = answering(httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), {"label_sets": []})
    with pytest.raises(deixis.ProblemError, match="cannot be read"):
        client.label_sets.put("x", ["a"])
    assert len(requests) == 3
    assert len(slept) == 2
    client, requests = answering(httpx.ConnectError("refused"), retries=2)
    with pytest.raises(deixis.UnreachableError, match=r"http://service.*refused.*running"):
        client.label_sets.put("x", ["a"])
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ReadError(""), "the connection was closed before an answer"),
        (httpx.ReadTimeout(""), "it did not answer in time"),
        (httpx.ConnectTimeout(""), "the connection was not accepted in time"),
        (httpx.UnsupportedProtocol(""), "UnsupportedProtocol"),
    ],
)
def test_an_error_without_a_text_is_explained_in_words(answering, error, reason):
    client, _ = answering(error, connect_retries=0)
    with pytest.raises(deixis.UnreachableError, match=f"no response from http://service: {reason}; is the server"):
        ask(client)


def test_a_connection_that_breaks_during_a_change_is_an_error_at_once(answering):
    client, requests = answering(httpx.ReadError("reset"))
    with pytest.raises(deixis.UnreachableError, match="reset"):
        client.label_sets.add_classes("x", ["a"])
    assert len(requests) == 1
    client, requests = answering(httpx.ReadError("reset"), ANSWER)
    ask(client)
    assert len(requests) == 2


def test_without_connect_retries_a_missing_server_is_an_error_at_once_and_refusals_are_still_retried(answering):
    client, requests = answering(httpx.ConnectError("refused"), connect_retries=0)
    with pytest.raises(deixis.UnreachableError, match="refused"):
        ask(client)
    assert len(requests) == 1
    client, requests = answering(refusal(503, "1"), ANSWER, connect_retries=0)
    ask(client)
    assert len(requests) == 2


@pytest.mark.parametrize("error", [httpx.UnsupportedProtocol("no http://"), httpx.DecodingError("bad gzip")])
def test_a_failure_that_a_retry_cannot_mend_is_an_error_at_once(answering, error):
    client, requests = answering(error)
    with pytest.raises(deixis.UnreachableError, match=str(error)):
        ask(client)
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"<html>nginx</html>", r"http://service/v1/models answered 404 without the error body"),
        *((200, body, "is not one that") for body in (b"<html>", b"{}", b'{"models": 3}', b"[]")),
    ],
)
def test_responses_of_other_servers_are_errors_that_ask_whether_it_is_deixis(answering, status, body, message):
    client, _ = answering(httpx.Response(status, content=body))
    with pytest.raises(deixis.ProblemError, match=f"{message}.*is a Deixis server running there"):
        client.models()


def test_fields_of_newer_services_are_kept(answering):
    prediction = {"label": "a", "score": 1, "similarity": 1, "news": 3}
    client, _ = answering({**ANSWER, "results": [{"predictions": [prediction], "hint": "x"}], "extra": [1]})
    answer = ask(client)
    assert answer.results[0].label == "a"
    assert answer.model_extra == {"extra": [1]}


def test_key_and_namespace_are_arguments_or_environment_variables(answering, monkeypatch):
    client, requests = answering(ANSWER, api_key=" secret ", namespace="acme")
    ask(client)
    assert requests[0].headers["authorization"] == "Bearer secret"
    assert requests[0].headers["deixis-namespace"] == "acme"
    monkeypatch.setenv("DEIXIS_API_KEY", "other")
    client, requests = answering(ANSWER)
    ask(client)
    assert requests[0].headers["authorization"] == "Bearer other"
    assert "deixis-namespace" not in requests[0].headers
    client, requests = answering(ANSWER, api_key="")
    ask(client)
    assert "authorization" not in requests[0].headers
    for arguments, name in (({"api_key": "schlüssel"}, "DEIXIS_API_KEY"), ({"namespace": "é"}, "DEIXIS_NAMESPACE")):
        with pytest.raises(ValueError, match=f"{name}.*ASCII"):
            answering(ANSWER, **arguments)


def test_a_service_that_does_not_respond_is_not_ready(answering):
    client, requests = answering(httpx.ConnectError("refused"))
    assert client.is_ready() is False
    assert len(requests) == 1
    client, _ = answering(httpx.Response(503, json=PROBLEM))
    assert client.is_ready() is False


def test_a_client_is_closed_at_the_end_of_its_block():
    with deixis.Client("http://127.0.0.1:9", retries=0) as client, pytest.raises(deixis.UnreachableError):
        client.models()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()
