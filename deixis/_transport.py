"""Retries, request headers, and the errors for responses that are missing or not from Deixis."""

import email.utils
import os
import random
import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx

from deixis._calls import Call
from deixis.answers import Problem
from deixis.errors import ProblemError, UnreachableError

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
# The backoff if the service names no time: the first wait, doubled after each try up to the longest.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
# The service refused the request before it did any work.
_REFUSED_FOR_NOW = frozenset({429, 503})
# The service may have done the work although its response was lost.
_LOST = frozenset({502, 504})
# Of errors that httpx raises without a text.
_REASONS = MappingProxyType(
    {
        httpx.ConnectTimeout: "the connection was not accepted in time",
        httpx.TimeoutException: "it did not answer in time",
        httpx.NetworkError: "the connection was closed before an answer",
    }
)


@dataclass(frozen=True, slots=True)
class Retries:
    """When a request is sent again, and after how many seconds.

    Args:
        max_retries: retries after responses that refuse a request for now.
        max_connect_retries: retries after failures without a response.
        max_wait_s: if the service asks for a longer wait than this, its refusal is raised at once.
    """

    max_retries: int
    max_connect_retries: int
    max_wait_s: float

    def after_response(self, call: Call[Any], response: httpx.Response, tries: int) -> float | None:
        """Return the seconds to wait before the next try, or None if the response is final."""
        is_passing = response.status_code in _REFUSED_FOR_NOW or (response.status_code in _LOST and call.repeatable)
        if tries > self.max_retries or not is_passing:
            return None
        asked_s = retry_after_s(response)
        wait_s = _backoff_s(tries) if asked_s is None else asked_s * random.uniform(1, 1.25)  # noqa: S311
        return wait_s if wait_s <= self.max_wait_s else None

    def after_failure(self, call: Call[Any], error: httpx.RequestError, tries: int) -> float | None:
        """Return the seconds to wait before the next try, or None if the request is not sent again."""
        was_not_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        was_lost = isinstance(
            error, httpx.NetworkError | httpx.TimeoutException | httpx.ProxyError | httpx.RemoteProtocolError
        )
        is_passing = was_not_sent or (was_lost and call.repeatable)
        return _backoff_s(tries) if tries <= self.max_connect_retries and is_passing else None


def _backoff_s(tries: int) -> float:
    # Random, so that clients that lost the service at the same moment do not all return at the same moment.
    return float(min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1))  # noqa: S311


def retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds of the header ``Retry-After``, given as a number or a date; None if it cannot be read."""
    header = response.headers.get("retry-after", "").strip()
    if header.isascii() and header.isdecimal():
        return float(header[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def request_headers(api_key: str | None, namespace: str | None) -> dict[str, str]:
    """Return the headers of every request; arguments that are None are read from the environment.

    Raises:
        ValueError: a value has characters that a header cannot carry.
    """
    key = os.environ.get("DEIXIS_API_KEY") if api_key is None else api_key
    space = os.environ.get("DEIXIS_NAMESPACE") if namespace is None else namespace
    for name, value in (("the API key (DEIXIS_API_KEY)", key), ("the namespace (DEIXIS_NAMESPACE)", space)):
        if value and not (value.strip().isascii() and value.strip().isprintable()):
            raise ValueError(f"{name} has characters that an HTTP header cannot carry; use ASCII")
    headers = {"User-Agent": "deixis-python"}
    if key:
        headers["Authorization"] = f"Bearer {key.strip()}"
    if space:
        headers["Deixis-Namespace"] = space.strip()
    return headers


def unreachable(url: httpx.URL, error: Exception) -> UnreachableError:
    """Return the error for a request without a response."""
    known = (reason for kind, reason in _REASONS.items() if isinstance(error, kind))
    reason = str(error) or next(known, type(error).__name__)
    return UnreachableError(f"no response from {url}: {reason}; is the server running?")


def refused(response: httpx.Response) -> ProblemError:
    """Return the error for a response with a status of 400 or above."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:
        # The page of a proxy, or another service at that address.
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase or str(response.status_code),
            status=response.status_code,
            detail=f"{response.request.url} answered {response.status_code} without the error body of Deixis; is a"
            " Deixis server running there?",
        )
    return ProblemError(problem, retry_after_s(response))


def unexpected_body(response: httpx.Response) -> ProblemError:
    """Return the error for a successful response whose body cannot be parsed."""
    problem = Problem(
        type="about:blank",
        title="The response cannot be read",
        status=response.status_code,
        detail=f"the body of {response.request.url} is not one that this version of the client knows; is a Deixis"
        " server running there?",
    )
    return ProblemError(problem)
