"""NegLabel (Jiang et al., ICLR 2024) with equal priors for the labels and the words: a slow form with Python's floats."""
from math import exp, fsum

def none_of_these(labels, words, scale):
    """labels (n,c), words (n,m) cosines -> [P(none)]. P(w_j | x) ~ exp(scale * cos) / (2 m), P(l_i | x) ~ exp(...) / (2 c)."""
    out = []
    for a, b in zip(labels, words):
        top = max([float(x) for x in a] + [float(x) for x in b])          # any shift cancels
        known = fsum(exp(scale * (float(x) - top)) for x in a) / len(a)
        other = fsum(exp(scale * (float(x) - top)) for x in b) / len(b)
        out.append(other / (known + other))
    return out
