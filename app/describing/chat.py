"""A client for chat endpoints with OpenAI's protocol, for many small requests.

Temporary errors (an overloaded server, a lost connection, an invalid response) are retried. Errors that the operator
must correct are raised at once, and name the setting. The API key is never in a message, a log or a ``repr``.
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

_MAX_PAUSE_S = 120
_MAX_BACKOFF_S = 30
_CONNECT_TIMEOUT_S = 10
_MAX_SHOWN_CHARS = 300
_MAX_RESPONSE_BYTES = 2**20
_MAX_MODEL_CHARS = 200
# More than a request can need; the database stores the sum of the counts of several requests in 31 bits.
_MAX_TOKENS = 10_000_000

_CHARS_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 10  # the start, the role and the end of a message

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
    """All attempts failed; a later one may succeed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answers to one prompt, with the endpoint's token counts (0 if it reports none).

    ``model`` is the model that the endpoint reports, whose name may be more exact than the requested one.
    """

    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """An upper bound on the requests and tokens of a run."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


def estimate(questions: int, n: int, prompt_chars: int, max_tokens: int) -> Estimate:
    """Return an upper bound on the requests and tokens of a run in which no request fails.

    It assumes one answer per request. An endpoint that supports ``n`` needs ``n`` times fewer requests and prompt
    tokens. It also assumes 4 characters per token, which fits English; in some scripts a character takes a token or
    more.

    Args:
        questions: the number of prompts.
        n: answers per prompt.
        prompt_chars: the length of all prompts together.
        max_tokens: the limit of one answer.
    """
    requests = questions * n
    prompt_tokens = -(-prompt_chars // _CHARS_PER_TOKEN) * n + requests * _TOKENS_PER_MESSAGE
    return Estimate(requests, prompt_tokens, requests * max_tokens)


class ChatClient:
    """A client for one endpoint, model and key. Close it, or use it in ``async with``.

    A response 429, or an error with Retry-After, pauses all requests of the client, because the limits belong to the
    key. So does a response whose headers say that no more requests are allowed at the moment.

    Args:
        base_url: the URL before ``/chat/completions``, as in ``https://api.openai.com/v1``.
        api_key: None for an endpoint without keys.
        model: the endpoint's name of the model.
        timeout_s: of one attempt, from sending to the last byte.
        concurrency: the largest number of concurrent requests.
        max_attempts: of one request.
        transport: replaces the network; the proxies of the environment are then not used.
        sleep: waits for a number of seconds.
        clock: a monotonic clock in seconds.

    Raises:
        ConfigurationError: the URL, the key or the model is invalid.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        model: str,
        *,
        timeout_s: float = 60,
        concurrency: int = 8,
        max_attempts: int = 6,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert concurrency >= 1
        assert max_attempts >= 1
        headers = _authorization(api_key)
        self._authorized = bool(headers)
        self._hide = _key_hider(api_key)
        self._url = _endpoint(base_url)
        if not model.strip():
            raise ConfigurationError("DEIXIS_LLM_MODEL is empty; set it to a model that the endpoint lists")
        self.model = model
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._clock = clock
        self._slots = asyncio.Semaphore(concurrency)
        self._paused_until = clock()
        self._supports_n = True
        self._http = httpx.AsyncClient(
            headers=headers | {"Accept-Encoding": "identity"},
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

        If the endpoint returns fewer answers, the rest is requested again, with at most ``n`` requests in all. If it
        refuses to return several answers, they are requested one at a time from then on.

        Raises:
            ChatRefusedError: the key, the model, the URL or a parameter is wrong.
            ChatUnavailableError: ``max_attempts`` attempts of one request failed; the other answers are lost.
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
            answers.append(await self._complete_some(body, missing))
            missing -= len(answers[-1].texts)
        return Completion(
            texts=tuple(text for answer in answers for text in answer.texts)[:n],
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
            model=answers[-1].model,
        )

    async def _complete_some(self, body: dict[str, Any], wanted: int) -> Completion:
        """Return at least one answer."""
        if wanted > 1 and self._supports_n:
            try:
                return await self._request_with_retries({**body, "n": wanted})
            except ChatRefusedError as error:
                if error.status not in {400, 422}:
                    raise
            # Some servers always refuse n > 1, others at temperature 0. Their messages differ.
            answer = await self._request_with_retries({**body, "n": 1})
            self._supports_n = False
            return answer
        return await self._request_with_retries({**body, "n": 1})

    async def _request_with_retries(self, body: dict[str, Any]) -> Completion:
        """Send the request until it is answered or refused, or ``max_attempts`` is reached."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._slots:
                    await self._wait_for_pause()
                    return await self._request(body)
            except _TemporaryError as fault:
                if attempt == self._max_attempts:
                    times = "once" if attempt == 1 else f"{attempt} times"
                    # Without its causes, which quote the server's text and so may contain the key.
                    raise ChatUnavailableError(
                        f"{self._hide(self._url)} was tried {times}; the last time {self._printable(fault.reason)};"
                        f" {fault.way_out}"
                    ) from None
                log.info("chat_retry", attempt=attempt, reason=self._printable(fault.reason))
                # Full jitter: requests that failed together should not be sent again together.
                backoff_s = random.uniform(0, min(_MAX_BACKOFF_S, 2 ** (attempt - 1)))  # noqa: S311
                if fault.is_limited:
                    self._pause(fault.retry_after_s or backoff_s)
                else:
                    await self._sleep(backoff_s)

    async def _request(self, body: dict[str, Any]) -> Completion:
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._post(body)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _TemporaryError(
                f"no answer came within {self._timeout_s:g} s",
                "check DEIXIS_LLM_BASE_URL and the load of the server",
            ) from error
        except httpx.RequestError as error:
            raise _TemporaryError(
                f"the connection failed: {error or type(error).__name__}",
                "check DEIXIS_LLM_BASE_URL, and that the server is running",
            ) from error
        status = response.status_code
        if response.is_success:
            limit_reset_s = _limit_reset_s(response)
            if limit_reset_s is not None:
                self._pause(limit_reset_s)
            return _completion(response, self.model)
        is_temporary = status in {408, 409} or status >= 500 or (status == 429 and not _is_credit_exhausted(response))
        if not is_temporary:
            self._refuse(response)
        retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
        if retry_after_s is None:
            retry_after_s = _limit_reset_s(response)
        raise _TemporaryError(
            f"it answered {self._status_and_message(response)}",
            "wait, or raise the limits of DEIXIS_LLM_API_KEY"
            if status == 429
            else "wait, or set DEIXIS_LLM_BASE_URL to a server that works",
            is_limited=status == 429 or retry_after_s is not None,
            retry_after_s=retry_after_s,
        )

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        """Send a request, and return the response with its body; the endpoint must not fill the memory."""
        async with self._http.stream("POST", self._url, json=body) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity":  # a few bytes may expand to any number
                raise _malformed(response, f"compressed by '{encoding}', which the request does not accept")
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > _MAX_RESPONSE_BYTES:
                    raise _malformed(response, f"with more than {_MAX_RESPONSE_BYTES:,} bytes")
        return httpx.Response(response.status_code, headers=response.headers, content=bytes(received))

    def _refuse(self, response: httpx.Response) -> NoReturn:
        """Raise the error that says what the operator must correct."""
        status = response.status_code
        if status in {401, 403} and not self._authorized:
            problem = "requires a key"
            way_out = "set DEIXIS_LLM_API_KEY"
        elif status in {401, 403}:
            problem = "refuses the key"
            way_out = f"set DEIXIS_LLM_API_KEY to one that may use '{self.model}'"
        elif status in {402, 429}:
            problem = "requires payment"
            way_out = "add credit to the account of DEIXIS_LLM_API_KEY, or set another"
        elif status == 404:
            problem = f"has no model '{self.model}', or is not a chat endpoint"
            way_out = (
                "set DEIXIS_LLM_MODEL to a model it lists, and DEIXIS_LLM_BASE_URL to the URL before /chat/completions"
            )
        elif response.has_redirect_location:
            problem = f"redirects requests to '{response.headers['location']}'"
            way_out = "set DEIXIS_LLM_BASE_URL to that server"
        elif status == 405:
            problem = "is not a chat endpoint"
            way_out = "set DEIXIS_LLM_BASE_URL to the URL before /chat/completions, often ending in /v1"
        else:
            problem = "refuses the request"
            way_out = f"if '{self.model}' does not support these parameters, set DEIXIS_LLM_MODEL to another chat model"
        raise ChatRefusedError(
            f"{self._hide(self._url)} {self._printable(problem)}; it answered {self._status_and_message(response)};"
            f" {self._printable(way_out)}",
            status,
        )

    def _status_and_message(self, response: httpx.Response) -> str:
        message = self._printable(_error_message(response))
        return f"{response.status_code}: {message}" if message else str(response.status_code)

    def _printable(self, text: str) -> str:
        """Return a server's text on one line, without the key, and shortened."""
        # The key is hidden before the text is cut, because half a key is still a secret.
        line = self._hide(_on_one_line(text))
        return line if len(line) <= _MAX_SHOWN_CHARS else f"{line[:_MAX_SHOWN_CHARS]}..."

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, self._clock() + min(seconds, _MAX_PAUSE_S))

    async def _wait_for_pause(self) -> None:
        waited_until = None
        # Waits again only if the pause was extended meanwhile; the sleep itself is trusted to be long enough.
        while waited_until != self._paused_until and (left_s := self._paused_until - self._clock()) > 0:
            waited_until = self._paused_until
            # Spread, because most requests that are sent at the same moment would be refused again.
            spread_s = random.uniform(0, min(1, left_s))  # noqa: S311
            await self._sleep(min(left_s + spread_s, _MAX_PAUSE_S))


class _TemporaryError(Exception):
    """An error that another attempt may not have.

    Args:
        reason: the error, as the end of "the last time ...".
        way_out: what to do if the error persists.
        is_limited: the key has reached a limit, and all its requests should wait.
        retry_after_s: the pause that the endpoint requests.
    """

    def __init__(
        self, reason: str, way_out: str, *, is_limited: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.way_out = way_out
        self.is_limited = is_limited
        self.retry_after_s = retry_after_s


def _malformed(response: httpx.Response, problem: str) -> _TemporaryError:
    way_out = "check that DEIXIS_LLM_BASE_URL is the URL of a chat endpoint"
    return _TemporaryError(f"it answered {response.status_code} {problem}", way_out)


def _endpoint(base_url: str) -> str:
    rule = "write it as https://host/v1, without a key in it, and set DEIXIS_LLM_API_KEY to the key"
    # The message does not show the value: it may contain a password, or be the key by mistake.
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL is not a URL; {rule}") from None
    if url.userinfo or url.query or url.fragment:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL has a user, a query or a fragment; {rule}")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigurationError(f"DEIXIS_LLM_BASE_URL is not an HTTP URL; {rule}")
    before = str(url.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/chat/completions")
    return f"{before}/chat/completions"


def _authorization(api_key: str | None) -> dict[str, str]:
    key = (api_key or "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "DEIXIS_LLM_API_KEY contains a space or a character that a header cannot contain; copy the key again"
        )
    return {"Authorization": f"Bearer {key}"}


def _key_hider(api_key: str | None) -> Callable[[str], str]:
    """Return a function that replaces the key in a text, also where it is escaped."""
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
        problem = _error_message(response) or ("without choices" if body else "not with a JSON object")
        raise _TemporaryError(
            f"it answered {response.status_code}, but {problem}",
            "check that DEIXIS_LLM_BASE_URL is an OpenAI-compatible URL, which often ends in /v1",
        )
    messages = [choice.get("message") for choice in choices if isinstance(choice, dict)]
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    texts = tuple(_storable(content) for content in contents if isinstance(content, str))
    if not texts:
        raise _TemporaryError(
            f"it answered {response.status_code}, but without text",
            "a reasoning model may have used all its tokens; set DEIXIS_LLM_MODEL to another model",
        )
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    answered_by = body.get("model")
    reported = _on_one_line(answered_by)[:_MAX_MODEL_CHARS] if isinstance(answered_by, str) else ""
    return Completion(
        texts=texts,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        model=reported or model,
    )


def _json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the body; empty if it is not a JSON object."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKENS else 0


def _storable(text: str) -> str:
    """Return an answer without the characters that a database refuses: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _on_one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _error_message(response: httpx.Response) -> str:
    """Return the endpoint's error message; empty if it has none, or sends a web page."""
    body = _json_object(response)
    error = body.get("error", body)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    if isinstance(error, str):
        return error
    return response.text if response.headers.get("content-type", "").startswith("text/plain") else ""


def _is_credit_exhausted(response: httpx.Response) -> bool:
    """Return whether a 429 means that the credit is used up, so that waiting does not help."""
    error = _json_object(response).get("error")
    return isinstance(error, dict) and "insufficient_quota" in {str(error.get("code")), str(error.get("type"))}


def _retry_after_s(header: str) -> float | None:
    """Return the seconds of a Retry-After header, which may be a number or a date; None if it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip(), re.ASCII):
        return min(float(header), _MAX_PAUSE_S)
    try:
        date = parsedate_to_datetime(header)
        until = date if date.tzinfo else date.replace(tzinfo=UTC)
        return min(max((until - datetime.now(UTC)).total_seconds(), 0), _MAX_PAUSE_S)
    except (ValueError, OverflowError):
        return None


def _limit_reset_s(response: httpx.Response) -> float | None:
    """Return the seconds until requests are allowed again if this was the last one; None if it was not."""
    if response.headers.get("x-ratelimit-remaining-requests", "").strip() != "0":
        return None
    return _duration_s(response.headers.get("x-ratelimit-reset-requests", ""))


def _duration_s(header: str) -> float | None:
    """Return the seconds of "1s", "6m0s", "120ms" or "1h2m3.5s"; None for any other text."""
    spans = _SPANS.findall(header)
    if not spans or "".join(number + unit for number, unit in spans) != header.strip():
        return None
    return min(sum(float(number) * _UNITS_S[unit] for number, unit in spans), _MAX_PAUSE_S)
