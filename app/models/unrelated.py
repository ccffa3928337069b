"""Measures how similar unrelated images and words are for each model, so that answers can say that no label fits."""

from collections.abc import Sequence

import numpy as np

from app.errors import ClientError
from app.models.registry import ModelRegistry
from app.prompting.templates import fill
from app.scoring.unrelated import UnrelatedSimilarity


async def measure_unrelated(
    models: ModelRegistry, photographs: Sequence[bytes], words: Sequence[str], template: str
) -> None:
    """Set ``unrelated`` of each model in service, while no request needs it.

    Args:
        models: in service.
        photographs: encoded images of different things.
        words: names of many things.
        template: the sentence with ``{}`` that the words are filled into.
    """
    prompts = [prompt for word in words for prompt in fill([template], word)]
    for served in models:
        texts = await models.background_texts(served.name)(prompts)
        images = await models.encode_images(served.name, photographs)
        rows = np.stack([image for image in images if not isinstance(image, ClientError)])
        served.unrelated = UnrelatedSimilarity(rows @ texts.T)
