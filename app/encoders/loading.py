"""From a model's name to a loaded encoder."""

import os
from pathlib import Path

from app.encoders._base import Encoder, model_source


def load_encoder(spec: str, *, device: str, precision: str, cache_dir: Path | None) -> Encoder:
    """Load a model by name, in the calling thread; seconds to minutes.

    torch is imported here and not with this module, so that commands which need no model start at once.

    Raises:
        ModelUnavailableError: with the reason and the way out.
    """
    source, _, _ = model_source(spec)
    _spin_briefly()
    from app.encoders.open_clip import load_open_clip, pick_device  # noqa: PLC0415 - see the docstring

    picked = pick_device(device)
    if source == "embedded":
        from app.encoders.embedded import load_embedded  # noqa: PLC0415

        return load_embedded(picked)
    return load_open_clip(spec, device=picked, precision=precision, cache_dir=cache_dir)


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates, from open_clip's own list."""
    from app.encoders.open_clip import imagenet_templates as read  # noqa: PLC0415 - imports torch

    return read()


def _spin_briefly() -> None:
    """Let OpenMP's idle threads sleep soon; read once, when torch loads it.

    By default they spin for milliseconds in wait of the next layer. That gains a little on an idle machine, and costs
    all speed on a busy one: a thread that decodes a picture, or a neighbour's process, waits behind threads that do
    nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
