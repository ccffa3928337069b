"""From a model's name to a loaded encoder."""

import os

from app.encoders._base import Encoder, LoadOptions, model_source

_DEFAULTS = LoadOptions()


def load_encoder(spec: str, options: LoadOptions = _DEFAULTS) -> Encoder:
    """Load a model by name, in the calling thread; seconds to minutes.

    torch is imported here and not with this module, so that commands which need no model start at once.

    Args:
        spec: ``embedded``, ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``.
        options: the settings.

    Raises:
        ModelUnavailableError: with the reason and the way out.
    """
    source, _, _ = model_source(spec)
    _spin_briefly()
    from app.encoders.open_clip import load_open_clip  # noqa: PLC0415 - see the docstring

    if source == "embedded":
        from app.encoders.embedded import load_embedded  # noqa: PLC0415

        return load_embedded(options)
    return load_open_clip(spec, options)


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
