"""An image tower that OpenVINO runs on a CPU, converted from torch once and stored on disk.

For convolutional towers on CPUs, OpenVINO is several times as fast as torch.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch

from app.runtime.atomic_files import publish, write_atomically
from app.runtime.checksums import sha256
from app.runtime.cpu import usable_cores
from app.runtime.temporary_folders import temporary_folder
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures, Pixels

log = structlog.get_logger()

# The names of OpenVINO by ours.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}

# OpenVINO prepares the first batch of each size, which takes up to ten times as long as the forward pass.
_MAX_WARM_UP_BATCH = 8


def openvino_is_installed() -> bool:
    """Return whether the package is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoImageTower:
    """Runs any number of batches at the same time, each with an inference request of its own.

    Args:
        compiled: maps uint8 images (n, h, w, 3) to features (n, d), not normalised.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._free: list[Any] = []

    def begin(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 images and return a function that waits for their unit rows (n, d), float32."""
        batch = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
        request = self._free.pop() if self._free else self._compiled.create_infer_request()
        # The request reads the batch without a copy; ``wait`` keeps it alive.
        request.start_async({0: batch}, share_inputs=True)

        def wait() -> ImageFeatures:
            request.wait()
            features = request.get_output_tensor(0).data.reshape(len(batch), -1).astype(np.float32)
            self._free.append(request)
            return unit_rows(features)

        return wait


def load_openvino_tower(
    encode: torch.nn.Module,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size_px: int,
    precision: str,
    fingerprint: str,
    folder: Path | None,
) -> OpenVinoImageTower:
    """Convert a tower, or read a stored conversion, and compile it for this CPU.

    Args:
        encode: maps normalised images (n, 3, size, size) to features (n, d), in single precision on the CPU.
        mean: of each channel, in [0, 1].
        std: of each channel.
        size_px: side of an image.
        precision: ``fp32`` or ``bf16``.
        fingerprint: identifies the weights and all other inputs of the conversion.
        folder: folder of converted towers; None does not store them.

    Raises:
        ImportError: OpenVINO is not installed.
        Exception: OpenVINO cannot convert the tower; it raises errors of any type.
    """
    ov = _import_openvino()
    model = _read_or_convert(
        ov, encode, mean, std, size_px, folder and folder / f"{fingerprint}-{version('openvino')}.xml"
    )
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads are faster, but several containers on one machine would pin theirs to the same cores.
        "ENABLE_CPU_PINNING": usable_cores() == os.cpu_count(),
    }
    tower = OpenVinoImageTower(ov.Core().compile_model(model, "CPU", options))
    for size in range(1, _MAX_WARM_UP_BATCH + 1):
        tower.begin([np.zeros((size_px, size_px, 3), np.uint8)] * size)()
    return tower


def _read_or_convert(
    ov: Any, encode: torch.nn.Module, mean: Sequence[float], std: Sequence[float], size_px: int, file: Path | None
) -> Any:
    """Return the converted tower from its file; if that is missing or damaged, convert the tower and write it."""
    # Earlier releases wrote no checksums; their towers are converted again.
    if file is not None and file.is_file() and file.with_suffix(".sha256").is_file():
        try:
            # OpenVINO reads wrong weights without an error.
            if _checksums(file) == file.with_suffix(".sha256").read_text(encoding="utf-8"):
                return ov.Core().read_model(file)
            reason = "its checksum has changed"
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        log.warning("converted_tower_not_readable", file=str(file), reason=reason)
    model = _convert(ov, encode, mean, std, size_px)
    if file is not None:
        _write(ov, model, file)
    return model


def _convert(ov: Any, encode: torch.nn.Module, mean: Sequence[float], std: Sequence[float], size_px: int) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecation warnings of third-party packages, and warnings about sizes that are constant here.
        warnings.simplefilter("ignore")
        model = ov.convert_model(
            encode, example_input=torch.zeros(2, 3, size_px, size_px), input=[-1, 3, size_px, size_px]
        )
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean([255 * value for value in mean]).scale(
        [255 * value for value in std]
    )
    return steps.build()


def _checksums(graph: Path) -> str:
    """Return the checksums of the graph and of its weights."""
    return f"{sha256(graph)} {sha256(graph.with_suffix('.bin'))}"


def _write(ov: Any, model: Any, file: Path) -> None:
    """Write a converted tower: first checksums and weights, then the graph, so that a graph always has both."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(file.parent, ".deixis-tower-") as folder:
            partial = folder / file.name
            ov.save_model(model, partial, compress_to_fp16=False)
            write_atomically(file.with_suffix(".sha256"), _checksums(partial))
            publish(partial.with_suffix(".bin"), file.with_suffix(".bin"))
            publish(partial, file)
    except (OSError, RuntimeError) as error:  # the disk is full, or the folder is read-only
        log.warning("converted_tower_not_written", file=str(file), reason=str(error).splitlines()[0])


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports every conversion to its vendor by default."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # makes its import fail, as if it were not installed
    import openvino  # noqa: PLC0415 - an optional dependency

    return openvino
