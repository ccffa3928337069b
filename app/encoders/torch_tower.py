"""An image tower that torch runs, on a CPU or an accelerator."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels


class TorchImageTower:
    """Normalises on the device: a byte per channel is copied there, a quarter of what single precision would take.

    Args:
        encode: normalised images (n, 3, h, w), channels last, to features (n, d).
        mean: of each channel, in [0, 1].
        std: of each channel.
        device: of the weights.
        dtype: of the weights.
        threads: for the arithmetic on a CPU; None takes one per core.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: str,
        dtype: torch.dtype,
        threads: int | None = None,
    ) -> None:
        self._encode = encode
        self._mean = 255 * torch.tensor(mean, device=device)[:, None, None]
        self._std = 255 * torch.tensor(std, device=device)[:, None, None]
        self._device = torch.device(device)
        self._dtype = dtype
        self._threads = threads or usable_cores()
        self._copying: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def begin(self, pixels: Sequence[Pixels]) -> Callable[[], ImageFeatures]:
        """Start encoding n >= 1 images and return what gives their unit rows (n, d), float32.

        On CUDA the copy to the device and the computation go on by themselves, beside a batch that began earlier.
        Elsewhere what is returned computes.

        Raises:
            MemoryError: the device has none left; also by what is returned.
        """
        # One image needs no copy to become a batch.
        batch = torch.from_numpy(pixels[0][None] if len(pixels) == 1 else np.stack(pixels))
        if self._copying is None:
            return lambda: self._compute(batch)
        with out_of_memory_is_memory_error():
            return self._launch(batch, self._copying)

    def _compute(self, batch: torch.Tensor) -> ImageFeatures:
        use_threads(self._threads)
        with out_of_memory_is_memory_error(), torch.inference_mode():
            rows: ImageFeatures = self._forward(batch.to(self._device)).cpu().numpy()
            return rows

    def _launch(self, batch: torch.Tensor, copying: torch.cuda.Stream) -> Callable[[], ImageFeatures]:
        with torch.inference_mode(), torch.cuda.device(self._device):
            computing = torch.cuda.current_stream()
            with torch.cuda.stream(copying):
                there = batch.pin_memory().to(self._device, non_blocking=True)
            computing.wait_stream(copying)
            there.record_stream(computing)
            features = self._forward(there)
            here = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            here.copy_(features, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()

        def wait() -> ImageFeatures:
            with out_of_memory_is_memory_error():
                done.synchronize()
            rows: ImageFeatures = here.numpy()
            return rows

        return wait

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        # Height, width, channels, seen as channels first: what convolutions know as channels last.
        normalised = (batch.permute(0, 3, 1, 2).float() - self._mean) / self._std
        return torch.nn.functional.normalize(self._encode(normalised.to(self._dtype)).float(), dim=-1)


_thread = threading.local()


def use_threads(count: int) -> None:
    """Let the calling thread compute on ``count`` cores from now on; setting it again would empty torch's caches."""
    if getattr(_thread, "count", None) != count:
        torch.set_num_threads(count)
        _thread.count = count


@contextmanager
def out_of_memory_is_memory_error() -> Iterator[None]:
    """Raise the built-in error, which code that knows no torch can tell from others; free torch's reserve."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise MemoryError(str(error)) from error
