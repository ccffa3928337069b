"""The manifest of a caption database: the contents of a generation, how it was made, and the checksums of its files."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from app.captions.texts import OFFSETS, TEXTS
from app.errors import StoreError
from app.names.namespaces import own_name

FORMAT = 1
"""The format of the files. A reader refuses a newer one."""

MANIFEST = "manifest.json"
FEATURES = "features.npy"
INDEX = "index.faiss"
DATA_FILES = (TEXTS, OFFSETS, FEATURES, INDEX)

TO_COME = "to_come"
"""Of the counts: captions that are not in this generation, because the build of the database goes on."""

FLAT = "flat"
IVF_PQ = "ivf-pq"


@dataclass(frozen=True, slots=True)
class IndexParameters:
    """The kind of an index, ``flat`` or ``ivf-pq``, and the parameters of a search in it.

    An ``ivf-pq`` index is an inverted file of ``lists`` lists, of which a search reads ``probes``; its product codes
    have ``code_bytes`` bytes. All three are 0 for a ``flat`` index.
    """

    kind: str
    lists: int = 0
    probes: int = 0
    code_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a generation, and how it was made.

    ``counts`` are the numbers of captions read, kept and dropped, and of those to come. ``recall`` is the share of
    the ``recall_at`` nearest captions that a search finds, by kind of query: ``images`` are images; ``near`` and
    ``far`` are captions with a little and with much noise, whose recall only approximates that of images. ``files``
    maps the name of each file to its ``bytes`` and ``sha256``.
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
        """Return the manifest that ``to_json`` wrote; unknown keys are ignored.

        Raises:
            KeyError, ValueError: a key is missing, or a value has the wrong type.
        """
        manifest: Self = _manifest_adapter().validate_python({each.name: content[each.name] for each in fields(cls)})
        if any(type(manifest.files[name].get("bytes")) is not int for name in DATA_FILES):
            raise ValueError("the size of a file is missing")
        return manifest

    @property
    def warning(self) -> str | None:
        """Why more captions will be found later; None if the database is complete."""
        to_come = self.counts.get(TO_COME, 0)
        if not to_come:
            return None
        return (
            f"the caption database '{own_name(self.name)}' is still being built: {self.captions:,} of its"
            f" {self.captions + to_come:,} captions can be found so far"
        )

    @property
    def generation(self) -> str:
        """The name of the generation's folder: a digest of everything but ``created_at``."""
        content = {key: value for key, value in self.to_json().items() if key != "created_at"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _manifest_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Manifest)


def read_manifest(generation_folder: Path) -> Manifest:
    """Return the manifest of a generation.

    Raises:
        StoreError: it is missing, damaged, or of a newer format.
    """
    file = generation_folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        file_format = int(content["format"])
        if file_format <= FORMAT:
            return Manifest.from_json(content)
    except OSError as error:
        raise StoreError(f"'{file}' cannot be read: {error.strerror}; build the database again") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(f"'{file}' is damaged; build the database again") from error
    problem = f"the caption database '{generation_folder.parent}' has format {file_format}"
    raise StoreError(
        f"{problem}, and this release reads up to {FORMAT}; use a newer release, or build the database again"
    )


def check_files(generation_folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compare the sizes of a generation's files, and with ``verify`` their checksums, with the manifest.

    Raises:
        StoreError: a file is missing or differs.
    """
    with damage_reported(generation_folder):
        for name in DATA_FILES:
            file, expected = generation_folder / name, manifest.files[name]
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise StoreError(f"'{file}' has {size} bytes instead of {expected['bytes']}; build the database again")
            if verify and sha256_of(file) != expected["sha256"]:
                raise StoreError(f"'{file}' is damaged, its checksum is wrong; build the database again")


def sha256_of(file: Path) -> str:
    """Return the checksum of a file in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def damage_reported(generation_folder: Path) -> Iterator[None]:
    """Raise every error of the block as a ``StoreError`` that says which file is missing or damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"'{error.filename}' is missing; build the database again") from error
    except OSError as error:
        problem = f"the caption database in '{generation_folder}' cannot be read: {error.strerror}"
        raise StoreError(f"{problem}; make its files readable for the service") from error
    except StoreError:
        raise
    except Exception as error:  # NumPy raises many kinds of errors for a damaged header
        raise StoreError(f"the caption database in '{generation_folder}' is damaged; build it again") from error
