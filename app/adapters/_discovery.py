"""Find every adapter of this package, and read its options from its constructor."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_type_hints

import app.adapters
from app.adapters._base import Adapter, Declaration, Range
from app.types import Option


def adapter_classes() -> tuple[type[Adapter], ...]:
    """Return the classes with a ``declaration`` from the modules of this package, in the order of module names.

    Modules whose names begin with ``_`` are helpers.
    """
    names = sorted(each.name for each in pkgutil.iter_modules(app.adapters.__path__) if not each.name.startswith("_"))
    modules = [importlib.import_module(f"{app.adapters.__name__}.{name}") for name in names]
    return tuple(
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and isinstance(getattr(value, "declaration", None), Declaration)
    )


@functools.cache
def options_of(adapter: type[Adapter]) -> Mapping[str, Option]:
    """Return the options that the arguments of ``__init__`` declare with ``Range``, in their order."""
    hints = get_type_hints(adapter.__init__, include_extras=True)
    options = {}
    for name, parameter in inspect.signature(adapter).parameters.items():
        for given in _metadata(hints.get(name)):
            if isinstance(given, Range):
                whole = hints[name].__origin__ is int
                options[name] = Option(parameter.default, given.minimum, given.maximum, given.description, whole=whole)
    return MappingProxyType(options)


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())
