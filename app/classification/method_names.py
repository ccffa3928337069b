"""The names of methods and priors that have a meaning of their own; ``methods.py`` has all methods."""

DEFAULT_METHOD = "zero-shot"

AUTO = "auto"
"""Not a method: selects one of them by the evidence."""

DISCOVERY_METHOD = "cased"
"""The method without classes."""

ESTIMATE, UNIFORM = "estimate", "uniform"
PRIOR_NAMES = (ESTIMATE, UNIFORM)
"""What a request can name as priors: the frequencies of the labelled images, or none."""
