"""Measures how similar unrelated images and words are for each model, so that answers can say that no label fits."""

import asyncio
from collections.abc import Sequence

import numpy as np

from app.errors import ClientError, OverloadedError
from app.models.registry import ModelRegistry
from app.prompting.templates import fill
from app.scoring.unrelated import UnrelatedSimilarity


async def measure_unrelated(
    models: ModelRegistry, photographs: Sequence[bytes], words: Sequence[str], template: str
) -> None:
    """Set ``unrelated`` of each model in service.

    Texts are encoded while no request needs a model, and images one at a time, as those of a request. A model that
    takes no more images at the moment is asked again later; none is measured if all photographs exceed its limits.

    Args:
        models: in service.
        photographs: encoded images of different things.
        words: names of many things.
        template: the sentence with ``{}`` that the words are filled into.
    """
    prompts = [prompt for word in words for prompt in fill([template], word)]
    for served in models:
        texts = await models.background_texts(served.name)(prompts)
        images = [await _encoded(models, served.name, photograph) for photograph in photographs]
        if rows := [image for image in images if not isinstance(image, ClientError)]:
            served.unrelated = UnrelatedSimilarity(np.stack(rows) @ texts.T)


async def _encoded(models: ModelRegistry, name: str, photograph: bytes) -> np.ndarray | ClientError:
    while True:
        try:
            (image,) = await models.encode_images(name, [photograph])
        except OverloadedError as error:
            await asyncio.sleep(error.retry_after_s)
        else:
            return image
