"""The edge: disconnects, and encoders of the same deployment."""

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


async def test_a_cancelled_task_is_reported_as_a_disconnect():
    received = []
    messages = [{"type": "http.request", "body": b"half", "more_body": True}]

    async def app(_, receive, __):
        received.extend([await receive(), await receive()])

    async def receive():
        if messages:
            return messages.pop()
        raise TaskCancelledError

    await DisconnectMiddleware(app)({"type": "http"}, receive, None)
    assert received == [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]


class Encoders:
    """A deployment handle that returns the models of several deployments in turn, and then the last one."""

    def __init__(self, *versions):
        self.infos = [RemoteModelInfo.of(FakeEncoder("fake"), version) for version in versions]
        self.model_info = self
        self.calls = 0

    def remote(self, _):
        self.calls += 1
        return SimpleNamespace(result=lambda: self.infos.pop(0) if len(self.infos) > 1 else self.infos[0])


def test_an_edge_waits_for_the_encoders_of_its_deployment(monkeypatch):
    monkeypatch.setattr(edge, "_POLL_INTERVAL_S", 0.0)
    settings = Settings(models=["embedded"])
    before, own = "earlier", deployment_version(settings)
    encoders = Encoders(before, before, own)
    (info,) = Edge(settings, {"embedded": encoders}, [])._model_infos(settings)
    assert (info.version, encoders.calls) == (own, 3)


def test_an_edge_stops_if_no_encoder_of_its_deployment_starts(monkeypatch):
    monkeypatch.setattr(edge, "_POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(edge, "_ENCODER_TIMEOUT_S", 0.05)
    with pytest.raises(
        NotReadyError, match=r"no encoder of embedded was replaced within 0\.05 s; the cluster may not have room"
    ):
        Edge(Settings(models=["embedded"]), {"embedded": Encoders("earlier")}, [])._model_infos(
            Settings(models=["embedded"])
        )


async def test_an_edge_is_unhealthy_if_no_encoder_has_the_weights_that_it_knows():
    outdated = Edge(Settings(models=["embedded"]), {"embedded": Encoders("")}, [])
    outdated._towers = [SimpleNamespace(is_outdated=False)]
    await outdated.check_health()
    outdated._towers[0].is_outdated = True
    with pytest.raises(RuntimeError, match="other weights"):
        await outdated.check_health()


def test_an_edge_does_not_probe_models_of_shared_encoders():
    class Shared(Encoders):
        def options(self, *, multiplexed_model_id):
            return self

    assert Edge(Settings(models=["embedded"]), {"embedded": Encoders("")}, [])._settings.health_probe_s > 0
    shared = Edge(Settings(models=["embedded"], ray_layout={"models_per_encoder": 1}), {"embedded": Shared("")}, [])
    assert shared._settings.health_probe_s == 0
    assert shared._version == deployment_version(Settings(models=["embedded"], ray_layout={"models_per_encoder": 1}))
