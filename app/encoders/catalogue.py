"""The catalogue of known encoders: one TOML file per model, read strictly."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import ConfigurationError

Text = Annotated[str, Field(min_length=1)]
Url = Annotated[str, Field(pattern=r"^https://\S+$")]


class ModelCard(BaseModel):
    """What is known about one pretrained encoder without loading it.

    Accuracy is what its source reports, not what this service measured. ``commercial_use`` says what the licence of the
    weights permits; ``params_millions`` counts both towers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[\w.+-]+/[\w.+-]+$")]
    """``architecture/tag`` as OpenCLIP has them, and as the settings take it."""
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
        """Bytes that the weights take on disk and in memory in single precision."""
        return round(self.params_millions * 1_000_000) * 4

    @model_validator(mode="after")
    def _a_figure_has_a_source(self) -> Self:
        if (self.imagenet_zero_shot_top1 is None) != (self.imagenet_source is None):
            raise ValueError("imagenet_zero_shot_top1 and imagenet_source come together: give both or neither")
        return self


def load_catalogue(folder: Path) -> dict[str, ModelCard]:
    """Return the cards of every ``*.toml`` directly in a folder, by model name, in the order of the file names.

    Raises:
        ConfigurationError: no such folder, or a file that is not TOML, has a missing, unknown or wrong key, or names a
            model that another file names; every broken key of that file is listed.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"no folder of model cards at '{folder}'; it belongs to the installation")
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
