"""The client handles every failure of an endpoint, and does not disclose its key."""

import gzip
import json
import math
import random
import sys
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.api.problems import problem
from app.describing.chat import (
    ChatClient,
    ChatRefusedError,
    ChatUnavailableError,
    DescribingError,
    Estimate,
    _duration_s,
    _retry_after_s,
    estimate,
)
from app.errors import ConfigurationError
from tests.describing.chat_server import (
    MODEL,
    ChatServer,
    Step,
    answer_to,
    cut,
    failing,
    full,
    giving,
    malformed,
    ok,
    saying,
    slow,
    without_choices,
    without_text,
)

pytestmark = pytest.mark.anyio

KEY = "sk-Test/Key+1234567890"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    """The loopback server is reached directly, independent of the environment."""
    monkeypatch.setenv("no_proxy", "*")


class Time:
    """A clock that advances only during sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds


def client_of(server: ChatServer | str, time: Time | None = None, *, key: str | None = KEY, **changes) -> ChatClient:
    time = time or Time()
    url = server if isinstance(server, str) else server.url
    return ChatClient(url, key, "scripted", sleep=time.sleep, clock=time.clock, **changes)


async def completed(client: ChatClient, prompt: str = "What?", n: int = 1, **changes):
    fields = {"temperature": 0.5, "max_tokens": 50, "stop": None} | changes
    return await client.complete(prompt, n=n, **fields)


async def test_a_prompt_is_sent_by_the_protocol_and_its_answers_and_tokens_are_returned():
    with ChatServer() as server:
        async with client_of(server) as client:
            completion = await client.complete("How does it look?", n=3, temperature=0.99, max_tokens=50, stop=["."])

    (received,) = server.received
    assert received.headers["authorization"] == f"Bearer {KEY}"
    assert received.body == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "How does it look?"}],
        "n": 3,
        "temperature": 0.99,
        "max_tokens": 50,
        "stop": ["."],
    }
    assert completion.texts == tuple(answer_to("How does it look?", index) for index in range(3))
    assert completion.prompt_tokens == 4
    assert completion.completion_tokens == sum(len(text.split()) for text in completion.texts)
    assert completion.model == MODEL


@pytest.mark.parametrize("key", [None, "", " \n"])
async def test_without_a_key_and_stop_words_none_are_sent(key):
    with ChatServer() as server:
        async with client_of(server, key=key) as client:
            await completed(client)
    assert "authorization" not in server.received[0].headers
    assert "stop" not in server.received[0].body


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
async def test_common_endings_of_the_base_url_are_accepted(end):
    with ChatServer() as server:
        async with client_of(server.url + end) as client:
            await completed(client)
    assert server.received[0].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    "step",
    [
        full(),
        *(failing(status) for status in (408, 409, 500, 502, 503, 529)),
        cut(),
        malformed(),
        saying(b"<html>"),
        saying(b"[]"),
        saying(b"[" * 100_000),
        saying(b'{"choices": {"a": 1}}'),
        saying(b'{"choices": [1, {}, {"message": 1}]}'),
        saying(b'{"error": {"message": "upstream failed", "code": 502}}'),
        saying(b"\x1f\x8b not gzip", content_encoding="gzip"),
        without_choices(),
        without_text(),
    ],
    ids=lambda step: f"{step.status} {(step.body or b'cut')[:30]}",
)
async def test_a_temporary_error_is_retried(step):
    with ChatServer([step, step]) as server:
        async with client_of(server) as client:
            completion = await completed(client)
    assert completion.texts == (answer_to("What?", 0),)
    assert len(server.received) == 3


@pytest.mark.parametrize("step", [failing(500), full(), malformed()])
async def test_backoff_is_random_and_its_limit_doubles_up_to_30_seconds(step, monkeypatch):
    drawn = []

    def longest(least: float, most: float) -> float:
        drawn.append((least, most))
        return most

    monkeypatch.setattr(random, "uniform", longest)
    time = Time()
    with ChatServer(afterwards=step) as server:
        async with client_of(server, time, max_attempts=8) as client:
            with pytest.raises(ChatUnavailableError):
                await completed(client)
    assert len(server.received) == 8
    assert [item for item in drawn if item != (0, 1)] == [(0, most) for most in (2, 4, 8, 16, 30, 30)]
    assert all(least <= slept for least, slept in zip([1, 2, 4, 8, 16, 30, 30], time.sleeps, strict=False))


async def test_the_error_after_six_attempts_contains_the_last_failure():
    with ChatServer(afterwards=failing(500, "no cards left")) as server:
        async with client_of(server) as client:
            with pytest.raises(
                ChatUnavailableError, match=r"tried 6 times; .*500: no cards left; .*DEIXIS_LLM_BASE_URL"
            ):
                await completed(client)
    assert len(server.received) == 6


async def test_the_error_of_a_failed_connection_contains_the_url():
    with ChatServer() as server:
        url = server.url
    async with client_of(url, max_attempts=2) as client:
        with pytest.raises(ChatUnavailableError, match=rf"{url}/chat/.* 2 times; .*connection.*DEIXIS_LLM_BASE_URL"):
            await completed(client)


async def test_a_slow_server_is_a_timeout():
    with ChatServer([slow()]) as server:
        async with client_of(server, timeout_s=0.1, max_attempts=1) as client:
            with pytest.raises(ChatUnavailableError, match=r"tried once; .*no answer came within 0\.1 s"):
                await completed(client)
        async with client_of(server) as client:
            await completed(client)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            failing(401, "who are you"),
            r"refuses the key; it answered 401: who are you; set DEIXIS_LLM_API_KEY .*'scripted'",
        ),
        (failing(403), "403: .*DEIXIS_LLM_API_KEY"),
        (failing(402), "402: .*credit.*DEIXIS_LLM_API_KEY"),
        (failing(429, "exceeded", "insufficient_quota"), "429: exceeded; .*credit.*DEIXIS_LLM_API_KEY"),
        (failing(404, "no such model"), "'scripted'.*404: no such model; .*DEIXIS_LLM_MODEL.*DEIXIS_LLM_BASE_URL"),
        (failing(405), "405: .*DEIXIS_LLM_BASE_URL"),
        (failing(400, "max_tokens is unknown"), "400: max_tokens is unknown; .*DEIXIS_LLM_MODEL"),
        (failing(422), "422: .*DEIXIS_LLM_MODEL"),
        (
            saying(b"", 301, location="https://other.example/v1"),
            "redirects requests to 'https://other.example/v1'.*DEIXIS_LLM_BASE_URL",
        ),
        (saying(b'{"error": "in one string"}', 400), "400: in one string;"),
        (saying(b'{"detail": "in detail"}', 400), "400: in detail;"),
        (saying(b"in words\n\x1b[1m", 400, content_type="text/plain; charset=utf-8"), r"400: in words \[1m;"),
        (saying(b"<html>a page</html>", 400, content_type="text/html"), "400;"),
        (failing(400, "long " * 1000), r"400: long .{290,300}\.\.\.;"),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Step) else None,
)
async def test_a_permanent_error_is_raised_immediately_and_names_the_setting(step, message):
    with ChatServer([step]) as server:
        async with client_of(server) as client:
            with pytest.raises(ChatRefusedError, match=message) as caught:
                await completed(client)
    assert len(server.received) == 1
    assert caught.value.status == step.status
    assert isinstance(caught.value, DescribingError)


async def test_the_error_says_that_a_key_is_missing():
    with ChatServer(key=KEY) as server:
        async with client_of(server, key=None) as client:
            with pytest.raises(ChatRefusedError, match=r"requires a key; .*set DEIXIS_LLM_API_KEY"):
                await completed(client)


def test_every_error_has_an_http_status():
    for error in (ChatRefusedError("no", 401), ChatUnavailableError("later")):
        assert problem(error)["status"] >= 500


ECHOES = [
    failing(401, f"incorrect API key provided: {KEY}"),
    failing(400, "x" * 290 + KEY),
    failing(500, f"Bearer {KEY.upper()} is odd"),
    full(retry_after=KEY),
    saying(KEY.encode(), 403, content_type="text/plain"),
    saying(b"", 302, location=f"/login?key={httpx.QueryParams({'key': KEY})['key']}"),
    saying(b"", 302, location="/login?key=sk-Test%2FKey%2B1234567890"),
    saying(f'{{"error": {{"message": "{KEY}"}}}}'.encode()),
    saying(f"text {KEY}".encode()),
]


@pytest.mark.parametrize("step", ECHOES)
async def test_the_key_is_in_no_message_and_no_log_even_if_the_server_returns_it(step, caplog):
    caplog.set_level("INFO")
    with ChatServer(afterwards=step) as server, capture_logs() as logs:
        async with client_of(server, max_attempts=2) as client:
            with pytest.raises(DescribingError) as caught:
                await completed(client)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(logs) + repr(client)
    for secret in (KEY, "1234567890", KEY[:12]):
        assert secret.lower() not in shown.lower()
    assert KEY not in caplog.text


async def test_the_key_is_hidden_in_messages_of_the_http_library():
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError(f"illegal status line: {request.headers['authorization']}", request=request)

    with capture_logs() as logs:
        async with client_of("http://test/v1", transport=httpx.MockTransport(answer), max_attempts=2) as client:
            with pytest.raises(ChatUnavailableError, match=r"illegal status line: Bearer \[key\]") as caught:
                await completed(client)
    assert KEY not in "".join(traceback.format_exception(caught.value)) + str(logs)


@pytest.mark.parametrize("key", ["sk-12\n34", "sk-12 34", "sk-12\u2026", "sk-12\x00"])
def test_a_key_that_a_header_cannot_contain_is_rejected_and_not_shown(key):
    with pytest.raises(ConfigurationError, match="DEIXIS_LLM_API_KEY") as caught:
        ChatClient("http://test/v1", key, "scripted")
    assert "12" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.com/v1",
        "ftp://test/v1",
        "https://",
        "http://h:port/v1",
        "http://u:1234@h/v1",
        "http://h?k=1234",
    ],
)
def test_an_invalid_base_url_is_rejected_and_not_shown(url):
    with pytest.raises(ConfigurationError, match=r"DEIXIS_LLM_BASE_URL .*https://host/v1") as caught:
        ChatClient(url, None, "scripted")
    assert "1234" not in "".join(traceback.format_exception(caught.value))


def test_an_empty_model_is_rejected():
    with pytest.raises(ConfigurationError, match="DEIXIS_LLM_MODEL is empty"):
        ChatClient("http://test/v1", None, " ")


@pytest.mark.parametrize(("header", "least_s", "most_s"), [("7", 7, 8), ("0.5", 0.5, 1), ("100000", 120, 120)])
async def test_retry_after_is_obeyed_up_to_two_minutes(header, least_s, most_s):
    time = Time()
    with ChatServer([full(header)]) as server:
        async with client_of(server, time) as client:
            await completed(client)
    (slept,) = time.sleeps
    assert least_s <= slept <= most_s


async def test_retry_after_may_be_a_date():
    time = Time()
    with ChatServer([full(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))]) as server:
        async with client_of(server, time) as client:
            await completed(client)
    (slept,) = time.sleeps
    assert 40 <= slept <= 61


@pytest.mark.parametrize("header", ["0", "Wed, 21 Oct 2015 07:28:00 GMT", "", "soon", "-5"])
async def test_an_invalid_retry_after_gives_the_normal_backoff(header):
    time = Time()
    with ChatServer([full(header)]) as server:
        async with client_of(server, time) as client:
            await completed(client)
    assert len(time.sleeps) == 1
    assert time.sleeps[0] <= 2


async def test_retry_after_of_a_503_is_obeyed():
    time = Time()
    with ChatServer([failing(503, retry_after="9")]) as server:
        async with client_of(server, time) as client:
            await completed(client)
    assert 9 <= sum(time.sleeps) <= 10


async def test_retry_after_pauses_all_requests():
    """The second request starts after the first was rejected, and is sent after the pause."""
    time = Time()
    asleep, awake = [anyio.Event(), anyio.Event()], anyio.Event()

    async def sleep(seconds: float) -> None:
        asleep[len(time.sleeps)].set()
        time.sleeps.append(seconds)
        await awake.wait()
        time.now_s = max(time.now_s, seconds)

    with ChatServer([full("7")]) as server:
        async with (
            ChatClient(server.url, KEY, "scripted", sleep=sleep, clock=time.clock) as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(completed, client, "first")
            await asleep[0].wait()
            tasks.start_soon(completed, client, "second")
            await asleep[1].wait()
            assert server.prompts == ["first"]
            awake.set()
    assert sorted(server.prompts) == ["first", "first", "second"]
    assert all(7 <= slept <= 8 for slept in time.sleeps)


@pytest.mark.parametrize(("reset", "least_s"), [("1s", 1), ("120ms", 0.12), ("6m0s", 120), ("1m0.5s", 60.5)])
async def test_an_exhausted_rate_limit_pauses_the_next_request(reset, least_s):
    time = Time()
    last = ok(x_ratelimit_remaining_requests="0", x_ratelimit_reset_requests=reset)
    with ChatServer([last]) as server:
        async with client_of(server, time) as client:
            await completed(client)
            assert time.sleeps == []
            await completed(client)
    (slept,) = time.sleeps
    assert least_s <= slept <= least_s + min(1, least_s)


async def test_a_429_without_retry_after_waits_for_the_reset_of_the_rate_limit():
    time = Time()
    with ChatServer([full(x_ratelimit_remaining_requests="0", x_ratelimit_reset_requests="20s")]) as server:
        async with client_of(server, time) as client:
            await completed(client)
    assert 20 <= sum(time.sleeps) <= 21


@pytest.mark.parametrize(("remaining", "reset"), [("1", "1s"), ("0", ""), ("0", "soon"), ("0", "1s or so"), ("", "1s")])
async def test_rate_limits_that_are_not_exhausted_or_not_valid_do_not_pause(remaining, reset):
    time = Time()
    with ChatServer([ok(x_ratelimit_remaining_requests=remaining, x_ratelimit_reset_requests=reset)]) as server:
        async with client_of(server, time) as client:
            await completed(client)
            await completed(client)
    assert time.sleeps == []


@given(st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ ([A-Z]{3}|[+-]\d+)"))
def test_any_header_gives_a_pause_within_bounds_or_none(header):
    for seconds in (_retry_after_s(header), _duration_s(header)):
        assert seconds is None or 0 <= seconds <= 120


@pytest.mark.parametrize("at_most", [1, 2, 3])
async def test_missing_answers_are_requested_again(at_most):
    with ChatServer(afterwards=giving(at_most)) as server:
        async with client_of(server) as client:
            completion = await completed(client, n=5)
    assert len(completion.texts) == 5
    assert len(server.received) == math.ceil(5 / at_most)
    assert [item.body["n"] for item in server.received] == list(range(5, 0, -at_most))
    assert completion.prompt_tokens == len(server.received)


async def test_surplus_answers_are_dropped():
    body = (
        b'{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}], "usage": {"prompt_tokens": null}}'
    )
    with ChatServer([saying(body)]) as server:
        async with client_of(server) as client:
            completion = await completed(client)
    assert completion.texts == ("a",)
    assert (completion.prompt_tokens, completion.completion_tokens, completion.model) == (0, 0, "scripted")


async def test_a_choice_without_text_is_requested_again_and_the_others_are_kept():
    body = b'{"choices": [{"message": {"content": null}}, {"message": {"content": "kept"}}]}'
    with ChatServer([saying(body)]) as server:
        async with client_of(server) as client:
            completion = await completed(client, n=2)
    assert completion.texts == ("kept", answer_to("What?", 0))


@pytest.mark.parametrize("status", [200, 400, 503])
async def test_a_response_of_more_than_a_mebibyte_is_not_read_to_its_end(status):
    sent = 0

    async def long():
        nonlocal sent
        while sent < 2**26:
            sent += 2**16
            yield b" " * 2**16

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=long())

    async with client_of("http://chat", transport=httpx.MockTransport(answer), max_attempts=1) as client:
        with pytest.raises(ChatUnavailableError, match=r"more than 1,048,576 bytes; check that DEIXIS_LLM_BASE_URL"):
            await completed(client)
    assert sent < 2**21


async def test_a_compressed_response_is_not_requested_and_not_expanded():
    body = gzip.compress(b'{"choices": [{"message": {"content": "kept"}}]}')
    with ChatServer([saying(body, content_encoding="gzip")]) as server:
        async with client_of(server, max_attempts=1) as client:
            with pytest.raises(ChatUnavailableError, match="answered 200 compressed by 'gzip'"):
                await completed(client)
    assert server.received[0].headers["accept-encoding"] == "identity"


async def test_an_answer_has_only_what_both_databases_can_store():
    choice = {"message": {"content": "A cat\0 has \ud800 ears."}}
    usage = {"prompt_tokens": 10**30, "completion_tokens": 2**31}
    body = json.dumps({"choices": [choice], "model": "a\0\x1b\ud800\nb" + "c" * 1000, "usage": usage}).encode()
    with ChatServer([saying(body)]) as server:
        async with client_of(server) as client:
            completion = await completed(client)
    assert completion.texts == ("A cat has ? ears.",)
    assert completion.model == "a b" + "c" * 197
    assert (completion.prompt_tokens, completion.completion_tokens) == (0, 0)


@pytest.mark.parametrize("status", [400, 422])
async def test_after_a_rejection_of_several_answers_one_is_requested_at_a_time(status):
    with ChatServer([failing(status, "n must be 1")]) as server:
        async with client_of(server) as client:
            first, second = await completed(client, n=2), await completed(client, n=2)
    assert len(first.texts) == len(second.texts) == 2
    assert [item.body["n"] for item in server.received] == [2, 1, 1, 1, 1]


async def test_a_rejection_that_does_not_depend_on_the_number_of_answers_is_raised_immediately():
    with ChatServer(key="another") as server:
        async with client_of(server) as client:
            with pytest.raises(ChatRefusedError, match="DEIXIS_LLM_API_KEY"):
                await completed(client, n=10)
    assert len(server.received) == 1


async def test_a_rejection_of_a_single_answer_is_raised_and_the_next_request_asks_for_several():
    with ChatServer([failing(400), failing(400, "bad prompt")]) as server:
        async with client_of(server) as client:
            with pytest.raises(ChatRefusedError, match="bad prompt"):
                await completed(client, n=2)
            await completed(client, n=2)
    assert [item.body["n"] for item in server.received] == [2, 1, 2]


async def test_concurrency_limits_the_requests():
    under_way, most = 0, 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        under_way -= 1
        return httpx.Response(200, json={"choices": [{"message": {"content": "a"}}]})

    transport = httpx.MockTransport(answer)
    async with (
        client_of("http://test/v1", transport=transport, concurrency=3) as client,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(12):
            tasks.start_soon(completed, client)
    assert most == 3


async def test_many_concurrent_requests_are_all_answered():
    script = [full("1"), failing(500), cut(), malformed(), giving(1)] * 6
    prompts = [f"What is {number}?" for number in range(40)]
    found = {}

    async def ask(prompt: str) -> None:
        found[prompt] = await completed(client, prompt, n=2)

    with ChatServer(script) as server:
        async with client_of(server, concurrency=6, max_attempts=40) as client, anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(ask, prompt)
    assert {prompt: completion.texts[0] for prompt, completion in found.items()} == {
        prompt: answer_to(prompt, 0) for prompt in prompts
    }


async def test_a_cancelled_request_frees_its_slot():
    with ChatServer([slow()]) as server:
        async with client_of(server, concurrency=1) as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(completed, client, "abandoned")
                await anyio.to_thread.run_sync(server.received_one.wait)
                tasks.cancel_scope.cancel()
            completion = await completed(client, "next")
    assert completion.texts == (answer_to("next", 0),)


def test_an_estimate_assumes_one_answer_per_request():
    assert estimate(questions=30, n=10, prompt_chars=1200, max_tokens=50) == Estimate(
        requests=300, prompt_tokens=300 * 10 + 300 * 10, completion_tokens=15_000
    )
    assert estimate(0, 10, 0, 50) == Estimate(0, 0, 0)


async def test_a_run_stays_within_its_estimate():
    prompts = ["Describe what an owl looks like.", "How does a lynx look?"]
    expected = estimate(len(prompts), 3, sum(map(len, prompts)), 50)
    with ChatServer(afterwards=giving(1)) as server:
        async with client_of(server) as client:
            found = [await completed(client, prompt, n=3) for prompt in prompts]
    assert len(server.received) <= expected.requests
    assert sum(item.prompt_tokens for item in found) <= expected.prompt_tokens
    assert sum(item.completion_tokens for item in found) <= expected.completion_tokens


async def test_the_server_runs_as_a_process_and_logs_each_prompt(tmp_path):
    log_file = tmp_path / "prompts.log"
    command = [sys.executable, "-m", "tests.describing.chat_server", "--port", "0", "--log", log_file, "--key", KEY]
    async with await anyio.open_process(command, cwd=Path(__file__).parents[2], stderr=None) as process:
        try:
            url = (await process.stdout.receive()).decode().strip()
            async with client_of(url) as client:
                completion = await completed(client, "first\nline")
                await completed(client, "second")
            assert log_file.read_text("utf-8") == '"first\\nline"\n"second"\n'
        finally:
            process.kill()
    assert completion.texts == (answer_to("first\nline", 0),)
