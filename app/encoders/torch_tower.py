"""An image tower that torch runs on a CPU or an accelerator."""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from app.runtime.cpu import usable_cores
from app.types import ImageFeatures, Pixels


class TorchImageTower:
    """Copies images to the device as bytes and normalises them there; single precision would copy four times as much.

    Args:
        encode: maps normalised images (n, 3, h, w), channels last, to features (n, d).
        mean: of each channel, in [0, 1].
        std: of each channel.
        device: of the weights.
        dtype: of the weights.
        threads: CPU threads of a forward pass; None uses one per core.
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
        self._copy_stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def streams(self) -> int:
        """One: an accelerator, or all cores, work on one batch at a time."""
        return 1

    def begin(self, pixels: Sequence[Pixels], *, alone: bool = True) -> Callable[[], ImageFeatures]:  # noqa: ARG002
        """Start encoding n >= 1 images and return a function that returns their unit rows (n, d), float32.

        On CUDA, copying and computing are asynchronous, in parallel with an earlier batch. On other devices the
        returned function computes. ``alone`` changes nothing.

        Raises:
            MemoryError: the device is out of memory; the returned function may raise it too.
        """
        # A batch of one image is a view.
        batch = torch.from_numpy(pixels[0][None] if len(pixels) == 1 else np.stack(pixels))
        if self._copy_stream is None:
            return lambda: self._compute(batch)
        with out_of_memory_is_memory_error():
            return self._launch(batch, self._copy_stream)

    def _compute(self, batch: torch.Tensor) -> ImageFeatures:
        use_threads(self._threads)
        with out_of_memory_is_memory_error(), torch.inference_mode():
            rows: ImageFeatures = self._forward(batch.to(self._device)).cpu().numpy()
            return rows

    def _launch(self, batch: torch.Tensor, copy_stream: torch.cuda.Stream) -> Callable[[], ImageFeatures]:
        with torch.inference_mode(), torch.cuda.device(self._device):
            compute_stream = torch.cuda.current_stream()
            with torch.cuda.stream(copy_stream):
                on_device = batch.pin_memory().to(self._device, non_blocking=True)
            compute_stream.wait_stream(copy_stream)
            on_device.record_stream(compute_stream)
            features = self._forward(on_device)
            on_host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            on_host.copy_(features, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()

        def wait() -> ImageFeatures:
            with out_of_memory_is_memory_error():
                done.synchronize()
            rows: ImageFeatures = on_host.numpy()
            return rows

        return wait

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        # (n, h, w, 3) viewed as (n, 3, h, w) is the memory format channels last.
        normalised = (batch.permute(0, 3, 1, 2).float() - self._mean) / self._std
        return torch.nn.functional.normalize(self._encode(normalised.to(self._dtype)).float(), dim=-1)


def compiled(encode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function as torch compiles it at its first call: once for one image, and once for several.

    Only the number of images varies. If the height and the width could vary too, torch would simplify conditions on the
    sizes of each layer for many minutes.
    """
    run = torch.compile(encode)

    def encode_any_number(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            torch._dynamo.maybe_mark_dynamic(images, 0)  # noqa: SLF001 - documented
        return run(images)

    return encode_any_number


def fingerprint_of(weights: Iterable[tuple[str, torch.Tensor]], *others: object) -> str:
    """Return a hash of the weights, their names and ``others``; this takes about one second per gigabyte."""
    digest = hashlib.sha256(repr(others).encode())
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


_thread = threading.local()


def use_threads(count: int) -> None:
    """Limit torch to ``count`` cores in the calling thread; setting the same limit again would clear torch's caches."""
    if getattr(_thread, "count", None) != count:
        torch.set_num_threads(count)
        _thread.count = count


@contextmanager
def out_of_memory_is_memory_error() -> Iterator[None]:
    """Raise ``MemoryError`` for torch's errors, so that callers need no torch, and free torch's cached memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise MemoryError(str(error)) from error
