"""The towers of a model that OpenVINO runs on a CPU."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.runtime.cpu import usable_cores
from app.scoring.numerics import unit_rows
from app.types import ImageFeatures, Pixels, TextFeatures

# The names of OpenVINO by ours.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}

# One core each, or more on machines with more cores: each stream needs memory and a thread of the queue.
_MAX_STREAMS = 8


class _Requests:
    """The inference requests of a compiled model, each used by one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._free: list[Any] = []

    def infer(self, batch: np.ndarray) -> np.ndarray:
        """Return the rows of a batch as a new array, float32."""
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer({0: batch}, share_inputs=True, share_outputs=True)
        rows: np.ndarray = request.get_output_tensor(0).data.reshape(len(batch), -1).astype(np.float32)
        self._free.append(request)
        return rows


class OpenVinoImageTower:
    """Runs one batch on all cores, or one batch in each stream, which has a part of the cores.

    A pass on all cores waits for its slowest thread at each layer. Beside threads that decode, one pass per core gives
    a third more images per second, but each takes almost twice as long. So a lone batch gets all cores.

    Args:
        on_all_cores: maps uint8 images (n, h, w, 3) to features (n, d), not normalised.
        in_streams: the same with several streams; None for no streams.
        streams: their number.
    """

    def __init__(self, on_all_cores: Any, in_streams: Any | None, streams: int) -> None:
        self.streams = 1 if in_streams is None else streams
        self._on_all_cores = _Requests(on_all_cores)
        self._in_streams = None if in_streams is None else _Requests(in_streams)
        self._all_cores = threading.Lock()

    def begin(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:
        """Return a function that encodes n >= 1 images to unit rows (n, d), float32, in the thread that calls it."""
        batch = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
        return partial(self._encode, batch, alone=alone)

    def _encode(self, batch: np.ndarray, *, alone: bool) -> ImageFeatures:
        if not alone and self._in_streams is not None:
            return unit_rows(self._in_streams.infer(batch))
        with self._all_cores:
            return unit_rows(self._on_all_cores.infer(batch))


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
        precision: ``fp32`` or ``bf16``; of a quantised tower, that of the operations which are not quantised.
    """
    streams = min(usable_cores(), _MAX_STREAMS)
    model = _read(model)
    in_streams = _compile(model, precision, streams) if streams > 1 else None
    return OpenVinoImageTower(_compile(model, precision), in_streams, streams)


def compile_text_tower(model: Any) -> OpenVinoTextTower:
    """Compile a converted text tower, or the path of its file, for this CPU, in single precision."""
    return OpenVinoTextTower(_compile(_read(model), "fp32"))


def _read(model: Any) -> Any:
    return import_openvino().Core().read_model(model) if isinstance(model, Path) else model


def _compile(model: Any, precision: str, streams: int = 1) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": usable_cores(),
        "NUM_STREAMS": streams,
        # Pinned threads are faster, but several containers on one machine would pin theirs to the same cores.
        "ENABLE_CPU_PINNING": usable_cores() == os.cpu_count(),
    }
    return import_openvino().Core().compile_model(model, "CPU", options)


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
