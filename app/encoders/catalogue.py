"""The catalogue of known encoders: one TOML file per model."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import ConfigurationError

Text = Annotated[str, Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https://\S+$")]


class ModelCard(BaseModel):
    """The properties of a pretrained encoder that are known without loading it.

    The accuracy is the one reported by ``imagenet_source``. ``commercial_use`` refers to the licence of the weights.
    ``params_millions`` counts both towers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[\w.+-]+/[\w.+-]+$")]
    """``architecture/tag`` of OpenCLIP, as in the settings."""
    title: Text
    family: Text
    year: Annotated[int, Field(ge=2021)]
    paper: Url

    licence: Text
    licence_url: Url
    commercial_use: bool
    licence_note: str = ""

    embed_dim: Annotated[int, Field(gt=0)]
    image_size_px: Annotated[int, Field(gt=0)]
    params_millions: Annotated[float, Field(gt=0)]
    probability: Literal["softmax", "sigmoid"]
    languages: Literal["English", "multilingual"]
    training_data: Text

    imagenet_zero_shot_top1: Annotated[float, Field(gt=0, le=100)] | None = None
    """Percent."""
    imagenet_source: Text | None = None

    notes: Text

    @property
    def architecture(self) -> str:
        """The name of OpenCLIP's model configuration."""
        return self.name.split("/")[0]

    @property
    def pretrained(self) -> str:
        """OpenCLIP's tag for the weights."""
        return self.name.split("/")[1]

    @property
    def float32_bytes(self) -> int:
        """Size of the weights in single precision, on disk and in memory."""
        return round(self.params_millions * 1_000_000) * 4

    @model_validator(mode="after")
    def _check_accuracy_has_source(self) -> Self:
        if (self.imagenet_zero_shot_top1 is None) != (self.imagenet_source is None):
            raise ValueError("imagenet_zero_shot_top1 and imagenet_source require each other: give both or neither")
        return self


def load_catalogue(folder: Path) -> dict[str, ModelCard]:
    """Return the model cards in a folder's ``*.toml`` files by model name, in the order of the file names.

    Raises:
        ConfigurationError: the folder does not exist, a file is not TOML or has missing, unknown or invalid keys (all
            of them are listed), or two files have the same model name.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"the folder of model cards '{folder}' does not exist; reinstall deixis")
    cards: dict[str, ModelCard] = {}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.toml")):
        card = _read_card(file)
        if card.name in cards:
            raise ConfigurationError(f"{file}: name: '{card.name}' is also in {files[card.name].name}; keep one")
        cards[card.name] = card
        files[card.name] = file
    return cards


def _read_card(file: Path) -> ModelCard:
    try:
        fields: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not a TOML file: {error}") from error
    try:
        return ModelCard.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem["loc"] else problem["msg"]
            for problem in error.errors(include_url=False)
        )
        raise ConfigurationError(f"{file}: {problems}") from error
