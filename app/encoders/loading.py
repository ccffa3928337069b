"""Load an encoder by the name of its model."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from app.encoders._base import Encoder, LoadOptions
from app.encoders.embedded import load_embedded
from app.encoders.exported import find_export, load_exported
from app.encoders.model_names import HUB_IDS, model_source
from app.encoders.openvino import runs_on_openvino
from app.encoders.quantization import Int8Trial, quantise_tower
from app.encoders.tuning import is_installed
from app.errors import ModelUnavailableError, NotConfiguredError, one_line
from app.types import ImageFeatures, Pixels
from deixis.extras import needs_extra

if TYPE_CHECKING:
    from app.encoders.open_clip import OpenClipEncoder

log = structlog.get_logger()

_DEFAULTS = LoadOptions()
_NO_INT8_OF_EMBEDDED = (
    "the embedded model does not run in int8, which changes 6 of 100 of its predictions; set DEIXIS_PRECISION=auto"
)


def load_encoder(spec: str, options: LoadOptions = _DEFAULTS) -> Encoder:
    """Load a model in the calling thread; this takes a second without torch, and seconds to minutes with it.

    The embedded model and exported models run without torch on a CPU. Other models are exported when they are loaded
    for the first time, if OpenVINO runs their image tower.

    Args:
        spec: ``embedded``, ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``.
        options: how to load it.

    Raises:
        ModelUnavailableError: the model cannot be loaded.
    """
    source, _, _ = model_source(spec)
    log.info("loading_model", model=spec)
    if source == "embedded" and options.precision == "int8":
        raise ModelUnavailableError(_NO_INT8_OF_EMBEDDED)
    if source == "embedded" and runs_on_openvino(options):
        return load_embedded(options)
    exported = load_exported(spec, options)
    if exported is not None:
        return exported
    if options.precision == "int8":
        raise ModelUnavailableError(
            f"model '{spec}' has no image tower in int8 that works here; int8 runs on CPUs, with OpenVINO, after"
            f" `deixis models tune {spec} --calibration FOLDER` has accepted it; run this command, or set"
            " DEIXIS_PRECISION=auto"
        )
    encoder = _load_with_torch(spec, options)
    if options.exports_dir is None or source == "embedded" or encoder.image_path.backend != "openvino":
        return encoder
    try:
        encoder.export(options.exports_dir)
    except Exception as error:  # noqa: BLE001 - OpenVINO raises errors of any type
        log.warning("model_not_exported", model=spec, reason=one_line(error))
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
    if model_source(spec)[0] == "embedded":
        raise ModelUnavailableError("the embedded model needs no export: it is served without PyTorch on CPUs")
    encoder = _load_with_torch(spec, replace(options, device="cpu", backend="openvino", precision="fp32"))
    try:
        return encoder.export(options.exports_dir)
    except Exception as error:
        raise ModelUnavailableError(
            f"model '{spec}' cannot be exported: {one_line(error)}; serve it with PyTorch"
        ) from error


def quantise_model(
    spec: str,
    options: LoadOptions,
    encoder: Encoder,
    *,
    pixels: Sequence[Pixels],
    labels: Sequence[str],
    seconds: float,
) -> Int8Trial:
    """Make the image tower of a model in int8, and keep it for later starts if it is accepted.

    Args:
        spec: as for ``load_encoder``.
        options: how to load it; ``exports_dir`` is the folder of exports.
        encoder: the model in its fastest other configuration.
        pixels: images of ``encoder.transform`` in random order, at least ``MIN_IMAGES``.
        labels: whose predictions are compared.
        seconds: time for comparing the speed.

    Raises:
        ModelUnavailableError: the model cannot be exported.
    """
    assert options.exports_dir is not None
    found = find_export(spec, options.exports_dir)
    if found is None:
        export_model(spec, options)
        found = find_export(spec, options.exports_dir)
        assert found is not None
    export, folder, image_tower = found
    return quantise_tower(
        folder,
        image_tower=image_tower,
        fingerprint=export.image_fingerprint,
        pixels=pixels,
        texts=encoder.encode_texts([f"a photo of a {label}" for label in labels]),
        best=_TowerOf(encoder),
        seconds=seconds,
    )


def check_takes_int8(spec: str, options: LoadOptions) -> None:
    """Check whether a model may have an image tower in int8.

    Raises:
        ModelUnavailableError: it may not.
    """
    if model_source(spec)[0] == "embedded":
        raise ModelUnavailableError(_NO_INT8_OF_EMBEDDED)
    if not runs_on_openvino(options) or options.precision not in {"auto", "int8"}:
        raise ModelUnavailableError(
            "int8 runs on CPUs, with OpenVINO; install the extra openvino, and set DEIXIS_DEVICE=cpu, and"
            " DEIXIS_IMAGE_BACKEND and DEIXIS_PRECISION to auto"
        )


@dataclass(frozen=True, slots=True)
class _TowerOf:
    """The image tower of a model, whatever runs it."""

    encoder: Encoder

    @property
    def streams(self) -> int:
        return self.encoder.image_streams

    def begin(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        return self.encoder.begin_images(pixels, alone=alone)


def _load_with_torch(spec: str, options: LoadOptions) -> "OpenClipEncoder":
    _limit_openmp_spinning()
    if not is_installed("torch"):
        light = (
            "without it, the embedded model and exported models run on a CPU (DEIXIS_DEVICE=cpu, and"
            " DEIXIS_IMAGE_BACKEND and DEIXIS_PRECISION=auto)"
            if is_installed("openvino")
            else "or the extra embedded, with which the embedded model and exported models run on a CPU"
        )
        sentence = needs_extra(f"model '{spec}'", "torch")
        raise ModelUnavailableError(f"{sentence}; {light}")
    # Two checks before PyTorch is imported, which takes seconds.
    source, location, _ = model_source(spec)
    if source == "local-dir" and not Path(location).is_dir():
        raise ModelUnavailableError(f"model '{spec}': the folder {location} does not exist")
    if (spec.startswith("hf-hub:") and spec.count("/") == 1) or spec in HUB_IDS.values():
        from app.encoders.hub import HubFiles  # noqa: PLC0415 - the hub library, which only downloads need

        HubFiles(spec, options.weights_dir, options.data_dir).check_reachable()
    try:
        from app.encoders.open_clip import load_open_clip  # noqa: PLC0415 - imports torch
    except (ImportError, OSError, MemoryError) as error:
        problem = f"PyTorch or OpenCLIP cannot be loaded: {error or type(error).__name__}"
        raise ModelUnavailableError(f"{problem}; give the process more memory, or install both again") from error

    if source == "embedded":
        from app.encoders.embedded_torch import load_embedded_with_torch  # noqa: PLC0415

        return load_embedded_with_torch(options)
    return load_open_clip(spec, options)


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates from open_clip, with ``{}`` for the class name.

    The list is read from its file, since importing open_clip imports torch.

    Raises:
        NotConfiguredError: open_clip is not installed.
    """
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise NotConfiguredError(needs_extra("the template set 'imagenet'", "embedded"))
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = spec_from_file_location("zero_shot_metadata", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(template("{}") for template in module.OPENAI_IMAGENET_TEMPLATES)


def _limit_openmp_spinning() -> None:
    """Let idle OpenMP threads sleep early; torch reads the variable once, when it loads OpenMP.

    By default, idle threads spin for milliseconds while they wait for the next layer. This is slightly faster on an
    idle machine and much slower on a busy one, where spinning threads block threads that decode images and other
    processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
