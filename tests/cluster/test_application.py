"""The deployments for settings and for a Serve config file."""

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
        for argument in [*bound.init_args, *bound.init_kwargs.values()]:
            values = argument if isinstance(argument, list) else [argument]
            values = argument.values() if isinstance(argument, dict) else values
            seen += [value for value in values if hasattr(value, "_bound_deployment")]
    return found


def test_each_model_and_each_caption_shard_has_a_deployment(tmp_path):
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


def test_encoders_request_the_cores_and_gpus_of_the_settings(tmp_path):
    found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="encoder_gpus=0.5,encoder_cpus=3")))
    assert found["encoder-embedded"].ray_actor_options == {"num_cpus": 3.0, "num_gpus": 0.5}


def test_a_single_replica_stops_after_its_successor_is_ready(tmp_path):
    found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="edges=2-4,encoders=1-4,shards=1")))
    surges = {name: deployment._deployment_config.max_surge_percent for name, deployment in found.items()}
    # Rounded up, this is one additional replica.
    assert surges == {"edge": 0, "encoder-embedded": 1, "captions-0": 1}


def test_the_decode_threads_of_an_edge_do_not_depend_on_the_machine_that_deploys_it(tmp_path, monkeypatch):
    # No machine has this number of cores.
    monkeypatch.setattr("app.cluster.application._DECODE_THREADS", 1000)

    def decode_threads(**settings):
        found = deployments(application(load_settings(data_dir=tmp_path, ray_layout="shards=1", **settings)))
        # An edge waits for encoders with equal settings.
        assert len({deployment_version(deployment.init_args[0]) for deployment in found.values()}) == 1
        return found["edge"].init_args[0].decode_threads

    assert decode_threads() == 1000
    assert decode_threads(decode_threads=5) == 5
    monkeypatch.setenv("DEIXIS_DECODE_THREADS", "3")
    assert decode_threads() == 3


def test_the_config_file_is_valid_for_serve_and_its_arguments_are_settings(tmp_path, monkeypatch):
    config = ServeDeploySchema.model_validate(CONFIG)
    (application_config,) = config.applications
    assert application_config.import_path == "app.cluster.application:build"
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DEIXIS_KEYS", "off")
    assert set(deployments(build(application_config.args))) == {"edge", "encoder-embedded", "captions-0", "captions-1"}


def test_a_config_file_without_a_key_or_with_an_unknown_field_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIXIS_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="there are no API keys"):
        build({})
    with pytest.raises(ConfigurationError, match="unknown field 'egdes'; known: edges"):
        build({"ray_layout": {"egdes": 2}})


@pytest.fixture(autouse=True)
def _keep_logging(monkeypatch):
    # Otherwise later tests would log to the standard error of a command that has ended.
    monkeypatch.setattr("app.cli.serving.configure_logs", lambda *_: None)


def error_of(*flags, data_dir):
    done = CliRunner().invoke(cli, ["serve", "--engine", "ray", "--data-dir", str(data_dir), "--port", "0", *flags])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_a_cluster_needs_a_shared_database_and_a_key_and_must_be_reachable(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "DEIXIS_DATABASE_URL" in error_of(data_dir=tmp_path)
    database = f"sqlite:///{tmp_path}/shared.sqlite3"
    cluster = ("--database-url", database)
    assert "the cluster can be reached from other machines, and there are no API keys" in error_of(
        *cluster, data_dir=tmp_path
    )
    assert "Ray cannot be reached at '127.0.0.1:1'" in error_of(*cluster, "--keys", "off", data_dir=tmp_path)
    monkeypatch.delenv("RAY_ADDRESS")
    assert "there are no API keys" in error_of("--host", "0.0.0.0", data_dir=tmp_path)


def test_without_ray_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "needs the extra 'ray'" in error_of(data_dir=tmp_path)
