"""Which classifiers of a label set are built before the first request needs them."""

import asyncio

import structlog

from app.classification.classifiers import ClassifierCache, texts_of
from app.classification.method_names import AUTO, DEFAULT_METHOD
from app.classification.resolve import Resolver
from app.models.registry import ModelRegistry
from app.runtime.turns import in_background
from app.types import LabelSet

log = structlog.get_logger()

# Together they encode every text of a label set, so that any other method finds its text features in the store.
_METHODS_WITH_DESCRIPTIONS = (DEFAULT_METHOD, "cupl-ensemble", "dclip")


async def build_classifiers(
    label_set: LabelSet, *, models: ModelRegistry, resolver: Resolver, classifiers: ClassifierCache
) -> None:
    """Build the classifiers that requests for a label set are likely to need; failures are logged."""
    if not len(models):
        return  # a command that only reads and writes label sets
    try:
        described = any(entry.descriptions or entry.features for entry in label_set.classes)
        methods: tuple[str, ...] = _METHODS_WITH_DESCRIPTIONS if described else (DEFAULT_METHOD,)
        for method in (*methods, AUTO) if label_set.examples_revision else methods:
            task = await resolver.resolve_label_set(label_set, method=method)
            if method in methods:  # the method that is selected needs no other texts
                await models.store_texts(task.model, await asyncio.to_thread(texts_of, task))
            with in_background(models.turns):
                await classifiers.get(task)
    except Exception as error:  # noqa: BLE001 - whatever an encoder raises
        # A request for this label set meets the same error and reports it.
        reason = str(error) or type(error).__name__
        log.warning("label_set_not_prewarmed", label_set=label_set.reference, reason=reason)
