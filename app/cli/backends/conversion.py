"""Domain objects as the types of ``deixis.answers``, so that both backends return the same types."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from app import types
from app.api.problems import problem
from app.captions.catalogue import DatabaseState
from app.captions.search import CaptionPage
from app.errors import ClientError
from app.names.namespaces import own_name
from app.selection.selection_reader import evidence_of
from app.selection.threshold_curves import LabelThresholds
from app.store.drafts import Draft
from app.store.examples import Added, ExampleCounts, NewExample, StoredSelection
from app.store.label_sets import LabelSetSummary
from deixis import answers

A = TypeVar("A", bound=answers.Answer)

# Fields of a manifest that a database has as well; None if it has no readable manifest.
_MANIFEST_FIELDS = (
    *("captions", "model", "dims", "index", "recall", "recall_at", "recall_target"),
    *("counts", "source_notes", "licence", "created_at"),
)


def failed_image(error: ClientError) -> answers.ImageResult:
    """Return the result of an image with an error."""
    return answers.ImageResult(predictions=[], error=answers.Problem(**problem(error)))


def image_result(result: types.ImageResult, warnings: Sequence[str]) -> answers.ImageResult:
    """Return the result of an image, with the warnings of its request."""
    if result.error is not None:
        return failed_image(result.error).model_copy(update={"warnings": list(warnings)})
    return _validated(
        answers.ImageResult,
        predictions=list(result.predictions),
        explanation=_explanation(result),
        out_of_vocabulary=result.out_of_vocabulary,
        prediction_set=result.prediction_set,
        rejected=result.rejected,
        rejection_score=result.rejection_score,
        weak_match=result.weak_match,
        labels=result.labels,
        path=result.path,
        warnings=[*warnings, *result.warnings],
    )


def _explanation(result: types.ImageResult) -> answers.Explanation | None:
    if result.explanation is None and result.captions is None:
        return None
    labels = [
        _validated(
            answers.LabelExplanation,
            label=entry.label,
            similarity=entry.similarity,
            rival=entry.rival,
            rival_similarity=entry.rival_similarity,
            supporting=[_contribution(prompt) for prompt in entry.supporting],
            opposing=[_contribution(prompt) for prompt in entry.opposing],
        )
        for entry in result.explanation or ()
    ]
    return _validated(answers.Explanation, labels=labels, captions=result.captions or ())


def _contribution(prompt: types.PromptContribution) -> answers.PromptContribution:
    return answers.PromptContribution(
        prompt=prompt.text, source=prompt.source, cosine=prompt.cosine, weight=prompt.weight
    )


def shared_names(names: Sequence[types.SharedName] | None) -> list[answers.SharedName]:
    """Return the labels that several images share."""
    return [answers.SharedName(label=name.label, images=name.images) for name in names or ()]


def label_set(found: types.LabelSet) -> answers.LabelSet:
    """Return one version of a label set."""
    return _validated(
        answers.LabelSet,
        name=own_name(found.name),
        version=found.version,
        classes=found.classes,
        templates=found.templates,
        merge_synonyms=found.merge_synonyms.value,
        multi_label=found.multi_label,
        priors=found.priors,
        created_at=found.created_at,
    )


def label_set_summary(found: LabelSetSummary) -> answers.LabelSetSummary:
    """Return a label set of a list."""
    return answers.LabelSetSummary(
        name=own_name(found.name),
        version=found.version,
        classes=found.class_count,
        multi_label=found.multi_label,
        created_at=found.created_at,
    )


def example_counts(counts: ExampleCounts) -> answers.ExampleCounts:
    """Return the number of example images by class."""
    return answers.ExampleCounts.model_validate(counts, from_attributes=True)


def added_examples(
    added: Added, prepared: Sequence[NewExample | ClientError], counts: ExampleCounts
) -> answers.AddedExamples:
    """Return the result of an upload, with the images that could not be prepared."""
    return answers.AddedExamples(
        added=added.added,
        duplicates=added.duplicates,
        relabelled=added.relabelled,
        skipped=[
            answers.SkippedImage(image=index, problem=item.message)
            for index, item in enumerate(prepared)
            if isinstance(item, ClientError)
        ],
        counts=example_counts(counts),
        job=None,
    )


def selection(found: StoredSelection) -> answers.Selection:
    """Return the selected method and its evidence."""
    return answers.Selection(
        version=found.version,
        examples_revision=found.revision,
        current=found.is_current,
        created_at=found.created_at,
        **evidence_of(found.result),
    )


def thresholds(measured: LabelThresholds) -> answers.Thresholds:
    """Return the thresholds of the labels of a label set."""
    return _validated(
        answers.Thresholds,
        label_set=own_name(measured.label_set.reference),
        version=measured.label_set.version,
        multi_label=measured.label_set.multi_label,
        model=measured.model,
        images=measured.images,
        calibrated=measured.is_calibrated,
        labels=measured.labels,
    )


def draft(found: Draft) -> answers.Draft:
    """Return a draft."""
    return answers.Draft(
        id=found.id,
        label=found.classname,
        kind=found.kind.value,
        text=found.text,
        question=found.question,
        model=found.model,
        status=found.status.value,
        asked_at=found.asked_at,
        decided_at=found.decided_at,
    )


def database(state: DatabaseState, models: Sequence[str], *, default: bool, problem: str | None) -> answers.Database:
    """Return a caption database that can be queried by ``models``."""
    manifest: Mapping[str, Any] = {name: getattr(state.manifest, name, None) for name in _MANIFEST_FIELDS}
    return _validated(
        answers.Database,
        name=own_name(state.name),
        default=default,
        models=models,
        generation=state.generation,
        bytes=state.nbytes,
        problem=problem,
        **manifest,
    )


def found_captions(page: CaptionPage) -> answers.FoundCaptions:
    """Return one page of captions."""
    return answers.FoundCaptions(
        database=own_name(page.database),
        model=page.model,
        results=[answers.FoundCaption(caption=caption, score=score) for caption, score in page.captions],
        searched=page.searched,
        next_offset=page.next_offset,
        warnings=list(page.warnings),
    )


def _validated(kind: type[A], **fields: Any) -> A:
    """Return an answer whose nested answers are read from the attributes of domain objects."""
    return kind.model_validate(fields, from_attributes=True)
