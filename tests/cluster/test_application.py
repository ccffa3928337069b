"""What is deployed, from settings and from a Serve config file."""

import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from app.cli import cli
from app.cluster.application import application, build, cpus_needed
from app.cluster.messages import deployment_version
from app.errors import ConfigurationError
from app.settings import load_settings

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())


def deployments(application):
    """Return the deployments of an application by name."""
    found, seen = {}, [application]
    while seen:
        bound = seen.pop()._bound_deployment
        found[bound.name] = bound
        given = [*bound.init_args, *bound.init_kwargs.values()]
        for each in given:
            inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else [each]
            seen += [one for one in inner if hasattr(one, "_bound_deployment")]
    return found


def test_each_model_has_encoders_and_each_part_of_the_captions_a_deployment(tmp_path):
    settings = load_settings(
        data_dir=tmp_path, models="embedded,ViT-B-32/openai", ray_layout="edges=3,encoders=1-4,shards=2"
    )
    found = deployments(application(settings))
    assert set(found) == {"edge", "encoder-embedded", "encoder-ViT-B-32-openai", "captions-0", "captions-1"}
    assert found["edge"].num_replicas == 3
    scaled = found["encoder-embedded"]._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (1, 4)
    assert scaled.policy.policy_function == "app.cluster.autoscaling:replicas_for_load"
    assert cpus_needed(settings) == 3 + 2 * 4 + 2


def test_models_that_share_encoders_have_one_deployment(tmp_path):
    settings = load_settings(data_dir=tmp_path, models="embedded,ViT-B-32/openai", ray_layout="models_per_encoder=1")
    assert set(deployments(application(settings))) == {"edge", "encoder"}
    assert cpus_needed(settings) == 2


def test_a_gpu_is_asked_for_where_the_settings_say_so(tmp_path):
    found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="encoder_gpus=0.5,encoder_cpus=3")))
    assert found["encoder-embedded"].ray_actor_options == {"num_cpus": 3.0, "num_gpus": 0.5}


def test_a_replica_that_may_be_alone_goes_when_its_successor_is_there(tmp_path):
    found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="edges=2-4,encoders=1-4,shards=1")))
    surges = {name: each._deployment_config.max_surge_percent for name, each in found.items()}
    # Rounded up, one more.
    assert surges == {"edge": 0, "encoder-embedded": 1, "captions-0": 1}


def test_an_edge_does_not_decode_in_as_many_threads_as_there_are_cores_where_it_is_deployed(tmp_path, monkeypatch):
    # What no machine has for cores that this runs on.
    monkeypatch.setattr("app.cluster.application._DECODE_THREADS", 1000)

    def decode_threads(**told):
        found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="shards=1", **told)))
        # An edge waits for encoders of the version that these settings are.
        assert len({deployment_version(each.init_args[0]) for each in found.values()}) == 1
        return found["edge"].init_args[0].decode_threads

    assert decode_threads() == 1000
    assert decode_threads(decode_threads=5) == 5
    monkeypatch.setenv("DEIXIS_DECODE_THREADS", "3")
    assert decode_threads() == 3


def test_the_config_file_is_one_of_serve_and_its_arguments_are_settings(tmp_path, monkeypatch):
    told = ServeDeploySchema.model_validate(CONFIG)
    (only,) = told.applications
    assert only.import_path == "app.cluster.application:build"
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DEIXIS_KEYS", "off")
    assert set(deployments(build(only.args))) == {"edge", "encoder-embedded", "captions-0", "captions-1"}


def test_on_a_cluster_somebody_must_have_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="there are no API keys"):
        build({})
    with pytest.raises(ConfigurationError, match="unknown field 'egdes'; known: edges"):
        build({"ray_layout": {"egdes": 2}})


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch):
    # Else what later tests log would go to the standard error of a command that has ended.
    monkeypatch.setattr(sys.modules["app.cli.serve"], "configure_logs", lambda *_: None)


def refusal(*flags, data_dir):
    done = CliRunner().invoke(cli, ["serve", "--engine", "ray", "--data-dir", str(data_dir), "--port", "0", *flags])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_a_cluster_needs_a_shared_database_and_a_key_and_must_be_reachable(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "DEIXIS_DATABASE_URL" in refusal(data_dir=tmp_path)
    database = f"sqlite:///{tmp_path}/shared.sqlite3"
    cluster = ("--database-url", database)
    assert "the cluster can be reached from other machines, and there are no API keys" in refusal(
        *cluster, data_dir=tmp_path
    )
    assert "Ray cannot be reached at '127.0.0.1:1'" in refusal(*cluster, "--keys", "off", data_dir=tmp_path)
    monkeypatch.delenv("RAY_ADDRESS")
    assert "there are no API keys" in refusal("--host", "0.0.0.0", data_dir=tmp_path)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'deixis[server,ray]'" in refusal(data_dir=tmp_path)
