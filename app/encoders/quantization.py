"""The image tower of an exported model in int8, calibrated with images of the user.

Rounding weights and activations to 8 bits changes features more than other precisions do, and by how much depends on
the model and on the images. Therefore a tower is quantised only with images, and is used only if it is clearly faster
and its predictions on other images are almost always those of single precision.

The tower lies in the folder of the export, with ``int8.json``, which is written last and names its files. Using it
needs OpenVINO alone; NNCF is needed to make it.
"""

import contextlib
import hashlib
import logging
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from app.encoders._base import ImageTower
from app.encoders.openvino_tower import compile_image_tower, import_openvino
from app.encoders.tuning import compare_towers, has_bf16_instructions, has_int8_instructions, is_installed
from app.errors import ModelUnavailableError
from app.runtime.atomic_files import sync, write_atomically
from app.runtime.checksums import sha256
from app.runtime.temporary_folders import temporary_folder
from app.types import ImageFeatures, Pixels, TextFeatures
from deixis.extras import needs_extra

MIN_AGREEMENT = 0.995
"""Lowest allowed share of the held-out images whose prediction is that of single precision."""

MIN_IMAGES = 300
"""A third calibrates. Of 200 others, one may have another prediction."""

MAX_CALIBRATION_IMAGES = 300
MAX_IMAGES = 1300

_MANIFEST, _PREFIX = "int8.json", "image-int8"
_BATCH = 8
# Operations of attention: NNCF quantises transformers in a way of their own.
_ATTENTION = frozenset({"ScaledDotProductAttention", "Softmax"})


class Int8Tower(BaseModel):
    """The content of ``int8.json``: a tower that was accepted, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    exported_weights: str
    """SHA-256 of the weights that were quantised."""

    image_fingerprint: str
    """Differs from that of the model, since stored features of both cannot be compared."""

    calibration_images: int
    held_out_images: int
    labels: int
    agreement: float
    speed_up: float
    precision: Literal["fp32", "bf16"]
    """Of the operations that are not quantised, wherever the tower runs."""

    int8_instructions: bool
    """Whether the CPU on which predictions were compared has them; without them, features differ."""

    tower: str
    """Name of its file."""

    checksums: dict[str, str]
    """SHA-256 of the files of the tower by name."""

    def check_cpu(self, model: str) -> None:
        """Raise ``ValueError`` if predictions were compared on a CPU that computes differently from this one."""
        differences = []
        if self.precision == "bf16" and not has_bf16_instructions():
            differences.append("with instructions for bf16")
        if self.int8_instructions != has_int8_instructions():
            differences.append(f"{'with' if self.int8_instructions else 'without'} instructions for int8")
        if differences:
            raise ValueError(
                f"its predictions were compared on a CPU {' and '.join(differences)}, unlike this one; run `deixis"
                f" models tune {model} --calibration FOLDER` here"
            )


@dataclass(frozen=True, slots=True)
class Int8Trial:
    """What was measured of a quantised tower.

    Args:
        calibration_images: number of images that it was calibrated with.
        held_out_images: number of other images.
        labels: number of labels that were predicted of.
        agreement: share of the held-out images with the prediction of single precision.
        min_cosine: lowest cosine of their features with those in single precision.
        speed_up: median of its rate divided by that of the fastest other tower; None if it was not compared.
        refused: why it is not used; None if it is.
    """

    calibration_images: int
    held_out_images: int
    labels: int
    agreement: float
    min_cosine: float
    speed_up: float | None
    refused: str | None


def check_can_quantise(images: int) -> None:
    """Check what can be checked before anything is computed.

    Raises:
        ModelUnavailableError: a package or images are missing.
    """
    if not is_installed("nncf"):
        raise ModelUnavailableError(needs_extra("quantising to int8", "quantization"))
    if images < MIN_IMAGES:
        raise ModelUnavailableError(
            f"the folder of --calibration has {images} readable images; at least {MIN_IMAGES} are needed, of which a"
            " third calibrates the model and the others check its predictions; add images like those to be classified"
        )


def quantise_tower(
    folder: Path,
    *,
    image_tower: str,
    fingerprint: str,
    pixels: Sequence[Pixels],
    texts: TextFeatures,
    best: ImageTower,
    seconds: float,
    quantise: Callable[[Any, Sequence[Pixels]], Any] | None = None,
) -> Int8Trial:
    """Quantise the image tower of an export, and keep it in the folder if it is accepted.

    It replaces an earlier one, which stays otherwise.

    Args:
        folder: of the export.
        image_tower: name of the file of its image tower.
        fingerprint: of the image tower.
        pixels: at least ``MIN_IMAGES`` images in random order.
        texts: unit rows (k, d), one for each label.
        best: the fastest other tower, which the new one is compared with.
        seconds: time for that comparison.
        quantise: returns the tower in int8; None uses NNCF.
    """
    ov = import_openvino()
    count = min(MAX_CALIBRATION_IMAGES, len(pixels) // 3)
    calibration, held_out = pixels[:count], pixels[count:]
    exported = folder / image_tower
    wanted = _features(compile_image_tower(exported, "fp32"), held_out)
    precision: Literal["fp32", "bf16"] = "bf16" if has_bf16_instructions() else "fp32"
    with temporary_folder(folder, ".int8-") as new:
        file = new / f"{_PREFIX}-{uuid.uuid4().hex[:8]}.xml"  # of no other tower, so that replacing one takes one step
        ov.save_model(
            (quantise or _quantise)(ov.Core().read_model(exported), calibration), file, compress_to_fp16=False
        )
        tower = compile_image_tower(file, precision)
        rows = _features(tower, held_out)
        agreement = float(((rows @ texts.T).argmax(axis=1) == (wanted @ texts.T).argmax(axis=1)).mean())
        speed_up, refused = None, None
        if agreement < MIN_AGREEMENT:
            refused = f"predictions differ from single precision; at least {MIN_AGREEMENT:.1%} must be the same"
        else:
            speed_up, refused = compare_towers(best, tower, held_out[:16], seconds=seconds)
        if refused is None:
            assert speed_up is not None
            parts = (file, file.with_suffix(".bin"))
            identity = repr((fingerprint, [sha256(part) for part in parts], precision, has_int8_instructions()))
            accepted = Int8Tower(
                exported_weights=sha256(exported.with_suffix(".bin")),
                image_fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
                calibration_images=len(calibration),
                held_out_images=len(held_out),
                labels=len(texts),
                agreement=agreement,
                speed_up=round(speed_up, 3),
                precision=precision,
                int8_instructions=has_int8_instructions(),
                tower=file.name,
                checksums={part.name: sha256(part) for part in parts},
            )
            for part in parts:
                sync(part)
                part.rename(folder / part.name)
            write_atomically(folder / _MANIFEST, accepted.model_dump_json(indent=2) + "\n")
            for old in folder.glob(f"{_PREFIX}*"):
                if old.name not in accepted.checksums:
                    with contextlib.suppress(OSError):  # Windows keeps files that a server uses
                        old.unlink()
        elif has_int8(folder):
            refused += "; the tower in int8 that was accepted before stays in use"
    return Int8Trial(
        calibration_images=len(calibration),
        held_out_images=len(held_out),
        labels=len(texts),
        agreement=agreement,
        min_cosine=float((rows * wanted).sum(axis=1).min()),
        speed_up=speed_up,
        refused=refused,
    )


def has_int8(folder: Path) -> bool:
    """Return whether an export has an accepted tower; its files may be damaged."""
    return (folder / _MANIFEST).is_file()


def read_int8(folder: Path, exported_weights: str) -> Int8Tower:
    """Return the accepted tower, whose files are as they were written.

    Args:
        folder: of the export.
        exported_weights: SHA-256 of the weights of its image tower.

    Raises:
        ValueError: the files are damaged, or belong to other weights.
        OSError: a file cannot be read.
    """
    accepted = Int8Tower.model_validate_json((folder / _MANIFEST).read_bytes())
    if accepted.exported_weights != exported_weights:
        raise ValueError("the weights of the model have changed")
    if any(Path(name).name != name for name in (accepted.tower, *accepted.checksums)):
        raise ValueError(f"{_MANIFEST} names a file of another folder")  # an export may come from somebody else
    for name, checksum in accepted.checksums.items():
        if sha256(folder / name) != checksum:
            raise ValueError(f"the checksum of {name} has changed")
    return accepted


def copy_int8(old: Path, new: Path, exported_weights: str) -> None:
    """Copy the accepted tower of an export to a new export, if there is one and the weights are the same."""
    try:
        accepted = read_int8(old, exported_weights)
    except (OSError, ValueError):
        return
    for name in (*accepted.checksums, _MANIFEST):
        shutil.copyfile(old / name, new / name)
        sync(new / name)


def _quantise(model: Any, calibration: Sequence[Pixels]) -> Any:
    """Return the tower with weights and activations in int8."""
    import_openvino()  # prevents its telemetry, which NNCF uses too
    import nncf  # noqa: PLC0415 - an optional dependency, which takes seconds

    nncf.set_log_level(logging.ERROR)
    is_transformer = any(each.get_type_name() in _ATTENTION for each in model.get_ops())
    with contextlib.redirect_stdout(sys.stderr):  # progress bars
        return nncf.quantize(
            model,
            nncf.Dataset([each[None] for each in calibration]),
            subset_size=len(calibration),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        )


def _features(tower: ImageTower, pixels: Sequence[Pixels]) -> ImageFeatures:
    return np.concatenate(
        [tower.begin(pixels[first : first + _BATCH])() for first in range(0, len(pixels), _BATCH)], axis=0
    )
