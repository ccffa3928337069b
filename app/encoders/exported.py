"""Exported models: folders that hold all that is needed to serve a model on a CPU without torch.

A folder has the two towers for OpenVINO, the tokenizer, and ``export.json``, which is written last. The folder of a
model is replaced when the files of the model have changed.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog
from pydantic import ValidationError
from tokenizers import Tokenizer

from app.encoders._base import Candidate, ImageTower, LoadOptions, Tuning
from app.encoders.model_names import model_source
from app.encoders.openvino import ModelDescription, OpenVinoEncoder, runs_on_openvino
from app.encoders.openvino_tower import compile_image_tower, compile_text_tower, import_openvino
from app.encoders.quantization import copy_int8, has_int8, read_int8
from app.encoders.tokenizing import TextTokenizer
from app.encoders.tuning import is_installed, select_tower, stored_tuning, warm_up
from app.errors import ModelUnavailableError, one_line
from app.runtime.atomic_files import publish, sync, write_atomically
from app.runtime.checksums import sha256
from app.runtime.temporary_folders import temporary_folder

log = structlog.get_logger()

MANIFEST = "export.json"
_IMAGE_TOWER, _WEIGHTS, _TEXT_TOWER, _TOKENIZER = "image.xml", "image.bin", "text.xml", "tokenizer.json"


class Export(ModelDescription):
    """The content of ``export.json``."""

    format: Literal[1] = 1
    source: str
    """Identifies the files that the model was exported from; empty if they never change."""

    licence: str | None
    """Of the weights, if Deixis has a model card."""

    checksums: dict[str, str]
    """SHA-256 of the other files by name."""


def load_exported(spec: str, options: LoadOptions, tuning: Tuning | None = None) -> OpenVinoEncoder | None:
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
    if options.exports_dir is None or not runs_on_openvino(options):
        return None
    folder = export_folder(spec, options.exports_dir)
    int8 = options.precision in {"auto", "int8"} and not options.ignore_int8 and has_int8(folder)
    # Where torch is installed, it is a candidate.
    others = options.precision != "int8" and not (has_torch and options.measure_again)
    if not (int8 or others):
        return None
    try:
        export = _read(folder, spec)
        if export is None:
            return None
        encoder = _load_int8(export, folder, options) if int8 else None
        if encoder is not None or not others:
            return encoder
        return _load(export, folder / _IMAGE_TOWER, folder, options, tuning, has_torch=has_torch)
    except Exception as error:  # damaged files let OpenVINO and the tokenizer raise errors of any type
        reason = one_line(error)
        if not has_torch:
            raise ModelUnavailableError(
                f"model '{spec}' cannot be loaded: its export {folder} does not work: {reason}; write it again with"
                f" `deixis models export {spec}`, which needs the extra torch"
            ) from error
        log.warning("export_not_used", model=spec, folder=str(folder), reason=reason)
        return None


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


def _load_int8(export: Export, folder: Path, options: LoadOptions) -> OpenVinoEncoder | None:
    """Load an exported model with its image tower in int8; None if that does not work."""
    try:
        accepted = read_int8(folder, export.checksums[_WEIGHTS])
        accepted.check_cpu(export.model)
        return _load(
            export.model_copy(update={"image_fingerprint": accepted.image_fingerprint}),
            folder / accepted.tower,
            folder,
            replace(options, precision="int8"),
            None,
            has_torch=False,
            not_quantised=accepted.precision,
        )
    except Exception as error:  # noqa: BLE001 - damaged files let OpenVINO raise errors of any type
        log.warning("int8_not_used", model=export.model, folder=str(folder), reason=one_line(error))
        return None


def find_export(spec: str, exports_dir: Path) -> tuple[Export, Path, str] | None:
    """Return an export, its folder, and the name of its image tower; None if it has to be written."""
    folder = export_folder(spec, exports_dir)
    try:
        export = _read(folder, spec)
    except (OSError, ValueError):  # its files are damaged
        return None
    return None if export is None else (export, folder, _IMAGE_TOWER)


def _load(
    export: Export,
    image_tower: Path,
    folder: Path,
    options: LoadOptions,
    tuning: Tuning | None,
    *,
    has_torch: bool,
    not_quantised: str | None = None,
) -> OpenVinoEncoder | None:
    """Load an export with an image tower; in int8, with the precision of the operations that are not quantised."""
    if tuning is None and has_torch and options.backend == "auto":
        stored = stored_tuning(export.model, "cpu", export.image_fingerprint, options)
        tuning = stored if stored and not stored.provisional else None
    path = tuning.image_path() if tuning else None
    if path is not None and path.backend == "torch":
        return None
    size_px = export.preprocessing.size_px

    def build(candidate: Candidate) -> ImageTower:
        return compile_image_tower(image_tower, not_quantised or candidate.precision)

    if path is None:
        seconds = options.tuning_seconds if tuning is None else 0.0
        tower, path, measured = select_tower(
            export.model,
            "cpu",
            build=build,
            size_px=size_px,
            fingerprint=export.image_fingerprint,
            options=replace(options, backend="openvino", tuning_seconds=seconds),
        )
        tuning = tuning or measured
    else:
        tower = build(Candidate(path.backend, path.precision, path.threads))
        warm_up(tower, size_px, path)
    return OpenVinoEncoder(
        export,
        image_tower=tower,
        image_path=path,
        tuning=tuning,
        text_tower=compile_text_tower(folder / _TEXT_TOWER),
        tokenizer=TextTokenizer(Tokenizer.from_file(str(folder / _TOKENIZER)), export.tokenizer),
    )


def write_export(
    exports_dir: Path,
    description: ModelDescription,
    *,
    image_tower: Any,
    text_tower: Any,
    tokenizer: Tokenizer,
    licence: str | None,
) -> Path:
    """Write or replace the export of a model, and return its folder.

    Args:
        exports_dir: folder of exports, which is created.
        description: of the model.
        image_tower: as ``convert_image_tower`` returns it.
        text_tower: as ``convert_text_tower`` returns it.
        tokenizer: of the model.
        licence: of the weights, if it is known.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: OpenVINO cannot write its files.
    """
    ov = import_openvino()
    exports_dir.mkdir(parents=True, exist_ok=True)
    target = export_folder(description.model, exports_dir)
    with temporary_folder(exports_dir, ".deixis-export-") as folder:
        for name, model in ((_IMAGE_TOWER, image_tower), (_TEXT_TOWER, text_tower)):
            ov.save_model(model, folder / name, compress_to_fp16=False)
        tokenizer.save(str(folder / _TOKENIZER))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            sync(path)
        export = Export(
            **description.model_dump(),
            source=_source_of(description.model) or "",
            licence=licence,
            checksums={path.name: sha256(path) for path in files},
        )
        write_atomically(folder / MANIFEST, export.model_dump_json(indent=2) + "\n")
        copy_int8(target, folder, export.checksums[_WEIGHTS])
        folder.chmod(0o755)
        old = folder.parent / "old"
        with suppress(FileNotFoundError):
            target.rename(old)  # removed with the temporary folder; processes that use it keep its files
        publish(folder, target)
    return target


def export_folder(spec: str, exports_dir: Path) -> Path:
    """Return a folder with a readable name that no other model has, on file systems without case too."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", spec).strip("-.")[-60:]
    return exports_dir / f"{readable}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def _source_of(spec: str) -> str | None:
    """Return what identifies the files of a model; None if they are not on this machine.

    The files of a repository are those of the day of the export.
    """
    source, location, _ = model_source(spec)
    if source != "local-dir":
        return ""
    if not Path(location).is_dir():
        return None
    status = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(location).iterdir())
    return hashlib.sha256(repr(status).encode()).hexdigest()
