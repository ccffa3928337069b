"""When a request is sent again, and what an answer that is none of ours is told as."""

import email.utils
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from deixis._calls import Call
from deixis.answers import Problem
from deixis.errors import ProblemError, UnreachableError

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
# The first of the waits where the service did not say how long; each next one is twice as long.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
# It was refused before anything was done.
_REFUSED_FOR_NOW = frozenset({429, 503})
# It may have been done.
_LOST = frozenset({502, 504})


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is sent again, and how long that waits.

    Args:
        most: tries after the first.
        max_wait_s: longer waits than this, as the service may ask for, are left to the caller.
    """

    most: int
    max_wait_s: float

    def after_answer(self, call: Call[Any], answer: httpx.Response, tries: int) -> float | None:
        """Return the seconds to wait after an answer, or None where it stands; ``tries`` were made."""
        is_passing = answer.status_code in _REFUSED_FOR_NOW or (answer.status_code in _LOST and call.repeatable)
        if tries > self.most or not is_passing:
            return None
        told_s = retry_after_s(answer)
        wait_s = _back_off_s(tries) if told_s is None else told_s * random.uniform(1, 1.25)  # noqa: S311
        return wait_s if wait_s <= self.max_wait_s else None

    def after_failure(self, call: Call[Any], error: httpx.TransportError, tries: int) -> float | None:
        """Return the seconds to wait where there was no answer, or None where it is not sent again."""
        was_not_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        return _back_off_s(tries) if tries <= self.most and (was_not_sent or call.repeatable) else None


def _back_off_s(tries: int) -> float:
    # Not all callers who lost the service at the same moment should come back at the same moment.
    return float(min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1))  # noqa: S311


def retry_after_s(answer: httpx.Response) -> float | None:
    """Return what the header says, in seconds from now; None where it says nothing that can be read."""
    told = answer.headers.get("retry-after", "").strip()
    if told.isascii() and told.isdecimal():
        return float(told[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def headers_of(api_key: str | None, namespace: str | None) -> dict[str, str]:
    """Return the headers of every request; key and namespace are those of the environment where they are None.

    Raises:
        ValueError: characters that no header can have.
    """
    key = os.environ.get("DEIXIS_API_KEY") if api_key is None else api_key
    own = os.environ.get("DEIXIS_NAMESPACE") if namespace is None else namespace
    headers = {"User-Agent": "deixis-python"}
    if key:
        headers["Authorization"] = f"Bearer {key.strip()}"
    if own:
        headers["Deixis-Namespace"] = own
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"the header {name} would have characters that none can have; use ASCII")
    return headers


def unreachable(url: httpx.URL, error: Exception) -> UnreachableError:
    """Return an error about an answer that did not come."""
    reason = str(error) or type(error).__name__
    return UnreachableError(f"no answer from {url}: {reason}; is the service running there?")


def refused(answer: httpx.Response) -> ProblemError:
    """Return an error about an answer that is a refusal."""
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValueError:
        # A proxy's page, or another service at that address.
        problem = Problem(
            type="about:blank",
            title=answer.reason_phrase or str(answer.status_code),
            status=answer.status_code,
            detail=f"{answer.request.url} answered {answer.status_code}, and not as Deixis does; is it one?",
        )
    return ProblemError(problem, retry_after_s(answer))


def not_ours(answer: httpx.Response) -> ProblemError:
    """Return an error about an answer that succeeded and cannot be read."""
    problem = Problem(
        type="about:blank",
        title="The answer cannot be read",
        status=answer.status_code,
        detail=f"what {answer.request.url} answered is not what this version of the client knows; is it Deixis?",
    )
    return ProblemError(problem)
