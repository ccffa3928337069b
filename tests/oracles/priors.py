"""Priors from their definitions, with loops: P(c | x) is reweighed by wanted over predicted frequencies."""
import math


def softmax(row):
    top = max(row)
    shares = [math.exp(value - top) for value in row]
    total = sum(shares)
    return [share / total for share in shares]


def smoothed(counts):
    total = sum(counts) + len(counts)
    return [(count + 1) / total for count in counts]


def counted(labels, classes):
    return smoothed([sum(label == index for label in labels) for index in range(classes)])


def predicted(logits, temperature, classes):
    rows = [softmax([value / temperature for value in row]) for row in logits]
    return smoothed([sum(row[index] for row in rows) for index in range(classes)])


def posterior(row, temperature, wanted, contained):
    """Saerens et al., 2002, eq. 2.4: the posterior under new frequencies, from that under those that it contains."""
    shares = softmax([value / temperature for value in row])
    products = [share * new / old for share, new, old in zip(shares, wanted, contained)]
    return [product / sum(products) for product in products]
