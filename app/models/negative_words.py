"""Words for everyday things in general, which compete with the labels of a request: perhaps none of the labels fits."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from app.models.registry import ModelRegistry
from app.names.kinds import WordKinds
from app.types import TextFeatures

_PROMPT = "a photo of a {}."


@dataclass(frozen=True, slots=True, eq=False)
class NegativeWords:
    """Words, what they are kinds of, and their unit features (m, d) for one model."""

    words: tuple[str, ...]
    kinds: WordKinds
    features: TextFeatures


class NegativeVocabulary:
    """The negative words of each model in service, encoded once.

    Args:
        models: in service.
        read: returns the words and what they are kinds of.
    """

    def __init__(self, models: ModelRegistry, read: Callable[[], tuple[tuple[str, ...], WordKinds]]) -> None:
        self._models = models
        self._read = read
        self._encoded: dict[str, NegativeWords] = {}
        self._lock = asyncio.Lock()

    def get(self, model: str) -> NegativeWords | None:
        """Return the words of a model; None until ``prepare`` has encoded them."""
        return self._encoded.get(model)

    async def prepare(self, model: str) -> None:
        """Encode the words of a model, while no request needs any model, unless the store has their features."""
        async with self._lock:
            if model in self._encoded:
                return
            words, kinds = await asyncio.to_thread(self._read)
            features = await self._models.background_texts(model)([_PROMPT.format(word) for word in words])
            self._encoded[model] = NegativeWords(words, kinds, features)

    async def prepare_all(self) -> None:
        """Encode the words of every model, the default one first."""
        for name in self._models.names:
            await self.prepare(name)
