"""Loads models for `deixis models download` and `deixis models tune`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from app.cli.common import err, report_errors
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import export_model, load_encoder
from app.encoders.model_names import catalogue_name
from app.main import load_options
from app.observability.logs import configure_logs
from app.settings import load_settings


def download(name: str) -> Encoder:
    """Download the weights of a model, and load it."""
    configure_logs("console", "info")  # with the progress of the download
    with report_errors():
        settings = load_settings()
        return load_encoder(
            catalogue_name(name), LoadOptions(device="cpu", weights_dir=settings.model_cache_dir, backend="torch")
        )


def export(name: str) -> Path:
    """Export a model with the settings of this process, and return the folder of its export."""
    configure_logs("console", "info")
    with report_errors():
        return export_model(catalogue_name(name), load_options(load_settings()))


def tune(name: str | None, seconds: float) -> Iterator[Encoder]:
    """Measure a model, or each model of the settings, and yield it with its measurement."""
    configure_logs("console", "warning")
    with report_errors():
        settings = load_settings()
        options = replace(load_options(settings), tuning_seconds=seconds, measure_again=True)
        for model in settings.models if name is None else [catalogue_name(name)]:
            with err.status(f"Measuring {model}, about {seconds:g} s"):
                encoder = load_encoder(model, options)
            yield encoder
