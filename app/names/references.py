"""References to label sets, ``name`` or ``name@version``, and to generations of caption databases."""

from typing import NamedTuple, Self

from app.errors import InvalidFieldError

_SEPARATOR = "@"


class LabelSetReference(NamedTuple):
    """A label set: one version of it, or its latest version where ``version`` is None."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str, field: str = "label_set") -> Self:
        """Return the reference that ``name`` or ``name@version`` spells; the name is not checked.

        Raises:
            InvalidFieldError: the version is not a whole number of at most 9 digits.
        """
        name, separator, version = text.partition(_SEPARATOR)
        if not separator:
            return cls(name)
        if not (version.isascii() and version.isdigit() and len(version) <= 9):
            raise InvalidFieldError.of(field, f"{version[:40]!r} is not a version; write name or name@3")
        return cls(name, int(version))

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}{_SEPARATOR}{self.version}"
