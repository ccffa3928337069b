"""Load an encoder by the name of its model."""

import os

import structlog

from app.encoders._base import Encoder, LoadOptions
from app.encoders.model_names import model_source
from app.errors import ModelUnavailableError

log = structlog.get_logger()

_DEFAULTS = LoadOptions()


def load_encoder(spec: str, options: LoadOptions = _DEFAULTS) -> Encoder:
    """Load a model in the calling thread; this takes seconds to minutes.

    The function imports torch, so that commands that need no model start without it.

    Args:
        spec: ``embedded``, ``architecture/tag``, ``hf-hub:org/repo`` or ``local-dir:path``.
        options: how to load it.

    Raises:
        ModelUnavailableError: the model cannot be loaded.
    """
    source, _, _ = model_source(spec)
    log.info("loading_model", model=spec)
    _limit_openmp_spinning()
    try:
        from app.encoders.open_clip import load_open_clip  # noqa: PLC0415 - see the docstring
    except (ImportError, OSError, MemoryError) as error:
        problem = f"PyTorch or OpenCLIP cannot be loaded: {error or type(error).__name__}"
        raise ModelUnavailableError(f"{problem}; give the process more memory, or install both again") from error

    if source == "embedded":
        from app.encoders.embedded import load_embedded  # noqa: PLC0415

        return load_embedded(options)
    return load_open_clip(spec, options)


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 ImageNet templates, from open_clip's own list."""
    from app.encoders.open_clip import imagenet_templates as read  # noqa: PLC0415 - imports torch

    return read()


def _limit_openmp_spinning() -> None:
    """Let idle OpenMP threads sleep early; torch reads the variable once, when it loads OpenMP.

    By default, idle threads spin for milliseconds while they wait for the next layer. This is slightly faster on an
    idle machine and much slower on a busy one, where spinning threads block threads that decode images and other
    processes.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
