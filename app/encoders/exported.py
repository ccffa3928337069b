"""Exported models: folders that hold all that is needed to serve a model on a CPU without torch.

A folder has the two towers for OpenVINO, the tokenizer, and ``export.json``, which is written last. The folder of a
model is replaced when the files of the model have changed.
"""

import hashlib
import platform
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from app.encoders._base import Candidate, ImagePath, ImageTower, LoadOptions, Tuning, model_source
from app.encoders.openvino_tower import (
    OpenVinoTextTower,
    compile_image_tower,
    compile_text_tower,
    import_openvino,
)
from app.encoders.preprocessing import Preprocessing
from app.encoders.tokenizing import TextTokenizer, TokenizerOptions
from app.encoders.tuning import is_installed, select_tower, stored_tuning
from app.errors import ModelUnavailableError
from app.runtime.atomic_files import publish, sync, write_atomically
from app.runtime.checksums import sha256
from app.runtime.data_files import resources
from app.runtime.temporary_folders import temporary_folder
from app.types import ImageFeatures, Pixels, TextFeatures

log = structlog.get_logger()

MANIFEST = "export.json"
_IMAGE_TOWER, _TEXT_TOWER, _TOKENIZER = "image.xml", "text.xml", "tokenizer.json"


class Export(BaseModel):
    """The content of ``export.json``: what a served model has besides its towers and its tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str
    """The name in the settings."""

    source: str = ""
    """Identifies the files that the model was exported from; empty if they never change."""

    licence: str | None
    """Of the weights, if Deixis has a model card."""

    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    preprocessing: Preprocessing
    tokenizer: TokenizerOptions
    image_fingerprint: str
    text_fingerprint: str
    imagenet_templates: tuple[str, ...]
    checksums: dict[str, str] = {}
    """SHA-256 of the other files by name."""


class ExportedEncoder:
    """A model that OpenVINO runs on a CPU.

    Args:
        export: the content of ``export.json``.
        image_tower: runs the image tower.
        image_path: how it runs.
        tuning: the measurements that ``image_path`` was selected from.
        text_tower: runs the text tower.
        tokenizer: of the model.
    """

    def __init__(
        self,
        export: Export,
        *,
        image_tower: ImageTower,
        image_path: ImagePath,
        tuning: Tuning | None,
        text_tower: OpenVinoTextTower,
        tokenizer: TextTokenizer,
    ) -> None:
        self.name = export.model
        self.logit_scale = export.logit_scale
        self.logit_bias = export.logit_bias
        self.image_size_px = export.preprocessing.size_px
        self.image_path = image_path
        self.tuning = tuning
        self.transform = export.preprocessing.transform
        self._export = export
        self._image_tower = image_tower
        self._text_tower = text_tower
        self._tokenizer = tokenizer
        self.embed_dim = export.embed_dim

    def begin_images(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding and return a function that waits for the unit rows (n, d), float32."""
        return self._image_tower.begin(pixels)

    def encode_images(self, pixels: Sequence[Pixels]) -> ImageFeatures:
        """Return unit rows (n, d), float32."""
        return self.begin_images(pixels)()

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Return unit rows (k, d), float32; texts beyond the tokenizer's context are truncated."""
        return self._text_tower.encode(self._tokenizer(texts))

    def image_fingerprint(self) -> str:
        """Return the identifier of the image tower that was exported."""
        return self._export.image_fingerprint

    def text_fingerprint(self) -> str:
        """Return the identifier of the text tower that was exported."""
        return self._export.text_fingerprint


def load_exported(spec: str, options: LoadOptions, tuning: Tuning | None = None) -> ExportedEncoder | None:
    """Load an exported model, without torch; None if there is none for these options.

    Args:
        spec: the model's name.
        options: how to load it; ``exports_dir`` is the folder of exports.
        tuning: measurements of this start; None uses stored ones.

    Raises:
        ModelUnavailableError: torch, which could load the model otherwise, is not installed, and the export does not
            work.
    """
    has_torch = is_installed("torch")
    if options.exports_dir is None or not _is_for_cpu(options, has_torch=has_torch):
        return None
    folder = options.exports_dir / _folder_name(spec)
    try:
        export = _read(folder, spec)
        return None if export is None else _load(export, folder, options, tuning, has_torch=has_torch)
    except Exception as error:  # damaged files let OpenVINO and the tokenizer raise errors of any type
        reason = _one_line(error)
        if not has_torch:
            raise ModelUnavailableError(
                f"model '{spec}' cannot be loaded: its export {folder} does not work: {reason}; write it again: deixis"
                f" models export {spec} (where deixis[torch] is installed)"
            ) from error
        log.warning("export_not_used", model=spec, folder=str(folder), reason=reason)
        return None


def _is_for_cpu(options: LoadOptions, *, has_torch: bool) -> bool:
    if options.backend == "torch" or options.precision == "fp16" or not is_installed("openvino"):
        return False
    if has_torch and options.measure_again:
        return False  # torch is a candidate
    if options.device == "auto":
        return not has_torch or not has_accelerator()
    return options.device.startswith("cpu")


def _read(folder: Path, spec: str) -> Export | None:
    """Return the manifest of an export whose files are as they were written; None if it has to be written again."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        export = Export.model_validate_json(file.read_bytes())
    except ValidationError:
        log.info("export_outdated", model=spec, folder=str(folder), reason="another release has written it")
        return None
    source = _source_of(spec)
    if export.model != spec or source not in {None, export.source}:
        log.info("export_outdated", model=spec, folder=str(folder), reason="the files of the model have changed")
        return None
    for name, checksum in export.checksums.items():
        if sha256(folder / name) != checksum:  # OpenVINO reads wrong weights without an error
            raise ValueError(f"the checksum of {name} has changed")
    return export


def _load(
    export: Export, folder: Path, options: LoadOptions, tuning: Tuning | None, *, has_torch: bool
) -> ExportedEncoder | None:
    if tuning is None and has_torch and options.backend == "auto":
        tuning = stored_tuning(export.model, "cpu", export.image_fingerprint, options)
    path = tuning.image_path() if tuning else None
    if path is not None and path.backend == "torch":
        return None
    size_px = export.preprocessing.size_px

    def build(candidate: Candidate) -> ImageTower:
        return compile_image_tower(folder / _IMAGE_TOWER, precision=candidate.precision, size_px=size_px)

    if path is None:
        tower, path, tuning = select_tower(
            export.model,
            "cpu",
            build=build,
            size_px=size_px,
            fingerprint=export.image_fingerprint,
            options=replace(options, backend="openvino"),
        )
    else:
        tower = build(Candidate(path.backend, path.precision, path.threads))
    return ExportedEncoder(
        export,
        image_tower=tower,
        image_path=path,
        tuning=tuning,
        text_tower=compile_text_tower(folder / _TEXT_TOWER),
        tokenizer=TextTokenizer(Tokenizer.from_file(str(folder / _TOKENIZER)), export.tokenizer),
    )


def write_export(exports_dir: Path, export: Export, *, image_tower: Any, text_tower: Any, tokenizer: Tokenizer) -> Path:
    """Write or replace the export of a model, and return its folder.

    Args:
        exports_dir: folder of exports, which is created.
        export: its ``source`` and ``checksums`` are filled in.
        image_tower: as ``convert_image_tower`` returns it.
        text_tower: as ``convert_text_tower`` returns it.
        tokenizer: of the model.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: OpenVINO cannot write its files.
    """
    ov = import_openvino()
    exports_dir.mkdir(parents=True, exist_ok=True)
    target = exports_dir / _folder_name(export.model)
    with temporary_folder(exports_dir, ".deixis-export-") as folder:
        for name, model in ((_IMAGE_TOWER, image_tower), (_TEXT_TOWER, text_tower)):
            ov.save_model(model, folder / name, compress_to_fp16=False)
        tokenizer.save(str(folder / _TOKENIZER))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            sync(path)
        checksums = {path.name: sha256(path) for path in files}
        complete = export.model_copy(update={"source": _source_of(export.model) or "", "checksums": checksums})
        write_atomically(folder / MANIFEST, complete.model_dump_json(indent=2) + "\n")
        folder.chmod(0o755)
        old = folder.parent / "old"
        with suppress(FileNotFoundError):
            target.rename(old)  # removed with the temporary folder; processes that use it keep its files
        publish(folder, target)
    return target


def imagenet_templates(exports_dir: Path | None) -> tuple[str, ...]:
    """Return OpenAI's ImageNet templates as any export has them; none without an export."""
    for file in sorted(exports_dir.glob(f"*/{MANIFEST}")) if exports_dir else ():
        with suppress(OSError, ValidationError):
            return Export.model_validate_json(file.read_bytes()).imagenet_templates
    return ()


def has_accelerator() -> bool:
    """Return whether this machine may have a device that is faster than its CPU, without importing torch."""
    devices = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and both in the Linux of Windows
    return _is_apple() or any(Path(device).exists() for device in devices)


def _is_apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _folder_name(spec: str) -> str:
    """Return a readable name that no other model has, on file systems without case too."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-.")[-60:]
    return f"{readable}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def _source_of(spec: str) -> str | None:
    """Return what identifies the files of a model; None if they are not on this machine.

    The files of a repository are those of the day of the export.
    """
    source, location, _ = model_source(spec)
    if source == "embedded":
        return sha256(resources("models") / "embedded" / "config.json")  # has the checksums of all files
    if source != "local-dir":
        return ""
    if not Path(location).is_dir():
        return None
    status = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(location).iterdir())
    return hashlib.sha256(repr(status).encode()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
