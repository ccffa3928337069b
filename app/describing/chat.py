"""A client of any chat endpoint that speaks OpenAI's protocol, for many small requests that are allowed to take long.

What passes by itself (a full server, a lost connection, an answer that is not one) is tried again; what an operator has
to mend is told at once, with the setting to mend. The key is in no message, no log and no ``repr``.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote

import httpx
import structlog

from app.errors import ConfigurationError, ServerError

log = structlog.get_logger()

_LONGEST_PAUSE_S = 120
_LONGEST_BACKOFF_S = 30
_CONNECT_TIMEOUT_S = 10
_MAX_TOLD_CHARS = 300

_CHARS_PER_TOKEN = 4
_TOKENS_AROUND_A_PROMPT = 10  # what marks a message's beginning, its role and its end

_UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_SPANS = re.compile(r"(\d+(?:\.\d+)?)(ms|us|ns|[dhms])")


class DescribingError(ServerError):
    """The language model did not answer."""


class ChatRefusedError(DescribingError):
    """The endpoint refuses the request and would refuse it again; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ChatUnavailableError(DescribingError):
    """No try brought an answer; a later one may."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Answers to one prompt, and their tokens as the endpoint counted them, or 0 where it does not say.

    ``model`` is the endpoint's name for what answered, which may be more exact than the one that was asked for.
    """

    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The most that a run should take."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


def estimate(questions: int, n: int, prompt_chars: int, max_tokens: int) -> Estimate:
    """Return an upper bound on what a run takes if no request fails.

    It holds for endpoints that give one answer a request, whatever ``n``; others take ``n`` times fewer requests and
    prompt tokens. A token is taken for 4 characters, which fits English; some scripts take a token or more for each.

    Args:
        questions: prompts to send.
        n: answers wanted to each.
        prompt_chars: of all the prompts together.
        max_tokens: of one answer.
    """
    requests = questions * n
    prompt_tokens = -(-prompt_chars // _CHARS_PER_TOKEN) * n + requests * _TOKENS_AROUND_A_PROMPT
    return Estimate(requests, prompt_tokens, requests * max_tokens)


class ChatClient:
    """An endpoint, a model and a key; to be closed, as by ``async with``.

    A 429, or a failure with Retry-After, pauses every request of the client, since the limits are those of the key. So
    does an answer that says it was the last one allowed for now.

    Args:
        base_url: what comes before ``/chat/completions``, as in ``https://api.openai.com/v1``.
        api_key: None for an endpoint that takes none.
        model: the endpoint's name of it.
        timeout_s: of one try, from sending to the last byte.
        concurrency: requests under way at once.
        max_tries: of one request.
        transport: instead of the network; with it, the environment's proxies are not used.
        sleep: waits that many seconds.
        clock: seconds that go up, with any beginning.

    Raises:
        ConfigurationError: no such URL, key or model can be.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        *,
        timeout_s: float = 60,
        concurrency: int = 8,
        max_tries: int = 6,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert concurrency >= 1
        assert max_tries >= 1
        headers = _authorization(api_key)
        self._authorized = bool(headers)
        self._hide = _hiding(api_key)
        self._url = _endpoint(base_url)
        if not model.strip():
            raise ConfigurationError("DEIXIS_LLM_MODEL is empty; set it to a model that the endpoint lists")
        self.model = model
        self._timeout_s = timeout_s
        self._max_tries = max_tries
        self._sleep = sleep
        self._clock = clock
        self._slots = asyncio.Semaphore(concurrency)
        self._paused_until = clock()
        self._takes_n = True
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
        )

    def __repr__(self) -> str:
        return self._hide(f"ChatClient({self._url!r}, model={self.model!r})")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def complete(
        self, prompt: str, *, n: int, temperature: float, max_tokens: int, stop: Sequence[str] | None
    ) -> Completion:
        """Return exactly ``n`` answers to the prompt.

        An endpoint that gives fewer is asked again for the rest, at most ``n`` times in all; one that refuses to give
        several is asked for one at a time from then on.

        Raises:
            ChatRefusedError: the key, the model, the URL or a parameter is wrong.
            ChatUnavailableError: ``max_tries`` tries of one request failed; answers that came before are lost.
        """
        assert n >= 1
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if stop:
            body["stop"] = list(stop)
        answers: list[Completion] = []
        missing = n
        while missing > 0:
            answers.append(await self._some(body, missing))
            missing -= len(answers[-1].texts)
        return Completion(
            texts=tuple(text for answer in answers for text in answer.texts)[:n],
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
            model=answers[-1].model,
        )

    async def _some(self, body: dict[str, Any], wanted: int) -> Completion:
        """Return at least one answer."""
        if wanted > 1 and self._takes_n:
            try:
                return await self._persist({**body, "n": wanted})
            except ChatRefusedError as error:
                if error.status not in {400, 422}:
                    raise
            # Some servers refuse n > 1 always, others at temperature 0, each in its own words.
            answer = await self._persist({**body, "n": 1})
            self._takes_n = False
            return answer
        return await self._persist({**body, "n": 1})

    async def _persist(self, body: dict[str, Any]) -> Completion:
        """Try until there is an answer, the endpoint refuses, or the tries are used up."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._slots:
                    await self._out_of_pause()
                    return await self._try(body)
            except _PassingError as fault:
                if attempt == self._max_tries:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    # Without its causes, which quote what the server sent as it is.
                    raise ChatUnavailableError(
                        f"{self._hide(self._url)} was tried {times}; the last time {self._shown(fault.reason)};"
                        f" {fault.way_out}"
                    ) from None
                log.info("chat_retry", attempt=attempt, reason=self._shown(fault.reason))
                # Full jitter: requests that failed together should not come back together.
                backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, 2 ** (attempt - 1)))  # noqa: S311
                if fault.limited:
                    self._pause(fault.told_s or backoff_s)
                else:
                    await self._sleep(backoff_s)

    async def _try(self, body: dict[str, Any]) -> Completion:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.post(self._url, json=body)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _PassingError(
                f"no answer came within {self._timeout_s:g} s",
                "is DEIXIS_LLM_BASE_URL right, and is the server up to it?",
            ) from error
        except httpx.RequestError as error:
            raise _PassingError(
                f"the connection failed: {error or type(error).__name__}",
                "is DEIXIS_LLM_BASE_URL right, and is the server running?",
            ) from error
        status = response.status_code
        if response.is_success:
            last_one_s = _last_one_s(response)
            if last_one_s is not None:
                self._pause(last_one_s)
            return _completion(response, self.model)
        passes = status in {408, 409} or status >= 500 or (status == 429 and not _is_about_money(response))
        if not passes:
            self._refuse(response)
        told_s = _retry_after_s(response.headers.get("retry-after", ""))
        if told_s is None:
            told_s = _last_one_s(response)
        raise _PassingError(
            f"it answered {self._classified(response)}",
            "wait, send fewer requests at once, or raise the limits of DEIXIS_LLM_API_KEY"
            if status == 429
            else "wait, or set DEIXIS_LLM_BASE_URL to a server that works",
            limited=status == 429 or told_s is not None,
            told_s=told_s,
        )

    def _refuse(self, response: httpx.Response) -> NoReturn:
        """Say what has to be mended."""
        status = response.status_code
        if status in {401, 403} and not self._authorized:
            problem = "wants a key"
            way_out = "set DEIXIS_LLM_API_KEY"
        elif status in {401, 403}:
            problem = "refuses the key"
            way_out = f"set DEIXIS_LLM_API_KEY to one that may use '{self.model}'"
        elif status in {402, 429}:
            problem = "wants to be paid"
            way_out = "add credit to the account of DEIXIS_LLM_API_KEY, or set another"
        elif status == 404:
            problem = f"has no model '{self.model}', or is no chat endpoint"
            way_out = (
                "set DEIXIS_LLM_MODEL to a model it lists, and DEIXIS_LLM_BASE_URL to what precedes /chat/completions"
            )
        elif response.has_redirect_location:
            problem = f"sends requests on to '{response.headers['location']}'"
            way_out = "set DEIXIS_LLM_BASE_URL to where the server is"
        elif status == 405:
            problem = "is no chat endpoint"
            way_out = "set DEIXIS_LLM_BASE_URL to what precedes /chat/completions, often ending in /v1"
        else:
            problem = "refuses the request"
            way_out = f"does '{self.model}' take these parameters? if not, set DEIXIS_LLM_MODEL to another chat model"
        raise ChatRefusedError(
            f"{self._hide(self._url)} {self._shown(problem)}; it answered {self._classified(response)};"
            f" {self._shown(way_out)}",
            status,
        )

    def _classified(self, response: httpx.Response) -> str:
        told = self._shown(_told(response))
        return f"{response.status_code}: {told}" if told else str(response.status_code)

    def _shown(self, text: str) -> str:
        """Return what a server may have written, without the key, on one line and cut where it is long."""
        # Hidden before it is cut: half a key is still a secret.
        told = self._hide(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
        return told if len(told) <= _MAX_TOLD_CHARS else f"{told[:_MAX_TOLD_CHARS]}..."

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, _LONGEST_PAUSE_S))

    async def _out_of_pause(self) -> None:
        waited_until = None
        # Again only where the pause has become longer meanwhile; whether the sleep was long enough is not doubted.
        while waited_until != self._paused_until and (left_s := self._paused_until - self._clock()) > 0:
            waited_until = self._paused_until
            # Not all at the same moment, or most of them are refused once more.
            spread_s = random.uniform(0, min(1, left_s))  # noqa: S311
            await self._sleep(min(left_s + spread_s, _LONGEST_PAUSE_S))


class _PassingError(Exception):
    """What another try may not meet.

    Args:
        reason: what happened, as the end of "the last time ...".
        way_out: what to do if it stays.
        limited: the key has reached a limit, and all of its requests should wait.
        told_s: how long the endpoint wants to be left alone.
    """

    def __init__(self, reason: str, way_out: str, *, limited: bool = False, told_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.way_out = way_out
        self.limited = limited
        self.told_s = told_s


def _endpoint(base_url: str) -> str:
    rule = "write it as https://host/v1, without a key in it, and set DEIXIS_LLM_API_KEY to the key"
    # The value is not shown: it may hold a password, and the two settings may have been taken for each other.
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL is no URL; {rule}") from None
    if url.userinfo or url.query or url.fragment:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL has a user, a query or a fragment; {rule}")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL is no HTTP address; {rule}")
    before = str(url.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/chat/completions")
    return f"{before}/chat/completions"


def _authorization(api_key: str | None) -> dict[str, str]:
    key = (api_key or "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "DEIXIS_LLM_API_KEY holds a space or a character that a header cannot carry; copy the key once more"
        )
    return {"Authorization": f"Bearer {key}"}


def _hiding(api_key: str | None) -> Callable[[str], str]:
    """Return a function that replaces the key in a text, however it is spelled there."""
    key = (api_key or "").strip()
    if not key:
        return lambda text: text
    spellings = sorted({key, json.dumps(key)[1:-1], quote(key), quote(key, safe="")}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, spellings)), re.IGNORECASE)
    return lambda text: pattern.sub("[key]", text)


def _completion(response: httpx.Response, model: str) -> Completion:
    body = _json_object(response)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        told = _told(response) or ("without choices" if body else "not with a JSON object")
        raise _PassingError(
            f"it answered {response.status_code}, but {told}",
            "is DEIXIS_LLM_BASE_URL an OpenAI-compatible address, often ending in /v1?",
        )
    messages = [choice.get("message") for choice in choices if isinstance(choice, dict)]
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    texts = tuple(content for content in contents if isinstance(content, str))
    if not texts:
        raise _PassingError(
            f"it answered {response.status_code}, but without text",
            "a model that thinks first may have used up its tokens; allow more, or set DEIXIS_LLM_MODEL to another",
        )
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    answered_by = body.get("model")
    return Completion(
        texts=texts,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        model=answered_by if isinstance(answered_by, str) and answered_by else model,
    )


def _json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the body; empty where it is no object."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _count(told: object) -> int:
    return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else 0


def _told(response: httpx.Response) -> str:
    """Return the endpoint's own words for what is wrong; empty where it has none, or a whole page."""
    body = _json_object(response)
    error = body.get("error", body)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    if isinstance(error, str):
        return error
    return response.text if response.headers.get("content-type", "").startswith("text/plain") else ""


def _is_about_money(response: httpx.Response) -> bool:
    """Whether a 429 means that the credit is used up, which no waiting brings back."""
    error = _json_object(response).get("error")
    return isinstance(error, dict) and "insufficient_quota" in {str(error.get("code")), str(error.get("type"))}


def _retry_after_s(told: str) -> float | None:
    """Return the seconds of a Retry-After header, which may also be a date; None where it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", told.strip(), re.ASCII):
        return min(float(told), _LONGEST_PAUSE_S)
    try:
        date = parsedate_to_datetime(told)
        until = date if date.tzinfo else date.replace(tzinfo=UTC)
        return min(max((until - datetime.now(UTC)).total_seconds(), 0), _LONGEST_PAUSE_S)
    except (ValueError, OverflowError):
        return None


def _last_one_s(response: httpx.Response) -> float | None:
    """Return how long until requests are allowed again, where this was the last one."""
    if response.headers.get("x-ratelimit-remaining-requests", "").strip() != "0":
        return None
    return _span_s(response.headers.get("x-ratelimit-reset-requests", ""))


def _span_s(told: str) -> float | None:
    """Return the seconds of "1s", "6m0s", "120ms" or "1h2m3.5s"; None for anything else."""
    spans = _SPANS.findall(told)
    if not spans or "".join(number + unit for number, unit in spans) != told.strip():
        return None
    return min(sum(float(number) * _UNITS_S[unit] for number, unit in spans), _LONGEST_PAUSE_S)
