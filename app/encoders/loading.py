"""Load an encoder by the name of its model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from app.encoders._base import Encoder, LoadOptions, model_source
from app.encoders.exported import imagenet_templates as exported_templates
from app.encoders.exported import load_exported
from app.encoders.tuning import is_installed
from app.errors import ModelUnavailableError

if TYPE_CHECKING:
    from app.encoders.open_clip import OpenClipEncoder

log = structlog.get_logger()

_DEFAULTS = LoadOptions()


def load_encoder(spec: str, options: LoadOptions = _DEFAULTS) -> Encoder:
    """Load a model in the calling thread; this takes seconds to minutes, or about a second if it is exported.

    A model that OpenVINO runs is exported when it is loaded for the first time. Only models that are not exported need
    torch, whose import takes seconds.

    Args:
        spec: ``embedded``, ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``.
        options: how to load it.

    Raises:
        ModelUnavailableError: the model cannot be loaded.
    """
    model_source(spec)
    log.info("loading_model", model=spec)
    exported = load_exported(spec, options)
    if exported is not None:
        return exported
    encoder = _load_with_torch(spec, options)
    if options.exports_dir is None or encoder.image_path.backend != "openvino":
        return encoder
    try:
        encoder.export(options.exports_dir)
    except Exception as error:  # noqa: BLE001 - OpenVINO raises errors of any type
        log.warning("model_not_exported", model=spec, reason=" ".join(str(error).split())[:300])
        return encoder
    # From the first start on, models run in the same way, and without the weights of torch in memory.
    return load_exported(spec, options, encoder.tuning) or encoder


def export_model(spec: str, options: LoadOptions = _DEFAULTS) -> Path:
    """Export a model, also if it is exported already, and return the folder of its export.

    Args:
        spec: as for ``load_encoder``.
        options: how to load it; ``exports_dir`` is the folder of exports.

    Raises:
        ModelUnavailableError: the model cannot be loaded or exported.
    """
    assert options.exports_dir is not None
    encoder = _load_with_torch(spec, replace(options, device="cpu", backend="openvino", precision="fp32"))
    try:
        return encoder.export(options.exports_dir)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelUnavailableError(f"model '{spec}' cannot be exported: {reason}; serve it with torch") from error


def _load_with_torch(spec: str, options: LoadOptions) -> "OpenClipEncoder":
    _limit_openmp_spinning()
    if not is_installed("torch"):
        raise ModelUnavailableError(
            f"model '{spec}' is not exported, and PyTorch is not installed; run: pip install 'deixis[torch]', or copy"
            " the export of another machine (`deixis models export`)"
        )
    try:
        from app.encoders.open_clip import load_open_clip  # noqa: PLC0415 - imports torch
    except (ImportError, OSError, MemoryError) as error:
        problem = f"PyTorch or OpenCLIP cannot be loaded: {error or type(error).__name__}"
        raise ModelUnavailableError(f"{problem}; give the process more memory, or install both again") from error

    if model_source(spec)[0] == "embedded":
        from app.encoders.embedded_torch import load_embedded  # noqa: PLC0415

        return load_embedded(options)
    return load_open_clip(spec, options)


def imagenet_templates(exports_dir: Path | None = None) -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates, from open_clip's own list or from an exported model.

    Raises:
        ModelUnavailableError: open_clip is not installed, and no model is exported.
    """
    if is_installed("open_clip"):
        from app.encoders.open_clip import imagenet_templates as read  # noqa: PLC0415 - imports torch

        return read()
    templates = exported_templates(exports_dir)
    if not templates:
        raise ModelUnavailableError(
            "the templates 'imagenet' are those of OpenCLIP, which is not installed; run: pip install 'deixis[torch]'"
        )
    return templates


def _limit_openmp_spinning() -> None:
    """Let idle OpenMP threads sleep early; torch reads the variable once, when it loads OpenMP.

    By default, idle threads spin for milliseconds while they wait for the next layer. This is slightly faster on an
    idle machine and much slower on a busy one, where spinning threads block threads that decode images and other
    processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
