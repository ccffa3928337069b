"""What an edge adds to the application."""

from types import SimpleNamespace

import pytest
from ray.exceptions import TaskCancelledError

from app.cluster import edge
from app.cluster.edge import DisconnectMiddleware, Edge
from app.cluster.messages import RemoteModelInfo, deployment_version
from app.encoders.fake import FakeEncoder
from app.errors import NotReadyError
from app.settings import Settings

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

    await DisconnectMiddleware(app)({"type": "http"}, receive, None)
    assert seen == [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]


class Encoders:
    """A deployment's handle, whose replicas tell one card after the other, the last one for ever."""

    def __init__(self, *versions):
        self.cards = [RemoteModelInfo.of(FakeEncoder("fake"), version) for version in versions]
        self.card = self
        self.asked = 0

    def remote(self, _):
        self.asked += 1
        return SimpleNamespace(result=lambda: self.cards.pop(0) if len(self.cards) > 1 else self.cards[0])


def test_an_edge_begins_with_what_encoders_tell_that_were_deployed_with_it(monkeypatch):
    monkeypatch.setattr(edge, "_ASKED_AGAIN_AFTER_S", 0.0)
    settings = Settings(models=["embedded"])
    before, own = "of before", deployment_version(settings)
    encoders = Encoders(before, before, own)
    (card,) = Edge(settings, {"embedded": encoders}, [])._cards(settings)
    assert (card.version, encoders.asked) == (own, 3)


def test_an_edge_that_waits_long_makes_room_for_the_encoders_that_it_waits_for(monkeypatch):
    monkeypatch.setattr(edge, "_ASKED_AGAIN_AFTER_S", 0.0)
    monkeypatch.setattr(edge, "_WAITED_FOR_S", 0.05)
    with pytest.raises(NotReadyError, match=r"no encoder of embedded was replaced within 0.05 s; is there room\?"):
        Edge(Settings(models=["embedded"]), {"embedded": Encoders("of before")}, [])._cards(
            Settings(models=["embedded"])
        )


async def test_an_edge_that_knows_weights_which_nobody_has_any_more_is_replaced():
    here = Edge(Settings(models=["embedded"]), {"embedded": Encoders("")}, [])
    here._towers = [SimpleNamespace(is_outdated=False)]
    await here.check_health()
    here._towers[0].is_outdated = True
    with pytest.raises(RuntimeError, match="other weights"):
        await here.check_health()


def test_where_encoders_share_models_no_edge_tries_those_that_nobody_asks_for():
    class Shared(Encoders):
        def options(self, *, multiplexed_model_id):
            return self

    assert Edge(Settings(models=["embedded"]), {"embedded": Encoders("")}, [])._settings.health_probe_s > 0
    shared = Edge(Settings(models=["embedded"], ray_layout={"models_per_encoder": 1}), {"embedded": Shared("")}, [])
    assert shared._settings.health_probe_s == 0
    assert shared._version == deployment_version(Settings(models=["embedded"], ray_layout={"models_per_encoder": 1}))
