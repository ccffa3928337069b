"""Label sets: read, checked and written."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import InvalidFieldError
from app.names.class_names import MAX_DESCRIPTIONS_PER_CLASS, clean_classes, numbers_of
from app.names.hierarchy import forest_of
from app.names.namespaces import Namespace
from app.names.references import LabelSetReference
from app.prompting.templates import TemplateLibrary
from app.store.drafts import DraftRepository
from app.store.label_sets import IfMatch, LabelSetRepository, LabelSetSummary
from app.types import ClassEntry, LabelSet, MergeSynonyms

DEFAULT_TEMPLATES = "photo"


@dataclass(frozen=True, slots=True)
class LabelLimits:
    """How many labels a request may have, how many classes a label set, and how long each name may be."""

    max_labels: int
    max_classes: int
    max_label_chars: int


class LabelSets:
    """Label sets by the names they are stored under, which contain the namespace.

    Args:
        repository: stores them.
        drafts: stores descriptions that await a decision.
        templates: that a label set may name.
        limits: on the classes of a label set.
        max_label_sets: limit for one namespace.
        on_write: called with each new version.
        on_delete: called with the name of each deleted label set.
    """

    def __init__(
        self,
        repository: LabelSetRepository,
        drafts: DraftRepository,
        templates: TemplateLibrary,
        *,
        limits: LabelLimits,
        max_label_sets: int,
        on_write: Callable[[LabelSet], None],
        on_delete: Callable[[str], None],
    ) -> None:
        self._repository = repository
        self._drafts = drafts
        self._templates = templates
        self._limits = limits
        self._max_label_sets = max_label_sets
        self._on_write = on_write
        self._on_delete = on_delete

    async def get(self, name: str, version: int | None = None) -> LabelSet:
        """Return a version, by default the latest; raises as ``LabelSetRepository.get``."""
        return await self._repository.get(name, version)

    async def find(self, reference: LabelSetReference | str) -> LabelSet:
        """Return the label set of ``name`` (its latest version) or ``name@version``.

        Raises:
            InvalidFieldError: the version is not a number.
            UnknownNameError: no such label set or version.
        """
        name, version = LabelSetReference.parse(reference) if isinstance(reference, str) else reference
        return await self.get(name, version)

    async def list(
        self, limit: int, after: str | None = None, namespace: Namespace | None = None
    ) -> Sequence[LabelSetSummary]:
        """Return a page of summaries; as ``LabelSetRepository.list``."""
        return await self._repository.list(limit, after, namespace)

    async def put(
        self,
        name: str,
        classes: Sequence[ClassEntry],
        templates: str,
        *,
        merge_synonyms: MergeSynonyms = MergeSynonyms.MEAN,
        multi_label: bool = False,
        priors: Mapping[str, float] | None = None,
        if_match: IfMatch = None,
        if_none_match_any: bool = False,
    ) -> tuple[LabelSet, bool]:
        """Check and write a new version; also return whether the name is new.

        Raises:
            InvalidFieldError: a name breaks a rule, a class has no prior although others have one, there are priors and
                several labels per image, or the parents form no forest.
            UnknownNameError: no such template set.
            TooLargeError: too many classes, or too many label sets in the namespace.
            PreconditionFailedError: the latest version is not one that may be replaced.
        """
        await self._templates.load(templates, field="templates")
        if multi_label and priors is not None:
            problem = "say how often an image shows each class instead of the others, and multi_label allows several"
            raise InvalidFieldError.of("priors", f"{problem}; leave out priors, or set multi_label to false")
        label_set, created = await self._repository.put(
            name,
            # In a thread, because the largest label sets take a second.
            await asyncio.to_thread(self._checked, classes, priors),
            templates,
            merge_synonyms=merge_synonyms,
            multi_label=multi_label,
            if_match=if_match,
            if_none_match_any=if_none_match_any,
            max_label_sets=self._max_label_sets,
        )
        self._on_write(label_set)
        return label_set, created

    async def add_classes(
        self,
        name: str,
        classes: Sequence[ClassEntry],
        *,
        priors: Mapping[str, float] | None = None,
        if_match: IfMatch = None,
    ) -> LabelSet:
        """Check and append classes, as a new version; raises as ``put``, and ``ConflictError`` for a known class."""
        label_set = await self._repository.add_classes(
            name,
            await asyncio.to_thread(self._checked, classes, priors),
            max_classes=self._limits.max_classes,
            if_match=if_match,
        )
        self._on_write(label_set)
        return label_set

    async def remove_class(self, name: str, classname: str, *, if_match: IfMatch = None) -> LabelSet:
        """Remove a class, as a new version; raises as ``LabelSetRepository.remove_class``."""
        return await self._repository.remove_class(name, self.clean_classname(classname), if_match=if_match)

    async def set_thresholds(
        self, name: str, thresholds: Mapping[str, float | None], *, if_match: IfMatch = None
    ) -> LabelSet:
        """Write a new version with other thresholds; raises as ``LabelSetRepository.set_thresholds``."""
        label_set = await self._repository.set_thresholds(name, thresholds, if_match=if_match)
        self._on_write(label_set)
        return label_set

    async def delete(self, name: str, *, if_match: IfMatch = None) -> None:
        """Delete a label set with its examples, drafts and fitted adapters; raises as ``LabelSetRepository.delete``."""
        await self._repository.delete(name, if_match=if_match)
        self._on_delete(name)

    async def accept_drafts(
        self, name: str, ids: Collection[int] | None = None, *, if_match: IfMatch = None
    ) -> tuple[LabelSet, int]:
        """Put drafts, by default all undecided ones, into a new version; raises as ``DraftRepository.accept``."""
        label_set, accepted = await self._drafts.accept(
            name, ids, max_texts=MAX_DESCRIPTIONS_PER_CLASS, if_match=if_match
        )
        self._on_write(label_set)
        return label_set, accepted

    def _checked(self, classes: Sequence[ClassEntry], priors: Mapping[str, float] | None) -> tuple[ClassEntry, ...]:
        """Return the classes with their texts normalised and checked, and with their priors if there are any."""
        cleaned = self.clean_classes(classes)
        forest_of(cleaned)
        if priors is None:
            return cleaned
        numbers = numbers_of(priors, [entry.name for entry in cleaned], "priors")
        return tuple(replace(entry, prior=number) for entry, number in zip(cleaned, numbers, strict=True))

    def clean_classes(self, classes: Sequence[ClassEntry]) -> tuple[ClassEntry, ...]:
        """Return classes with their texts normalised and checked; raises as ``names.clean_classes``."""
        return self._clean_classes(classes, in_urls=True)

    def clean_classname(self, classname: str) -> str:
        """Return the name of a class that is stored already, normalised and checked; raises as ``clean_classes``."""
        (entry,) = self._clean_classes([ClassEntry(classname)], in_urls=False)
        return entry.name

    def _clean_classes(self, classes: Sequence[ClassEntry], *, in_urls: bool) -> tuple[ClassEntry, ...]:
        return clean_classes(
            classes,
            max_classes=self._limits.max_classes,
            max_label_chars=self._limits.max_label_chars,
            field="classes",
            setting="DEIXIS_MAX_CLASSES",
            in_urls=in_urls,
        )
