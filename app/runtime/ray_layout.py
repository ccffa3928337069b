"""How many processes of each kind run on Ray, and what each of them needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.errors import did_you_mean

_REPLICAS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")


@dataclass(frozen=True, slots=True)
class Replicas:
    """A number of processes that do the same work; with ``min`` below ``max`` it follows the load."""

    min: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}" if self.min == self.max else f"{self.min}-{self.max}"


def parse_replicas(text: str) -> Replicas:
    """Return the replicas that ``2`` or ``1-8`` stands for.

    Raises:
        ValueError: the text has another form.
    """
    match = _REPLICAS.fullmatch(text.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        msg = f"'{text}' is not a number of replicas; write a number as 2, or a range as 1-8"
        raise ValueError(msg)
    return Replicas(int(match[1]), int(match[2] or match[1]))


def _to_replicas(value: object) -> object:
    return parse_replicas(str(value)) if isinstance(value, str | int) else value


_Replicas = Annotated[Replicas, BeforeValidator(_to_replicas)]


class RayLayout(BaseModel):
    """The deployments of the service on Ray.

    Args:
        edges: processes that accept requests and decode images.
        encoders: processes that encode, for each model; for all models together with ``models_per_encoder``.
        encoder_cpus: cores reserved for each encoder.
        encoder_gpus: GPUs reserved for each encoder.
        models_per_encoder: models that an encoder holds at once if encoders share all models; None gives each model
            encoders of its own.
        shards: parts that caption databases are searched in; 0 searches in the edges.
        shard_replicas: processes that search, for each part.
    """

    model_config = ConfigDict(frozen=True)

    edges: _Replicas = Replicas(1, 1)
    encoders: _Replicas = Replicas(1, 1)
    encoder_cpus: float = Field(1, gt=0)
    encoder_gpus: float = Field(0, ge=0)
    models_per_encoder: int | None = Field(None, ge=1)
    shards: int = Field(0, ge=0, le=1000)
    shard_replicas: _Replicas = Replicas(1, 1)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: object) -> object:
        for name in fields if isinstance(fields, Mapping) else ():
            if name not in cls.model_fields:
                known = cls.model_fields
                msg = f"unknown field '{name}'; known: {', '.join(known)}{did_you_mean(name, known)}"
                raise ValueError(msg)
        return fields

    def __str__(self) -> str:
        """Return the fields that differ from their defaults, in the form that ``parse_layout`` reads."""
        return ",".join(f"{name}={value}" for name, value in self if value != type(self).model_fields[name].default)


def parse_layout(text: str) -> Mapping[str, str]:
    """Return the fields of a layout written as ``edges=2,encoders=1-8``.

    Raises:
        ValueError: a part is not ``name=value``, or a name is repeated.
    """
    fields: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name in fields:
            msg = f"'{part}' {'repeats a field' if equals else 'is not name=value'}; write edges=2,encoders=1-8"
            raise ValueError(msg)
        fields[name] = value
    return fields
