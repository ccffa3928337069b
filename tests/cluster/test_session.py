"""How Serve is started and stopped on a cluster, with a fake of Serve."""

from types import SimpleNamespace

import pytest

from app.cluster import session, temporary_encoders
from app.errors import ConfigurationError
from app.settings import load_settings

CLUSTER = "127.0.0.1:26379"


class FakeServe:
    """Records its options and its applications."""

    def __init__(self):
        self.running, self.applications, self.names = None, {}, []
        self.used_port = None

    def start(self, *, proxy_location, http_options=None, logging_config=None):
        if self.running is not None:
            return
        self.running = {"proxy_location": proxy_location, "http_options": http_options or {}}
        if self.used_port is not None and self.used_port == (http_options or {}).get("port"):
            raise RuntimeError(f"ray::ProxyActor.ready()\n  File ...\nFailed to bind to address '{self.used_port}'.")

    def run(self, deployment, *, name, route_prefix):
        assert route_prefix is None
        self.names.append(name)
        self.applications[name] = deployment
        if deployment == "broken":
            raise RuntimeError("Deploying application failed")
        model_info = SimpleNamespace(remote=lambda model: SimpleNamespace(result=lambda: model))
        return SimpleNamespace(model_info=model_info)

    def delete(self, name):
        del self.applications[name]

    def status(self):
        return SimpleNamespace(applications=self.applications)

    def shutdown(self):
        self.running, self.applications = None, {}


@pytest.fixture
def ray_serve(monkeypatch):
    fake = FakeServe()
    monkeypatch.setattr(session, "serve", fake)
    monkeypatch.setattr(temporary_encoders, "serve", fake)
    monkeypatch.setattr(session, "_serve_details", lambda: fake.running)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(session.ray, name, lambda **_: None)
    monkeypatch.setattr(session, "_check_reachable", lambda _: None)
    monkeypatch.setattr(temporary_encoders, "encoders", lambda settings: dict.fromkeys(settings.models, "encoder"))
    return fake


@pytest.fixture
def settings(tmp_path):
    return load_settings(data_dir=tmp_path, port=21000)


def test_temporary_encoders_start_serve_without_proxies_and_stop_it(ray_serve, settings):
    with temporary_encoders.encoders_on_ray(settings, CLUSTER) as (infos, _):
        assert infos == ["embedded"]
        assert ray_serve.running["proxy_location"] == "Disabled"
    assert ray_serve.running is None


def test_temporary_encoders_do_not_stop_other_applications(ray_serve, settings):
    session.start_serve(settings)
    ray_serve.applications["deixis"] = "the service"
    with temporary_encoders.encoders_on_ray(settings, CLUSTER):
        pass
    assert ray_serve.running["http_options"]["port"] == 21000
    assert ray_serve.applications == {"deixis": "the service"}

    ray_serve.shutdown()
    with temporary_encoders.encoders_on_ray(settings, CLUSTER):
        ray_serve.applications["another"] = "a build"
    assert ray_serve.applications == {"another": "a build"}
    assert ray_serve.running is not None


def test_two_commands_on_one_cluster_have_separate_encoders(ray_serve, settings):
    with temporary_encoders.encoders_on_ray(settings, CLUSTER):
        with temporary_encoders.encoders_on_ray(settings, CLUSTER):
            assert len(ray_serve.applications) == 2
        assert len(ray_serve.applications) == 1
    assert len(set(ray_serve.names)) == 2


def test_encoders_that_cannot_start_are_reported_and_deleted(ray_serve, settings, monkeypatch):
    monkeypatch.setattr(temporary_encoders, "encoders", lambda _: {"first": "encoder", "second": "broken"})
    with pytest.raises(ConfigurationError, match="encoders cannot be started on Ray: Deploying"):
        temporary_encoders.encoders_on_ray(settings, CLUSTER).__enter__()
    assert ray_serve.applications == {}
    assert ray_serve.running is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"port": 21001}, "has port 21000, not 21001"),
        ({"host": "0.0.0.0"}, "has host 127.0.0.1, not 0.0.0.0"),
        ({"keep_alive_s": 5}, "has keep_alive_timeout_s 75, not 5"),
    ],
)
def test_a_service_with_other_options_than_the_running_serve_is_rejected(ray_serve, settings, other, message):
    session.start_serve(settings)
    session.start_serve(settings)
    with pytest.raises(ConfigurationError, match=f"{message}.*serve shutdown"):
        session.start_serve(settings.model_copy(update=other))


def test_a_service_is_rejected_if_serve_runs_without_proxies(ray_serve, settings):
    with (
        temporary_encoders.encoders_on_ray(settings, CLUSTER),
        pytest.raises(ConfigurationError, match="already runs on this cluster and has no proxies"),
    ):
        session.start_serve(settings)


def test_a_port_in_use_is_reported_in_one_line_and_serve_is_stopped(ray_serve, settings):
    ray_serve.used_port = settings.port
    with pytest.raises(ConfigurationError, match=r"^Ray's proxies cannot listen on 127.0.0.1:21000: Failed to bind"):
        session.start_serve(settings)
    assert ray_serve.running is None
