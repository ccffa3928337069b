"""Copies caption databases into a backup, and restores them from it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from app.captions.generations import CURRENT, current_generation, install, is_database
from app.names.namespaces import is_qualified_database_name


def copy_databases(captions_dir: Path, target: Path) -> tuple[str, ...]:
    """Copy the current generation of every database in ``captions_dir``, and return the names of the databases.

    Raises:
        StoreError: a database is damaged.
        OSError: a file cannot be read or written.
    """
    if not captions_dir.is_dir():
        return ()
    names = sorted(
        path.name for path in captions_dir.iterdir() if is_qualified_database_name(path.name) and is_database(path)
    )
    for name in names:
        generation = current_generation(captions_dir / name)
        shutil.copytree(captions_dir / name / generation, target / name / generation)
        (target / name / CURRENT).write_text(f"{generation}\n", "ascii")
    return tuple(names)


def restore_databases(captions_dir: Path, source: Path, names: Sequence[str]) -> None:
    """Copy databases from ``source`` to ``captions_dir``, where they replace those of the same name.

    Raises:
        StoreError: a database is damaged, or the disk is full.
        ConflictError: a database is being built.
    """
    for name in names:
        install(source / name / current_generation(source / name), captions_dir / name)
