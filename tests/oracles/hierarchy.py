"""Scores and paths of a hierarchy from their definitions: walks up from each class, and down from the roots."""


def above(parents, index):
    path = [index]
    while parents[path[-1]] is not None:
        path.append(parents[path[-1]])
    return path


def rolled_up(scores, parents, independent):
    """Scores of classes and parents by label name; the result by label name."""
    found = {label: 0.0 for label in parents}
    for label, score in scores.items():
        for upper in above(parents, label):
            found[upper] = max(found[upper], score) if independent else found[upper] + score
    return found


def path(scores, parents, independent, min_score):
    sums, found = rolled_up(scores, parents, independent), []
    while True:
        here = found[-1] if found else None
        below = [label for label in parents if parents[label] == here]
        if not below:
            return found
        best = max(below, key=lambda label: sums[label])
        if sums[best] < min_score or scores.get(here, -1) > sums[best]:
            return found
        found.append(best)
