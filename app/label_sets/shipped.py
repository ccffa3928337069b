"""The label sets that come with the installation: JSON files, each the body of a ``PUT /v1/label-sets/{name}``."""

from pathlib import Path

from app.errors import UnknownNameError
from app.runtime.data_files import resources


def shipped_files() -> dict[str, Path]:
    """Return the file of each label set that comes with the installation, sorted by name."""
    return {file.stem: file for file in sorted((resources("prompts") / "descriptions").glob("*.json"))}


def shipped_file(name: str, way_out: str = "") -> Path:
    """Return the file of a label set that comes with the installation.

    Args:
        name: of the label set.
        way_out: for the message of the error, what else the caller can do.

    Raises:
        UnknownNameError: no such label set comes with it.
    """
    files = shipped_files()
    if name not in files:
        raise UnknownNameError("shipped label set", name, files, way_out)
    return files[name]
