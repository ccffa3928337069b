"""Thresholds of labels: counts, precision, recall, average precision and suggestions, by trying every threshold."""
from fractions import Fraction as F
import numpy as np
def counts(scores, truth, threshold):                       # one label; images at or above, and of these with the label
    return sum(s >= threshold for s in scores), sum(s >= threshold and y for s, y in zip(scores, truth))
def average_precision(scores, truth):                       # mean over the images with the label of the precision there
    found = [counts(scores, truth, s) for s, y in zip(scores, truth) if y]
    return float(np.mean([right / picked for picked, right in found])) if found else None
def halves(scores):                                         # a threshold below each distinct score, down to 0
    levels = sorted(set(scores)); lower = [min(0.0, levels[0]), *levels[:-1]]
    return [(a + b) / 2 for a, b in zip(lower, levels)]
def f1_with_shared(scores, truth, every, every_truth, threshold, weight=10):
    picked, right = counts(scores, truth, threshold); more, more_right = counts(every, every_truth, threshold)
    w = weight / max(1, sum(every_truth))                   # of all labels, as many images with a label as `weight`
    return 2 * (right + w * more_right) / (sum(truth) + picked + w * (sum(every_truth) + more))
def best_f1(scores, truth, every, every_truth):             # the highest value; None without an image of the label
    if not any(truth): return None
    def micro_f1(t): picked, right = counts(every, every_truth, t); return right / (sum(every_truth) + picked)
    shared = max(halves(every), key=micro_f1)               # the lowest of equal ones
    return max(f1_with_shared(scores, truth, every, every_truth, t) for t in [*halves(scores), shared])
def at_precision(scores, truth, precision):                 # the counts of the lowest threshold, one more error counted
    for t in sorted(set(scores)):
        picked, right = counts(scores, truth, t)
        if F(right, picked + 1) >= F(str(precision)): return picked, right
    return None
def at_recall(scores, truth, recall):                       # of the highest that a new image misses with 1 - recall
    n = sum(truth)
    for t in sorted(set(scores), reverse=True):
        if n and n - counts(scores, truth, t)[1] + 1 <= (1 - F(str(recall))) * (n + 1): return counts(scores, truth, t)
    return None
