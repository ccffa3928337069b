"""Explanations: the prompts that raise the similarity of a label above its rival, and those that do not."""

from collections.abc import Mapping, Sequence

import numpy as np

from app.prompting.class_embeddings import prototype
from app.prompting.recipes import Pooling, Recipe, Row
from app.types import LabelExplanation, MergeSynonyms, PromptContribution

MAX_LABELS = 5
"""The largest number of labels that are explained."""

MAX_PROMPTS = 10
"""The largest number of supporting, and of opposing, prompts of a label."""


def explain(
    recipe: Recipe,
    classnames: Sequence[str],
    merge: MergeSynonyms,
    *,
    best: Sequence[int],
    similarities: np.ndarray,
    image: np.ndarray,
    features: Mapping[str, np.ndarray],
    slot_weights: np.ndarray | None,
) -> tuple[LabelExplanation, ...]:
    """Return the explanations of some classes for one image.

    Args:
        recipe: the prompts of every class.
        classnames: of every class.
        merge: how the scores of the names of a class were merged.
        best: the indices of the classes to explain, the best first.
        similarities: of every class, (c,).
        image: unit features (d,).
        features: unit features (d,) of every prompt of these classes.
        slot_weights: (k,), for methods that weight slots.
    """
    explanations = []
    for index in best:
        rival = _rival(index, best)
        against = None if rival is None else float(similarities[rival])
        # Without a rival, a prompt is compared with its own label.
        level = float(similarities[index]) if against is None else against
        prompts = _contributions(recipe, index, merge, image, features, slot_weights)
        prompts.sort(key=lambda prompt: -prompt.weight * abs(prompt.cosine - level))
        explanations.append(
            LabelExplanation(
                label=classnames[index],
                similarity=float(similarities[index]),
                rival=None if rival is None else classnames[rival],
                rival_similarity=against,
                supporting=tuple(prompt for prompt in prompts if prompt.cosine > level)[:MAX_PROMPTS],
                opposing=tuple(prompt for prompt in prompts if prompt.cosine <= level)[:MAX_PROMPTS],
            )
        )
    return tuple(explanations)


def prompts_to_explain(recipe: Recipe, indices: Sequence[int]) -> list[str]:
    """Return every prompt of these classes, once."""
    wanted = set(indices)
    return list(dict.fromkeys(text for row in recipe.rows if row.class_index in wanted for text in row.texts))


def _rival(index: int, best: Sequence[int]) -> int | None:
    if index != best[0]:
        return best[0]
    return best[1] if len(best) > 1 else None


def _contributions(
    recipe: Recipe,
    index: int,
    merge: MergeSynonyms,
    image: np.ndarray,
    features: Mapping[str, np.ndarray],
    slot_weights: np.ndarray | None,
) -> list[PromptContribution]:
    """Return the prompts of the names of a class: of the best name if scores are merged by maximum, else of all."""
    by_name = []
    for row in recipe.rows:
        if row.class_index == index:
            prompts = np.stack([features[text] for text in row.texts])
            by_name.append((row, prompts @ image, _weights(row, recipe.pooling, prompts, slot_weights)))
    if merge is MergeSynonyms.MAX:
        by_name = [max(by_name, key=lambda row_cosines_weights: float(row_cosines_weights[1] @ row_cosines_weights[2]))]
    share = 1 / len(by_name)
    return [
        PromptContribution(text, source, float(cosine), float(weight) * share)
        for row, cosines, weights in by_name
        for (source, text), cosine, weight in zip(_sources_and_texts(row), cosines, weights, strict=True)
    ]


def _sources_and_texts(row: Row) -> list[tuple[str, str]]:
    return [(slot.source, text) for slot in row.slots for text in slot.texts]


def _weights(row: Row, pooling: Pooling, prompts: np.ndarray, slot_weights: np.ndarray | None) -> np.ndarray:
    """Return the weights (k,) of the prompts, such that the weighted sum of their cosines is the row's similarity."""
    if pooling is Pooling.MEAN:
        return np.full(len(prompts), 1 / len(prompts))
    if pooling is Pooling.PROTOTYPE:
        return np.full(len(prompts), _share(prompts))
    assert slot_weights is not None
    ends = np.cumsum([len(slot.texts) for slot in row.slots])[:-1]
    parts = np.split(prompts, ends)
    return np.concatenate(
        [np.full(len(part), weight * _share(part)) for part, weight in zip(parts, slot_weights, strict=True)]
    )


def _share(prompts: np.ndarray) -> float:
    """Return the weight of each prompt's cosine in the cosine with their prototype."""
    length = float(np.linalg.norm(prompts.mean(axis=0)))
    return 0.0 if not prototype(prompts).any() else 1 / (len(prompts) * length)
