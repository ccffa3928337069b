"""The names of methods that have a meaning of their own; ``methods.py`` has all methods."""

DEFAULT_METHOD = "zero-shot"

AUTO = "auto"
"""Not a method: selects one of them by the evidence."""

DISCOVERY_METHOD = "cased"
"""The method without classes."""
