"""What goes from process to process: what a model is, what was encoded, what went wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Self

import numpy as np
from jaxtyping import Float32
from PIL import Image

from app import __version__
from app.encoders._base import Encoder, ImagePath, Tuning
from app.errors import DeadlineExceededError, DeixisError, NotReadyError, OverloadedError
from app.settings import Settings
from app.types import Pixels


class ReplicaUnavailableError(Exception):
    """The process that was asked has gone, or none is there; asking again may find another."""


class WeightsMismatchError(ReplicaUnavailableError):
    """The process that was asked has the model with other weights; another one may have these."""


class RemoteEncoderError(Exception):
    """An encoder elsewhere raised an error of its own; the message has its type and words."""


@dataclass(slots=True)
class RemoteModelInfo:
    """What an edge must know of a model whose towers are elsewhere: ``app.encoders._base.ModelInfo``.

    Args:
        image_fingerprint: what tells its image tower from every other.
        text_fingerprint: the same of its text tower.
        version: of the service that has loaded it.
    """

    name: str
    embed_dim: int
    image_size_px: int
    logit_scale: float
    logit_bias: float | None
    image_path: ImagePath
    tuning: Tuning | None
    transform: Callable[[Image.Image], Pixels]
    image_fingerprint: str
    text_fingerprint: str
    version: str = ""

    @classmethod
    def of(cls, encoder: Encoder, version: str = "") -> Self:
        """Return that of a loaded encoder; takes up to some seconds."""
        return cls(
            name=encoder.name,
            embed_dim=encoder.embed_dim,
            image_size_px=encoder.image_size_px,
            logit_scale=encoder.logit_scale,
            logit_bias=encoder.logit_bias,
            image_path=encoder.image_path,
            tuning=encoder.tuning,
            transform=encoder.transform,
            image_fingerprint=encoder.image_fingerprint(),
            text_fingerprint=encoder.text_fingerprint(),
            version=version,
        )


@dataclass(frozen=True, slots=True)
class SerializedError:
    """An error as it is told across processes, where an exception might not survive.

    ``kind`` is ``overloaded``, ``deadline``, ``other-weights``, ``not-ready`` for the rest of our own errors, or
    ``fault``.
    """

    kind: str
    message: str
    retry_after_s: int = 1

    @classmethod
    def from_exception(cls, error: BaseException) -> Self:
        """Return what tells an error."""
        match error:
            case OverloadedError():
                return cls("overloaded", error.message, error.retry_after_s)
            case DeadlineExceededError():
                return cls("deadline", error.message)
            case WeightsMismatchError():
                return cls("other-weights", str(error))
            case DeixisError():
                return cls("not-ready", error.message)
            case _:
                return cls("fault", f"{type(error).__name__}: {error}")

    def to_exception(self) -> Exception:
        """Return it as an exception again."""
        match self.kind:
            case "overloaded":
                return OverloadedError(self.message, self.retry_after_s)
            case "deadline":
                return DeadlineExceededError(self.message)
            case "other-weights":
                return WeightsMismatchError(self.message)
            case "not-ready":
                return NotReadyError(self.message)
            case _:
                return RemoteEncoderError(self.message)


@dataclass(frozen=True, slots=True)
class EncodeResponse:
    """What became of n items.

    Args:
        rows: the unit row of each (n, d); of one that failed nothing.
        failures: by the place of the item.
        queue_s: how long each waited there for its batch to begin (n,).
        encode_s: how long its batch then took (n,).
    """

    rows: Float32[np.ndarray, "n d"]
    failures: Mapping[int, SerializedError]
    queue_s: Sequence[float]
    encode_s: Sequence[float]


def deployment_version(settings: Settings) -> str:
    """Return what tells replicas that were deployed together from those before and after."""
    return sha256(f"{__version__} {settings.model_dump_json()}".encode()).hexdigest()[:16]
