"""Class prototypes written for reading: one class at a time, each with its own number of prompts.

Inputs: T is a list of c arrays (k_c, d) of text embeddings of any norm.
"""

import numpy as np


def unit(a, axis=-1, eps=1e-12):
    return a / np.maximum(np.linalg.norm(a, axis=axis, keepdims=True), eps)


def cupl_prototypes(T):  # noqa: N803 - a matrix
    """Unit -> mean -> unit, as CLIP's 80 templates and CuPL do it."""
    return np.stack([unit(unit(t).mean(0)) for t in T])
