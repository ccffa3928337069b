"""Charts as image files, for commands with ``--picture``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import FieldProblem, InvalidFieldError
from deixis.extras import needs_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".svg", ".png", ".pdf")


def check_picture(file: Path) -> None:
    """Check before the measurement that the picture can be written.

    Raises:
        InvalidFieldError: an unknown format, no such folder, or the extra is not installed.
    """
    if file.suffix not in _SUFFIXES:
        raise InvalidFieldError.of("--picture", f"'{file.name}' must end in one of {', '.join(_SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise InvalidFieldError.of("--picture", f"there is no folder {file.absolute().parent}")
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        import matplotlib  # noqa: F401, PLC0415 - an optional dependency
    except ImportError as error:
        raise InvalidFieldError([FieldProblem("", needs_extra("--picture", "plots"))]) from error


def write_picture(figure: "Figure", file: Path) -> None:
    """Write a figure and close it.

    Raises:
        InvalidFieldError: the file cannot be written.
    """
    from matplotlib import pyplot as plt  # noqa: PLC0415 - an optional dependency

    try:
        figure.savefig(file)
    except OSError as error:
        raise InvalidFieldError.of("--picture", f"{file} cannot be written: {error.strerror}") from error
    finally:
        plt.close(figure)
