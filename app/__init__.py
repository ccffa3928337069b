"""Deixis, a zero-shot vision-language classification service."""

__version__ = "0.1.0"
