"""Messages between processes: the properties of a model, encoded items, and errors."""

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
    """The replica has disappeared, or there is none; a retry may reach another one."""


class WeightsMismatchError(ReplicaUnavailableError):
    """The replica has other weights of the model; another one may have the expected weights."""


class RemoteEncoderError(Exception):
    """A remote encoder raised an error; the message contains its type and text."""


@dataclass(slots=True)
class RemoteModelInfo:
    """The properties of a remote model that an edge needs; implements ``app.encoders._base.ModelInfo``.

    Args:
        image_fingerprint: of the weights of the image tower.
        text_fingerprint: of the weights of the text tower.
        version: of the deployment that loaded the model; see ``deployment_version``.
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
        """Return the properties of a loaded encoder; computing the fingerprints may take seconds."""
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
    """An error in a form that can be sent to another process, which is not certain for exceptions.

    ``kind`` is ``overloaded``, ``deadline``, ``weights-mismatch``, ``not-ready`` for every other ``DeixisError``, or
    ``fault``.
    """

    kind: str
    message: str
    retry_after_s: int = 1

    @classmethod
    def from_exception(cls, error: BaseException) -> Self:
        """Return the form of an exception."""
        match error:
            case OverloadedError():
                return cls("overloaded", error.message, error.retry_after_s)
            case DeadlineExceededError():
                return cls("deadline", error.message)
            case WeightsMismatchError():
                return cls("weights-mismatch", str(error))
            case DeixisError():
                return cls("not-ready", error.message)
            case _:
                return cls("fault", f"{type(error).__name__}: {error}")

    def to_exception(self) -> Exception:
        """Return the exception."""
        match self.kind:
            case "overloaded":
                return OverloadedError(self.message, self.retry_after_s)
            case "deadline":
                return DeadlineExceededError(self.message)
            case "weights-mismatch":
                return WeightsMismatchError(self.message)
            case "not-ready":
                return NotReadyError(self.message)
            case _:
                return RemoteEncoderError(self.message)


@dataclass(frozen=True, slots=True)
class EncodeResponse:
    """The outcomes of n items.

    Args:
        rows: one unit row for each item (n, d); zeros for items that failed.
        failures: by the position of the item.
        queue_s: waiting time of each item in the replica, until its batch started (n,).
        encode_s: duration of its batch (n,).
    """

    rows: Float32[np.ndarray, "n d"]
    failures: Mapping[int, SerializedError]
    queue_s: Sequence[float]
    encode_s: Sequence[float]


def deployment_version(settings: Settings) -> str:
    """Return an identifier that replicas share if and only if they were deployed together."""
    return sha256(f"{__version__} {settings.model_dump_json()}".encode()).hexdigest()[:16]
