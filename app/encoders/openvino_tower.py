"""The towers of a model that OpenVINO runs on a CPU."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.encoders.tuning import has_bf16_instructions
from app.runtime.cpu import usable_cores
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures, Pixels, TextFeatures

# The names of OpenVINO by ours.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def _precision_hint(precision: str) -> str:
    """Return the precision of the operations that are not quantised."""
    if precision == "int8":
        return "bf16" if has_bf16_instructions() else "f32"
    return _PRECISIONS[precision]


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


class OpenVinoTextTower:
    """Runs one batch at a time.

    Args:
        compiled: maps token ids (k, length) to features (k, d), not normalised.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()

    def encode(self, tokens: np.ndarray) -> TextFeatures:
        """Return unit rows (k, d), float32, for int64 tokens (k, length)."""
        self._request.infer({0: tokens}, share_inputs=True)
        return unit_rows(self._request.get_output_tensor(0).data.astype(np.float32))


def compile_image_tower(model: Any, precision: str) -> OpenVinoImageTower:
    """Compile a converted tower for this CPU.

    Args:
        model: as ``convert_image_tower`` returns it, or the path of its file.
        precision: ``fp32`` or ``bf16``; ``int8`` for a quantised tower.
    """
    return OpenVinoImageTower(_compile(model, precision))


def compile_text_tower(model: Any) -> OpenVinoTextTower:
    """Compile a converted text tower, or the path of its file, for this CPU, in single precision."""
    return OpenVinoTextTower(_compile(model, "fp32"))


def _compile(model: Any, precision: str) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": _precision_hint(precision),
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads are faster, but several containers on one machine would pin theirs to the same cores.
        "ENABLE_CPU_PINNING": usable_cores() == os.cpu_count(),
    }
    core = import_openvino().Core()
    return core.compile_model(core.read_model(model) if isinstance(model, Path) else model, "CPU", options)


def reads_bytes(model: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Let a tower of normalised images (n, 3, h, w) read bytes (n, h, w, 3).

    Args:
        model: OpenVINO's model, which is changed.
        mean: of each channel, in [0, 1].
        std: of each channel.
    """
    ov = import_openvino()
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean([255 * value for value in mean]).scale(
        [255 * value for value in std]
    )
    return steps.build()


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports every conversion to its vendor by default.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # makes its import fail, as if it were not installed
    import openvino  # noqa: PLC0415 - an optional dependency

    return openvino
