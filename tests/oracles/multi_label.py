"""Independent scores of labels: a label against the words that are more similar to the image than 98 % of the words."""
import math
def score(logit, word_logits, related=0.02):               # one image, one label; lists of floats
    w = sorted(word_logits); p = (1 - related) * (len(w) - 1); i = math.floor(p); j = math.ceil(p)
    zero = w[i] * (1 - (p - i)) + w[j] * (p - i)            # linear interpolation of order statistics
    z = logit - zero
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
def above(scores, thresholds):                              # indices, best first; ties in their order
    kept = [i for i, (s, t) in enumerate(zip(scores, thresholds)) if s >= t]
    return sorted(kept, key=lambda i: -scores[i])
