"""`deixis models ...`: models that are known to be good, and their weights."""

from dataclasses import replace
from typing import Annotated

import typer
from rich.markup import escape

from app.cli.common import err, out, table_of, told_plainly
from app.encoders._base import Encoder, LoadOptions
from app.encoders.catalogue import ModelCard, load_catalogue
from app.encoders.loading import load_encoder
from app.errors import UnknownNameError
from app.main import load_options
from app.observability.logs import configure_logs
from app.runtime.data_files import resources
from app.settings import load_settings

models_cli = typer.Typer(help="Models that are known to be good, and their weights.", no_args_is_help=True)


@models_cli.command("list")
def list_models() -> None:
    """List models that are known to be good; any other that open_clip can load works as well."""
    rows = [
        (
            card.name,
            str(card.year),
            f"{card.params_millions:.0f}",
            str(card.image_size_px),
            str(card.embed_dim),
            "" if card.imagenet_zero_shot_top1 is None else f"{card.imagenet_zero_shot_top1:.1f}",
            card.licence,
        )
        for card in _catalogue().values()
    ]
    columns = ("DEIXIS_MODELS", "year", "M params", "px", "dim", "ImageNet top-1 %", "licence")
    out.print(table_of(columns, rows, right=columns[1:6]))


@models_cli.command("show")
def show_model(name: Annotated[str, typer.Argument(help="As `models list` shows it.")]) -> None:
    """Show all that is known of one model, with sources."""
    with told_plainly():
        catalogue = _catalogue()
        if name not in catalogue:
            raise UnknownNameError(
                "model", name, catalogue, "others that open_clip knows can be served but have no card"
            )
    rows = [(key, str(value)) for key, value in catalogue[name].model_dump(exclude_none=True).items()]
    out.print(table_of(("", ""), rows))


@models_cli.command("download")
def download_model(
    name: Annotated[str, typer.Argument(help="architecture/tag or hf-hub:org/repo.")],
) -> None:
    """Fetch a model's weights into the cache and load them once, so that `serve` will start without a network."""
    configure_logs("console", "warning")
    with told_plainly():
        settings = load_settings()
        encoder = load_encoder(name, LoadOptions(device="cpu", weights_dir=settings.model_cache_dir, backend="torch"))
    out.print(
        f"{escape(name)} is cached and loads: {encoder.embed_dim} dimensions, {encoder.image_size_px} px",
        highlight=False,
    )


@models_cli.command("tune")
def tune_model(
    name: Annotated[
        str | None, typer.Argument(help="As DEIXIS_MODELS has it; by default every model of the settings.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For each model, about.")] = 60,
) -> None:
    """Measure how a model runs best on this machine, and keep that for `serve` and every other command.

    `serve` does the same, in less time, when it first loads a model.
    """
    configure_logs("console", "warning")
    with told_plainly():
        settings = load_settings()
        options = replace(load_options(settings), tuning_seconds=seconds, measure_again=True)
        for model in settings.models if name is None else [name]:
            with err.status(f"Measuring {model}, about {seconds:g} s"):
                encoder = load_encoder(model, options)
            _write_tuning(encoder)


def _write_tuning(encoder: Encoder) -> None:
    path, tuning = encoder.image_path, encoder.tuning
    assert tuning is not None
    sizes = sorted({size for trial in tuning.trials for size in trial.images_per_s})
    rows = [
        (
            trial.candidate.backend,
            trial.candidate.precision,
            str(trial.candidate.threads or ""),
            "" if trial.min_cosine is None else f"{trial.min_cosine:.4f}",
            *(f"{trial.images_per_s[size]:.1f}" if size in trial.images_per_s else "" for size in sizes),
            trial.refused or "",
        )
        for trial in tuning.trials
    ]
    columns = ("back end", "precision", "threads", "cosine", *(f"images/s at {size}" for size in sizes), "refused")
    out.print(f"[bold]{escape(encoder.name)}[/bold] on {tuning.device}", highlight=False)
    out.print(table_of(columns, rows, right=columns[2:-1]))
    out.print(
        f"best: {path.backend} {path.precision}, {path.batch_size} images in a batch, {path.images_per_s} images/s;"
        " kept for the next start\n",
        highlight=False,
    )


def _catalogue() -> dict[str, ModelCard]:
    with told_plainly():
        return load_catalogue(resources("models"))
