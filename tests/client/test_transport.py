"""When a request is sent again, and when it is not."""

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
    """The seconds that a client would have waited."""
    waits = []

    async def asleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("deixis._client.time.sleep", waits.append)
    monkeypatch.setattr("deixis._async_client.asyncio.sleep", asleep)
    return waits


@pytest.fixture
def answering(connect, slept):
    """Makes a client whose service answers one thing after another, the last for ever; and the requests it got."""

    def make(*answers, **more):
        got = []

        def handle(request):
            got.append(request)
            answer = answers[min(len(got), len(answers)) - 1]
            if isinstance(answer, Exception):
                raise answer
            return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

        return connect("http://service", transport=httpx.MockTransport(handle), **more), got

    return make


def refusal(status=503, retry_after=None, **problem):
    headers = {"content-type": "application/problem+json"} | (
        {} if retry_after is None else {"Retry-After": retry_after}
    )
    return httpx.Response(status, content=json.dumps({**PROBLEM, "status": status, **problem}), headers=headers)


def ask(client):
    return client.classify(picture(), labels=["a", "b"])


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_for_now_is_waited_out_as_it_says(answering, slept, status):
    client, got = answering(refusal(status, "3"), refusal(status, "2"), ANSWER)
    assert ask(client).model == "m"
    assert len(got) == 3
    assert 3 <= slept[0] <= 3.75
    assert 2 <= slept[1] <= 2.5
    assert got[0].read() != b""
    assert len({request.read()[-200:].split(b"--")[0] for request in got}) == 1  # the body is sent whole each time


def test_a_date_to_wait_for_is_understood_and_nonsense_is_a_guess(answering, slept):
    at = email.utils.formatdate(time.time() + 10, usegmt=True)
    client, _ = answering(refusal(503, at), refusal(503, "soon"), refusal(503), refusal(503, "-5"), ANSWER)
    ask(client)
    assert 8 <= slept[0] <= 12.5
    assert all(0 < each <= 8 for each in slept[1:])
    assert slept[1] < 1


def test_longer_waits_than_allowed_and_more_of_them_are_left_to_the_caller(answering, slept):
    client, got = answering(refusal(429, "3600"))
    with pytest.raises(deixis.ProblemError) as caught:
        ask(client)
    assert (len(got), slept, caught.value.retry_after_s) == (1, [], 3600)
    client, got = answering(refusal(503, "1"), retries=2)
    with pytest.raises(deixis.ProblemError, match="Service overloaded: later"):
        ask(client)
    assert len(got) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 412, 413, 415, 422, 500, 501])
def test_what_will_not_change_is_not_asked_again(answering, status):
    client, got = answering(refusal(status, "1"))
    with pytest.raises(deixis.ProblemError) as caught:
        ask(client)
    assert caught.value.status == status
    assert len(got) == 1


@pytest.mark.parametrize("status", [502, 504])
def test_a_lost_answer_is_asked_for_again_only_where_twice_is_as_good_as_once(answering, status):
    client, got = answering(refusal(status), ANSWER)
    ask(client)
    assert len(got) == 2
    client, got = answering(refusal(status))
    with pytest.raises(deixis.ProblemError):
        client.label_sets.add_classes("x", ["a"])
    assert len(got) == 1


def test_no_connection_is_tried_again_whatever_was_asked(answering, slept):
    client, got = answering(httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), {"label_sets": []})
    with pytest.raises(deixis.ProblemError, match="cannot be read"):
        client.label_sets.put("x", ["a"])
    assert len(got) == 3
    assert len(slept) == 2
    client, got = answering(httpx.ConnectError("refused"), retries=2)
    with pytest.raises(deixis.UnreachableError, match=r"http://service.*refused.*running"):
        client.label_sets.put("x", ["a"])
    assert len(got) == 3


def test_a_connection_that_breaks_under_a_change_is_told_at_once(answering):
    client, got = answering(httpx.ReadError("reset"))
    with pytest.raises(deixis.UnreachableError, match="reset"):
        client.label_sets.add_classes("x", ["a"])
    assert len(got) == 1
    client, got = answering(httpx.ReadError("reset"), ANSWER)
    ask(client)
    assert len(got) == 2


def test_answers_of_others_are_told_as_such(answering):
    client, _ = answering(httpx.Response(404, text="<html>nginx</html>"))
    with pytest.raises(deixis.ProblemError, match=r"http://service/v1/models answered 404.*is it one"):
        client.models()
    for body in (b"<html>", b"{}", b'{"models": 3}', b"[]"):
        client, _ = answering(httpx.Response(200, content=body))
        with pytest.raises(deixis.ProblemError, match="is it Deixis"):
            client.models()


def test_newer_services_may_answer_more(answering):
    prediction = {"label": "a", "score": 1, "similarity": 1, "news": 3}
    client, _ = answering({**ANSWER, "results": [{"predictions": [prediction], "hint": "x"}], "extra": [1]})
    answer = ask(client)
    assert answer.results[0].label == "a"
    assert answer.model_extra == {"extra": [1]}


def test_key_and_namespace_are_shown_and_come_from_the_environment_too(answering, monkeypatch):
    client, got = answering(ANSWER, api_key=" secret ", namespace="acme")
    ask(client)
    assert got[0].headers["authorization"] == "Bearer secret"
    assert got[0].headers["deixis-namespace"] == "acme"
    monkeypatch.setenv("DEIXIS_API_KEY", "other")
    client, got = answering(ANSWER)
    ask(client)
    assert got[0].headers["authorization"] == "Bearer other"
    assert "deixis-namespace" not in got[0].headers
    client, got = answering(ANSWER, api_key="")
    ask(client)
    assert "authorization" not in got[0].headers
    with pytest.raises(ValueError, match="ASCII"):
        answering(ANSWER, api_key="schlüssel")


def test_a_service_that_is_not_there_is_not_ready(answering):
    client, got = answering(httpx.ConnectError("refused"))
    assert client.is_ready() is False
    assert len(got) == 1
    client, _ = answering(httpx.Response(503, json=PROBLEM))
    assert client.is_ready() is False


def test_clients_end_with_their_block():
    with deixis.Client("http://127.0.0.1:9", retries=0) as client, pytest.raises(deixis.UnreachableError):
        client.models()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()
