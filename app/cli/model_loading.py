"""Loads models for `deixis models download` and `deixis models tune`."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from app.captions.everyday import everyday_names
from app.cli.common import report_errors, status, warn
from app.encoders._base import Encoder, LoadOptions
from app.encoders.loading import check_takes_int8, export_model, load_encoder, quantise_model
from app.encoders.model_names import catalogue_name
from app.encoders.quantization import MAX_IMAGES, Int8Trial, check_can_quantise
from app.errors import DeixisError, InvalidFieldError
from app.images.decode import decode_image
from app.images.discovery import find_images
from app.main import load_options
from app.names.labels import split_labels
from app.observability.logs import configure_logs
from app.settings import Settings, load_settings
from app.types import Pixels

# Names of everyday things whose predictions are compared by default.
_LABELS = 100


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
            with status(f"Measuring {model}, about {seconds:g} s"):
                encoder = load_encoder(model, options)
            yield encoder


def tune_int8(
    name: str | None, seconds: float, calibration: Path, labels: str | None
) -> Iterator[tuple[Encoder, Int8Trial]]:
    """Measure each model as ``tune`` does, then its image tower in int8, and yield it with both measurements."""
    configure_logs("console", "warning")
    with report_errors():
        settings = load_settings()
        options = replace(load_options(settings), tuning_seconds=seconds, measure_again=True)
        files = find_images([calibration])
        random.Random(0).shuffle(files)  # noqa: S311 - a mixture of all folders
        check_can_quantise(len(files))
        names = _distinct_labels(labels)
        for model in settings.models if name is None else [catalogue_name(name)]:
            check_takes_int8(model, options)
            others = replace(options, precision="auto", ignore_int8=True)
            with status(f"Measuring {model}, about {seconds:g} s"):
                encoder = load_encoder(model, others)
            with status(f"Quantising {model}"):
                pixels = _read(files[:MAX_IMAGES], encoder, settings)
                check_can_quantise(len(pixels))
                trial = quantise_model(model, others, encoder, pixels=pixels, labels=names, seconds=seconds)
            yield encoder, trial


def _distinct_labels(text: str | None) -> Sequence[str]:
    if text is None:
        return everyday_names()[:_LABELS]
    labels = list(dict.fromkeys(label for each in split_labels(text) if (label := each.strip())))
    if len(labels) < 2:
        raise InvalidFieldError.of("labels", f"'{text}' has {len(labels)} labels; predictions need at least 2")
    return labels


def _read(files: Sequence[Path], encoder: Encoder, settings: Settings) -> list[Pixels]:
    """Return the images that can be read, as the model takes them."""
    pixels = []
    for file in files:
        try:
            image = decode_image(
                file.read_bytes(),
                max_bytes=settings.max_image_bytes,
                max_pixels=settings.max_image_pixels,
                target_px=encoder.image_size_px,
            )
        except (DeixisError, OSError) as error:
            warn("skipped", f"{file}: {error}")
            continue
        pixels.append(encoder.transform(image))
    return pixels
