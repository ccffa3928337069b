"""Example images of label sets: encoded, stored as features, and deleted with everything fitted to them."""

import asyncio
import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from app.errors import ClientError, OverloadedError
from app.fewshot.fitting import FitCache
from app.models.registry import ModelRegistry
from app.names.class_names import indices_of
from app.store.examples import (
    Added,
    Deleted,
    ExampleCounts,
    ExampleRepository,
    LabelledFeatures,
    NewExample,
    StoredFeatures,
)
from app.types import LabelSet


class ExampleImages:
    """Encodes and stores example images, and returns their features.

    Args:
        repository: stores them.
        models: encode them.
        fits: adapters fitted to them.
        max_examples: limit for one label set.
        max_pool: number of unlabelled images whose features are returned; a larger pool is sampled evenly.
        batch_size: images encoded together; the queue must have room for them.
        keep_files: store the files too, so that another model can encode them later.
    """

    def __init__(
        self,
        repository: ExampleRepository,
        models: ModelRegistry,
        fits: FitCache,
        *,
        max_examples: int,
        max_pool: int,
        batch_size: int,
        keep_files: bool,
    ) -> None:
        self.repository = repository
        self._models = models
        self._fits = fits
        self._max_examples = max_examples
        self._max_pool = max_pool
        self._batch_size = batch_size
        self._keep_files = keep_files

    async def encode(
        self, model: str, images: Sequence[bytes], *, wait: bool = True, is_request: bool = False
    ) -> list[np.ndarray | ClientError]:
        """Return each image's unit features (d,), or why it cannot be decoded.

        Args:
            model: in service.
            images: files.
            wait: wait while the queue is full.
            is_request: whether somebody waits for the result; else a few images at a time, in turns with requests.

        Raises:
            OverloadedError: the queue is full, and ``wait`` is false.
        """
        features: list[np.ndarray | ClientError] = []
        encode = self._models.encode_images if is_request else self._models.encode_images_in_background
        while len(features) < len(images):
            batch = images[len(features) : len(features) + self._batch_size]
            try:
                features += await encode(model, batch)
            except OverloadedError as error:
                if not (wait or features):
                    raise
                await asyncio.sleep(error.retry_after_s)
        return features

    async def prepare(
        self,
        name: str,
        images: Sequence[bytes],
        classnames: Sequence[tuple[str, ...]],
        *,
        wait: bool = True,
        is_request: bool = False,
    ) -> list[NewExample | ClientError]:
        """Hash images and encode them with every model in service, except images whose features are stored already.

        Args:
            name: of a label set.
            images: files.
            classnames: the classes of each, none for unlabelled images.
            wait: as in ``encode``.
            is_request: as in ``encode``.

        Raises:
            UnknownNameError: no such label set.
        """
        digests = await asyncio.to_thread(lambda: [hashlib.sha256(image).digest() for image in images])
        fingerprints = {served.name: await served.image_fingerprint() for served in self._models}
        known = await self.repository.known(name, digests, list(fingerprints.values()))
        new = [index for index, digest in enumerate(digests) if digest not in known]
        features: dict[int, dict[str, np.ndarray]] = {index: {} for index in range(len(images))}
        refused: dict[int, ClientError] = {}
        for model, fingerprint in fingerprints.items():
            files = [images[index] for index in new]
            rows = await self.encode(model, files, wait=wait, is_request=is_request) if new else []
            for index, row in zip(new, rows, strict=True):
                if isinstance(row, ClientError):
                    refused[index] = row
                else:
                    features[index][fingerprint] = row
        return [
            refused.get(index) or NewExample(digest, given, features[index], image if self._keep_files else None)
            for index, (digest, given, image) in enumerate(zip(digests, classnames, images, strict=True))
        ]

    async def add(self, name: str, items: Sequence[NewExample]) -> Added:
        """Store examples; raises as ``ExampleRepository.add``."""
        return await self.repository.add(name, items, max_examples=self._max_examples)

    async def counts(self, name: str) -> ExampleCounts:
        """Return how many examples a label set has, and how many of them lack features of the default model."""
        return await self.repository.counts(
            name, await self._models.get().image_fingerprint() if len(self._models) else None
        )

    async def find_class(self, label_set: LabelSet, classname: str) -> str:
        """Return a class name as the label set, or else one of its example images, spells it.

        Raises:
            UnknownNameError: neither has such a class.
        """
        counts = await self.counts(label_set.name)
        known = list(dict.fromkeys((*label_set.classnames, *counts.labelled)))
        return known[indices_of([classname], known)[0]]

    async def delete(
        self,
        name: str,
        *,
        ids: Collection[int] | None = None,
        classname: str | None = None,
        unlabelled: bool = False,
        everything: bool = False,
    ) -> Deleted:
        """Delete examples and the adapters fitted to them; raises as ``ExampleRepository.delete``."""
        deleted = await self.repository.delete(
            name, ids=ids, classname=classname, unlabelled=unlabelled, everything=everything
        )
        self._fits.forget(name)
        return deleted

    async def features(self, label_set: LabelSet, model: str) -> StoredFeatures:
        """Return the features of a label set's examples, as one of the models in service encodes them."""
        fingerprint = await self._models.get(model).image_fingerprint()
        return await self.repository.features(
            label_set.name, fingerprint, label_set.classnames, max_pool=self._max_pool
        )

    async def labelled_features(self, label_set: LabelSet, model: str) -> LabelledFeatures:
        """Return the features of all examples with classes, also those with several, and the classes of each."""
        fingerprint = await self._models.get(model).image_fingerprint()
        return await self.repository.labelled_features(label_set.name, fingerprint, label_set.classnames)

    async def encode_stored(self, name: str, model: str) -> int:
        """Encode stored files that a model has not encoded yet, and return their number."""
        fingerprint = await self._models.get(model).image_fingerprint()
        encoded = after = 0
        while page := await self.repository.missing(name, fingerprint, self._batch_size, after):
            after = page[-1][0]
            features = await self.encode(model, [content for _, content in page])
            rows = {
                example_id: row
                for (example_id, _), row in zip(page, features, strict=True)
                if not isinstance(row, ClientError)
            }
            encoded += await self.repository.add_features(name, fingerprint, rows)
        return encoded
