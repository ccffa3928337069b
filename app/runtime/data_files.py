"""Where the data files are that belong to the code."""

from pathlib import Path


def resources(folder: str) -> Path:
    """Return ``models`` or ``prompts``: inside the package in an installed wheel, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "data" / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder
