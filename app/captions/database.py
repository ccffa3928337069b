"""An open caption database: the captions nearest to an image or a text.

A database is a folder of generations (``app/captions/generations.py``). A generation contains:

- ``manifest.json``: its contents and how it was made (``Manifest``);
- ``texts.bin`` and ``offsets.npy``: the captions (``app/captions/texts.py``);
- ``features.npy``: their text features in half precision, (n, d);
- ``index.faiss``: the index.

A small database has a flat index: the features again, all of which are compared. A large one has an inverted file of
product codes, about d/8 + 8 bytes per caption, that finds candidates; the features then decide. So the cosines are
always those of the stored features, whatever the index lost.
"""

import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float16, Float32, Int

from app.captions.generations import current_generation
from app.captions.index import WHOLE, CaptionIndex, Part
from app.captions.manifest import DATA_FILES, FEATURES, INDEX, Manifest, check_files, damage_reported, read_manifest
from app.captions.texts import CaptionTexts
from app.errors import ConfigurationError, StoreError
from app.runtime.arrays import map_array
from app.types import ImageFeatures, TextFeatures

_MAX_OPEN_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class NearestCaptions:
    """The captions nearest to a query, the nearest first, with their cosines (k,) and optionally features (k, d).

    ``missing`` says which captions could not be searched; None if all were searched.
    """

    captions: tuple[str, ...]
    cosines: Float32[np.ndarray, " k"]
    features: TextFeatures | None
    generation: str
    missing: str | None = None


def merge_parts(found: Sequence[NearestCaptions], k: int, missing: str | None) -> NearestCaptions:
    """Return the k nearest captions of the parts of one generation; they are those of the whole."""
    cosines = np.concatenate([part.cosines for part in found])
    best = np.argsort(-cosines, kind="stable")[:k]
    captions = [caption for part in found for caption in part.captions]
    features = [part.features for part in found if part.features is not None]
    return NearestCaptions(
        tuple(captions[index] for index in best),
        cosines[best],
        np.concatenate(features)[best] if features else None,
        found[0].generation,
        missing,
    )


class OpenFiles:
    """The files of an open generation, which are mapped into memory.

    The operating system ends a process that reads behind the end of a mapped file.

    Args:
        generation_folder: contains the files.
        manifest: their sizes.
    """

    def __init__(self, generation_folder: Path, manifest: Manifest) -> None:
        self._files: list[tuple[Path, int, int]] = []
        for name in DATA_FILES:
            file = generation_folder / name
            opened = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, opened)
            self._files.append((file, opened, manifest.files[name]["bytes"]))

    @property
    def problem(self) -> str | None:
        """Which file was truncated after it was opened; None if no file was."""
        for file, opened, expected in self._files:
            size = os.fstat(opened).st_size
            if size < expected:
                return f"'{file}' was truncated from {expected} to {size} bytes; build the database again"
        return None


class CaptionDatabase:
    """An open generation. Several threads may read it, also after another generation became the current one.

    Args:
        generation: the name of its folder.
        manifest: its manifest.
        texts: n captions.
        features: their features (n, d).
        index: of the features.
        files: that these are mapped from.
    """

    def __init__(
        self,
        generation: str,
        manifest: Manifest,
        texts: CaptionTexts,
        features: Float16[np.ndarray, "n d"],
        index: CaptionIndex,
        files: OpenFiles,
    ) -> None:
        self.generation = generation
        self.manifest = manifest
        self._texts = texts
        self._features = features
        self._index = index
        self._files = files

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None, verify: bool = False) -> Self:
        """Open the current generation of the database in ``folder``.

        Args:
            folder: of the database.
            fingerprint: of the text tower that must have encoded the captions, because searches with another model
                are meaningless. None leaves this check to the caller.
            verify: also compare checksums, which reads every file once.

        Raises:
            StoreError: there is no database, or it is of a newer release, or a file is missing or damaged.
            ConfigurationError: another model encoded the captions.
        """
        generation = current_generation(folder)
        for _ in range(_MAX_OPEN_ATTEMPTS):
            try:
                return cls._open(folder, generation, fingerprint, verify=verify)
            except StoreError:
                # A build may just have replaced and removed it.
                before, generation = generation, current_generation(folder)
                if generation == before:
                    raise
        return cls._open(folder, generation, fingerprint, verify=verify)

    @classmethod
    def open_generation(cls, folder: Path, generation: str) -> Self:
        """Open a generation by its name, also one that is not current any more; raises StoreError."""
        return cls._open(folder, generation, None, verify=False)

    @classmethod
    def _open(cls, folder: Path, generation: str, fingerprint: str | None, *, verify: bool) -> Self:
        generation_folder = folder / generation
        manifest = read_manifest(generation_folder)
        if fingerprint not in {None, manifest.fingerprint}:
            problem = f"the caption database '{folder}' was built with another model, '{manifest.model}'"
            raise ConfigurationError(f"{problem}; use that model, or build the database again with this one")
        check_files(generation_folder, manifest, verify=verify)
        with damage_reported(generation_folder):
            files = OpenFiles(generation_folder, manifest)
        texts = CaptionTexts.open(generation_folder)
        features = _open_features(generation_folder)
        if features.shape != (manifest.captions, manifest.dims) or len(texts) != manifest.captions:
            problem = f"'{generation_folder}' has {len(texts)} captions and features {features.shape}, but should have "
            raise StoreError(f"{problem}{manifest.captions} of {manifest.dims}; build the database again")
        index = CaptionIndex.open(generation_folder / INDEX, features, manifest.index)
        return cls(generation, manifest, texts, features, index, files)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def problem(self) -> str | None:
        """Why it cannot be searched any more; None if it can."""
        return self._files.problem

    @property
    def nbytes_resident(self) -> int:
        """About how many bytes are always in memory; mapped files are not counted."""
        return self._index.nbytes_resident

    def search(
        self, queries: ImageFeatures | TextFeatures, k: int, part: Part = WHOLE
    ) -> tuple[Int[np.ndarray, "q m"], Float32[np.ndarray, "q m"]]:
        """Return the indices and cosines of the m = min(k, n) captions nearest to each query, the nearest first.

        A part may have fewer than m of the captions that a search of the whole reads; the result is then filled with
        index -1 and cosine -1.

        Args:
            queries: unit rows (q, d); values that are not finite count as zero.
            k: at least 1.
            part: the part to search.

        Raises:
            ValueError: the queries have other dimensions, or k is below 1.
            StoreError: a file was truncated after it was opened.
        """
        if self.problem is not None:
            raise StoreError(self.problem)
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dims:
            raise ValueError(f"queries have shape {queries.shape}, but captions have {self.manifest.dims} dimensions")
        if k < 1:
            raise ValueError(f"k is {k}, but must be at least 1")
        return self._index.search(queries, k, part)

    def nearest(
        self,
        indices: Int[np.ndarray, " k"],
        cosines: Float32[np.ndarray, " k"],
        *,
        features: bool,
    ) -> NearestCaptions:
        """Return one query's result of ``search`` as captions, copied so that it outlives this generation.

        Raises:
            StoreError: the index names captions that do not exist.
        """
        indices, cosines = indices[indices != -1], cosines[indices != -1]
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            problem = f"the index of the caption database '{self.manifest.name}' is damaged"
            raise StoreError(f"{problem}; build the database again")
        rows = self.features(indices) if features else None
        # Rows in half precision are not exactly of unit length.
        return NearestCaptions(tuple(self.captions(indices)), cosines.clip(-1, 1), rows, self.generation)

    def captions(self, indices: Iterable[int] | Int[np.ndarray, " m"]) -> list[str]:
        """Return the captions at ``indices``, in that order."""
        return self._texts.many(indices)

    def features(self, indices: Int[np.ndarray, " m"]) -> TextFeatures:
        """Return the stored features (m, d) at ``indices``, converted to single precision."""
        rows: TextFeatures = self._features[np.asarray(indices, np.int64)].astype(np.float32)
        return rows


def _open_features(generation_folder: Path) -> Float16[np.ndarray, "n d"]:
    with damage_reported(generation_folder):
        features = map_array(generation_folder / FEATURES)
        if features.dtype != np.float16:
            raise StoreError(f"'{generation_folder / FEATURES}' has type {features.dtype}; build the database again")
        return np.asarray(features)
