"""Namespaces, and the names of label sets and caption databases in them.

A name is stored together with its namespace, as in ``acme#pets``: the *qualified name*. Callers neither send nor see
the qualified name. The methods of ``Namespace`` make it from the name that a caller sends; ``own_name`` and ``hide``
remove the namespace from what a caller receives.
"""

import re
from dataclasses import dataclass

from app.errors import FieldProblem, InvalidFieldError
from app.names.references import LabelSetReference
from app.names.text import check_text, quoted

NAMESPACE_SEPARATOR = "#"
"""Stands between the namespace and the name in a qualified name; no name may contain it."""

_MAX_LABEL_SET_NAME_CHARS = 64
_RESERVED_IN_URLS = "/\\@:?#%,"

_DATABASE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_NAMESPACE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Namespace:
    """The owner of label sets and caption databases.

    The namespace without a name is the open one: that of callers without a key, and of keys without a namespace.
    """

    name: str = ""

    def label_set(self, raw: str, field: str = "name") -> str:
        """Return the qualified name of a label set; raises as ``clean_label_set_name``."""
        return self.qualify(clean_label_set_name(raw, field))

    def reference(self, raw: str, field: str = "label_set") -> LabelSetReference:
        """Return a ``name`` or ``name@version`` of this namespace, with the qualified name.

        Raises:
            InvalidFieldError: the name or the version breaks a rule.
        """
        name, version = LabelSetReference.parse(raw, field)
        return LabelSetReference(self.label_set(name, field), version)

    def database(self, raw: str, field: str = "name") -> str:
        """Return the qualified name of a caption database; raises as ``clean_database_name``."""
        return self.qualify(clean_database_name(raw, field))

    def qualify(self, name: str) -> str:
        """Return the qualified name of a name that is already clean."""
        return f"{self.name}{NAMESPACE_SEPARATOR}{name}" if self.name else name

    def contains(self, qualified: str) -> bool:
        """Return whether a qualified name belongs to this namespace."""
        return namespace_of(qualified) == self

    def hide(self, text: str) -> str:
        """Return the text with this namespace removed from every qualified name in it."""
        return text.replace(f"{self.name}{NAMESPACE_SEPARATOR}", "") if self.name else text


OPEN_NAMESPACE = Namespace()


def namespace_of(qualified: str) -> Namespace:
    """Return the namespace of a qualified name or reference."""
    return (
        Namespace(qualified.partition(NAMESPACE_SEPARATOR)[0]) if NAMESPACE_SEPARATOR in qualified else OPEN_NAMESPACE
    )


def own_name(qualified: str) -> str:
    """Return a qualified name or reference without its namespace, as its callers know it."""
    return qualified.rpartition(NAMESPACE_SEPARATOR)[2]


def clean_namespace(raw: str, field: str) -> Namespace:
    """Return the namespace of a name; the empty name is the open namespace.

    Raises:
        InvalidFieldError: it is not made of at most 32 lower-case letters, digits, ``-`` and ``_``.
    """
    if raw and not _NAMESPACE_NAME.fullmatch(raw):
        rule = "use 1 to 32 of a-z, 0-9, - and _, the first one a letter or a digit"
        raise InvalidFieldError.of(field, f"{quoted(raw)} is not a valid namespace; {rule}")
    return Namespace(raw)


def clean_label_set_name(raw: str, field: str) -> str:
    """Return the name of a label set, trimmed and in NFC; also for names that are only looked up.

    Raises:
        InvalidFieldError: the name is empty, longer than 64 characters, or contains a character that it must not.
    """
    name, problems = check_text(raw, _MAX_LABEL_SET_NAME_CHARS, keep_spaces=True)
    if name.startswith("."):
        problems.append(f"{quoted(name)} begins with '.', which has a meaning in URL paths; remove it")
    if reserved := sorted(set(name) & set(_RESERVED_IN_URLS)):
        listed = " ".join(reserved)
        rule = f"a name may contain none of {_RESERVED_IN_URLS}"
        problems.append(f"{quoted(name)} contains {listed} , and {rule}; use - instead")
    if problems:
        raise InvalidFieldError([FieldProblem(field, problem) for problem in problems])
    return name


def clean_database_name(raw: str, field: str) -> str:
    """Return the name of a caption database, trimmed. It also names a folder, on any file system.

    Raises:
        InvalidFieldError: it is not made of 1 to 64 lower-case letters, digits, ``-`` and ``_``.
    """
    name = raw.strip(" ")
    if not is_database_name(name):
        rule = "use 1 to 64 of a-z, 0-9, - and _, the first one a letter or a digit"
        raise InvalidFieldError.of(field, f"{quoted(name)} is not a valid name of a caption database; {rule}")
    return name


def is_database_name(name: str) -> bool:
    """Return whether a caption database may have this name."""
    return _DATABASE_NAME.fullmatch(name) is not None


def is_qualified_database_name(qualified: str) -> bool:
    """Return whether it is a name of a caption database, with or without a namespace; no path is."""
    namespace, separator, name = qualified.rpartition(NAMESPACE_SEPARATOR)
    return is_database_name(name) and (not separator or _NAMESPACE_NAME.fullmatch(namespace) is not None)
