"""`deixis models ...`: the catalogue of recommended models, and their weights."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from app.cli.common import make_table, out, report_errors
from app.encoders.catalogue import ModelCard, load_catalogue
from app.encoders.model_names import catalogue_name
from app.errors import UnknownNameError
from app.runtime.data_files import resources

if TYPE_CHECKING:
    from app.encoders._base import Encoder, Tuning
    from app.encoders.quantization import Int8Trial

models_cli = typer.Typer(no_args_is_help=True)


@models_cli.command("list")
def list_models() -> None:
    """List the recommended models. All other models of open_clip can be served as well."""
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
    out.print(make_table(columns, rows, right=columns[1:6]))


@models_cli.command("show")
def show_model(name: Annotated[str, typer.Argument(help="A name of `deixis models list`.")]) -> None:
    """Show the model card of a recommended model, with sources."""
    with report_errors():
        catalogue, name = _catalogue(), catalogue_name(name)
        if name not in catalogue:
            raise UnknownNameError("model", name, catalogue, "other models of open_clip can be served but have no card")
    rows = [(key, str(value)) for key, value in catalogue[name].model_dump(exclude_none=True).items()]
    out.print(make_table(("", ""), rows))


@models_cli.command("download")
def download_model(
    name: Annotated[str, typer.Argument(help="architecture/tag or hf-hub:org/repo.")],
) -> None:
    """Download the weights of a model into the cache and load them once, so that `serve` starts without a network."""
    from app.cli.model_loading import download  # noqa: PLC0415 - the encoders

    encoder = download(name)
    out.print(
        f"{escape(name)} is cached and loads: {encoder.embed_dim} dimensions, {encoder.image_size_px} px",
        highlight=False,
    )


@models_cli.command("export")
def export_command(
    name: Annotated[str, typer.Argument(help="A name as in DEIXIS_MODELS.")],
) -> None:
    """Export a model, so that it is served on a CPU without PyTorch and starts faster.

    `serve` exports a model when it loads it for the first time. This command does so in advance, for a container image
    or for another machine, and replaces an older export. The folder is `exports` in DEIXIS_MODEL_CACHE_DIR, or in the
    data folder.
    """
    from app.cli.model_loading import export  # noqa: PLC0415 - the encoders

    folder = export(name)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    out.print(f"{escape(name)} is exported to {escape(str(folder))}: {size_mb:.0f} MB", highlight=False)


@models_cli.command("tune")
def tune_model(
    name: Annotated[
        str | None, typer.Argument(help="A name as in DEIXIS_MODELS; by default all models of DEIXIS_MODELS.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Approximate time per model.")] = 60,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Also try int8, with at least 300 images of this folder like those to be classified; needs the extra"
            " quantization."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="With --calibration: labels whose predictions are compared, comma separated; by default 100 names of"
            " everyday things."
        ),
    ] = None,
) -> None:
    """Measure the fastest configuration of a model on this machine, and store it for `serve` and all other commands.

    `serve` makes a shorter measurement when it loads a model for the first time.

    With --calibration, the image tower is also quantised to int8. It is used from then on if it is clearly faster, and
    if at least 99.5 % of its predictions on two thirds of the images are those of single precision. The precisions fp32
    and bf16 of the setting DEIXIS_PRECISION ignore it.
    """
    from app.cli.model_loading import tune, tune_int8  # noqa: PLC0415 - the encoders

    if labels is not None and calibration is None:
        raise typer.BadParameter("only --calibration compares predictions of labels; give both, or neither")
    if calibration is not None:
        for encoder, trial in tune_int8(name, seconds, calibration, labels):
            _write_tuning(encoder)
            _write_int8(trial)
        return
    for encoder in tune(name, seconds):
        _write_tuning(encoder)


def _write_int8(trial: "Int8Trial") -> None:
    same = round(trial.agreement * trial.held_out_images)
    speed = "" if trial.speed_up is None else f"; {trial.speed_up:.2f} times as fast as the best of the table"
    verdict = "accepted, and used from the next start on" if trial.refused is None else f"not used: {trial.refused}"
    out.print(
        f"int8, calibrated with {trial.calibration_images} images: {same} of {trial.held_out_images} predictions of"
        f" {trial.labels} labels are the same ({trial.agreement:.2%}), lowest cosine {trial.min_cosine:.4f}{speed};"
        f" {verdict}\n",
        highlight=False,
    )


def _write_tuning(encoder: "Encoder") -> None:
    path, tuning = encoder.image_path, encoder.tuning
    assert tuning is not None
    columns = (
        "back end",
        "precision",
        "threads",
        "batch",
        "images/s",
        "lowest",
        "highest",
        "ratio",
        "cosine",
        "verdict",
    )
    out.print(f"[bold]{escape(encoder.name)}[/bold] on {tuning.device}", highlight=False)
    out.print(make_table(columns, _rows(tuning), right=columns[2:-1]))
    best = f"{path.backend} {path.precision}, {path.batch_size} images in a batch"
    if tuning.provisional:
        out.print(
            f"best so far: {best}; provisional, because other processes used {tuning.cpu_by_others:.0%} of the CPU; run"
            " the command again while the machine is idle\n",
            highlight=False,
        )
    else:
        out.print(f"best: {best}, {path.images_per_s} images/s; stored for the next start\n", highlight=False)


def _rows(tuning: "Tuning") -> Iterator[tuple[str, ...]]:
    """Yield a row for each candidate and batch size."""
    is_after_chosen = False
    for trial in tuning.trials:
        if trial.candidate == tuning.chosen:
            verdict, is_after_chosen = "chosen", True
        elif not trial.rates:
            verdict = trial.refused or "not measured"
        else:
            verdict = "not clearly faster" if is_after_chosen and (trial.ratio or 0) > 1 else "slower"
        for size, rates in (trial.rates or {0: ()}).items():
            yield (
                trial.candidate.backend,
                trial.candidate.precision,
                str(trial.candidate.threads or ""),
                *(
                    (str(size), f"{median(rates):.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}")
                    if rates
                    else ("", "", "", "")
                ),
                "" if trial.ratio is None else f"{trial.ratio:.2f}",
                "" if trial.min_cosine is None else f"{trial.min_cosine:.4f}",
                verdict,
            )


def _catalogue() -> dict[str, ModelCard]:
    with report_errors():
        return load_catalogue(resources("models"))
