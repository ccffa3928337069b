"""The caption database as readers see it: the captions nearest to an image or a text.

A database is a folder of generations, each named by a digest of what it holds, and a file ``current`` that names the
one in use. A generation is never changed once it is there, so that whoever has it open is not disturbed when the next
one takes its place. It holds:

- ``manifest.json``: what is in it and by whom it was made (``Manifest``);
- ``texts.bin`` and ``offsets.npy``: the captions (``app/captions/texts.py``);
- ``features.npy``: their text features in half precision, (n, d);
- ``index.faiss``: the index that is searched.

Up to ``EXACT_UP_TO`` captions the index is the features again and every cosine is taken. Above, it is an inverted file
of product codes, about d/8 + 8 bytes per caption, that finds candidates; the features themselves then decide. So the
cosines are always those of the features as they are stored, whatever the index lost.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float16, Float32, Int
from pydantic import TypeAdapter

from app.captions.texts import OFFSETS, TEXTS, CaptionTexts
from app.errors import ConfigurationError, StoreError
from app.types import ImageFeatures, TextFeatures

FORMAT = 1
"""Of the files; a reader refuses those that are newer."""

EXACT_UP_TO = 75_000
"""Captions up to which every cosine is taken, which takes about three milliseconds; WordNet's nouns are fewer."""

CURRENT = "current"
MANIFEST = "manifest.json"
FEATURES = "features.npy"
INDEX = "index.faiss"
DATA_FILES = (TEXTS, OFFSETS, FEATURES, INDEX)
GENERATION = re.compile(r"[0-9a-f]{16}")
FLAT = "flat"
IVF_PQ = "ivf-pq"

# Captions that the codes name for each one wanted, among which the features then choose, and how many at least.
_CANDIDATES = 8
_LEAST_CANDIDATES = 400
_MOST_CANDIDATES = 2000
_READ_AT_ONCE = 2**22
_TRIES = 3


@dataclass(frozen=True, slots=True)
class IndexParameters:
    """How a database is searched.

    ``kind`` is ``flat`` or ``ivf-pq``; of the latter, ``lists`` are the lists of the inverted file, ``probes`` those
    that a search reads, and ``code_bytes`` is the length of a code. All three are 0 for ``flat``.
    """

    kind: str
    lists: int = 0
    probes: int = 0
    code_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One of ``of`` parts of a database, about as large as the others.

    Its captions follow each other; where the index is an inverted file, they are those of lists that do.
    """

    number: int = 0
    of: int = 1

    def rows(self, count: int) -> range:
        """Return which of so many captions are its own, where there are no lists."""
        return range(count * self.number // self.of, count * (self.number + 1) // self.of)


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a generation holds and how it was made.

    ``counts`` tells what became of the captions of the source. ``recall`` is the share of the ``recall_at`` nearest
    captions that a search finds, by what it was measured with: ``near`` and ``far`` are captions with little and much
    noise, by which searches by images are only guessed, and ``images`` are images. ``files`` maps the name of each file
    to its ``bytes`` and ``sha256``.
    """

    format: int
    name: str
    source_notes: str
    licence: str
    model: str
    fingerprint: str
    captions: int
    dims: int
    counts: Mapping[str, int]
    index: IndexParameters
    recall: Mapping[str, float]
    recall_at: int
    recall_target: float
    files: Mapping[str, Mapping[str, Any]]
    created_at: str

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned; unknown keys are left out.

        Raises:
            KeyError, ValueError: a key is missing, or something has the wrong type.
        """
        manifest: Self = _manifests().validate_python({each.name: content[each.name] for each in fields(cls)})
        if any(type(manifest.files[name].get("bytes")) is not int for name in DATA_FILES):
            raise ValueError("the size of a file is missing")
        return manifest

    @property
    def generation(self) -> str:
        """The name of its folder: a digest of everything but ``created_at``."""
        told = {key: value for key, value in self.to_json().items() if key != "created_at"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _manifests() -> TypeAdapter[Any]:
    return TypeAdapter(Manifest)


class CaptionIndex:
    """Finds the nearest of n rows of features; searches may run in several threads.

    Args:
        index: FAISS's.
        features: the rows, which decide among the candidates of an inexact index.
        probes: lists that a search reads; 0 for an exact index.
    """

    def __init__(self, index: Any, features: Float16[np.ndarray, "n d"], probes: int) -> None:
        self._index = index
        self._features = features
        self.probes = probes
        lists = range(index.nlist) if probes else ()
        self._sizes = np.array([index.invlists.list_size(each) for each in lists], np.int64)
        self._begins = np.cumsum(self._sizes) - self._sizes

    @classmethod
    def open(cls, file: Path, features: Float16[np.ndarray, "n d"], parameters: IndexParameters) -> Self:
        """Read an index, as far as possible mapped into memory.

        Raises:
            StoreError: it is damaged, or not of these rows.
        """
        import faiss  # noqa: PLC0415 - commands that search nothing do not wait for it

        exact = parameters.kind == FLAT
        # FAISS maps an inverted file by the one flag, and a flat index, since 1.10, by the other.
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if exact else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        try:
            index: Any = faiss.read_index(str(file), flags)
        except (RuntimeError, MemoryError) as error:
            raise StoreError(f"the index '{file}' cannot be read; build the database again") from error
        if (index.ntotal, index.d) != features.shape or hasattr(index, "nprobe") is exact:
            problem = f"the index '{file}' is of {index.ntotal} rows of {index.d}, but there are {features.shape}"
            raise StoreError(f"{problem}; build the database again")
        if not exact:
            lists: Any = faiss.downcast_InvertedLists(index.invlists)
            # Else each search would start up to 32 threads, which read ahead.
            lists.prefetch_nthread = 0
        return cls(index, features, parameters.probes)

    def search(
        self, queries: ImageFeatures | TextFeatures, k: int, part: Part = WHOLE
    ) -> tuple[Int[np.ndarray, "q m"], Float32[np.ndarray, "q m"]]:
        """Return the indices and cosines of the m = min(k, n) nearest of the n rows of a part, the nearest first.

        Where a part of an inverted file has fewer in the lists that are read, the others have index -1 and cosine -1.
        """
        import faiss  # noqa: PLC0415 - as above

        rows = np.ascontiguousarray(np.nan_to_num(queries, posinf=0, neginf=0), np.float32)
        own = part.rows(len(self._features))
        lists = self._lists(part)
        count = int(self._sizes[lists.start : lists.stop].sum()) if self.probes else len(own)
        wanted = min(k, count)
        if not len(rows) or not wanted:
            return np.empty((len(rows), wanted), np.int64), np.empty((len(rows), wanted), np.float32)
        # Of this thread only: requests have the cores, and one search is too short to be shared.
        faiss.omp_set_num_threads(1)
        if not self.probes:
            selector: Any = None if part == WHOLE else faiss.IDSelectorRange(own.start, own.stop)
            plain: Any = faiss.SearchParameters
            cosines, indices = self._index.search(rows, wanted, params=plain(sel=selector))
            return indices, cosines
        # As many as are wanted are enough of many, of which those at the end may be others.
        candidates = max(min(_CANDIDATES * wanted, _MOST_CANDIDATES), wanted, _LEAST_CANDIDATES)
        found = self._candidates(rows, min(candidates, count), min(k, len(self._features)), lists)
        return self._decided(rows, found, wanted)

    def _lists(self, part: Part) -> range:
        """Return which lists are a part's own: those that begin where it does or later, and before the next."""
        own = part.rows(len(self._features))
        start, stop = np.searchsorted(self._begins, [own.start, own.stop]).tolist()
        return range(start, len(self._sizes) if part.number + 1 == part.of else stop)

    def _candidates(
        self, rows: Float32[np.ndarray, "q d"], count: int, least: int, lists: range
    ) -> Int[np.ndarray, "q c"]:
        """Return the rows whose codes are nearest, in some lists out of those that a search of all lists reads.

        Where there are not ``least`` in these together, all lists are read. Who has other lists reads as far.
        """
        import faiss  # noqa: PLC0415 - as above

        closeness, read = self._index.quantizer.search(rows, self.probes)
        few = self._sizes[read].sum(axis=1) < least
        read[(read < lists.start) | (read >= lists.stop)] = -1
        self._index.nprobe = self.probes  # which FAISS compares with what it is given
        found: np.ndarray = self._index.search_preassigned(rows, count, read, closeness)[1]
        if few.any():
            every: Any = faiss.SearchParametersIVF
            own: Any = faiss.SearchParameters
            selector = own(sel=faiss.IDSelectorRange(lists.start, lists.stop))
            reading = every(nprobe=len(lists), quantizer_params=selector)
            found[few] = self._index.search(rows[few], count, params=reading)[1]
        return found

    @property
    def nbytes_resident(self) -> int:
        """About how much of it is always in memory; what is mapped is not counted."""
        import faiss  # noqa: PLC0415 - as above

        count, dims = self._features.shape
        if not self.probes:
            return 0 if hasattr(faiss, "IO_FLAG_MMAP_IFC") else 2 * count * dims
        return int(4 * dims * (self._index.nlist + 256))  # the centroids of the lists and of the codes

    def _decided(self, queries: np.ndarray, found: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        indices = np.full((len(queries), wanted), -1, np.int64)
        cosines = np.full((len(queries), wanted), -1, np.float32)
        for place, (query, candidates) in enumerate(zip(queries, found, strict=True)):
            rows = np.sort(candidates[candidates >= 0])  # so that the disk is read in one direction
            exact = self._features[rows].astype(np.float32) @ query
            best = np.argsort(-exact, kind="stable")[:wanted]
            indices[place, : len(best)], cosines[place, : len(best)] = rows[best], exact[best]
        return indices, cosines


@dataclass(frozen=True, slots=True)
class Found:
    """The captions nearest to a query, the nearest first: their cosines (k,) and, where asked for, features (k, d).

    ``missing`` says which captions could not be searched; None where all were.
    """

    captions: tuple[str, ...]
    cosines: Float32[np.ndarray, " k"]
    features: TextFeatures | None
    generation: str
    missing: str | None = None


def merged(found: Sequence[Found], k: int, missing: str | None) -> Found:
    """Return the k nearest of what was found in the parts of one generation, which are those of the whole."""
    cosines = np.concatenate([each.cosines for each in found])
    best = np.argsort(-cosines, kind="stable")[:k]
    captions = [caption for each in found for caption in each.captions]
    parts = [each.features for each in found if each.features is not None]
    return Found(
        tuple(captions[place] for place in best),
        cosines[best],
        np.concatenate(parts)[best] if parts else None,
        found[0].generation,
        missing,
    )


class CaptionDatabase:
    """An opened generation; reads may run in several threads, and go on when another one becomes the current.

    Args:
        generation: the name of its folder.
        manifest: what it holds.
        texts: n captions.
        features: their features (n, d).
        index: of the features.
    """

    def __init__(
        self,
        generation: str,
        manifest: Manifest,
        texts: CaptionTexts,
        features: Float16[np.ndarray, "n d"],
        index: CaptionIndex,
    ) -> None:
        self.generation = generation
        self.manifest = manifest
        self._texts = texts
        self._features = features
        self._index = index

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None, verify: bool = False) -> Self:
        """Open the current generation of the database in ``folder``.

        Args:
            folder: where it was built.
            fingerprint: of the text tower; searches make sense only with the model that encoded the captions. None
                leaves that to whoever searches.
            verify: also compare checksums, which reads every file once.

        Raises:
            StoreError: there is none, a file is missing, damaged or shorter than it should be, or a newer release made
                it.
            ConfigurationError: another model made it.
        """
        generation = current_generation(folder)
        for _ in range(_TRIES):
            try:
                return cls._open(folder, generation, fingerprint, verify=verify)
            except StoreError:
                # It may just have been replaced and removed.
                before, generation = generation, current_generation(folder)
                if generation == before:
                    raise
        return cls._open(folder, generation, fingerprint, verify=verify)

    @classmethod
    def open_generation(cls, folder: Path, generation: str) -> Self:
        """Open a generation by its name, the current one or one before it that is still there; raises StoreError."""
        return cls._open(folder, generation, None, verify=False)

    @classmethod
    def _open(cls, folder: Path, generation: str, fingerprint: str | None, *, verify: bool) -> Self:
        place = folder / generation
        manifest = read_manifest(place)
        if fingerprint not in {None, manifest.fingerprint}:
            problem = f"the caption database '{folder}' was made by another model, '{manifest.model}'"
            raise ConfigurationError(f"{problem}; use that model, or build the database again with this one")
        check_files(place, manifest, verify=verify)
        texts = CaptionTexts.open(place)
        features = _open_features(place)
        if features.shape != (manifest.captions, manifest.dims) or len(texts) != manifest.captions:
            problem = f"'{place}' has {len(texts)} captions and features {features.shape}, but should have "
            raise StoreError(f"{problem}{manifest.captions} of {manifest.dims}; build the database again")
        return cls(generation, manifest, texts, features, CaptionIndex.open(place / INDEX, features, manifest.index))

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes_resident(self) -> int:
        """About how much memory it takes for good; mapped files come and go and are not counted."""
        return self._index.nbytes_resident

    def search(
        self, queries: ImageFeatures | TextFeatures, k: int, part: Part = WHOLE
    ) -> tuple[Int[np.ndarray, "q m"], Float32[np.ndarray, "q m"]]:
        """Return the indices and cosines of the m = min(k, n) captions nearest to each query, the nearest first.

        A part may have fewer of those that a search of the whole looks at; the others have index -1 and cosine -1.

        Args:
            queries: unit rows (q, d); what is not finite in them counts as zero.
            k: at least 1.
            part: where to search.

        Raises:
            ValueError: the queries have other dimensions, or k is below 1.
        """
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dims:
            raise ValueError(f"queries have shape {queries.shape}, but captions have {self.manifest.dims} dimensions")
        if k < 1:
            raise ValueError(f"k is {k}, but must be at least 1")
        return self._index.search(queries, k, part)

    def found(
        self,
        indices: Int[np.ndarray, " k"],
        cosines: Float32[np.ndarray, " k"],
        *,
        features: bool,
    ) -> Found:
        """Return what a search found for one query, as it lasts when this generation does not.

        Raises:
            StoreError: the index names captions that there are not.
        """
        indices, cosines = indices[indices != -1], cosines[indices != -1]
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            problem = f"the index of the caption database '{self.manifest.name}' is damaged"
            raise StoreError(f"{problem}; build the database again")
        rows = self.features(indices) if features else None
        # Features are in half precision, whose rows are not quite of length one.
        return Found(tuple(self.captions(indices)), cosines.clip(-1, 1), rows, self.generation)

    def captions(self, indices: Iterable[int] | Int[np.ndarray, " m"]) -> list[str]:
        """Return the captions of ``indices``, in that order."""
        return self._texts.many(indices)

    def features(self, indices: Int[np.ndarray, " m"]) -> TextFeatures:
        """Return the features (m, d) of ``indices`` as they were stored, in half precision made wide again."""
        wide: TextFeatures = self._features[np.asarray(indices, np.int64)].astype(np.float32)
        return wide


def is_database(folder: Path) -> bool:
    """Tell whether a database was published in ``folder``, whatever became of it since."""
    try:
        return (folder / CURRENT).is_file()
    except OSError:  # a folder that may not be entered
        return False


def current_generation(folder: Path) -> str:
    """Return the name of the generation that is to be read; cheap enough to ask often.

    Raises:
        StoreError: there is no database, or ``current`` is damaged.
    """
    file = folder / CURRENT
    try:
        name = file.read_text("ascii", "replace").strip()
    except FileNotFoundError as error:
        raise StoreError(f"'{folder}' holds no caption database; build one there, or name another folder") from error
    except OSError as error:
        problem = f"'{file}' cannot be read: {error.strerror}"
        raise StoreError(f"{problem}; make it readable for the service, or name another folder") from error
    if not GENERATION.fullmatch(name):
        raise StoreError(f"'{file}' is damaged: it names '{name[:40]}'; build the database again")
    return name


def read_manifest(place: Path) -> Manifest:
    """Return the manifest of the generation in ``place``.

    Raises:
        StoreError: it is missing, damaged, or of a newer format.
    """
    file = place / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        made = int(content["format"])
        if made <= FORMAT:
            return Manifest.from_json(content)
    except OSError as error:
        raise StoreError(f"'{file}' cannot be read: {error.strerror}; build the database again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"'{file}' is damaged; build the database again") from error
    problem = f"the caption database '{place.parent}' has format {made}, and this release reads up to {FORMAT}"
    raise StoreError(f"{problem}; use a newer release, or build the database again")


def check_files(place: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compare the files of a generation with what its manifest says of them.

    Raises:
        StoreError: one is missing, has another size, or with ``verify`` another checksum.
    """
    with _damage(place):
        for name in DATA_FILES:
            file, told = place / name, manifest.files[name]
            size = file.stat().st_size
            if size != told["bytes"]:
                raise StoreError(f"'{file}' has {size} bytes instead of {told['bytes']}; build the database again")
            if verify and sha256_of(file) != told["sha256"]:
                raise StoreError(f"'{file}' is damaged, its checksum is another one; build the database again")


def sha256_of(file: Path) -> str:
    """Return the checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(_READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _open_features(place: Path) -> Float16[np.ndarray, "n d"]:
    with _damage(place):
        features = np.load(place / FEATURES, mmap_mode="r", allow_pickle=False)
        if features.dtype != np.float16:
            raise StoreError(f"'{place / FEATURES}' is of type {features.dtype}; build the database again")
        return np.asarray(features)


@contextmanager
def _damage(place: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"'{error.filename}' is missing; build the database again") from error
    except OSError as error:
        problem = f"the caption database in '{place}' cannot be read: {error.strerror}"
        raise StoreError(f"{problem}; make its files readable for the service") from error
    except StoreError:
        raise
    except Exception as error:  # a damaged header of an array raises whatever it likes
        raise StoreError(f"the caption database in '{place}' is damaged; build it again") from error
