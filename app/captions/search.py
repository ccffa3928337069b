"""Caption databases and the models that are served: which suits which, captions near an image or a text, building."""

import asyncio
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from app.captions.catalogue import CaptionCatalogue
from app.captions.database import Found, Manifest
from app.captions.plan import WORDNET, BuildPlan
from app.captions.sources import Source
from app.captions.wordnet import check_wordnet
from app.errors import (
    ClientError,
    ConfigurationError,
    InvalidFieldError,
    NotConfiguredError,
)
from app.images.fetch import ImageUrl, RemoteImages
from app.models.registry import ModelRegistry
from app.models.served_model import ServedModel
from app.names.namespaces import Namespace
from app.names.text import clean_text

log = structlog.get_logger()

MAX_LIMIT = 100
"""Captions on one page."""

MAX_OFFSET = 900
"""Where the last page may begin."""

MAX_CONTAINS_CHARS = 200
"""Of what a caption must contain."""

_LOOKED_THROUGH = 1000
_MAX_QUERY_CHARS = 1000


@dataclass(frozen=True, slots=True)
class CaptionQuery:
    """Captions of ``database`` near one of ``text`` and ``image``; of those that pass the filters, ``limit`` are told.

    ``contains`` must be in a caption, whatever the case; ``min_score`` is the least cosine.
    """

    database: str
    text: str | None = None
    image: bytes | ClientError | ImageUrl | None = None
    model: str | None = None
    limit: int = 10
    offset: int = 0
    contains: str | None = None
    min_score: float | None = None


@dataclass(frozen=True, slots=True)
class CaptionPage:
    """Captions with their cosines, the nearest first; ``searched`` are those that were looked through.

    ``database`` is ``name@generation``; ``next_offset`` is None where there are no more.
    ``warnings`` tell of parts that could not be searched.
    """

    database: str
    model: str
    captions: tuple[tuple[str, float], ...]
    next_offset: int | None
    searched: int
    warnings: tuple[str, ...] = ()


class CaptionSearch:
    """Asks caption databases with the models that are served, and builds them.

    Args:
        databases: those there are.
        models: encode images and texts.
        remote_images: fetches images that are given by URL.
        build_wordnet: whether the database that comes with the service is to be built where it is missing.
    """

    def __init__(
        self, databases: CaptionCatalogue, models: ModelRegistry, remote_images: RemoteImages, *, build_wordnet: bool
    ) -> None:
        self.databases = databases
        self._models = models
        self._remote_images = remote_images
        self._build_wordnet = build_wordnet

    async def choose(self, given: str | None, model: str, namespace: Namespace) -> str:
        """Return the database to ask with a model; raises as ``CaptionCatalogue.named``, ``check`` and ``choose``."""
        fingerprint = await self._models.get(model).text_fingerprint()
        if given is None:
            return await self.databases.choose(model, fingerprint, namespace)
        name = self.databases.named(given, namespace, "database")
        await self.databases.check(name, fingerprint)
        return name

    async def models_of(self, manifest: Manifest) -> list[str]:
        """Return the served models that a database can be asked with."""
        return [served.name for served in self._models if await served.text_fingerprint() == manifest.fingerprint]

    async def search(self, query: CaptionQuery) -> CaptionPage:
        """Return a page of the captions near an image or a text.

        Raises:
            InvalidFieldError: not one of text and image, or a model that the database is not of.
            UnknownNameError: no such database or model.
            ClientError: the image cannot be read.
            ServerError: the database is damaged, or the queue of the model or of the database is full.
        """
        if (query.text is None) == (query.image is None):
            raise InvalidFieldError.of("text", "give either text or an image to search by")
        model = await self._resolved(query)
        served = self._models.get(model)
        if query.text is not None:
            text = clean_text(query.text, max_chars=_MAX_QUERY_CHARS, field="text")
            features = await served.encode_texts([text])
        else:
            features = await self._image_features(model, query.image)
        # Always as many: with another number another page could have the same captions.
        k = _LOOKED_THROUGH
        (found,) = await self.databases.search(query.database, await served.text_fingerprint(), features, k)
        passing = await asyncio.to_thread(_passing, found, query)
        after = query.offset + query.limit
        return CaptionPage(
            f"{query.database}@{found.generation}",
            model,
            tuple(passing[query.offset : after]),
            after if len(passing) > after and after <= MAX_OFFSET else None,
            len(found.captions),
            () if found.missing is None else (found.missing,),
        )

    async def _resolved(self, query: CaptionQuery) -> str:
        """Return the model to ask the database with."""
        if query.model is not None:
            fingerprint = await self._models.get(query.model).text_fingerprint()
            await self.databases.check(query.database, fingerprint, field="model")
            return query.model
        manifest = await self.databases.manifest(query.database)
        models = await self.models_of(manifest)
        if not models:
            problem = f"the caption database '{query.database}' was made by '{manifest.model}', which is not served"
            raise InvalidFieldError.of("model", f"{problem}; serve that model, or build the database again")
        return models[0]

    async def _image_features(self, model: str, image: bytes | ClientError | ImageUrl | None) -> np.ndarray:
        assert image is not None
        (features,) = await self._models.encode_images(model, await self._remote_images.fetch([image]))
        if isinstance(features, ClientError):
            raise features
        row: np.ndarray = features[None]
        return row

    async def plan_wordnet(self) -> BuildPlan | None:
        """Return how to build the database that comes with the service, where it is wanted and missing.

        It is missing, too, where a model made it that is not served any more.
        """
        if not self._build_wordnet or self.databases.default != WORDNET:
            return None
        for state in await self.databases.states():
            if state.name == WORDNET and state.manifest and await self.models_of(state.manifest) and not state.problem:
                return None
        try:
            await asyncio.to_thread(check_wordnet, self.databases.wordnet)
        except ConfigurationError as error:
            log.warning("no_default_database", reason=error.message)
            return None
        self.databases.expect(WORDNET)
        return BuildPlan(model=self._models.default, source=WORDNET)

    def check_plan(self, plan: BuildPlan) -> None:
        """Refuse what cannot be built; reads the first of WordNet's nouns where it is the source.

        Raises:
            InvalidFieldError: rules that no caption can meet.
            UnknownNameError: the model is not served.
            NotConfiguredError: it is to be built of WordNet, which is not there.
        """
        self.served(plan)
        assert plan.rules
        if plan.source == WORDNET:
            try:
                check_wordnet(self.databases.wordnet)
            except ConfigurationError as error:
                raise NotConfiguredError(error.message) from error

    async def build(
        self,
        name: str,
        plan: BuildPlan,
        sources: Sequence[Source],
        advance: Callable[[int, int], Awaitable[object]],
    ) -> Manifest:
        """Build a database; raises as ``CaptionCatalogue.build``; ``UnknownNameError``: the model is not served."""
        served = self.served(plan)
        return await self.databases.build(
            name,
            plan,
            sources,
            encode=served.encode_new_texts,
            fingerprint=await served.text_fingerprint(),
            advance=advance,
        )

    def served(self, plan: BuildPlan) -> ServedModel:
        """Return the model of a plan; raises ``UnknownNameError`` where it is not served."""
        return self._models.get(plan.model)


def _passing(found: Found, query: CaptionQuery) -> list[tuple[str, float]]:
    # Captions are kept in NFC.
    wanted = None if query.contains is None else unicodedata.normalize("NFC", query.contains).casefold()
    return [
        (caption, cosine)
        for caption, cosine in zip(found.captions, found.cosines.tolist(), strict=True)
        if (wanted is None or wanted in caption.casefold()) and (query.min_score is None or cosine >= query.min_score)
    ]
