"""Locate the data files of the installation."""

from pathlib import Path


def resources(folder: str) -> Path:
    """Return the folder ``models`` or ``prompts``: inside an installed package, or next to it in a checkout."""
    inside = Path(__file__).parents[1] / "data" / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder
