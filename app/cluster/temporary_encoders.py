"""Encoder replicas on Ray for one command, such as the build of a caption database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from ray import serve
from ray.serve import Application

from app.cluster.application import encoders, encoders_cpus
from app.cluster.messages import RemoteModelInfo
from app.cluster.remote_model import remote_model
from app.cluster.session import connected, without_proxies
from app.errors import ConfigurationError
from app.main import RemoteSteps
from app.settings import Settings


@contextmanager
def encoders_on_ray(settings: Settings, address: str | None) -> Iterator[tuple[list[RemoteModelInfo], RemoteSteps]]:
    """Start encoder replicas for this process, and delete them at the end; a service on the cluster is not affected.

    Args:
        settings: of the service.
        address: of the cluster; None starts a Ray on this machine.

    Raises:
        ConfigurationError: Ray cannot be reached, or a model cannot be loaded.
    """
    # The name is unique, because several commands may use one cluster.
    prefix = f"deixis-encoders-{uuid4().hex[:12]}"
    with connected(settings, address, cpus=encoders_cpus(settings)), without_proxies(address):
        handles, names = {}, []
        try:
            for number, (model, deployment) in enumerate(encoders(settings).items()):
                names.append(f"{prefix}-{number}")
                handles[model] = _run(deployment, names[-1])
            infos = {model: handle.model_info.remote(model).result() for model, handle in handles.items()}
            yield (
                list(infos.values()),
                RemoteSteps(serve_model=lambda info, *others: remote_model(info, handles[info.name], *others)),
            )
        finally:
            for name in names:
                serve.delete(name)


def _run(deployment: Application, name: str) -> Any:
    try:
        return serve.run(deployment, name=name, route_prefix=None)
    except RuntimeError as error:
        raise ConfigurationError(f"encoders cannot be started on Ray: {error}") from error
