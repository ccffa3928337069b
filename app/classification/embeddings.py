"""Embeddings of texts and images, without a classifier."""

from collections.abc import Sequence

import numpy as np

from app.errors import ClientError, FieldProblem, InvalidFieldError, TooLargeError
from app.images.fetch import ImageUrl, RemoteImages
from app.models.registry import ModelRegistry
from app.names.text import MAX_TEXT_CHARS
from app.types import ImageFeatures, TextFeatures


class Embedder:
    """Returns unit features; nothing is stored.

    Args:
        models: in service.
        remote_images: fetches images that are given by URL.
        max_texts: of one request.
    """

    def __init__(self, models: ModelRegistry, remote_images: RemoteImages, *, max_texts: int) -> None:
        self._models = models
        self._remote_images = remote_images
        self._max_texts = max_texts

    async def embed_texts(
        self, texts: Sequence[str], *, model: str | None, dimensions: int | None
    ) -> tuple[str, TextFeatures]:
        """Return the name of the model and one unit row per text (k, d).

        Raises:
            UnknownNameError: no such model.
            InvalidFieldError: other dimensions than the model's, or a text that is too long.
            TooLargeError: too many texts.
            OverloadedError, DeadlineExceededError: as ``ModelRegistry.encode_texts``.
        """
        name = self._model(model, dimensions)
        if len(texts) > self._max_texts:
            raise TooLargeError(
                f"{len(texts)} texts in one request, at most {self._max_texts} are allowed; send fewer per request, or"
                " raise DEIXIS_MAX_LABELS"
            )
        for index, text in enumerate(texts):
            if len(text) > MAX_TEXT_CHARS:
                raise InvalidFieldError.of(
                    f"input.{index}", f"has {len(text):,} characters, at most {MAX_TEXT_CHARS:,} are allowed"
                )
        return name, await self._models.encode_texts(name, texts)

    async def embed_images(
        self, images: Sequence[bytes | ClientError | ImageUrl], *, model: str | None, dimensions: int | None
    ) -> tuple[str, ImageFeatures]:
        """Return the name of the model and one unit row per image (n, d), if all images can be decoded.

        Raises:
            UnknownNameError, InvalidFieldError: as ``embed_texts``.
            ClientError: an image cannot be fetched or decoded.
            OverloadedError, DeadlineExceededError: as ``ModelRegistry.encode_images``.
        """
        name = self._model(model, dimensions)
        fetched = await self._remote_images.fetch(images)
        features = await self._models.encode_images(name, fetched, has_deadline=True)
        bad = [(index, row) for index, row in enumerate(features) if isinstance(row, ClientError)]
        if bad and len(images) == 1:
            error = bad[0][1]
            raise error.renamed({"url": "input"}) if isinstance(error, InvalidFieldError) else error
        if bad:
            raise InvalidFieldError([FieldProblem(f"input.{index}", error.message) for index, error in bad])
        return name, np.stack([row for row in features if not isinstance(row, ClientError)])

    def _model(self, model: str | None, dimensions: int | None) -> str:
        served = self._models.get(model)
        known = served.encoder.embed_dim
        if dimensions not in {None, known}:
            raise InvalidFieldError.of(
                "dimensions", f"'{served.name}' has {known} dimensions, not {dimensions}; leave the field out"
            )
        return served.name
