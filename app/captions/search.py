"""Searches and builds caption databases with the models in service."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog

from app.captions.build_plan import EVERYDAY, WORDNET, BuildPlan
from app.captions.catalogue import CaptionCatalogue
from app.captions.database import NearestCaptions
from app.captions.manifest import Manifest
from app.captions.query import MAX_OFFSET, CaptionQuery
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
from app.names.text import clean_text, nfc

log = structlog.get_logger()

_MAX_SEARCHED = 1000
_MAX_QUERY_CHARS = 1000


@dataclass(frozen=True, slots=True)
class CaptionPage:
    """A page of captions with their cosines, the nearest first, out of the ``searched`` nearest ones.

    ``database`` is ``name@generation``; ``next_offset`` is None on the last page; ``warnings`` name the parts that
    could not be searched.
    """

    database: str
    model: str
    captions: tuple[tuple[str, float], ...]
    next_offset: int | None
    searched: int
    warnings: tuple[str, ...] = ()


class CaptionSearch:
    """Searches and builds caption databases with the models in service.

    Args:
        catalogue: the caption databases.
        models: encode images and texts.
        remote_images: fetches images that are given by URL.
        build_default: whether to build the default database if it is missing, and a source has its name.
    """

    def __init__(
        self,
        catalogue: CaptionCatalogue,
        models: ModelRegistry,
        remote_images: RemoteImages,
        *,
        build_default: bool,
    ) -> None:
        self.catalogue = catalogue
        self._models = models
        self._remote_images = remote_images
        self._build_default = build_default

    async def choose(self, given: str | None, model: str, namespace: Namespace) -> str:
        """Return the qualified name of the database to search with a model: the given one, or the default.

        Raises:
            Exception: as ``CaptionCatalogue.qualified_name``, ``check_model`` and ``choose``.
        """
        fingerprint = await self._models.get(model).text_fingerprint()
        if given is None:
            return await self.catalogue.choose(model, fingerprint, namespace)
        name = self.catalogue.qualified_name(given, namespace, "database")
        await self.catalogue.check_model(name, fingerprint)
        return name

    async def models_of(self, manifest: Manifest) -> list[str]:
        """Return the models in service that can search a database: those with the fingerprint of its manifest."""
        return [served.name for served in self._models if await served.text_fingerprint() == manifest.fingerprint]

    async def search(self, query: CaptionQuery) -> CaptionPage:
        """Return a page of the captions near an image or a text.

        Raises:
            InvalidFieldError: not exactly one of text and image is given, or another model built the database.
            UnknownNameError: there is no database or model of this name.
            ClientError: the image cannot be read.
            ServerError: the database is damaged, or the queue of the model or of the database is full.
        """
        if (query.text is None) == (query.image is None):
            raise InvalidFieldError.of("text", "give either a text or an image")
        model = await self._resolve_model(query)
        served = self._models.get(model)
        if query.text is not None:
            text = clean_text(query.text, max_chars=_MAX_QUERY_CHARS, field="text")
            features = await served.encode_texts([text])
        else:
            features = await self._image_features(model, query.image)
        # All pages search for the same number of captions, because the result of an inverted file depends on it.
        (found,) = await self.catalogue.search(query.database, await served.text_fingerprint(), features, _MAX_SEARCHED)
        passing = await asyncio.to_thread(_filter, found, query)
        after = query.offset + query.limit
        return CaptionPage(
            f"{query.database}@{found.generation}",
            model,
            tuple(passing[query.offset : after]),
            after if len(passing) > after and after <= MAX_OFFSET else None,
            len(found.captions),
            () if found.missing is None else (found.missing,),
        )

    async def _resolve_model(self, query: CaptionQuery) -> str:
        if query.model is not None:
            fingerprint = await self._models.get(query.model).text_fingerprint()
            await self.catalogue.check_model(query.database, fingerprint, field="model")
            return query.model
        manifest = await self.catalogue.manifest(query.database)
        models = await self.models_of(manifest)
        if not models:
            problem = (
                f"the caption database '{query.database}' was built with '{manifest.model}', which is not in service"
            )
            raise InvalidFieldError.of(
                "model", f"{problem}; add that model to DEIXIS_MODELS, or build the database again"
            )
        return models[0]

    async def _image_features(self, model: str, image: bytes | ClientError | ImageUrl | None) -> np.ndarray:
        assert image is not None
        (features,) = await self._models.encode_images(model, await self._remote_images.fetch([image]))
        if isinstance(features, ClientError):
            raise features
        row: np.ndarray = features[None]
        return row

    async def plan_default(self) -> BuildPlan | None:
        """Return the plan of the default database if it should be built: it is wanted, and there is no usable one.

        A database whose model is not in service any more is not usable.
        """
        default = self.catalogue.default
        if not self._build_default or default not in {EVERYDAY, WORDNET}:
            return None
        for state in await self.catalogue.states():
            manifest = state.manifest
            is_usable = manifest is not None and manifest.warning is None and state.problem is None
            if state.name == default and is_usable and manifest and await self.models_of(manifest):
                return None
        plan = BuildPlan(model=self._models.default, source=default)
        try:
            await asyncio.to_thread(self.check_plan, plan)
        except NotConfiguredError as error:
            log.warning("no_default_database", reason=error.message)
            return None
        self.catalogue.announce_build(default)
        return plan

    def check_plan(self, plan: BuildPlan) -> None:
        """Check that a plan can be carried out; reads the first noun of WordNet if that is the source.

        Raises:
            InvalidFieldError: no caption can meet its rules.
            UnknownNameError: the model is not in service.
            NotConfiguredError: its source is WordNet, which is not installed.
        """
        self.served(plan)
        assert plan.rules
        if plan.source == WORDNET:
            try:
                check_wordnet(self.catalogue.wordnet)
            except ConfigurationError as error:
                raise NotConfiguredError(error.message) from error

    async def build(
        self,
        name: str,
        plan: BuildPlan,
        sources: Sequence[Source],
        advance: Callable[[int, int], Awaitable[object]],
    ) -> Manifest:
        """Build a database.

        Raises:
            UnknownNameError: the model of the plan is not in service.
            Exception: as ``CaptionCatalogue.build``.
        """
        served = self.served(plan)
        return await self.catalogue.build(
            name,
            plan,
            sources,
            encode=partial(self._models.encode_in_background, plan.model),
            fingerprint=await served.text_fingerprint(),
            advance=advance,
        )

    def served(self, plan: BuildPlan) -> ServedModel:
        """Return the model of a plan; raises ``UnknownNameError`` if it is not in service."""
        return self._models.get(plan.model)


def _filter(found: NearestCaptions, query: CaptionQuery) -> list[tuple[str, float]]:
    # Stored captions are in NFC.
    wanted = None if query.contains is None else nfc(query.contains).casefold()
    return [
        (caption, cosine)
        for caption, cosine in zip(found.captions, found.cosines.tolist(), strict=True)
        if (wanted is None or wanted in caption.casefold()) and (query.min_score is None or cosine >= query.min_score)
    ]
