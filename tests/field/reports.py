"""The decorator of the tests in this folder, and the list of their reports."""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import tests.field


@dataclass(frozen=True)
class Report:
    """A public bug report: its thread as ``owner/repository#number``, and what happened to the user, in our words."""

    thread: str
    happened: str


def report(thread: str, happened: str) -> pytest.MarkDecorator:
    """Mark a test that does what the user of a bug report did; ``pytest -m report`` runs them all."""
    return pytest.mark.report(Report(thread, happened))


def reported_tests() -> Iterator[tuple[str, list[Report]]]:
    """Return the name of each test of this folder with its reports."""
    for module in pkgutil.iter_modules(tests.field.__path__):
        if module.name.startswith("test_") and module.name != "test_reports":
            for name, test in vars(importlib.import_module(f"tests.field.{module.name}")).items():
                if name.startswith("test_"):
                    yield name, [mark.args[0] for mark in getattr(test, "pytestmark", []) if mark.name == "report"]
