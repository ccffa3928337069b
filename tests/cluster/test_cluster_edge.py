"""What an edge adds to the application."""

import pytest
from ray.exceptions import TaskCancelledError

from app.cluster.edge import CallersWhoLeft

pytestmark = pytest.mark.anyio


async def test_a_caller_who_left_is_one_who_disconnected():
    seen = []
    messages = [{"type": "http.request", "body": b"half", "more_body": True}]

    async def app(_, receive, __):
        seen.extend([await receive(), await receive()])

    async def receive():
        if messages:
            return messages.pop()
        raise TaskCancelledError

    await CallersWhoLeft(app)({"type": "http"}, receive, None)
    assert seen == [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
