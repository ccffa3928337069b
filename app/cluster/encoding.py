"""Encoders on Ray for a command of this process, as one that builds a caption database."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve

from app.cluster.application import encoders, encoders_cpus
from app.cluster.models import remote_model
from app.cluster.session import connected
from app.cluster.wire import Card
from app.main import Steps
from app.settings import Settings

_NAME = "deixis-encoders-{}"


@contextmanager
def encoders_on_ray(settings: Settings) -> Iterator[tuple[list[Card], Steps]]:
    """Have replicas encode for this process, beside those of a service that may run there; they end with the block.

    Raises:
        ConfigurationError: Ray cannot be reached, or a model cannot be loaded.
    """
    with connected(settings, cpus=encoders_cpus(settings)):
        handles = {}
        try:
            for number, (model, deployment) in enumerate(encoders(settings).items()):
                handles[model] = serve.run(deployment, name=_NAME.format(number), route_prefix=None)
            cards = {model: handle.card.remote(model).result() for model, handle in handles.items()}
            yield (
                list(cards.values()),
                Steps(serve_model=lambda card, *others: remote_model(card, handles[card.name], *others)),
            )
        finally:
            for number in range(len(handles)):
                serve.delete(_NAME.format(number))
