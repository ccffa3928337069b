"""Example images of label sets: from files to features that methods learn from, and gone for good when deleted."""

import asyncio
import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from app.classification.pipeline import Pipeline
from app.errors import ClientError, NotAnImageError, OverloadedError
from app.store.examples import Added, Deleted, ExampleCounts, ExampleRepository, NewExample, StoredFeatures
from app.types import LabelSet


class ExampleImages:
    """Takes example images in, and hands out their features.

    Args:
        repository: where they are kept.
        pipeline: encodes them.
        max_examples: of one label set.
        max_pool: unlabelled images that features are handed out of.
        at_once: images that are encoded together, as many as the queue has room for at least.
        keep_files: keep the files too, so that another model can encode them later.
    """

    def __init__(
        self,
        repository: ExampleRepository,
        pipeline: Pipeline,
        *,
        max_examples: int,
        max_pool: int,
        at_once: int,
        keep_files: bool,
    ) -> None:
        self.repository = repository
        self._pipeline = pipeline
        self._max_examples = max_examples
        self._max_pool = max_pool
        self._at_once = at_once
        self._keep_files = keep_files

    async def encode(
        self, model: str, images: Sequence[bytes], *, patient: bool = True
    ) -> list[np.ndarray | ClientError]:
        """Return each image's unit features (d,), or why it cannot be read; a full queue is waited for if ``patient``.

        Raises:
            OverloadedError: the queue has no room, and nobody waits for it.
        """
        features: list[np.ndarray | ClientError] = []
        while len(features) < len(images):
            some = images[len(features) : len(features) + self._at_once]
            try:
                features += await self._pipeline.image_features(model, some)
            except OverloadedError as error:
                if not (patient or features):
                    raise
                await asyncio.sleep(error.retry_after_s)
        return features

    async def prepare(
        self, name: str, images: Sequence[bytes], classnames: Sequence[str | None], *, patient: bool = True
    ) -> list[NewExample | ClientError]:
        """Hash and encode images by every model that is served, but for those whose features are kept already.

        Args:
            name: of a label set.
            images: files.
            classnames: the class of each, None for the unlabelled.
            patient: as in ``encode``.

        Raises:
            UnknownNameError: there is no such label set.
        """
        digests = await asyncio.to_thread(lambda: [hashlib.sha256(image).digest() for image in images])
        fingerprints = {model: await served.image_fingerprint() for model, served in self._pipeline.models.items()}
        known = await self.repository.known(name, digests, list(fingerprints.values()))
        wanted = [index for index, digest in enumerate(digests) if digest not in known]
        features: dict[int, dict[str, np.ndarray]] = {index: {} for index in range(len(images))}
        refused: dict[int, ClientError] = {}
        for model, fingerprint in fingerprints.items():
            told = await self.encode(model, [images[index] for index in wanted], patient=patient) if wanted else []
            for index, each in zip(wanted, told, strict=True):
                if isinstance(each, ClientError):
                    refused[index] = each
                elif not np.isfinite(each).all():
                    refused[index] = NotAnImageError(f"the model '{model}' makes nothing of the image: NaN or infinity")
                else:
                    features[index][fingerprint] = each
        return [
            refused.get(index) or NewExample(digest, classname, features[index], image if self._keep_files else None)
            for index, (digest, classname, image) in enumerate(zip(digests, classnames, images, strict=True))
        ]

    async def add(self, name: str, items: Sequence[NewExample]) -> Added:
        """Keep examples; raises as ``ExampleRepository.add``."""
        return await self.repository.add(name, items, max_examples=self._max_examples)

    async def counts(self, name: str) -> ExampleCounts:
        """Return how many examples a label set has, and how many of them are of no use to the default model."""
        served = self._pipeline.models.get(self._pipeline.default_model) if self._pipeline.models else None
        return await self.repository.counts(name, None if served is None else await served.image_fingerprint())

    async def delete(
        self,
        name: str,
        *,
        ids: Collection[int] | None = None,
        classname: str | None = None,
        unlabelled: bool = False,
        everything: bool = False,
    ) -> Deleted:
        """Delete examples and what was learned from them; raises as ``ExampleRepository.delete``."""
        deleted = await self.repository.delete(
            name, ids=ids, classname=classname, unlabelled=unlabelled, everything=everything
        )
        self._pipeline.learner.forget(name)
        return deleted

    async def features(self, label_set: LabelSet, model: str) -> StoredFeatures:
        """Return the features of a label set's examples by one of the models that are served."""
        fingerprint = await self._pipeline.models[model].image_fingerprint()
        return await self.repository.features(
            label_set.name, fingerprint, label_set.classnames, max_pool=self._max_pool
        )

    async def encode_kept(self, name: str, model: str) -> int:
        """Make the features that a model lacks of images whose files are kept, and return of how many."""
        fingerprint = await self._pipeline.models[model].image_fingerprint()
        made = after = 0
        while page := await self.repository.missing(name, fingerprint, self._at_once, after):
            after = page[-1][0]
            encoded = await self.encode(model, [content for _, content in page])
            rows = {
                example_id: each
                for (example_id, _), each in zip(page, encoded, strict=True)
                if not isinstance(each, ClientError)
            }
            made += await self.repository.add_features(name, fingerprint, rows)
        return made
